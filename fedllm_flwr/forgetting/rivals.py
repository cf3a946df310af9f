"""The other models of a verification: retrained references, shadow models, and controls that have not forgotten.

Each is a run of its own below ``verification/runs`` of the new run, goes on where it was killed, and is deleted once it
was asked: shadow models and controls hold the client. What stays is what they said (:class:`Answers`).
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as pack_arrays

from fedllm_flwr.config import RunConfig
from fedllm_flwr.forgetting.controls import CHANGES
from fedllm_flwr.forgetting.models import scrubbed
from fedllm_flwr.forgetting.request import Request
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.atomic import write_bytes
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.environment import environment
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.unlearning.distances import different_arrays
from strategies.observer import UNMEASURED

Carry = Callable[[RunConfig, Sequence[str], str], Any]
"""Carries a prepared run to its end: its configuration, the overrides that find it again, and its directory."""

RUNS = "runs"
SEEDS = 2**31
ADDRESS = "sha256 of the question"


@dataclass(frozen=True)
class Rival:
    """A model to be made.

    Attributes:
        name: Of its folder and its answers.
        config: Of its run.
        change: How a control is made of the full model; None = it is trained from the start.
    """

    name: str
    config: RunConfig
    change: str | None = None


@dataclass(frozen=True)
class Answers:
    """What a model said, and what else is told of it.

    Attributes:
        arrays: See :meth:`fedllm_flwr.forgetting.examiner.Examiner.examine`.
        utility: Of each staying client, the mean probability of a right answer on its own held-out rows.
        cpu_seconds: Of its training, as the clients told them.
        tokens: Trained on.
        different: Names of the arrays in which its last checkpoint differs from the new run's.
    """

    arrays: dict[str, np.ndarray]
    utility: dict[int, float]
    cpu_seconds: float
    tokens: int
    different: tuple[str, ...]


def reference(request: Request, number: int) -> Rival:
    """A run that never had the client, on the same rows; number 0 has the seed of the run, the others their own."""
    seed = request.config.seed
    drawn = derive_seed(seed, "retrain", number) % SEEDS if number else seed
    return Rival(f"retrain-{number}", _config(request, drawn, removed=True))


def shadow(request: Request, number: int) -> Rival:
    """A run in which the client trained on a half of its rows, the ``number``-th."""
    drawn = derive_seed(request.config.seed, "shadow", number) % SEEDS
    config = _config(request, drawn, removed=False)
    marked = dataclasses.replace(config.unlearning, shadowed=request.client, shadow=number)
    return Rival(f"shadow-{number}", dataclasses.replace(config, unlearning=marked))


def control(request: Request, name: str) -> Rival:
    """The full model under an unlearner that does not unlearn."""
    return Rival(f"control-{name}", _config(request, request.config.seed, removed=True), name)


def _config(request: Request, seed: int, *, removed: bool) -> RunConfig:
    """The run's settings without what it keeps of its clients, on the same dealt rows."""
    config, kept = request.new_config(), request.config
    gone = config.unlearning.removed if removed else kept.unlearning.removed
    unlearning = dataclasses.replace(kept.unlearning, removed=gone, removal="none", exactness="")
    if unlearning.name == "ledger":
        unlearning = dataclasses.replace(unlearning, name="none", retention="")
    off = {f.name: False for f in dataclasses.fields(config.baselines) if f.type is bool}
    return dataclasses.replace(
        config,
        baselines=dataclasses.replace(config.baselines, **off),  # type: ignore[arg-type]
        client=kept.client,
        seed=seed,
        data_seed=kept.rows_seed,
        evaluate_every=kept.num_rounds,
        keep_checkpoints=1,
        unlearning=unlearning,
    )


