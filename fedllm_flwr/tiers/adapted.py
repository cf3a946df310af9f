"""What a run has added to the frozen model, as it goes to clients: facts that JSON can hold, and one flat array.

The frozen model does not travel: a client has it, or loads it by name.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from fedllm_flwr.errors import ConfigError, WireError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.models.shapes import layer_shapes
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.records import pack_delta, unpack_delta


def pack_adaptation(added: Adaptation) -> tuple[dict[str, Any], np.ndarray | None]:
    """Facts, and the values as float32 [m]; None where nothing was added.

    Raises:
        ConfigError: It is neither an update alone nor a prompt alone. LoRA factors travel as the update that they are.
    """
    facts: dict[str, Any] = {"fixed_ids": list(added.fixed_ids)}
    if added.delta is not None and added.adapter is None:
        values, ranks = pack_delta(added.delta)
        return {**facts, "kind": "delta", "ranks": ranks}, values
    if added.delta is None and added.adapter is None:
        return {**facts, "kind": "plain"}, None
    if added.delta is not None or not isinstance(added.spec, PromptSpec | PeftPromptSpec):
        raise ConfigError(
            f"model to send: expected an update or a prompt, got {type(added.spec).__name__}"
            f"{' over an update' if added.delta is not None else ''}"
        )
    kind = "soft" if isinstance(added.spec, PromptSpec) else "peft"
    return {**facts, "kind": kind, "spec": asdict(added.spec)}, added.adapter


def unpack_adaptation(
    facts: Mapping[str, Any], parts: Mapping[str, np.ndarray], part: str, ref: ModelRef
) -> Adaptation:
    """Undo :func:`pack_adaptation`.

    Args:
        facts: As packed.
        parts: Arrays of the message.
        part: The name of the one with the values.
        ref: The frozen model, as this machine has it.

    Raises:
        WireError: The array is missing.
    """
    fixed = tuple(int(token) for token in facts["fixed_ids"])
    if facts["kind"] == "plain":
        return Adaptation(fixed_ids=fixed)
    if part not in parts:
        raise WireError(f"model: expected the values of {part}, got {sorted(parts)}")
    values = parts[part]
    if facts["kind"] == "delta":
        ranks = facts["ranks"]
        delta = unpack_delta(values, ranks, layer_shapes(ref, tuple(ranks)))
        return Adaptation(delta=delta, fixed_ids=fixed)
    spec = facts["spec"]
    if facts["kind"] == "peft":
        return Adaptation(values, PeftPromptSpec(**spec), fixed_ids=fixed)
    segments = tuple(Segment(**segment) for segment in spec["segments"])
    return Adaptation(values, PromptSpec(segments, spec["placement"]), fixed_ids=fixed)
