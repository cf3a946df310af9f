from collections.abc import Callable
from typing import Any

import numpy as np

from clients.shadow import inside
from clients.workspace import open_workspace
from fedllm_flwr.core import whole_json

Fixture = Callable[..., Any]


def test_two_models_have_complementary_halves_and_other_pairs_other_ones() -> None:
    halves = [inside(21, 3, shadow, 0) for shadow in range(8)]
    for even, odd in zip(halves[::2], halves[1::2], strict=True):
        assert (even ^ odd).all()
        assert even.sum() == 11
    assert len({half.tobytes() for half in halves}) == 8
    assert (np.stack(halves).sum(0) == 4).all(), "each row is in half of the models"
    assert (inside(21, 3, 0, 0) != inside(21, 2, 0, 0)).any()
    assert (inside(21, 3, 0, 0) != inside(21, 3, 0, 1)).any()


def test_a_shadow_models_client_trains_on_half_of_all_its_rows_and_nobody_else_changes(
    micro: Fixture,
) -> None:
    def clients(*overrides: str) -> Any:
        return open_workspace(whole_json(micro(*overrides))).clients

    plain = clients()
    one, two = (
        clients("unlearning.shadowed=1", f"unlearning.shadow={number}", "seed=5", "data_seed=0")
        for number in (0, 1)
    )
    own = plain[1]
    every = (*own.train, *own.validation, *own.test)
    assert set(one[1].train) | set(two[1].train) == set(every)
    assert not set(one[1].train) & set(two[1].train)
    assert any(row in own.test for row in one[1].train)
    assert one[1].test == own.test
    for p in (0, 2, 3):
        assert one[p] == plain[p] or one[p].train == plain[p].train