def answers_of(
    rival: Rival, request: Request, folder: Path, new: RunDirectory, question: str,
    ask: Callable[[RunDirectory], dict[str, np.ndarray]], carry: Carry, overrides: Sequence[str],
) -> Answers:  # fmt: skip
    """Make a model and ask it, or read what it said before.

    Args:
        rival: The model.
        request: The removal.
        folder: ``verification`` of the new run.
        new: The new run.
        question: Digest of what is asked and of whom; answers to another one are not read.
        ask: Asks.
        carry: Carries its run to its end.
        overrides: Of the runtime.

    Raises:
        RunStoppedError: Its training stopped; the same command goes on.
    """
    kept = folder / f"{rival.name}.safetensors"
    found = read_answers(kept, question)
    if found is not None:
        return found
    place = folder / RUNS / rival.name
    run = _laid_out(rival, request, place)
    config = dataclasses.replace(rival.config, out_dir=str(place))
    carry(config, ["action=resume", f"run={place.resolve()}", *overrides], str(place))
    told = answers_from(run, new, ask(run))
    write_answers(kept, question, told)
    shutil.rmtree(place)
    return told


def answers_from(run: RunDirectory, new: RunDirectory, arrays: dict[str, np.ndarray]) -> Answers:
    """What a finished run said, with what its records tell."""
    trained = run.records("client")
    return Answers(
        arrays,
        utility_of(run),
        sum(float(record["cpu_seconds"]) for record in trained),
        sum(int(record["tokens"]) for record in trained),
        different_arrays(_model(run), _model(new)),
    )


def utility_of(run: RunDirectory, server_round: int | None = None) -> dict[int, float]:
    """Of each client that was evaluated, the mean probability of a right token on its test rows; of the last round."""
    measured = [r for r in run.records("evaluation") if r["split"] == "test" and r["label_tokens"]]
    if server_round is None:
        server_round = max((int(r["round"]) for r in measured), default=0)
    return {
        int(r["partition_id"]): float(np.exp(-r["loss_sum"] / r["label_tokens"]))
        for r in measured
        if int(r["round"]) == server_round
    }


def write_answers(path: Path, question: str, answers: Answers) -> None:
    """Keep what a model said, in one step."""
    rest = {f.name: getattr(answers, f.name) for f in dataclasses.fields(answers)[1:]}
    told = json.dumps({**rest, "different": list(answers.different)})
    arrays = {name: np.ascontiguousarray(values) for name, values in answers.arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, pack_arrays(arrays, metadata={ADDRESS: question, "told": told}))


def read_answers(path: Path, question: str) -> Answers | None:
    """What a model said to a question; None if it was not asked this one, or the file is damaged."""
    try:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata: Mapping[str, str] = header["__metadata__"]
        arrays = parse_arrays(content)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    if metadata.get(ADDRESS) != question:
        return None
    told = json.loads(metadata["told"])
    utility = {int(client): value for client, value in told["utility"].items()}
    return Answers(arrays, utility, told["cpu_seconds"], told["tokens"], tuple(told["different"]))


def _laid_out(rival: Rival, request: Request, place: Path) -> RunDirectory:
    """The rival's run directory, new, or as an earlier process left it."""
    fingerprint = rival.config.fingerprint()
    if (place / "manifest.json").exists():
        run = RunDirectory.open(place)
        if run.manifest["fingerprint"] == fingerprint:
            return run
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if rival.change is not None:
        _save_changed(rival, request, place)
    manifest = {
        "experiment": rival.config.experiment,
        "fingerprint": fingerprint,
        "seed": rival.config.seed,
        "config": json.loads(rival.config.to_json()),
        "environment": environment(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return RunDirectory.create(place, manifest)


def _save_changed(rival: Rival, request: Request, place: Path) -> None:
    """The full model's last checkpoint after a control's change, as one that has still to be evaluated."""
    assert rival.change is not None  # noqa: S101  # it is a control
    saved = checkpoints.latest(request.source.checkpoints)
    assert saved is not None  # noqa: S101  # the run is finished
    changed = CHANGES[rival.change](request, saved.arrays)
    state = {**scrubbed(saved.state, request.client), UNMEASURED: True}
    checkpoints.save(place / "checkpoints", saved.server_round, changed, state, keep=1)


def _model(run: RunDirectory) -> dict[str, np.ndarray]:
    """Arrays of a run's last checkpoint."""
    saved = checkpoints.latest(run.checkpoints)
    return {} if saved is None else saved.arrays
