"""The frozen linear layers of a model in 8 or 4 bits, through the optional package bitsandbytes.

Axes: o outputs and i inputs of a linear layer.
"""

import importlib.util
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.catalog import Quantization


def check_package(quantization: Quantization) -> None:
    """Find out, before anything is loaded, whether the package is there if it is needed.

    Raises:
        ConfigError: It is not.
    """
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization={quantization}: expected the package bitsandbytes, which is not installed; use none, "
            "or `pip install bitsandbytes`"
        )


def quantize(model: Any, names: Iterable[str], quantization: Quantization, device: str) -> None:
    """Put quantised layers in the place of linear ones, one after the other, on a device.

    Embeddings, norms and the output head stay as they are. Gradients reach a layer's input, and never its weights.

    Args:
        model: A transformers model on the CPU, changed in place.
        names: Full module names of its linear layers.
        quantization: ``int8`` or ``nf4``.
        device: Where the layers go; they are quantised there.

    Raises:
        ConfigError: The package is not installed.

    Source:
        Dettmers et al. 2022 (LLM.int8()), section 2.2, for ``int8``: inputs are quantised too, row by row. Departure:
        no outlier columns are kept apart, since which ones are depends on the other rows of a pass, and so a client's
        result would on whom it shares a pass with. Dettmers et al. 2023 (QLoRA), section 3, for ``nf4``, without its
        second quantisation of the scales.
    """
    check_package(quantization)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), attribute, _quantized(layer, quantization, device))


def _quantized(layer: nn.Module, quantization: Quantization, device: str) -> nn.Module:
    """A layer's stand-in; the weight of transformers' Conv1D is stored as [i, o]."""
    with warnings.catch_warnings():  # of its own imports
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb

    stored: Tensor = layer.weight.detach()  # type: ignore[operator,union-attr,assignment]
    weight = (stored.t() if isinstance(layer, Conv1D) else stored).contiguous()
    outputs, inputs = weight.shape
    made: Any
    if quantization == "int8":
        made = bnb.nn.Linear8bitLt(
            inputs, outputs, bias=False, has_fp16_weights=False, device="meta"
        )
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(
            inputs, outputs, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
        made.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)  # type: ignore[operator]
    return made.to(device).eval()
