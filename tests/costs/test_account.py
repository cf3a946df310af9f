import pytest

from fedllm_flwr.costs import (
    PUBLISHED_SHAPES,
    ModelShape,
    SplitSizes,
    exchange_bytes,
    full_row,
    published_row,
)

GOLDEN = {
    "GPT-2": (61_440, 2_359_296, 38.40, 32_614_907_904, 27_106.08),
    "GPT-2 L": (102_400, 11_796_480, 115.20, 271_790_899_200, 225_884.03),
    "1.3B": (163_840, 12_582_912, 76.80, 463_856_467_968, 385_508.75),
    "7B": (327_680, 33_554_432, 102.40, 2_473_901_162_496, 2_056_046.68),
    "13B": (409_600, 52_428_800, 128.00, 4_831_838_208_000, 4_015_716.18),
}
"""The published five rows: bytes, LoRA's bytes, their ratio, LoRA's operations, their ratio to 1,203,232."""

CONTROLLER = {
    "GPT-2": (1_008_896, 2.34),
    "GPT-2 L": (1_664_256, 7.09),
    "1.3B": (2_647_296, 4.75),
    "7B": (5_268_736, 6.37),
    "13B": (6_579_456, 7.97),
}
"""Bytes of averaging the controller in a round, and LoRA's over them."""

EDGE = {
    "GPT-2": (3_426_432, 1_266_432, 9_519, 6_346),
    "7B": (7_686_272, 5_526_272, 321_860, 214_573),
}
"""Operations with every term, dense and sparse, and the ratios at 6 P T and 4 P T."""


@pytest.mark.parametrize("shape", PUBLISHED_SHAPES, ids=lambda shape: shape.name)
def test_the_published_table_to_the_digit(shape: ModelShape) -> None:
    row = published_row(shape)
    assert (row.model, row.width, row.layers) == (shape.name, shape.width, shape.layers)
    found = (row.resprompt_bytes, row.lora_bytes, round(row.byte_ratio, 2))
    assert (*found, row.lora_flops, round(row.flop_ratio, 2)) == GOLDEN[shape.name]
    assert row.edge_flops == 1_203_232


@pytest.mark.parametrize("shape", PUBLISHED_SHAPES, ids=lambda shape: shape.name)
def test_the_full_account_of_bytes(shape: ModelShape) -> None:
    row = full_row(shape)
    assert row.break_even_exchanges == pytest.approx(3.2 * shape.layers)
    assert row.break_even_exchanges == published_row(shape).byte_ratio
    found = (row.controller_round_bytes, round(row.controller_byte_ratio, 2))
    assert found == CONTROLLER[shape.name]
    assert row.prompt_tuning_round_bytes == published_row(shape).resprompt_bytes
    assert row.exchange_bytes == row.prompt_tuning_round_bytes + 8
    sent = row.break_even_exchanges_with_averaging * row.exchange_bytes + row.controller_round_bytes
    assert sent == pytest.approx(row.lora_round_bytes)


@pytest.mark.parametrize("name", EDGE)
def test_the_full_account_of_operations(name: str) -> None:
    [shape] = [shape for shape in PUBLISHED_SHAPES if shape.name == name]
    row = full_row(shape)
    ratios = (round(row.flop_ratio_6pt), round(row.flop_ratio))
    assert (row.edge_flops, row.edge_sparse_flops, *ratios) == EDGE[name]
    parts = (row.edge_reservoir_flops, row.edge_input_flops, row.edge_forward_flops)
    assert sum(parts) + row.edge_backward_flops + row.edge_update_flops == row.edge_flops


def test_what_the_edge_saves_the_server_computes() -> None:
    """Together they save no more than the prompt is shorter than the text, 64 tokens to 10."""
    for shape in PUBLISHED_SHAPES:
        assert 6 < full_row(shape).total_flop_ratio < 6.4


def test_other_sizes_reach_both_tables() -> None:
    sizes = SplitSizes(prompt_tokens=3, lora_rank=2, classes=9)
    shape = ModelShape(64, 2, "x")
    assert published_row(shape, sizes).byte_ratio == pytest.approx(2 * 2 * 2 * 2 / 3)
    private = exchange_bytes(shape, sizes, label_private=True).total
    assert full_row(shape, sizes).label_private_exchange_bytes == private == 2 * 768 + 72
