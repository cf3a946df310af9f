import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.batching.decompose import Decomposition, Serial, decompose

SET: dict[str, Any] = json.loads(Path(__file__).with_name("decompose_prompts.json").read_text())


def false_rate(prompts: list[str]) -> float:
    """How many dependent prompts are taken apart."""
    return sum(isinstance(decompose(prompt), Decomposition) for prompt in prompts) / len(prompts)


def test_no_dependent_prompt_that_the_rules_know_is_taken_apart() -> None:
    assert len(SET["dependent"]) + len(SET["dependent_later"]) == 68
    assert false_rate(SET["dependent"] + SET["dependent_later"]) == 0


def test_of_hard_prompts_that_the_rules_were_not_made_for_few_are_taken_apart() -> None:
    """An honest figure: most of these hide the dependence in what they mean and not in a word."""
    assert len(SET["dependent_last"]) == 20
    assert false_rate(SET["dependent_last"]) <= 0.15


def test_of_fresh_hard_prompts_a_third_is_taken_apart() -> None:
    """The rate to expect where dependence is in the meaning: these were written when all rules were there."""
    assert len(SET["dependent_fresh"]) == 20
    assert false_rate(SET["dependent_fresh"]) <= 0.35
    whole = [
        e["prompt"] for e in SET["independent_fresh"] if isinstance(decompose(e["prompt"]), Serial)
    ]
    assert whole == []


def test_independent_prompts_are_taken_apart_into_their_parts() -> None:
    found = [(decompose(entry["prompt"]), entry["parts"]) for entry in SET["independent"]]
    apart = [(own, parts) for own, parts in found if isinstance(own, Decomposition)]
    assert len(apart) >= 0.9 * len(found)
    for own, parts in apart:
        assert (len(own.items) or own.count) == len(own.prompts()) == parts
        assert bool(own.items) != bool(own.count)


@pytest.mark.parametrize(
    ("prompt", "category", "confidence", "first", "last"),
    [
        ("Translate each of the following sentences into French:\n1. Hello.\n2. Good night.",
         "translation", "high", "Translate each of the following sentences into French:\nHello.",
         "Translate each of the following sentences into French:\nGood night."),
        ("Text: The Rhine rises in the Alps.\n\nAnswer the following questions:\n1. Where does the Rhine rise?\n"
         "2. What is a river?",
         "reading_comprehension", "high",
         "Text: The Rhine rises in the Alps.\n\nAnswer the following questions:\nWhere does the Rhine rise?",
         "Text: The Rhine rises in the Alps.\n\nAnswer the following questions:\nWhat is a river?"),
        ("Write three short stories about the sea.", "repeated_generation", "high",
         "Write one short story about the sea.", "Write one short story about the sea."),
        ("For each of Paris, London and Rome, describe the weather in July.", "novel", "medium",
         "For Paris, describe the weather in July.", "For Rome, describe the weather in July."),
        ("Classify the sentiment of each review:\n- I loved it.\n- It was cold.", "sentiment", "medium",
         "Classify the sentiment of each review:\nI loved it.", "Classify the sentiment of each review:\nIt was cold."),
        ("Extract the keywords of each text: solar power, cold water.", "keyword_extraction", "medium",
         "Extract the keywords of each text:\nsolar power", "Extract the keywords of each text:\ncold water"),
        ("Extract the named entities from each sentence:\n1. Ann saw Paris.\n2. Bob saw Rome.",
         "named_entity_recognition", "high", "Extract the named entities from each sentence:\nAnn saw Paris.",
         "Extract the named entities from each sentence:\nBob saw Rome."),
        ("Fix the spelling of each line:\n1. recieve\n2. seperate", "language_correction", "high",
         "Fix the spelling of each line:\nrecieve", "Fix the spelling of each line:\nseperate"),
    ],
)  # fmt: skip
def test_the_schema_of_each_category(
    prompt: str, category: str, confidence: str, first: str, last: str
) -> None:
    found = decompose(prompt)
    assert isinstance(found, Decomposition)
    assert (found.category, found.confidence) == (category, confidence)
    assert [found.prompts()[0], found.prompts()[-1]] == [first, last]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("Tell me about Rome.", "no parts are marked"),
        ("Answer the questions:\n1. What is tin?\n2. Where is it found?", "a part says 'it'"),
        ("Answer the questions:\n1. What is tin?\n2. Add the result of question 1.", "not all questions"),
        ("Translate each sentence, then rank them:\n1. A b.\n2. C d.", "the instruction says 'then'"),
        ("Define each term:\n1. tin\n3. lead", "not numbered from 1 upwards"),
        ("Define each term:\n1. tin\n2. lead\nThank you", "text stands between or after the parts"),
        ("Define {data}:\n1. tin\n2. lead", "it has the marks of a template"),
        ("Sing a song.\n\nDefine each term:\n1. tin\n2. lead", "may be a task of its own"),
        ("Übersetze jeden Satz:\n1. A.\n2. B.", "what is to be done is not known"),
        ("Define each term. Be funny overall:\n1. tin\n2. lead", "several sentences"),
        ("Define terms:\n1. tin\n2. lead", "nothing says that the parts are meant one by one"),
        ("Define each part of the engine: piston, valve.", "pieces of one thing: 'each part of the engine'"),
        ("Label each number as smaller or larger: 2, 7.", "the instruction says 'smaller or larger'"),
    ],
)  # fmt: skip
def test_a_prompt_that_stays_whole_says_why(prompt: str, reason: str) -> None:
    found = decompose(prompt)
    assert isinstance(found, Serial)
    assert reason in found.reason


MARKERS = (
    "Then use the above.",
    "Use the previous answer.",
    "Is it larger?",
    "Take the result of step 1.",
)


@pytest.mark.parametrize("marker", MARKERS)
@given(at=st.integers(0, 3))
def test_a_marker_in_any_part_keeps_the_prompt_whole(marker: str, at: int) -> None:
    parts = ["tin", "lead", "gold", "zinc"]
    parts[at] = marker
    listed = "\n".join(f"{k}. {part}" for k, part in enumerate(parts, start=1))
    assert isinstance(decompose(f"Define each term:\n{listed}"), Serial)


@given(st.text(max_size=80))
def test_any_text_has_an_outcome(prompt: str) -> None:
    found = decompose(prompt)
    assert isinstance(found, Serial | Decomposition)


@given(
    st.lists(
        st.sampled_from(["{data}", "tin", "lead", "{context}", "zinc"]), min_size=2, max_size=5
    )
)
def test_what_parts_say_is_never_taken_for_a_mark(parts: list[str]) -> None:
    found = Decomposition("Define:\n{data}", "", tuple(parts), 0, "novel", "high")
    assert found.prompts() == [f"Define:\n{part}" for part in parts]


def test_answers_are_joined_in_order() -> None:
    found = decompose("Define each term:\n1. tin\n2. lead")
    assert isinstance(found, Decomposition)
    assert found.join(["a metal", " heavy \n"]) == "1. a metal\n2. heavy"
    with pytest.raises(ValueError, match="expected 2 answers, got 1"):
        found.join(["a metal"])
