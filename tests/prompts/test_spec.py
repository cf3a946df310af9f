import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.prompts import PromptSpec, Segment

THREE = PromptSpec((Segment("personal", 2), Segment("cluster", 1), Segment("shared", 3)), "after")


def test_rows_by_hand() -> None:
    assert THREE.length == 6
    assert [THREE.rows(name) for name in ("personal", "cluster", "shared")] == [
        slice(0, 2),
        slice(2, 3),
        slice(3, 6),
    ]
    assert THREE.trained_rows().tolist() == [True] * 6
    assert THREE.trained_rows(("shared", "personal")).tolist() == [1, 1, 0, 1, 1, 1]
    assert THREE.dropout == 0


def test_split_by_hand() -> None:
    found = THREE.split(np.arange(12, dtype=np.float32))
    assert {name: values.tolist() for name, values in found.items()} == {
        "personal": [0, 1, 2, 3],
        "cluster": [4, 5],
        "shared": [6, 7, 8, 9, 10, 11],
    }
    assert list(found) == ["personal", "cluster", "shared"]


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    width=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
)
def test_join_is_the_inverse_of_split_in_any_order(
    lengths: list[int], width: int, order: random.Random
) -> None:
    spec = PromptSpec(tuple(Segment(f"s{k}", n) for k, n in enumerate(lengths)), "before")
    flat = np.random.default_rng(0).standard_normal(spec.length * width).astype(np.float32)
    parts = list(spec.split(flat).items())
    order.shuffle(parts)
    joined = spec.join(dict(parts))
    assert joined.dtype == np.float32
    assert np.array_equal(joined, flat)
    assert not np.shares_memory(joined, flat)
    assert not any(np.shares_memory(values, flat) for _, values in parts)
    covered = np.concatenate([np.arange(spec.length)[spec.rows(s.name)] for s in spec.segments])
    assert covered.tolist() == list(range(spec.length))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segment("a", 0), "prompt segment a: expected a length of at least 1, got 0"),
        (lambda: Segment("", 3), "expected a name"),
        (lambda: PromptSpec((), "after"), r"at least one, got \[\]"),
        (lambda: PromptSpec((Segment("a", 1), Segment("a", 2)), "after"), r"got \['a', 'a'\]"),
        (lambda: PromptSpec((Segment("a", 1),), "amid"), "before or after, got 'amid'"),
        (lambda: THREE.rows("own"), "'own': expected one of personal, cluster, shared"),
        (lambda: THREE.trained_rows(("shared", "own")), "'own': expected one of"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("shape", [(13,), (0,), (6, 2)])
def test_a_flat_prompt_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="flat prompt: expected 6 x width values, got shape"):
        THREE.split(np.zeros(shape))


def test_parts_that_do_not_fit_are_refused() -> None:
    parts = THREE.split(np.zeros(12))
    with pytest.raises(ShapeError, match=r"expected segments .* got \['personal', 'shared'\]"):
        THREE.join({name: values for name, values in parts.items() if name != "cluster"})
    with pytest.raises(ShapeError, match="prompt segment shared: expected 3 x width"):
        THREE.join({**parts, "shared": np.zeros(9)})
    with pytest.raises(ShapeError, match="prompt segment personal: expected 2 x width"):
        THREE.join({**parts, "personal": np.zeros(0)})
