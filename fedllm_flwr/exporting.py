"""What a run leaves for other programs: its adapter or its prompts, in PEFT's format."""

from pathlib import Path

from fedllm_flwr.config import RunConfig
from fedllm_flwr.models.export import export_peft
from fedllm_flwr.models.export_prompts import export_prompt
from fedllm_flwr.models.tokenizers import load_tokenizer
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.encode import build_encoder
from strategies import FedLora, FedPrompt, RoundStrategy
from strategies.fedprompt import CLUSTER


def export(config: RunConfig, strategy: RoundStrategy, folder: Path) -> None:
    """Write the global model in PEFT's format; prompts of clusters go into folders of their own.

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


def _fixed_ids(config: RunConfig) -> tuple[int, ...]:
    """Tokens of the text ahead of every row; none in a deployment, where the data and its prompts are on the nodes."""
    if config.runtime.name == "deployment":
        return ()
    task = load_task(config.task.options(config.runtime.data_path), config.seed)
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
