import importlib.util

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.galore import GaloreSettings
from fedllm_flwr.grass.optimizer import GrassSettings
from fedllm_flwr.training.full_job import FullSettings
from fedllm_flwr.training.settings import LocalSettings, SamplePrivacy


def test_the_base_optimizer_is_that_of_local_training() -> None:
    local = LocalSettings(
        optimizer="sgd", learning_rate=0.3, momentum=0.5, weight_decay=0.1, beta1=0.7
    )
    base = FullSettings(local=local, projection=None).base
    assert (base.name, base.learning_rate, base.momentum, base.weight_decay) == (
        "sgd", 0.3, 0.5, 0.1,
    )  # fmt: skip
    adam = LocalSettings(learning_rate=0.2, beta1=0.7, beta2=0.8, momentum=0.5)
    base = FullSettings(local=adam, projection=None).base
    assert (base.name, base.beta1, base.beta2, base.momentum) == ("adamw", 0.7, 0.8, 0.0)


def test_rows_lie_where_grass_has_them() -> None:
    local = LocalSettings()
    assert FullSettings(local=local, projection=GrassSettings(side="in")).side == "in"
    assert FullSettings(local=local, projection=GaloreSettings()).side == "out"


def test_what_does_not_suit_is_refused() -> None:
    for bad, message in (
        (LocalSettings(clip_norm=1.0), "expected clip_norm 0, .* got 1.0"),
        (LocalSettings(proximal_mu=0.1), "expected proximal_mu 0, .* got 0.1"),
        (LocalSettings(side="a"), "expected side both, got a"),
        (
            LocalSettings(sample_privacy=SamplePrivacy(clip_norm=1.0, noise_multiplier=1.0)),
            "expected no sample_privacy",
        ),
    ):
        with pytest.raises(ConfigError, match=f"full-weight training: {message}"):
            FullSettings(local=bad, projection=None)
    sgd = LocalSettings(optimizer="sgd")
    with pytest.raises(ConfigError, match="eight_bit: expected optimizer adamw, got sgd"):
        FullSettings(local=sgd, projection=None, eight_bit=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ConfigError, match="expected the package bitsandbytes"):
            FullSettings(local=LocalSettings(), projection=None, eight_bit=True)
