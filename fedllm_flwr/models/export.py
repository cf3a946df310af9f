"""Adapters on disk in PEFT's own format, so that any program that knows PEFT can load the result of a run.

Axes: r rank, R width of a carried update, i input features, o output features.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from peft import LoraConfig
from safetensors import SafetensorError

from fedllm_flwr.averaging import Adapter, Delta, LoraFactors
from fedllm_flwr.errors import DataError, ShapeError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.layout import LoraSpec
from fedllm_flwr.models.shapes import layer_shapes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_FOREIGN = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)
"""Features of PEFT's LoRA that add weights which plain factors cannot hold."""


def export_peft(
    folder: Path, ref: ModelRef, spec: LoraSpec, factors: Adapter, delta: Delta | None = None
) -> None:
    """Write an adapter that ``PeftModel.from_pretrained(base, folder)`` loads.

    A carried update is not lost and not approximated: its R columns and rows stand beside the r of the layer's
    factors, as further rank of that layer. In such a layer all scalings are folded into B and the layer's own
    scaling is 1.

    Args:
        folder: Created if absent; earlier files of the same names are replaced. The same input gives the same bytes.
        ref: The base model.
        spec: Settings of the adapter.
        factors: Values by layer; ranks and scalings may differ between layers.
        delta: A carried update by layer; layers need not be adapted ones.

    Raises:
        ShapeError: There is nothing to write, or factors and update of a layer differ in shape.
    """
    layers = dict(factors)
    for name, update in (delta or {}).items():
        if not update.rank:
            continue
        beside = LoraFactors(update.right, update.left, 1.0)
        layers[name] = _side_by_side(name, layers[name], beside) if name in layers else beside
    if not layers:
        raise ShapeError("export: expected at least one adapted layer, got none")
    tensors = {}
    for name, value in sorted(layers.items()):
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(value.lora_a, np.float32)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(value.lora_b, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(_config(ref, spec, layers), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def import_peft(folder: Path) -> tuple[LoraSpec, dict[str, LoraFactors]]:
    """Read an adapter in PEFT's format, whoever wrote it.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The settings, and the factors by full layer name. Each layer has the rank and scaling it was saved with,
        so layers that a carried update was written into have a larger rank than the settings say.

    Raises:
        DataError: A file is missing or malformed, or the adapter is not a plain LoRA.
    """
    config = _read_config(folder)
    try:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / WEIGHTS_FILE}: cannot be read: {error}") from error
    sides: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise DataError(f"{folder / WEIGHTS_FILE}: {key} is not a factor of a linear layer")
        sides.setdefault(match["layer"], {})[match["side"]] = value.astype(np.float32)
    factors = {}
    for name in sorted(sides):
        if set(sides[name]) != {"A", "B"}:
            raise DataError(
                f"{folder / WEIGHTS_FILE}: layer {name} has lora_{min(sides[name])} only"
            )
        alpha = _pattern_value(config["alpha_pattern"], name, config["lora_alpha"])
        rank = sides[name]["A"].shape[0]
        scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        factors[name] = LoraFactors(sides[name]["A"], sides[name]["B"], scaling)
    targets = config["target_modules"]
    spec = LoraSpec(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        # a single text is a pattern of PEFT's own; the layers it chose are those in the file
        target_modules=tuple(factors) if isinstance(targets, str) else tuple(sorted(targets)),
        use_rslora=config["use_rslora"],
    )
    return spec, factors


def _side_by_side(name: str, adapted: LoraFactors, carried: LoraFactors) -> LoraFactors:
    wanted = (adapted.out_features, adapted.in_features)
    if (carried.out_features, carried.in_features) != wanted:
        got = (carried.out_features, carried.in_features)
        raise ShapeError(f"export, layer {name}: expected a delta of shape {wanted}, got {got}")
    lora_a = np.concatenate([adapted.lora_a, carried.lora_a])
    lora_b = np.concatenate([adapted.scaling * adapted.lora_b, carried.lora_b], axis=1)
    return LoraFactors(lora_a, lora_b, 1.0)


def _config(ref: ModelRef, spec: LoraSpec, layers: Adapter) -> dict[str, Any]:
    """PEFT's configuration, with the layers that differ from the settings listed one by one."""
    ranks = {name: value.rank for name, value in layers.items() if value.rank != spec.rank}
    alphas = {}
    for name, value in layers.items():
        root = math.sqrt(value.rank) if spec.use_rslora else value.rank
        if spec.alpha / root != value.scaling:
            alphas[name] = value.scaling * root
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=ref.base_name,
        inference_mode=True,
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT declares int, computes with any number
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        target_modules=_target_modules(ref, layers),
        rank_pattern={_exactly(name): ranks[name] for name in sorted(ranks)},
        alpha_pattern={_exactly(name): alphas[name] for name in sorted(alphas)},
    )
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }


def _target_modules(ref: ModelRef, layers: Iterable[str]) -> list[str]:
    """The short names of the layers if they name these and no others, else their full names."""
    names = sorted(layers)
    short = tuple(sorted({name.rpartition(".")[2] for name in names}))
    if names == [shape.name for shape in layer_shapes(ref, short)]:
        return list(short)
    return names


def _exactly(name: str) -> str:
    """A layer's name as a key of PEFT's patterns, which are regular expressions matched against the end of a name."""
    return re.escape(name)


def _pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise DataError(f"{file}: expected peft_type LORA, got {config.get('peft_type')!r}")
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise DataError(f"{file}: {name} is missing")
    for name in _FOREIGN:
        if config.get(name):
            raise DataError(f"{file}: {name} is set; expected a plain LoRA")
    defaults = {"lora_dropout": 0.0, "use_rslora": False, "alpha_pattern": {}}
    return {**config, **{name: config.get(name) or value for name, value in defaults.items()}}
