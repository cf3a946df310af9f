"""The shared parts of a soft prompt before any training: values that server and clients make alike, each for itself.

Axes: l soft tokens of a part, d width of the model's input embeddings.
"""

import numpy as np

from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.peft_prompts import PeftPromptSpec, start_module
from fedllm_flwr.models.prompt_start import InputEmbeddings, start_prompt
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.methods import FedPromptConfig


def first_prompts(
    method: FedPromptConfig, ref: ModelRef, embeddings: InputEmbeddings, seed: int
) -> dict[str, np.ndarray]:
    """The start values of the shared prompt, and of a cluster's where there are clusters.

    Args:
        method: The prompt.
        ref: Which model.
        embeddings: Of the model.
        seed: The run's.

    Returns:
        float32 [l d] for each part.

    Raises:
        ConfigError: The start does not fit the model.
    """
    spec = method.adapter_spec()
    if isinstance(spec, PeftPromptSpec):
        address = derive_seed(seed, "prompt", "shared")
        kind, text = method.start, method.start_text
        return {"shared": start_module(ref, spec, embeddings, address, kind=kind, text=text)}
    return {
        segment.name: start_prompt(
            embeddings,
            segment.length,
            method.start,
            derive_seed(seed, "prompt", segment.name),
            method.start_text,
        )
        for segment in method.spec().segments
        if segment.name != "personal"
    }


def part_shape(method: FedPromptConfig, part: str, size: int) -> tuple[int, ...]:
    """The matrix [l, d] that a part is; the parameters of PEFT's encoders are taken as one vector.

    Args:
        method: The prompt.
        part: ``shared`` or ``cluster``.
        size: Values of the part.
    """
    if method.kind not in ("soft", "prompt_tuning"):
        return (size,)
    length = method.cluster_length if part == "cluster" else method.length
    return length, size // length
