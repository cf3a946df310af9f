"""One question of a verification as a Flower run of its own: for runs whose clients' rows are on nodes.

Who asks writes a folder whose manifest is the question, and submits ``action=examine run=<run whose model is asked>
out_dir=<the folder>``. The ServerApp sends the model to the client's node and writes the answer into the folder:
figures, and a summary that says that they are whole.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from safetensors.numpy import load_file, save

from fedllm_flwr import records
from fedllm_flwr.averaging import product_of
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import chosen_runtime, resumed_config
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.limits import BoundedGrid
from fedllm_flwr.models.export import import_peft
from fedllm_flwr.models.export_prompts import import_prompt
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.runs.atomic import write_bytes, write_json
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.unlearning.questions import Material, Plan
from strategies import Hosting
from strategies.examination import Examination

QUESTION = "question"
FIGURES, MATERIAL = "figures.safetensors", "material.json"


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        source: The folder of the run that the client leaves: its settings say which rows are the client's.
        client: Who is asked.
        plan: What is asked about the model; None = what the client has to ask with.
        refuses: Whether a wrapper answers every prompt that holds a text of the client's with a refusal.
    """

    source: str
    client: int
    plan: Plan | None = None
    refuses: bool = False


@dataclass
class _Account:
    """Counts bytes, and keeps what went wrong where a person looks for it."""

    run: RunDirectory

    def __post_init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def note(self, text: str) -> None:
        """One line."""
        self.run.append({"kind": "event", "text": text})

    def count(self, kind: str, direction: str, message: Message) -> None:
        """Add a message's serialised size."""
        self.bytes[f"{direction}_bytes"] += records.serialized_bytes(message)

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        """The client's answer is missing or was refused; the run's last words say why."""
        self.note(f"stopped: {reason}")


def write_question(folder: Path, question: Question) -> RunDirectory:
    """The folder of a question.

    Raises:
        ConfigError: There is a question already.
    """
    return RunDirectory.create(folder, {"experiment": "examine", QUESTION: asdict(question)})


def read_material(folder: Path) -> Material:
    """What the client has to ask with, from the folder of an answered question.

    Raises:
        ConfigError: It was not answered.
    """
    told = json.loads(_answered(folder, MATERIAL).read_bytes())
    return Material(**told | {name: tuple(told[name]) for name in ("wordings", "forms")})


def read_figures(folder: Path) -> dict[str, np.ndarray]:
    """What the model said, from the folder of an answered question.

    Raises:
        ConfigError: It was not answered.
    """
    found: dict[str, np.ndarray] = load_file(_answered(folder, FIGURES))
    return found


def examine_run(
    grid: Grid, model: str, folder: str, runtime: RuntimeConfig, overrides: Sequence[str]
) -> None:
    """Answer a question, over the nodes of a grid.

    Args:
        grid: Flower's transport.
        model: The run whose model is asked about.
        folder: The question's, which gets the answer.
        runtime: Where to compute, as far as the overrides name it, and this machine's own files.
        overrides: Of the runtime.

    Raises:
        ConfigError: A folder holds no run or no question, or the model is none that can be sent.
        RunStoppedError: The client did not answer, or what it says is not what was asked for.
    """
    run = RunDirectory.open(folder)
    question = _question(run)
    source = RunDirectory.open(question.source)
    chosen = chosen_runtime(source, runtime, overrides)
    own = replace(chosen, data_path=runtime.data_path, model_path=runtime.model_path)
    config = resumed_config(source, own)
    account, began = _Account(run), time.monotonic()
    grid = BoundedGrid(grid, config.runtime.max_message_mb)
    hosting = Hosting(grid, config.runtime.node_wait_seconds, account.note, account.count)
    hosting.refresh()
    examination = Examination(config, hosting, account, question.client)
    material = examination.material()
    write_json(run.path / MATERIAL, asdict(material))
    if question.plan is not None:
        added = adaptation_of(RunDirectory.open(model), config)
        said = examination.examine(added, question.plan, refuses=question.refuses)
        arrays = {name: np.ascontiguousarray(values) for name, values in said.items()}
        write_bytes(run.path / FIGURES, save(arrays))
    run.write_summary({**account.bytes, "seconds": time.monotonic() - began})


def adaptation_of(run: RunDirectory, config: RunConfig) -> Adaptation:
    """The model that a run has left in ``adapter/``; LoRA as a frozen update, since ranks may differ.

    Args:
        run: Finished.
        config: Of a run of the same method.
    """
    folder = run.path / "adapter"
    if isinstance(config.method, FedPromptConfig):
        prompt = import_prompt(folder)
        return Adaptation(prompt.flat, prompt.spec, fixed_ids=prompt.fixed_ids)
    _, factors = import_peft(folder)
    return Adaptation(delta={name: product_of(layer) for name, layer in factors.items()})


def _question(run: RunDirectory) -> Question:
    told: dict[str, Any] | None = run.manifest.get(QUESTION)
    if told is None:
        raise ConfigError(f"{run.path}: expected a folder with a question, got another run")
    plan = None if told["plan"] is None else Plan(**told["plan"])
    return replace(Question(**told), plan=plan)


def _answered(folder: Path, name: str) -> Path:
    if not RunDirectory.open(folder).is_finished or not (folder / name).exists():
        raise ConfigError(f"{folder}: expected an answered question with {name}, got none")
    return folder / name
