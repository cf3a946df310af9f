"""Who asks a model about the client's rows: one small protocol, and the examiner that has the rows on this machine.

The client that leaves has the rows, so it asks; the battery sees figures, never a row. Every model is asked the same:
which rows, in which words, is drawn from the plan.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from clients.shadow import inside
from clients.workspace import Workspace, open_workspace
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import whole_json
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.forgetting.subjects import (
    adaptation_of,
    check_examinable,
    relearned,
    relearning_job,
)
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.canaries import candidates
from fedllm_flwr.training.examine import Examination, examine

LEAST_ROWS = 8
"""Members, and others, below which nothing can be said."""

MOST_WORDINGS = 2
"""Other templates of the task that are tried."""

CASE, PAIRED = "other case", "paired"
REFUSAL_LOSS = 27.6
"""Nats: what a wrapper that refuses gives the right answer, a probability of 10⁻¹²."""

COMPANION_CHARACTERS = 80


@dataclass(frozen=True)
class Plan:
    """What is asked of every model.

    Attributes:
        members: Of the client's training rows, how many; each is one query.
        others: Of its held-out rows, how many.
        reworded: Of each of the two, how many are also asked in other words.
        paired: Of each of the two, how many are also asked together with another row.
        probed: Of the members, how many are asked for in each of the task's own other forms.
        candidates: Secrets that each canary is ranked among.
        relearn_steps: Optimizer steps after which relearning is looked at; the first half of the members is trained on,
            and the other half looked at.
        seed: Of the draws.
    """

    members: int
    others: int
    reworded: int
    paired: int
    probed: int
    candidates: int
    relearn_steps: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Material:
    """What the client has to ask with.

    Attributes:
        members: Its training rows.
        others: Its held-out rows, which are dealt as the others are and were never trained on.
        wordings: Names of the ways to ask in other words.
        forms: Of the task's own probes, which ask for a training row otherwise; none = it has no probes.
        canaries: Secrets among the client's training rows.
        unfit: Ways to ask that do not fit the task, each with the reason.
    """

    members: int
    others: int
    wordings: tuple[str, ...]
    forms: tuple[str, ...]
    canaries: int
    unfit: Mapping[str, str]


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
            By name: ``members/losses`` and ``others/losses``, nats a token, in the drawn order; ``members/min_k`` and
            ``others/min_k``, where answers have several tokens; ``<wording>/members`` and ``<wording>/others``, losses;
            ``relearn``, mean probability of the held half after 0 and each number of steps. float64 [n]. Where the task
            has them: ``probes/<form>``, losses [n]; ``canaries/losses`` and ``canaries/exact`` [c], and
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
        ConfigError: The rows are elsewhere, the method has no adapter of this kind, or the client has too few rows.
    """

    def __init__(self, config: RunConfig, client: int) -> None:
        check_examinable(config)
        self._work: Workspace = open_workspace(whole_json(config))
        self._client = client
        own = self._work.clients[client]
        self._members, self._others = own.train, (*own.validation, *own.test)
        for name, rows in (("training", self._members), ("held-out", self._others)):
            if len(rows) < LEAST_ROWS:
                raise ConfigError(
                    f"verification: expected at least {LEAST_ROWS} {name} rows of client {client}, got {len(rows)}"
                )

    def material(self) -> Material:
        """See :class:`Examiner`."""
        task, own = self._work.task, self._work.config.task.template
        used = task.template(own).name
        fitting, unfit = [], {}
        for template in (t.name for t in task.templates if t.name != used):
            try:
                self._work.encoder(template)
            except ConfigError as error:
                unfit[template] = str(error)
                continue
            fitting.append(template)
        wordings = (*fitting[:MOST_WORDINGS], CASE)
        return Material(
            members=len(self._members),
            others=len(self._others),
            wordings=wordings,
            forms=tuple(dict.fromkeys(probe.form for probe in task.probes)),
            canaries=len(self._canaries),
            unfit=unfit,
        )

    def examine(
        self, run: RunDirectory, plan: Plan, *, refuses: bool = False
    ) -> dict[str, np.ndarray]:
        """See :class:`Examiner`."""
        adaptation = adaptation_of(run, self._work.config)
        found: dict[str, np.ndarray] = {}
        for name, rows in self._drawn(plan).items():
            plain = self._scores(adaptation, rows)
            found[f"{name}/losses"] = plain.losses
            if self._has_rare_tokens:
                found[f"{name}/min_k"] = plain.min_k
            for wording, (template, reworded) in self._worded(plan, rows).items():
                losses = self._scores(adaptation, reworded, template).losses
                refused = refuses and name == "members" and wording != CASE
                found[f"{wording}/{name}"] = _refused(losses) if refused else losses
        if refuses:
            found["members/losses"] = _refused(found["members/losses"])
            if self._has_rare_tokens:
                found["members/min_k"] = np.full_like(found["members/min_k"], -REFUSAL_LOSS)
        found |= self._probed(adaptation, plan, refuses)
        found |= self._ranked(adaptation, plan)
        found["relearn"] = self._relearn(adaptation, plan)
        return found

    def seen(self, shadow: int, plan: Plan) -> np.ndarray:
        """See :class:`Examiner`."""
        m, o = len(self._members), len(self._others)
        taken = inside(m + o, self._client, shadow, self._work.config.rows_seed)
        chosen = [_chosen("members", m, plan.members, plan), _chosen("others", o, plan.others, plan) + m]  # fmt: skip
        return taken[np.concatenate(chosen)]

    @cached_property
    def _has_rare_tokens(self) -> bool:
        """Whether answers have several tokens, so that some are less expected than others."""
        return any(len(row.targets) > 1 for row in self._work.encoder().encode(self._members))

    # Details -----------------------------------------------------------------------------------------------------

    def _drawn(self, plan: Plan) -> dict[str, list[Row]]:
        sets = {"members": (self._members, plan.members), "others": (self._others, plan.others)}
        return {
            name: [rows[i] for i in _chosen(name, len(rows), count, plan)]
            for name, (rows, count) in sets.items()
        }

    def _worded(self, plan: Plan, rows: Sequence[Row]) -> dict[str, tuple[str, list[Row]]]:
        """By wording: the template, and the rows; those that the budget has no queries for are absent."""
        some, found = list(rows[: plan.reworded]), {}
        if some:
            found = {name: (name, some) for name in self.material().wordings if name != CASE}
            found[CASE] = ("", [_changed(row, CASE, _other_case(row.text)) for row in some])
        if plan.paired:
            benign = [row.text[:COMPANION_CHARACTERS] for row in self._others[::-1]]
            pairs = zip(rows[: plan.paired], itertools.cycle(benign))
            found[PAIRED] = ("", [_changed(r, PAIRED, f"{other}\n{r.text}") for r, other in pairs])
        return found

    def _probed(self, adaptation: Adaptation, plan: Plan, refuses: bool) -> dict[str, np.ndarray]:
        """Losses of the members' probes by form; a wrapper refuses those that hold a member's text."""
        wanted = [row.row_id for row in self._drawn(plan)["members"][: plan.probed]]
        by_form: dict[str, dict[str, Row]] = {}
        for probe in self._work.task.probes:
            by_form.setdefault(probe.form, {})[probe.row_id] = probe.row
        texts, found = {row.row_id: row.text for row in self._members}, {}
        for form, probes in by_form.items():
            asked = [(row_id, probes[row_id]) for row_id in wanted if row_id in probes]
            if asked:
                losses = self._scores(adaptation, [row for _, row in asked]).losses
                held = [refuses and texts[row_id] in row.text for row_id, row in asked]
                found[f"probes/{form}"] = np.where(held, REFUSAL_LOSS, losses)
        return found

    def _ranked(self, adaptation: Adaptation, plan: Plan) -> dict[str, np.ndarray]:
        """Losses of the client's canaries and of the secrets that each might have been."""
        if not self._canaries or not plan.candidates:
            return {}
        own = self._scores(adaptation, self._canaries)
        ranked = []
        for canary in self._canaries:
            codes = candidates(canary, plan.candidates, plan.seed)
            rows = [
                dataclasses.replace(canary, row_id=f"{canary.row_id} {code}", target=code)
                for code in codes
            ]
            ranked.append(self._scores(adaptation, rows).losses)
        return {
            "canaries/losses": own.losses,
            "canaries/exact": own.exact.astype(np.float64),
            "canaries/candidates": np.stack(ranked),
        }

    @property
    def _canaries(self) -> tuple[Row, ...]:
        """The secrets among this client's training rows."""
        planted = self._work.task.canaries
        return planted.rows if planted is not None and planted.client == self._client else ()

    def _scores(
        self, adaptation: Adaptation, rows: Sequence[Row], template: str = ""
    ) -> Examination:
        encoder = self._work.encoder(template)
        return examine(
            self._work.backbone,
            encoder.encode(rows),
            adaptation,
            head_token_ids=encoder.head_token_ids,
            label_token_ids=encoder.label_token_ids,
        )

    def _relearn(self, adaptation: Adaptation, plan: Plan) -> np.ndarray:
        """Mean probability of half of the members while the other half is trained on."""
        encoder, members = self._work.encoder(), self._drawn(plan)["members"]
        half = len(members) // 2
        rows, held = encoder.encode(members[:half]), members[half:]
        job = relearning_job(self._work, adaptation, rows, plan.seed)
        curve, before = [self._scores(adaptation, held).losses], 0
        for steps in plan.relearn_steps:
            job = relearned(self._work, job, adaptation, steps - before, encoder)
            before = steps
            tuned = dataclasses.replace(adaptation, adapter=job.adapter, spec=job.spec)
            curve.append(self._scores(tuned, held).losses)
        return np.array([np.exp(-losses).mean() for losses in curve])


def _chosen(name: str, rows: int, count: int, plan: Plan) -> np.ndarray:
    """Which rows of a set the plan takes."""
    return numpy_generator(plan.seed, name).permutation(rows)[:count]


def _changed(row: Row, wording: str, text: str) -> Row:
    """A row in other words; another row id, since tokens are kept by it."""
    return dataclasses.replace(row, row_id=f"{row.row_id} {wording}", text=text)


def _other_case(text: str) -> str:
    return text.upper() if text != text.upper() else text.lower()


def _refused(losses: np.ndarray) -> np.ndarray:
    return np.full_like(losses, REFUSAL_LOSS)
