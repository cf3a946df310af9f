from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from fedllm_flwr.costs import ModelShape, SplitSizes, model_shape
from fedllm_flwr.errors import ConfigError


@pytest.mark.parametrize(("kind", "shape"), [("gpt2", (768, 12)), ("llama", (4096, 32))])
def test_a_configuration_of_transformers_has_a_shape(kind: str, shape: tuple[int, int]) -> None:
    """Whatever the fields of the family are called."""
    assert model_shape(AutoConfig.for_model(kind), kind) == ModelShape(*shape, kind)


def test_the_estimate_of_parameters() -> None:
    assert ModelShape(768, 12, "GPT-2").block_parameters == 84_934_656


def test_the_state_holds_a_one_and_the_last_input() -> None:
    assert SplitSizes().state_size == 202
    assert SplitSizes(reservoir_size=50, input_size=4).state_size == 55


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model x: expected a configuration .* got 8 and None"):
        model_shape(SimpleNamespace(hidden_size=8), "x")
    with pytest.raises(ConfigError, match="model x: expected layers >= 1, got 0"):
        ModelShape(8, 0, "x")
    with pytest.raises(ConfigError, match="costs: expected code_size >= 1, got 0"):
        SplitSizes(code_size=0)
    for density in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"costs: expected reservoir_density in \(0, 1\]"):
            replace(SplitSizes(), reservoir_density=density)
