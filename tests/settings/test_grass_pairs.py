import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError

GRASS = ("method=fedgrass", "strategy=row_mean", "client.clip_norm=0")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("strategy=factor_mean",), "strategy=factor_mean and method=fedgrass: .* use strategy=row_mean"),
        (("method=fedlora",), "strategy=row_mean and method=fedlora"),
        (("method=fedprompt",), "strategy=row_mean and method=fedprompt"),
        (("strategy.server_optimizer=fedadam",), r"strategy\.server_optimizer=fedadam and method=fedgrass"),
        (("client.clip_norm=1",), r"client\.clip_norm=1 and method=fedgrass: .* use client\.clip_norm=0"),
        (("client.proximal_mu=0.1",), r"client\.proximal_mu=0\.1 and method=fedgrass"),
        (("method.eight_bit=true", "optimizer=sgd"), "optimizer=sgd and method.eight_bit=true: expected"),
        (("fairness=group_dro", "fairness.groups=label"), "fairness=group_dro and method=fedgrass"),
        (("privacy=local",), "privacy=local and method=fedgrass"),
        (("privacy=central", "strategy.weighting=uniform"), "privacy=central and method=fedgrass"),
        (("privacy=sample",), "privacy=sample and method=fedgrass"),
        (("wire=int8",), r"wire\.uplink=int8 and method=fedgrass: .* use float32, float16 or bfloat16"),
        (("wire.downlink=int4",), r"wire\.downlink=int4 and method=fedgrass"),
        (("baselines.local_tuning=true",), r"baselines\.local_tuning=true and method=fedgrass"),
        (("robust=median", "strategy.weighting=uniform"), "robust=median and strategy=row_mean"),
        (("unlearning=ledger",), "unlearning=ledger and strategy=row_mean"),
    ],
)  # fmt: skip
def test_a_pair_that_cannot_work_is_named(
    overrides: tuple[str, ...], reason: str, smoke: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=reason):
        smoke(*GRASS, *overrides)


def test_the_commands_of_the_guide_compose(tmp_path: Path) -> None:
    guide = Path(__file__).parents[2] / "docs" / "grass.md"
    found = re.findall(r"^fedllm (experiment=.*)$", guide.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 2
    for command in found:
        config = compose_run([*command.split(), f"out_dir={tmp_path / 'run'}"]).config
        assert (config.method.name, config.strategy.name) == ("fedgrass", "row_mean")


@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16"])
def test_codecs_of_values_are_taken(wire: str, smoke: Callable[..., Any]) -> None:
    assert smoke(*GRASS, f"wire={wire}").wire.uplink == wire
