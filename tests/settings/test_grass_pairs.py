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
        (("model.quantization=nf4",), r"model\.quantization=nf4 and method=fedgrass: it changes the weights"),
        (("strategy.server_optimizer=fedadam",), r"strategy\.server_optimizer=fedadam and method=fedgrass"),
        (("client.clip_norm=1",), r"client\.clip_norm=1 and method=fedgrass: .* use client\.clip_norm=0"),
        (("client.proximal_mu=0.1",), r"client\.proximal_mu=0\.1 and method=fedgrass"),
        (("method.eight_bit=true", "optimizer=sgd"), "optimizer=sgd and method.eight_bit=true: expected"),
        (("fairness=group_dro", "fairness.groups=label"), "fairness=group_dro and method=fedgrass"),
        (("privacy=local",), "privacy=local and method.rule=norm_nr: rows that are picked by gradients tell of the"),
        (("privacy=central", "strategy.weighting=uniform"), "privacy=central and method.rule=norm_nr"),
        (("privacy=central", "strategy.weighting=uniform", "method.sharing=local", "method.rule=uniform_r"),
         "privacy=central and method.sharing=local: which rows a sum has tells who took part"),
        (("privacy=sample",), "privacy=sample and method=fedgrass: gradients of single rows of data are never formed"),
        (("wire=int8",), r"wire\.error_feedback=true and method=fedgrass: .* use error_feedback=false"),
        (("wire=top_k",), r"wire\.uplink=top_k and method=fedgrass: .* use float32, float16, bfloat16, int8, int4"),
        (("wire.downlink=low_rank",), r"wire\.downlink=low_rank and method=fedgrass"),
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
