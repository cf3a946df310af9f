"""Pairs of sentences that say the same, and pairs that say the opposite: what a similarity takes for agreement.

Written for this project. Each statement stands with a paraphrase and with a contradiction that changes one word or two.
"""

from collections.abc import Sequence
from typing import Any

from fedllm_flwr.cascade.semantic import Similarity

TRIPLES: tuple[tuple[str, str, str], ...] = (
    ("It is safe to drink the water.", "The water can be drunk safely.", "It is not safe to drink the water."),
    ("The council approved the new budget.", "The new budget was passed by the council.",
     "The council rejected the new budget."),
    ("Shares of the bank rose on Monday.", "On Monday the bank's stock went up.", "Shares of the bank fell on Monday."),
    ("The patient is allergic to penicillin.", "Penicillin causes an allergy in this patient.",
     "The patient is not allergic to penicillin."),
    ("The bridge will open before summer.", "The opening of the bridge comes ahead of summer.",
     "The bridge will not open before summer."),
    ("The minister confirmed the report.", "The report was confirmed by the minister.",
     "The minister denied the report."),
    ("All passengers survived the crash.", "Nobody on board was killed in the crash.",
     "No passengers survived the crash."),
    ("The medicine must be taken before meals.", "Take the medicine ahead of eating.",
     "The medicine must be taken after meals."),
    ("The team won the final.", "The final ended in a victory for the team.", "The team lost the final."),
    ("Exports increased last year.", "Last year saw a rise in exports.", "Exports decreased last year."),
    ("The suspect was found guilty.", "The court convicted the suspect.", "The suspect was found innocent."),
    ("The road to the airport is open.", "You can use the road to the airport.", "The road to the airport is closed."),
    ("The film is suitable for children.", "Children may watch the film.", "The film is unsuitable for children."),
    ("The vaccine reduces the risk of infection.", "Infection becomes less likely with the vaccine.",
     "The vaccine increases the risk of infection."),
    ("The strike ended on Friday.", "On Friday the walkout was over.", "The strike began on Friday."),
    ("The company hired two hundred people.", "Two hundred workers were taken on by the company.",
     "The company dismissed two hundred people."),
    ("The lake is deeper than the river.", "The river is less deep than the lake.",
     "The river is deeper than the lake."),
    ("She always locks the door.", "The door is locked by her every time.", "She never locks the door."),
    ("The law takes effect in May.", "From May on the law applies.", "The law expires in May."),
    ("The museum is free on Sundays.", "On Sundays there is no charge for the museum.",
     "The museum is not free on Sundays."),
)  # fmt: skip


def judged(similarity: Similarity, thetas: Sequence[float]) -> list[dict[str, Any]]:
    """How many paraphrases and how many contradictions pass each threshold.

    Args:
        similarity: Of texts.
        thetas: Least similarities.

    Returns:
        A row for each θ: ``paraphrases_accepted`` and ``contradictions_accepted`` as shares; the latter is the false
        accept rate.
    """
    texts = [text for triple in TRIPLES for text in triple]
    table = similarity.compare(texts)
    same = [float(table[3 * k, 3 * k + 1]) for k in range(len(TRIPLES))]
    opposite = [float(table[3 * k, 3 * k + 2]) for k in range(len(TRIPLES))]
    return [
        {
            "theta": theta,
            "paraphrases_accepted": sum(own >= theta for own in same) / len(same),
            "contradictions_accepted": sum(own >= theta for own in opposite) / len(opposite),
        }
        for theta in thetas
    ]
