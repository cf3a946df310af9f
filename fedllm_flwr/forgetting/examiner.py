"""Who asks a model about the client's rows: where they are on this machine, this process does; else the client's node.

The client that leaves has the rows, so it asks; the battery sees figures, never a row. What is asked is one piece of
code for both, :class:`clients.questions.Questions`.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from clients.questions import Questions, check_examinable
from clients.shadow import inside
from clients.workspace import open_workspace
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.examining import (
    Question,
    adaptation_of,
    read_figures,
    read_material,
    write_question,
)
from fedllm_flwr.launch import launch
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.tasks.catalog import TASKS
from fedllm_flwr.unlearning.questions import SETS, Material, Plan, chosen, shaped


class Examiner(Protocol):
    """Asks models about one client's rows."""

    def material(self) -> Material:
        """What there is to ask with."""

    def examine(
        self, run: RunDirectory, plan: Plan, *, refuses: bool = False
    ) -> dict[str, np.ndarray]:
        """What a run's model says.

        Args:
            run: Finished.
            plan: What is asked.
            refuses: Whether a wrapper answers every prompt that holds a text of the client's with a refusal.

        Returns:
            By name, float64, as :func:`fedllm_flwr.unlearning.questions.sizes` lists them: flat arrays, but
            ``canaries/candidates`` [c, candidates].
        """

    def seen(self, shadow: int, plan: Plan) -> np.ndarray:
        """Which members, then others, of the plan a shadow model was trained on; bool [members + others]."""


class LocalExaminer:
    """Asks in this process: for runs whose clients' rows are on this machine.

    Args:
        config: The run that the client leaves.
        client: Whose rows.

    Raises:
        ConfigError: The method has no adapter of this kind, or the client has too few rows.
    """

    def __init__(self, config: RunConfig, client: int) -> None:
        check_examinable(config)
        self._config, self._client = config, client
        self._questions = Questions(open_workspace(whole_json(config)), client)

    def material(self) -> Material:
        """See :class:`Examiner`."""
        return self._questions.material

    def examine(
        self, run: RunDirectory, plan: Plan, *, refuses: bool = False
    ) -> dict[str, np.ndarray]:
        """See :class:`Examiner`."""
        model = adaptation_of(run, self._config)
        return shaped(self._questions.ask(model, plan, refuses=refuses), plan)

    def seen(self, shadow: int, plan: Plan) -> np.ndarray:
        """See :class:`Examiner`."""
        return drawn_inside(self._config, self._client, shadow, plan, self.material())


class NodeExaminer:
    """Lets the client's node ask, each question in a Flower run of its own: for rows that are nowhere else.

    Args:
        source: The run that the client leaves.
        config: Its settings.
        client: Whose rows.
        overrides: Of the runtime, for the ServerApp that puts the question.

    Raises:
        ConfigError: The method has no adapter of this kind.
    """

    def __init__(
        self, source: RunDirectory, config: RunConfig, client: int, overrides: Sequence[str]
    ) -> None:
        check_examinable(config)
        self._source, self._config, self._client = source.path.resolve(), config, client
        self._overrides = [o for o in overrides if o.startswith("runtime")]
        self._material: Material | None = None

    def material(self) -> Material:
        """See :class:`Examiner`; asked for once.

        Raises:
            RunStoppedError: The client's node did not answer.
        """
        if self._material is None:
            with tempfile.TemporaryDirectory(prefix="fedllm-question-") as name:
                self._put(Path(name), self._source, None, refuses=False)
                self._material = read_material(Path(name))
        return self._material

    def examine(
        self, run: RunDirectory, plan: Plan, *, refuses: bool = False
    ) -> dict[str, np.ndarray]:
        """See :class:`Examiner`.

        Raises:
            RunStoppedError: The client's node did not answer.
        """
        with tempfile.TemporaryDirectory(prefix="fedllm-question-") as name:
            self._put(Path(name), run.path.resolve(), plan, refuses=refuses)
            return shaped(read_figures(Path(name)), plan)

    def seen(self, shadow: int, plan: Plan) -> np.ndarray:
        """See :class:`Examiner`."""
        return drawn_inside(self._config, self._client, shadow, plan, self.material())

    def _put(self, folder: Path, model: Path, plan: Plan | None, *, refuses: bool) -> None:
        write_question(folder, Question(str(self._source), self._client, plan, refuses))
        config = dataclasses.replace(self._config, out_dir=str(folder))
        launch(config, ["action=examine", f"run={model}", *self._overrides])


def examiner_for(
    source: RunDirectory, config: RunConfig, client: int, overrides: Sequence[str] = ()
) -> Examiner:
    """The examiner for where the client's rows are.

    Args:
        source: The run that the client leaves.
        config: Its settings.
        client: Whose rows.
        overrides: Of the runtime, for a question that goes to the client's node.

    Raises:
        ConfigError: The rows or the model cannot be looked at.
    """
    if config.runtime.name != "deployment":
        return LocalExaminer(config, client)
    if TASKS[config.task.name].kind is None:
        raise ConfigError(
            f"action=verify, runtime=deployment and task={config.task.name}: the control by gradient ascent climbs on "
            "the client's rows, which are on its node alone; expected a task of the catalog"
        )
    return NodeExaminer(source, config, client, overrides)


def drawn_inside(
    config: RunConfig, client: int, shadow: int, plan: Plan, material: Material
) -> np.ndarray:
    """Which members, then others, of a plan a shadow model was trained on.

    Args:
        config: The run that the client leaves.
        client: Whose rows.
        shadow: Number of the model.
        plan: Which rows are drawn.
        material: How many there are.

    Returns:
        Booleans [members + others].
    """
    counts = (material.members, material.others)
    taken = inside(sum(counts), client, shadow, config.rows_seed)
    asked = zip(SETS, counts, (plan.members, plan.others), (0, counts[0]), strict=True)
    return taken[np.concatenate([chosen(n, rows, c, plan) + shift for n, rows, c, shift in asked])]
