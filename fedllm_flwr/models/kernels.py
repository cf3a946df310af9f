"""Choose dtype, device, attention and float32 kernels for the hardware at hand.

Every choice reads capability flags or checks a numerical error. Nothing is timed, so the same machine
always chooses the same kernels, whatever else is running, and a run repeats bit for bit.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from fedllm_flwr.errors import ConfigError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
EAGER_MAX_TOKENS = 256
"""Up to this length plain attention costs less CPU time than the fused kernel, whose backward pass is slow
there; beyond it the memory of the score matrix, which grows with the square of the length, decides."""
FLOAT32_MAX_ERROR = 1e-6
"""Relative error of a float32 product that still counts as float32. True float32 gives about 4e-7 at the
size checked; bfloat16 tiles, which "medium" selects where the CPU has them, give about 2e-3."""

Attention = Literal["eager", "sdpa"]
Float32Precision = Literal["highest", "medium"]


@dataclass(frozen=True)
class Kernels:
    """How to compute.

    Attributes:
        dtype: Of the frozen weights and the activations: a key of ``DTYPES``. Adapters are always float32.
        device: A torch device.
        attention: Attention implementation, in transformers' words.
        float32_precision: What to give to ``torch.set_float32_matmul_precision``.
    """

    dtype: str
    device: str
    attention: Attention
    float32_precision: Float32Precision

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return DTYPES[self.dtype]

    def apply(self, threads: int) -> None:
        """Set the process-wide switches: number of intra-operation threads and float32 precision."""
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(self.float32_precision)


def choose(
    dtype: str = "auto", device: str = "auto", max_tokens: int = EAGER_MAX_TOKENS
) -> Kernels:
    """Choose the kernels.

    Args:
        dtype: A key of ``DTYPES``, or ``auto``: bfloat16 where the hardware multiplies it natively, else float32.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto``: the first CUDA device, else the CPU.
        max_tokens: Longest sequence that will be computed.

    Returns:
        The choice, with no ``auto`` left in it.

    Raises:
        ConfigError: The dtype is unknown, or the device is not present; names those that are.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; expected auto, {', '.join(DTYPES)}")
    present = devices()
    if device == "auto":
        device = "cuda" if "cuda" in present else "cpu"
    if device not in present:
        raise ConfigError(
            f"device {device!r} is not present; this machine has {', '.join(present)}"
        )
    on_cpu = device == "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if has_native_bfloat16(device) else "float32"
    return Kernels(
        dtype=dtype,
        device=device,
        attention="eager" if on_cpu and max_tokens <= EAGER_MAX_TOKENS else "sdpa",
        float32_precision="medium" if on_cpu and medium_is_float32() else "highest",
    )


def devices() -> tuple[str, ...]:
    """The devices of this machine that a model can be put on."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    numbered = [f"cuda:{index}" for index in cuda]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ("cpu", *(["cuda", *numbered] if numbered else []), *mps)


def has_native_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere bfloat16 is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The CPU's instruction-set flags as Linux lists them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    )


@lru_cache(maxsize=1)
def medium_is_float32() -> bool:
    """Whether torch's "medium" float32 products keep float32 accuracy on this CPU.

    "medium" sends float32 products through oneDNN, which is about twice as fast as the default library on
    some CPUs. Where the CPU has AMX, oneDNN would round the inputs to bfloat16; the error then exceeds
    ``FLOAT32_MAX_ERROR``.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, 576, generator=generator)
    right = torch.randn(576, 256, generator=generator)
    exact = left.double() @ right.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = ((left @ right).double() - exact).norm() / exact.norm()
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error < FLOAT32_MAX_ERROR)
