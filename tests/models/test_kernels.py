import pytest
import torch

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models import kernels
from fedllm_flwr.models.kernels import Kernels, choose


def test_unknown_dtype_and_absent_device_are_named() -> None:
    with pytest.raises(ConfigError, match="dtype 'int4' is unknown; expected auto, float32"):
        choose("int4")
    with pytest.raises(ConfigError, match="device 'cuda:99' is not present; this machine has cpu"):
        choose(device="cuda:99")


def test_auto_leaves_nothing_open_and_repeats() -> None:
    chosen = choose()
    assert "auto" not in (chosen.dtype, chosen.device)
    assert choose() == chosen


@pytest.mark.parametrize(("max_tokens", "attention"), [(256, "eager"), (257, "sdpa")])
def test_attention_on_the_cpu_follows_the_length(max_tokens: int, attention: str) -> None:
    assert choose(device="cpu", max_tokens=max_tokens).attention == attention


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (frozenset({"avx2"}), "float32"),
        (frozenset({"avx512f", "avx512_bf16"}), "bfloat16"),
        (frozenset({"amx_bf16", "amx_tile"}), "bfloat16"),
    ],
)
def test_auto_dtype_follows_the_cpu_flags(
    flags: frozenset[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "cpu_flags", lambda: flags)
    assert choose(device="cpu").dtype == dtype


def test_medium_is_chosen_only_if_it_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AMX, "medium" rounds inputs to bfloat16; imitate it at the edge, in torch's product."""
    plain = torch.Tensor.__matmul__

    def rounding(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            return plain(left.bfloat16(), right.bfloat16()).float()
        return plain(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    kernels.medium_is_float32.cache_clear()
    try:
        assert choose("float32", "cpu").float32_precision == "highest"
    finally:
        kernels.medium_is_float32.cache_clear()


def test_chosen_float32_products_are_float32() -> None:
    before = torch.get_float32_matmul_precision()
    choose("float32", "cpu").apply(threads=1)
    try:
        left = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
        exact = left.double() @ left.double().t()
        error = ((left @ left.t()).double() - exact).norm() / exact.norm()
        assert error < kernels.FLOAT32_MAX_ERROR
    finally:
        torch.set_float32_matmul_precision(before)


def test_check_leaves_the_process_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    kernels.medium_is_float32.cache_clear()
    try:
        kernels.medium_is_float32()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_apply_sets_threads() -> None:
    Kernels("float32", "cpu", "eager", "highest").apply(threads=1)
    assert torch.get_num_threads() == 1
