"""From settings to members that can be asked; everything that cannot work fails here, before anybody is."""

from collections.abc import Iterable
from pathlib import Path

from fedllm_flwr.averaging import product_of
from fedllm_flwr.config import run_config
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.export import import_peft
from fedllm_flwr.models.export_prompts import import_prompt
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.adaptation import TaskConfig
from fedllm_flwr.settings.cascade import MemberConfig, TierConfig
from fedllm_flwr.settings.methods import FedPromptConfig, FedResPromptConfig
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tiers.endpoint import Endpoint
from fedllm_flwr.tiers.grouped import GroupedMember
from fedllm_flwr.tiers.members import Computing, LocalMember
from fedllm_flwr.tiers.tier import Member, Tier


def load_tier(config: TierConfig, task: TaskConfig, computing: Computing, seed: int) -> Tier:
    """A tier that can be asked; backbones are loaded when they are.

    Args:
        config: Of the tier.
        task: The queries'; members without a run of their own ask with its template and length.
        computing: Where members compute.
        seed: Of samples.

    Raises:
        ConfigError: A run directory is absent, unfinished, of another task, or has no adapter.
        DataError: An adapter cannot be read.
    """
    members = tuple(
        load_member(member, name, task, computing)
        for member, name in zip(config.members, config.names, strict=False)
    )
    for member in members:
        if isinstance(member, Endpoint):
            member.headers()
    return Tier(config, members, seed)


def load_member(config: MemberConfig, name: str, task: TaskConfig, computing: Computing) -> Member:
    """One member; see :func:`load_tier`.

    Args:
        config: Of the member.
        name: In recorded answers.
        task: The queries'.
        computing: Where it computes.
    """
    if config.base_url:
        return Endpoint(
            name,
            config.base_url,
            config.model,
            config.key_variable,
            config.template or task.template,
        )
    if not config.run:
        template = config.template or task.template
        return LocalMember(name, config.ref(), template, task.max_tokens, computing=computing)
    directory = RunDirectory.open(config.run)
    run = run_config(directory.manifest["config"])
    if run.task.name != task.name:
        raise ConfigError(
            f"{config.run}: expected a run of task {task.name}, got one of {run.task.name}"
        )
    if config.path and run.model.name != "path":
        raise ConfigError(
            f"{config.run}: expected path= beside a run of a local folder's model only, got one of {run.model.name}"
        )
    folder = directory.path / "adapter"
    if isinstance(run.method, FedResPromptConfig) or not (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{config.run}: expected a finished run with an adapter or a prompt in adapter/, found none"
        )
    ref = run.model.ref(config.path)
    asked = {"template": run.task.template, "max_tokens": run.task.max_tokens}

    def prompted(place: Path) -> LocalMember:
        prompt = import_prompt(place)
        return LocalMember(
            name,
            ref,
            **asked,  # type: ignore[arg-type]
            prompt=prompt.flat,
            spec=prompt.spec,
            fixed_ids=prompt.fixed_ids,
            computing=computing,
        )

    if config.clusters:
        places = sorted((folder / "clusters").glob("*/adapter_config.json"))
        if not places:
            raise ConfigError(
                f"{config.run}: clusters=true: expected a run with method.cluster_length above 0, found no prompts of "
                "clusters"
            )
        return GroupedMember(name, {own.parent.name: prompted(own.parent) for own in places})
    if isinstance(run.method, FedPromptConfig):
        return prompted(folder)
    _, factors = import_peft(folder)
    delta = {layer: product_of(values) for layer, values in factors.items()}
    return LocalMember(name, ref, **asked, delta=delta, computing=computing)  # type: ignore[arg-type]


def check_unseen(members: Iterable[MemberConfig], rows: Iterable[Row], data_path: str) -> None:
    """Refuse queries that a member was trained on: its answers to them say nothing.

    Args:
        members: Of all tiers.
        rows: Queries.
        data_path: The user's own file, for tasks that read one.

    Raises:
        ConfigError: Names the run and how many queries it has seen.
    """
    queries = {row.row_id for row in rows}
    for member in members:
        if not member.run:
            continue
        run = run_config(RunDirectory.open(Path(member.run)).manifest["config"])
        task = load_task(run.task.options(data_path), run.rows_seed)
        seen = queries & {row.row_id for row in task.splits["train"]}
        if seen:
            raise ConfigError(
                f"{member.run}: expected a run that has not been trained on the queries, got one that has on "
                f"{len(seen)} of {len(queries)}; use its seed ({run.seed}) and rows"
            )
