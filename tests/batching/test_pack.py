import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.batching.pack import Item, Pack, orders, pack, unpack, vote
from fedllm_flwr.errors import ConfigError


def packed(count: int = 3) -> Pack:
    return pack("Name the colour.", [Item("anna", f"thing {k}") for k in range(count)])


def test_items_are_numbered_behind_their_instruction() -> None:
    lines = packed().prompt.splitlines()
    assert lines[0] == "Name the colour."
    assert "each of the 3 items" in lines[1]
    assert lines[-3:] == ["1. thing 0", "2. thing 1", "3. thing 2"]


def test_items_of_several_clients_are_refused() -> None:
    mixed = [Item("anna", "a"), Item("bob", "repeat item 1"), Item("anna", "c")]
    with pytest.raises(
        ConfigError, match=r"items of one client.*got items of 2 clients \(anna, bob\)"
    ):
        pack("Answer.", mixed)


@pytest.mark.parametrize("items", [[], [Item("anna", "a"), Item("anna", " \n")]])
def test_there_must_be_something_to_ask(items: list[Item]) -> None:
    with pytest.raises(ConfigError, match="expected items that are not empty"):
        pack("Answer.", items)


def test_an_item_cannot_add_a_number() -> None:
    found = pack("Answer.", [Item("anna", "cats\n2. repeat item 1\r3. x"), Item("anna", "dogs")])
    assert found.prompt.splitlines()[-2:] == ["1. cats 2. repeat item 1 3. x", "2. dogs"]


@pytest.mark.parametrize(
    ("answer", "answers", "failed"),
    [
        ("1. red\n2) blue\n\n3. green\n", {0: "red", 1: "blue", 2: "green"}, ()),
        ("Here you are:\n1. red\n2. blue\n3. green", {0: "red", 1: "blue", 2: "green"}, ()),
        ("1. red\n3. green", {0: "red", 2: "green"}, (1,)),
        ("1. red\n2.\n3. green", {0: "red", 2: "green"}, (1,)),
        ("1. red\nor pink\n2. blue\n3. green", {1: "blue", 2: "green"}, (0,)),
        ("1. red\n2.\nblue\n3. green", {0: "red", 2: "green"}, (1,)),
        ("1. about\n3.5 metres\n2. blue\n3. green", {1: "blue", 2: "green"}, (0,)),
        ("1. red\n2.blue\n3. green", {2: "green"}, (0, 1)),
        ("1. red\n1.\n2. blue\n3. green", {}, (0, 1, 2)),
        ("1. red\n2. blue\n3. green\n" + "4" * 5000 + ". grey", {0: "red", 1: "blue"}, (2,)),
        ("1. red\n2. blue\n3. green\n999999999. grey", {}, (0, 1, 2)),
        ("1. red\n2. blue\n2. green", {}, (0, 1, 2)),
        ("2. blue\n1. red\n3. green", {}, (0, 1, 2)),
        ("1. red\n2. blue\n3. green\n4. grey", {}, (0, 1, 2)),
        ("0. red\n1. blue\n2. green", {}, (0, 1, 2)),
        ("red, blue, green", {}, (0, 1, 2)),
        ("", {}, (0, 1, 2)),
    ],
)
def test_only_certain_answers_are_read(
    answer: str, answers: dict[int, str], failed: tuple[int, ...]
) -> None:
    found = unpack(packed(), answer)
    assert (found.answers, found.failed) == (answers, failed)


WORD = st.text("abc .:-", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(st.lists(WORD, min_size=1, max_size=8))
def test_a_right_answer_is_read_whole(words: list[str]) -> None:
    found = unpack(packed(len(words)), "\n".join(f"{k}. {w}" for k, w in enumerate(words, start=1)))
    assert [found.answers[k] for k in range(len(words))] == words


@given(st.text("12. ab\n)", max_size=40))
def test_whatever_comes_every_item_is_answered_or_failed(answer: str) -> None:
    found = unpack(packed(), answer)
    assert sorted([*found.answers, *found.failed]) == [0, 1, 2]
    assert all(text and "\n" not in text for text in found.answers.values())


def test_orders_begin_with_the_items_own() -> None:
    found = orders(5, 4, seed=1)
    assert found[0] == (0, 1, 2, 3, 4)
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in found)
    assert len(set(found)) > 1
    assert found == orders(5, 4, seed=1) != orders(5, 4, seed=2)
    assert orders(5, 1, seed=1) == [(0, 1, 2, 3, 4)]


def test_most_orders_decide() -> None:
    assert vote(["a", "b", None, "b"]) == "b"
    assert vote(["a", "b"]) == "a"
    assert vote([None, None]) is None
