"""Put the model that a run left to a probe of social bias, beside the plain model that it began with."""

from collections.abc import Callable
from typing import Any

import numpy as np

from clients.workspace import open_workspace
from fedllm_flwr.core import resumed_config, whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.evaluation import exported_folder, exported_model
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tasks.bias import bbq, crows_pairs, stereotypical
from fedllm_flwr.tasks.encode import build_encoder
from fedllm_flwr.tasks.metrics import Counts
from fedllm_flwr.training.evaluate import row_scores

PROBES: dict[str, Callable[[], Task]] = {"bbq": bbq, "crows_pairs": crows_pairs}
QUESTIONS = 50
"""Questions of BBQ from each of its 22 groups, drawn once for all runs; all 58,492 take hours on a CPU."""
MAX_TOKENS = 256

Groups = dict[str, Counts]


def probe_run(
    directory: RunDirectory, runtime: RuntimeConfig | None, probe: str
) -> list[dict[str, Any]]:
    """Ask the exported model, and the plain one.

    Args:
        directory: A finished run.
        runtime: Where to compute; None = as the run did.
        probe: A key of ``PROBES``.

    Returns:
        One record for each model and group, and one over all groups (``group`` = ``all``): ``run``, ``probe``,
        ``model`` (``exported`` or ``plain``), ``group``, ``rows``, and ``accuracy`` of BBQ, where chance is 1/3, or of
        CrowS-Pairs ``stereotypical``, the share of pairs whose more stereotypical sentence is the more probable one,
        where 1/2 is no preference.

    Raises:
        ConfigError: The probe is unknown, the run has left no model, or its prompt stands behind its own task's text.
        AssetError: The probe's package is not installed; says how to get it.
    """
    if probe not in PROBES:
        raise ConfigError(f"probe: expected {' or '.join(PROBES)}, got {probe!r}")
    folder = exported_folder(directory)
    config = resumed_config(directory, runtime)
    if isinstance(config.method, FedPromptConfig) and config.method.placement == "after":
        raise ConfigError(
            f"probe={probe} and method.placement=after: the prompt stands behind the question of the run's own task, "
            "which a probe does not ask; expected a run with method.placement=before"
        )
    task = PROBES[probe]()
    backbone = open_workspace(whole_json(config)).backbone
    with exported_model(config, folder, backbone) as model:
        exported = _asked(backbone, task, probe, model)
    models = {"exported": exported, "plain": _asked(backbone, task, probe, {})}
    figure = "accuracy" if probe == "bbq" else "stereotypical"
    return [
        {
            "run": str(directory.path), "probe": probe, "model": name, "group": group,
            "rows": counts.total, figure: counts.correct / counts.total,
        }
        for name, groups in models.items()
        for group, counts in {**groups, "all": sum(groups.values(), Counts())}.items()
    ]  # fmt: skip


def chosen_questions(rows: tuple[Row, ...]) -> list[Row]:
    """At most ``QUESTIONS`` rows of each group, in the order of the rows."""
    by_group: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        by_group.setdefault(row.group or "", []).append(place)
    chosen: list[int] = []
    for group, places in by_group.items():
        order = numpy_generator(0, "probe", group).permutation(len(places))[:QUESTIONS]
        chosen += [places[each] for each in order]
    return [rows[place] for place in sorted(chosen)]


def _asked(backbone: Backbone, task: Task, probe: str, model: dict[str, Any]) -> Groups:
    """Hits by group of one model."""
    whole = task.splits["test"]
    rows = chosen_questions(whole) if probe == "bbq" else list(whole)
    loss = "labels" if probe == "bbq" else "vocabulary"
    encoder = build_encoder(task, backbone.tokenizer, loss=loss, max_tokens=MAX_TOKENS)  # type: ignore[arg-type]
    losses, _, correct = row_scores(
        backbone,
        encoder.encode(rows),
        head_token_ids=encoder.head_token_ids,
        label_token_ids=encoder.label_token_ids,
        **model,
    )
    if probe == "crows_pairs":
        return stereotypical(rows, losses)
    groups = sorted({row.group or "" for row in rows})
    of_rows = np.array([row.group or "" for row in rows])
    return {
        group: Counts(int((correct[of_rows == group] == 1).sum()), int((of_rows == group).sum()))
        for group in groups
    }
