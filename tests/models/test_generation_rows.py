from typing import SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.models.generation_rows import Row, Sample, find_stop, settled
from fedllm_flwr.models.generation_sampling import Sampling
from fedllm_flwr.models.tiny import tiny_tokenizer

END = 1


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one two", ("!",), "one two"),
        ("one two.", (".\n",), "one two"),
        ("one two##", ("###", "x"), "one two"),
        ("caf\ufffd", (), "caf"),
        ("aab", ("abab", "ba"), "a"),
    ],
)
def test_what_may_still_become_a_stop_text_is_held_back(
    text: str, stop: tuple[str, ...], kept: str
) -> None:
    assert settled(text, stop) == kept


class Counted(str):
    """Counts how often a piece is cut out."""

    cuts = 0

    def __getitem__(self, place: SupportsIndex | slice) -> str:
        self.cuts += 1
        return super().__getitem__(place)


def test_a_long_stop_text_costs_no_more_than_the_answer_is_long() -> None:
    stop = Counted("ab" * 500)
    assert settled("xxab", (stop,)) == "xx"
    assert stop.cuts <= 4


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_what_is_settled_is_never_taken_back(text: str, stop: list[str]) -> None:
    found = find_stop(text, stop)
    final = text if found < 0 else text[:found]
    for size in range(len(text)):
        begun = text[:size]
        if find_stop(begun, stop) < 0:
            assert final.startswith(settled(begun, stop))


def grow(text: str, sampling: Sampling, *, end: bool = False) -> tuple[Sample, list[str]]:
    tokenizer, seen = tiny_tokenizer(), []

    def listener(query: int, sample: int, so_far: str) -> bool:
        assert (query, sample) == (4, 0)
        seen.append(so_far)
        return so_far != "give up"

    row = Row((4, 0), sampling, tokenizer, frozenset({END}), listener)
    for token in [*tokenizer(text)["input_ids"], *([END] if end else [])]:
        if row.finish is None:
            row.take(token)
    return row.sample(), seen


def test_an_answer_ends_at_the_end_token_a_stop_text_or_its_length() -> None:
    ended, seen = grow("yes", Sampling(50), end=True)
    assert (ended.text, ended.finish, seen[-1]) == ("yes", "stop", "yes")
    assert ended.output_tokens == len(ended.token_ids) + 1
    cut, seen = grow("one two;three", Sampling(50, stop=(" tw", ";")))
    assert (cut.text, cut.finish, seen[-1]) == ("one", "stop", "one")
    assert all(text in ("", "o", "on", "one") for text in seen)
    long, _ = grow("abcdefgh", Sampling(3))
    assert (len(long.token_ids), long.finish, long.output_tokens) == (3, "length", 3)


def test_a_listener_can_give_an_answer_up() -> None:
    dropped, seen = grow("give up the rest", Sampling(50))
    assert (dropped.finish, dropped.text, seen[-1]) == ("cancelled", "give up", "give up")


def test_a_character_of_several_bytes_comes_whole() -> None:
    _, seen = grow("né", Sampling(50))
    assert seen == ["n", "n", "né"]
