import pytest

from fedllm_flwr.costs import (
    PUBLISHED_SHAPES,
    ModelShape,
    SplitSizes,
    controller_parameters,
    exchange_bytes,
    lora_bytes,
    lora_parameters,
    prompt_bytes,
)
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.layout import AdapterLayout
from fedllm_flwr.models.shapes import layer_shapes

LLAMA_7B = ModelShape(4096, 32, "7B")


def test_prompt_tuning_beside_lora_of_rank_16() -> None:
    """320 KiB against 32 MiB one way at 7B; at 70B, whose value layers are narrower, 640 KiB against 131 MB."""
    prompt, adapter = prompt_bytes(20, 4096), lora_bytes(LLAMA_7B, SplitSizes(lora_rank=16))
    assert (prompt, adapter) == (320 * 1024, 33_554_432)
    assert adapter / prompt == pytest.approx(102.4)
    wide = 4 * lora_parameters([(8192, 8192), (8192, 1024)] * 80, rank=16)
    assert (prompt_bytes(20, 8192), wide) == (655_360, 131_072_000)
    assert wide / prompt_bytes(20, 8192) == 200


def test_lora_of_real_layers_is_the_size_of_the_flat_adapter() -> None:
    shapes = layer_shapes(ModelRef(name="tiny"), ("q_proj", "v_proj"))
    layers = [(shape.in_features, shape.out_features) for shape in shapes]
    assert lora_parameters(layers, 3) == AdapterLayout(shapes, 3).size


@pytest.mark.parametrize(
    ("width", "floats"),
    [(896, 60_544), (2048, 134_272), (3584, 232_576), (4096, 265_344), (5120, 330_880)],
)
def test_controllers_of_the_sources_sentiment_study(width: int, floats: int) -> None:
    """Four soft tokens, a code of 16 and 200 values of state."""
    sizes = SplitSizes(prompt_tokens=4, reservoir_size=198)
    assert controller_parameters(ModelShape(width, 1, "x"), sizes) == floats


@pytest.mark.parametrize("shape", PUBLISHED_SHAPES, ids=lambda shape: shape.name)
def test_an_exchange_with_and_without_labels(shape: ModelShape) -> None:
    sizes = SplitSizes(classes=3)
    plain, private = (exchange_bytes(shape, sizes, label_private=p) for p in (False, True))
    prompt = 4 * 10 * shape.width
    assert (plain.up, plain.down, plain.total) == (prompt + 4, prompt + 4, 2 * prompt + 8)
    assert (private.up, private.down, private.total) == (prompt + 12,) * 2 + (2 * prompt + 24,)
    assert private.target_up == private.loss_down == 0
