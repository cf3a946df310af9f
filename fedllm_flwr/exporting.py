"""What a run leaves for other programs: adapter or prompts in PEFT's format, a whole model, or a controller."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedllm_flwr.config import RunConfig
from fedllm_flwr.models.backbone import load
from fedllm_flwr.models.export import export_peft
from fedllm_flwr.models.export_prompts import export_prompt
from fedllm_flwr.models.tokenizers import load_tokenizer
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.encode import build_encoder
from fedllm_flwr.training.full_layers import updates_active
from strategies import FedGrass, FedLora, FedPrompt, FedResPrompt, RoundStrategy
from strategies.fedprompt import CLUSTER

CONTROLLER_FILE = "controller.safetensors"
MODEL_FILE = "model.safetensors"


def export(config: RunConfig, strategy: RoundStrategy, folder: Path) -> None:
    """Write the global model, in PEFT's format where that has one; prompts of clusters go into folders of their own.

    Personal prompts are not at the server, so what is written is the part that all clients share.

    Args:
        config: The run.
        strategy: Its strategy, at the round that is to be exported.
        folder: Where; created.
    """
    ref = config.model.ref(config.runtime.model_path)
    if isinstance(strategy, FedLora):
        export_peft(
            folder, ref, strategy.spec, strategy.model.factors, strategy.model.delta or None
        )
    elif isinstance(strategy, FedPrompt):
        _export_prompts(config, strategy, folder)
    elif isinstance(strategy, FedResPrompt):
        _export_controller(config, strategy, folder)
    elif isinstance(strategy, FedGrass):
        _export_model(config, strategy, folder)


def _export_prompts(config: RunConfig, strategy: FedPrompt, folder: Path) -> None:
    method = config.method
    assert isinstance(method, FedPromptConfig)  # noqa: S101  # the strategy says so
    ref, dtype = config.model.ref(config.runtime.model_path), config.runtime.dtype
    shared = strategy.parts["shared"]
    fixed = _fixed_ids(config) if method.kind == "soft" and method.placement == "after" else ()
    spec = method.adapter_spec()
    if isinstance(spec, PromptSpec):
        spec = PromptSpec((Segment("shared", method.length),), method.placement)
    export_prompt(folder, ref, spec, shared, fixed_ids=fixed, dtype=dtype)
    for name, values in strategy.parts.items():
        if name.startswith(CLUSTER):
            segments = (Segment("cluster", method.cluster_length), Segment("shared", method.length))
            both = PromptSpec(segments, method.placement)
            flat = both.join({"cluster": values, "shared": shared})
            own = folder / "clusters" / _file_name(name.removeprefix(CLUSTER))
            export_prompt(own, ref, both, flat, fixed_ids=fixed, dtype=dtype)


def _export_controller(config: RunConfig, strategy: FedResPrompt, folder: Path) -> None:
    """A controller in a format of our own, with all that it takes to build the reservoir before it."""
    folder.mkdir(parents=True, exist_ok=True)
    spec, values = strategy.spec, strategy.controller
    arrays = {"W_out": values[: spec.readout_values].reshape(spec.bottleneck, -1)}
    if values.size == spec.size:  # else P is the clients' own
        arrays["P"] = values[spec.readout_values :].reshape(-1, spec.bottleneck)
    save_file(
        {name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / CONTROLLER_FILE
    )
    series_width = load_task(
        config.task.options(config.runtime.data_path), config.rows_seed
    ).series_width
    described = {
        "model": config.model.ref(config.runtime.model_path).label,
        "controller": dataclasses.asdict(spec),
        "reservoir": dataclasses.asdict(strategy.method.reservoir(config.seed, series_width)),
        "reservoir_fingerprint": strategy.reservoir,
        "reads": "series" if series_width else "projected token embeddings",
    }
    (folder / "controller.json").write_text(json.dumps(described, indent=2) + "\n")


def _export_model(config: RunConfig, strategy: FedGrass, folder: Path) -> None:
    """The whole model with its changed rows, rounded to the dtype of the run, as transformers loads it."""
    ref = config.model.ref(config.runtime.model_path)
    backbone = load(ref, dtype=config.runtime.dtype, device="cpu")
    with updates_active(backbone, strategy.changed):
        backbone.model.save_pretrained(folder, max_shard_size="1TB")  # one file, by a known name
    backbone.tokenizer.save_pretrained(folder)


def _fixed_ids(config: RunConfig) -> tuple[int, ...]:
    """Tokens of the text ahead of every row."""
    task = load_task(config.task.options(config.runtime.data_path), config.rows_seed)
    ref = config.model.ref(config.runtime.model_path)
    encoder = build_encoder(
        task,
        load_tokenizer(ref, config.runtime.dtype),
        template=config.task.template,
        loss=config.task.loss,
        max_tokens=config.task.max_tokens,
    )
    return tuple(encoder.fixed_ids)


def _file_name(cluster: str) -> str:
    """A cluster's name came from a client: letters, digits and a few signs stay, everything else is spelled out."""
    return "".join(c if c.isalnum() or c in "-_" else f"%{ord(c):x}" for c in cluster)
