import pytest

from fedllm_flwr.costs.memory import METHODS, memory_row, memory_rows, sparsity_rows
from fedllm_flwr.errors import ConfigError


def llama(layers: int, width: int, inner: int, keys: int = 0) -> list[tuple[int, int]]:
    """The linear layers of a Llama: four of attention and three of the MLP in each block."""
    keys = keys or width
    block = [(width, width), (keys, width), (keys, width), (width, width),
             (inner, width), (inner, width), (width, inner)]  # fmt: skip
    return block * layers


LLAMA_7B = llama(32, 4096, 11008)
LLAMA_13B = llama(40, 5120, 13824)
SMOLLM_135M = llama(30, 576, 1536, 192)


def values(
    method: str, matrices: list[tuple[int, int]], rank: int, width: int = 1
) -> tuple[int, ...]:
    row = memory_row(method, matrices, model="m", rank=rank, width=width)  # type: ignore[arg-type]
    return row.weights, row.optimizer, row.gradient, row.projection, row.wire


def test_one_matrix_by_hand() -> None:
    m, n, r = 6, 10, 2
    for matrix in ((m, n), (n, m)):
        assert values("full", [matrix], r) == (60, 120, 60, 0, 60)
        assert values("lora", [matrix], r) == (60 + 32, 64, 32, 0, 32)
        assert values("galore", [matrix], r) == (60, 40, 60, 12, 60)
        assert values("grass", [matrix], r) == (60, 40, 20, 4, 20)
        assert values("prompt", [matrix], 3, width=5) == (60 + 15, 30, 15, 0, 15)
    row = memory_row("grass", [(m, n)], model="m", rank=r)
    assert row.float32_bytes == 4 * (60 + 40 + 20 + 4)


@pytest.mark.parametrize(
    ("matrices", "rank", "dense", "optimizer"),
    [
        (LLAMA_7B, 64, 6_476_005_376, 202_375_168),
        (LLAMA_7B, 128, 6_476_005_376, 404_750_336),
        (LLAMA_7B, 512, 6_476_005_376, 1_619_001_344),
        (LLAMA_13B, 128, 12_687_769_600, 634_388_480),
        (SMOLLM_135M, 8, 106_168_320, 3_317_760),
        (SMOLLM_135M, 64, 106_168_320, 26_542_080),
    ],
)
def test_known_models(
    matrices: list[tuple[int, int]], rank: int, dense: int, optimizer: int
) -> None:
    weights, moments, gradient, _, wire = values("grass", matrices, rank)
    assert (weights, moments) == (dense, optimizer)
    assert gradient == wire == optimizer // 2
    assert values("full", matrices, rank)[1] == 2 * dense
    assert values("galore", matrices, rank)[1] == optimizer


def test_published_ratios() -> None:
    full = values("full", LLAMA_7B, 1)[1]
    assert full / values("grass", LLAMA_7B, 64)[1] == 64
    assert full / values("grass", LLAMA_7B, 128)[1] == 32
    assert full / values("grass", LLAMA_7B, 512)[1] == 8
    assert round(values("full", LLAMA_13B, 1)[1] / values("grass", LLAMA_13B, 128)[1]) == 40
    assert 2 * values("grass", LLAMA_13B, 128)[4] == 634_388_480, "bytes of bfloat16 gradients"
    assert 4 * values("grass", SMOLLM_135M, 8)[4] == 6_635_520


def test_rows_of_sparse_training_need_a_narrow_base_to_become_small() -> None:
    found = {row.precision: row.total_gb for row in sparsity_rows()}
    assert found == {
        "float32, all rows": 112.0,
        "float32": 36.4,
        "bfloat16": 18.2,
        "bfloat16, moments float32": 21.0,
        "weights int8, else bfloat16": 11.2,
        "weights int4, else bfloat16": 7.7,
    }
    assert sparsity_rows()[1].total_bytes == 36_400_000_000
    assert sparsity_rows(200)[-1].total_bytes == 200 * 11 // 10


def test_a_row_for_each_method() -> None:
    rows = memory_rows(SMOLLM_135M, model="135M", width=576)
    assert [row.method for row in rows] == list(METHODS)
    assert {row.model for row in rows} == {"135M"}
    assert [row.rank for row in rows] == [0, 8, 64, 64, 10]
    assert rows[-1].wire == 5760


def test_a_rank_above_a_side_is_the_whole_side() -> None:
    assert values("grass", [(6, 10)], 99) == values("grass", [(6, 10)], 6)


@pytest.mark.parametrize(
    ("method", "matrices", "rank", "reason"),
    [
        ("sparse", [(2, 2)], 1, "expected one of full, lora, galore, grass, prompt, got 'sparse'"),
        ("grass", [(2, 2)], 0, "got rank 0 and 1 matrices"),
        ("lora", [], 1, "got rank 1 and 0 matrices"),
    ],
)
def test_bad_sizes_are_refused(
    method: str, matrices: list[tuple[int, int]], rank: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        values(method, matrices, rank)
    with pytest.raises(ConfigError, match="parameters >= 1"):
        sparsity_rows(0)
