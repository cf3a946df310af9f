"""Attacks on the replies of real clients, against the plain mean and the robust ones."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.settings.robust import RobustConfig
from strategies.robust import added, flat_update, robust_mean

Fixture = Callable[..., Any]
SEVEN = ("strategy.weighting=uniform", "partition=iid", "partition.num_clients=7", "num_rounds=1", "evaluate_every=1",
         "method.sharing=b_only", "strategy.min_fraction=0.9")  # fmt: skip
ATTACKERS = (1, 5)
RULES = {
    "norm_bound": ("robust=norm_bound", "robust.norm_bound=0.05"),
    "median": ("robust=median",),
    "trimmed_mean": ("robust=trimmed_mean", "robust.trimmed_fraction=0.3"),
    "krum": ("robust=krum", "robust.num_attackers=2"),
    "multi_krum": ("robust=multi_krum", "robust.num_attackers=2"),
}
SCALES = {"sign_flip": -3.0, "scaled_update": 100.0}


def attack(scale: float) -> Callable[..., None]:
    """Answer with a multiple of the values that were trained; B starts at 0, so these are the update."""

    def change(asked: Any, infos: Any, parts: dict[str, np.ndarray]) -> None:
        for client in ATTACKERS:
            if f"{client}/adapter" in parts:
                parts[f"{client}/adapter"] *= scale

    return change


def adapter(played: Any) -> np.ndarray:
    return np.concatenate([np.ravel(f.lora_b) for f in played.strategy.model.factors.values()])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.fixture(scope="module")
def honest(micro: Fixture, play: Fixture) -> Any:
    return play(micro(*SEVEN))


@pytest.mark.parametrize("how", SCALES)
@pytest.mark.parametrize("rule", RULES)
def test_two_liars_of_seven_turn_or_stretch_the_plain_mean_and_no_robust_one(
    rule: str, how: str, honest: Any, micro: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture
) -> None:  # fmt: skip
    change = spoil(attack(SCALES[how]))
    plain = play(micro(*SEVEN), grid=edge_grid(2, change))
    kept = play(micro(*SEVEN, *RULES[rule]), grid=edge_grid(2, change))
    others = [c for c in kept.run.records("client") if c["partition_id"] not in ATTACKERS]
    longest = max(c["update_norm"] for c in others)
    if how == "sign_flip":
        assert cosine(adapter(plain), adapter(honest)) < 0.2
        assert cosine(adapter(kept), adapter(honest)) > 0.3
    else:
        assert np.linalg.norm(adapter(plain)) > 10 * longest
        assert np.linalg.norm(adapter(kept)) < 1.01 * longest
    assert {c["partition_id"] for c in kept.run.records("client")} == set(range(7))
    if "krum" in rule:
        (chosen,) = kept.run.records("chosen")
        assert not set(ATTACKERS) & set(chosen["partition_ids"])
    if how == "scaled_update":
        norms = {c["partition_id"]: c["update_norm"] for c in kept.run.records("client")}
        assert sorted(norms, key=norms.__getitem__)[-2:] == sorted(ATTACKERS, key=norms.__getitem__)


@pytest.mark.parametrize("method", ["fedlora", "fedprompt"])
def test_nothing_cut_and_nothing_trimmed_is_the_plain_mean(
    method: str, micro: Fixture, play: Fixture
) -> None:
    own = ("method=fedprompt",) if method == "fedprompt" else ("method.sharing=b_only",)
    few = ("strategy.weighting=uniform", "num_rounds=2", *own)
    plain = play(micro(*few))
    for rule in (
        ("robust=norm_bound", "robust.norm_bound=1e9"),
        ("robust=trimmed_mean", "robust.trimmed_fraction=0"),
    ):
        same = play(micro(*few, *rule))
        for name, values in plain.effects.items():
            np.testing.assert_allclose(same.effects[name], values, rtol=1e-4, atol=1e-7)


def test_a_resumed_run_ends_with_the_same_bits(
    micro: Fixture, play: Fixture, tmp_path: Path
) -> None:
    config = micro("strategy.weighting=uniform", "robust=median", "strategy.server_optimizer=fedadam",
                   "strategy.server_learning_rate=0.01", "keep_checkpoints=9")  # fmt: skip
    whole = play(config)
    folder = tmp_path / "run"
    shutil.copytree(whole.run.path, folder)
    for later in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"round-{later:04d}")
    assert play(config, folder=folder).sha == whole.sha


def test_parts_go_to_an_update_and_back() -> None:
    start = {"shared": np.array([1.0, 2.0], np.float32), "more": np.array([3.0], np.float32)}
    values = {"more": np.array([5.0], np.float32), "shared": np.array([0.0, 2.5], np.float32)}
    update = flat_update(values, start)
    np.testing.assert_array_equal(update, [-1, 0.5, 2])
    for name, found in added(update, start).items():
        np.testing.assert_array_equal(found, values[name])
    with pytest.raises(ShapeError, match=r"expected the parts .* as at the start, got"):
        flat_update({"shared": np.zeros(2, np.float32)}, start)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "median"}, 2.0),
        ({"name": "trimmed_mean", "trimmed_fraction": 0.2}, 7 / 3),
        ({"name": "krum"}, 1.0),
        ({"name": "multi_krum", "num_chosen": 3}, 2.0),
        ({"name": "norm_bound", "norm_bound": 2.0}, 1.8),
    ],
)
def test_every_name_is_its_rule(settings: dict[str, Any], expected: float) -> None:
    updates = np.array([[1.0], [2.0], [3.0], [2.0], [100.0]])
    if settings["name"] == "krum":
        updates = np.array([[0.0], [1.0], [3.0], [7.0], [100.0]])
    if settings["name"] == "multi_krum":
        updates = np.array([[1.0], [2.0], [3.0], [50.0], [100.0]])
    mean, chosen = robust_mean(updates, RobustConfig(**settings))
    np.testing.assert_allclose(mean, [expected])
    assert (chosen is not None) == ("krum" in settings["name"])
