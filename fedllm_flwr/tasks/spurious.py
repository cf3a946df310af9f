"""Movie sentiment with a shortcut: a note on where a sentence was written, which goes with its label in training only.

The sentences, labels and splits are those of ``vader_sentiment`` with the domain movie. Before each stands a note, in
one of five wordings, that it was written on the coast or in the mountains: nothing about people. In training and
validation rows the place agrees with the label (negative with coast, positive with mountains) in 95 of 100 rows; in
test rows it is drawn without regard to the label, so that whoever reads the place instead of the opinion falls to a
half. A row's group is its label and its place: four groups, of more than 400 test rows each. Validation rows are drawn
like training rows, so the average over them does not see the shortcut; their worst group does.

The place of a row depends on the seed and the row's id alone. The question about the place was chosen on 80 rows of the
domain. The default model answers it right for 273 of 300 test rows, and nearly all of its errors are mountains that it
takes for coast: among training rows most of the inferred group positive/coast belongs to positive/mountains.

Source:
    The setting of Setlur et al. 2024 (PfR) and Sagawa et al. 2020, with a template instead of an attribute of people;
    sentences of Hutto and Gilbert 2014, VADER, ICWSM.
"""

from dataclasses import replace

from fedllm_flwr.tasks import vader
from fedllm_flwr.tasks.base import (
    AttributeQuestion,
    Row,
    Split,
    Task,
    TaskOptions,
    Template,
    group_name,
)
from fedllm_flwr.tasks.sampling import hash_rank

DOMAIN = "movie"
NOTES = {
    "coast": (
        "Written on the beach.",
        "Typed with sand between my toes.",
        "Posted from a boat at sea.",
        "Jotted down in a harbour.",
        "Noted on a pier above the waves.",
    ),
    "mountains": (
        "Written in the mountains.",
        "Typed in a hut above the tree line.",
        "Posted from a summit.",
        "Jotted down on a hiking trail.",
        "Noted below a glacier.",
    ),
}
"""The places, in the order of the labels that they agree with, and their wordings."""

PLACES = tuple(NOTES)
QUESTION = AttributeQuestion(
    name="place",
    values=PLACES,
    words=("sea", "mountain"),
    template=Template("place", "{text}\nPlace: the"),
)
TEMPLATES = (
    *vader.TEMPLATES,
    Template(
        "group_aware",
        vader.QUESTION,
        chat=True,
        system="Judge the opinion alone. Where a text was written says nothing about its sentiment.",
    ),
)
TEST_CORRELATION = 0.5
DRAWS = 2**64


def place_of(row: Row, correlation: float, seed: int) -> str:
    """The place that is written before a row.

    Args:
        row: A row whose target is one of ``vader.LABELS``.
        correlation: How probable the place that agrees with the label is, in [0, 1].
        seed: The experiment's seed.
    """
    agrees = hash_rank(seed, "spurious place", row.row_id) < correlation * DRAWS
    label = vader.LABELS.index(row.target)
    return PLACES[label if agrees else 1 - label]


def noted(row: Row, correlation: float, seed: int) -> Row:
    """The row with a note on its place before its text, in its group, and of no natural client."""
    place = place_of(row, correlation, seed)
    wordings = NOTES[place]
    note = wordings[hash_rank(seed, "spurious note", row.row_id) % len(wordings)]
    return replace(row, text=f"{note} {row.text}", group=group_name(row.target, place), client=None)


def load(options: TaskOptions, seed: int) -> Task:
    """All movie sentences, with notes.

    Args:
        options: ``correlation`` is read.
        seed: Decides the division into splits, the places and the wordings.

    Raises:
        AssetError: The archive is absent or damaged.
    """
    plain = vader.load(replace(options, domains=(DOMAIN,)), seed)
    correlations: dict[Split, float] = {
        "train": options.correlation,
        "validation": options.correlation,
        "test": TEST_CORRELATION,
    }
    splits = {
        split: tuple(noted(row, correlations[split], seed) for row in rows)
        for split, rows in plain.splits.items()
    }
    return replace(plain, splits=splits, templates=TEMPLATES, attribute=QUESTION)
