"""What every strategy promises, whatever its rule, its sharing or its server optimizer."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord

Fixture = Callable[..., Any]


def test_hosting_waves_and_order_of_replies_do_not_matter(
    loop_case: str, configured: Fixture, play: Fixture, undisturbed: Fixture, edge_grid: Fixture
) -> None:
    one_by_one = play(configured(loop_case, "runtime.num_nodes=1", "runtime.clients_per_wave=1"))
    assert one_by_one.sha == undisturbed(loop_case).sha
    backwards = edge_grid(4, lambda asked, replies: replies[::-1])
    assert (
        play(configured(loop_case, "runtime.num_nodes=4"), grid=backwards).sha
        == undisturbed(loop_case).sha
    )


@pytest.mark.parametrize(
    "which",
    ["factor_mean", "stack", "residual", "svd", "fedadam", "diloco", "prompt", "prompt_personal"],
)
def test_batched_training_agrees_to_rounding(
    which: str, configured: Fixture, play: Fixture, undisturbed: Fixture
) -> None:
    batched = play(configured(which, "runtime.num_nodes=1", "runtime.cohort_tokens=4096"))
    for name, effect in undisturbed(which).effects.items():
        # float32 sums in another order; Adam's division by small second moments makes 1e-7 of it about 1e-4
        np.testing.assert_allclose(batched.effects[name], effect, rtol=0, atol=2e-4)


def test_every_checkpoint_leads_to_the_same_end(
    resumed_case: str,
    last: int,
    configured: Fixture,
    play: Fixture,
    undisturbed: Fixture,
    tmp_path: Path,
) -> None:
    config, whole = configured(resumed_case, "keep_checkpoints=9"), undisturbed(resumed_case)
    folder = tmp_path / "run"
    shutil.copytree(whole.run.path, folder)
    for later in range(last + 1, config.num_rounds + 1):
        shutil.rmtree(folder / "checkpoints" / f"round-{later:04d}")
    resumed = play(config, folder=folder)
    assert resumed.sha == whole.sha
    done = [record["round"] for record in resumed.run.records("round")]
    assert done == list(range(config.num_rounds + 1))


def test_runs_under_flowers_own_loop(
    flower_case: str, configured: Fixture, play: Fixture, undisturbed: Fixture
) -> None:
    theirs = play(configured(flower_case), flower=True)
    assert theirs.sha == undisturbed(flower_case).sha
    ours = undisturbed(flower_case).result.arrays
    assert isinstance(theirs.result.arrays, ArrayRecord)
    assert list(theirs.result.arrays) == list(ours)
    for name in ours:
        np.testing.assert_array_equal(theirs.result.arrays[name].numpy(), ours[name].numpy())
    metrics = theirs.result.train_metrics_clientapp
    assert metrics == undisturbed(flower_case).result.train_metrics_clientapp
    assert sorted(metrics) == [1, 2, 3]


def test_hooks_return_lists(loop_case: str, undisturbed: Fixture) -> None:
    played = undisturbed(loop_case)
    strategy, empty = played.strategy, ConfigRecord()
    for hook in (strategy.configure_train, strategy.configure_evaluate):
        assert type(hook(4, strategy.arrays(), empty, played.grid)) is list
    strategy._left_to_train = []


def test_training_moves_the_model(loop_case: str, undisturbed: Fixture) -> None:
    losses = [r["train_loss"] for r in undisturbed(loop_case).run.records("round") if r["round"]]
    assert all(math.isfinite(loss) for loss in losses)
    assert max(np.abs(effect).max() for effect in undisturbed(loop_case).effects.values()) > 1e-4
