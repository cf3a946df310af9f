from dataclasses import dataclass
from typing import Any, Literal

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.tree import from_tree, require


@dataclass(frozen=True, kw_only=True)
class Cat:
    name: Literal["cat"]
    lives: int = 9


@dataclass(frozen=True, kw_only=True)
class Dog:
    name: Literal["dog"]
    tricks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class House:
    pet: Cat | Dog
    size: float
    note: str | None = None


def test_a_tree_becomes_dataclasses_and_lists_become_tuples() -> None:
    found = from_tree(House, {"pet": {"name": "dog", "tricks": ["sit"]}, "size": 3}, "house")
    assert found == House(pet=Dog(name="dog", tricks=("sit",)), size=3.0)
    assert isinstance(found.size, float)


def test_a_union_takes_the_member_that_the_name_says() -> None:
    assert from_tree(House, {"pet": {"name": "cat"}, "size": 1.0}, "").pet == Cat(name="cat")


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"pet": {"name": "cow"}, "size": 1.0}, r"house\.pet\.name: expected one of \['cat', 'dog'\], got 'cow'"),
        ({"pet": {"name": "cat", "tricks": []}, "size": 1.0}, r"pet: unknown key 'tricks'; known keys: name, lives"),
        ({"pet": 3, "size": 1.0}, r"house\.pet: expected a mapping, got 3"),
        ({"pet": {"name": "cat"}}, "house: missing size"),
        ({"pet": {"name": "cat"}, "size": "big"}, r"house\.size: expected float, got 'big'"),
        ({"pet": {"name": "cat", "lives": True}, "size": 1.0}, r"house\.pet\.lives: expected int, got True"),
        ({"pet": {"name": "cat"}, "size": float("nan")}, r"house\.size: expected float, got nan"),
        ({"pet": {"name": "dog", "tricks": "sit"}, "size": 1.0}, r"house\.pet\.tricks: expected a list, got 'sit'"),
        ([], r"house: expected a mapping, got \[\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tree: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_tree(House, tree, "house")


def test_require() -> None:
    require(True, "never seen")
    with pytest.raises(ConfigError, match=r"^said$"):
        require(False, "said")


def test_an_integer_that_no_float_holds_is_refused() -> None:
    @dataclass(frozen=True)
    class Rate:
        rate: float

    assert from_tree(Rate, {"rate": 3}, "") == Rate(3.0)
    with pytest.raises(ConfigError, match="rate: expected float, got an integer beyond its range"):
        from_tree(Rate, {"rate": 10**400}, "")


def test_nothing_is_no_member_of_a_union_that_does_not_allow_it() -> None:
    @dataclass(frozen=True)
    class Holder:
        pet: Cat | None
        other: Cat | Dog

    dog = {"name": "dog"}
    assert from_tree(Holder, {"pet": None, "other": dog}, "").pet is None
    with pytest.raises(ConfigError, match="other: expected a mapping, got None"):
        from_tree(Holder, {"pet": None, "other": None}, "")
