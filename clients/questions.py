"""What a client asks a model about its own rows, so that a verification sees figures and never a row.

The members are its training rows, the others its held-out rows. Which of them, in which words, is drawn from the plan,
so that every model is asked the same.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from clients.relearning import relearned, relearning_job
from clients.workspace import Workspace
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.generation import Adaptation, Generator
from fedllm_flwr.models.generation_losses import continuation_losses
from fedllm_flwr.settings.methods import FedLoraConfig, FedPromptConfig
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.canaries import candidates
from fedllm_flwr.training.examine import Examination, examine, prompt_of
from fedllm_flwr.unlearning.questions import PAIRED, SETS, Material, Plan, chosen

LEAST_ROWS = 8
"""Members, and others, below which nothing can be said."""

MOST_WORDINGS = 2
"""Other templates of the task that are tried."""

CASE = "other case"
REFUSAL_LOSS = 27.6
"""Nats: what a wrapper that refuses gives the right answer, a probability of 10⁻¹²."""

COMPANION_CHARACTERS = 80

Worded = tuple[str, list[Row]]
"""A template's name, and rows."""


class Questions:
    """Asks models about the rows of one client.

    Args:
        work: The run that the client leaves.
        client: Whose rows.

    Raises:
        ConfigError: The run's model is no adapter that all clients share, or the client has too few rows.
    """

    def __init__(self, work: Workspace, client: int) -> None:
        check_examinable(work.config)
        self._work = work
        own, planted = work.clients[client], work.task.canaries
        self._canaries = planted.rows if planted and planted.client == client else ()
        self._members, self._others = own.train, (*own.validation, *own.test)
        self._probes: dict[str, dict[str, Row]] = {}
        for probe in work.task.probes:
            self._probes.setdefault(probe.form, {})[probe.row_id] = probe.row
        for name, rows in (("training", self._members), ("held-out", self._others)):
            if len(rows) < LEAST_ROWS:
                raise ConfigError(
                    f"verification: expected at least {LEAST_ROWS} {name} rows of client {client}, got {len(rows)}"
                )

    @cached_property
    def material(self) -> Material:
        """What there is to ask with."""
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
        ids = {row.row_id for row in self._members}
        encoded = self._work.encoder().encode(self._members)
        return Material(
            members=len(self._members),
            others=len(self._others),
            wordings=(*fitting[:MOST_WORDINGS], CASE),
            forms=tuple(form for form, rows in self._probes.items() if ids <= set(rows)),
            canaries=len(self._canaries),
            unfit=unfit,
            several_tokens=any(len(row.targets) > 1 for row in encoded),
        )

    def ask(self, model: Adaptation, plan: Plan, *, refuses: bool = False) -> dict[str, np.ndarray]:
        """What a model says.

        Args:
            model: What a run has added to the frozen model.
            plan: What is asked.
            refuses: Whether a wrapper answers every prompt that holds a text of a member with a refusal.

        Returns:
            Flat float64 arrays, as :func:`fedllm_flwr.unlearning.questions.sizes` lists them, in the drawn order.

        Raises:
            ConfigError: The plan asks about more rows than there are.
            RunStoppedError: Relearning broke down.
        """
        found: dict[str, np.ndarray] = {}
        for name, rows in self._drawn(plan).items():
            plain = self._scores(model, rows)
            found[f"{name}/losses"] = plain.losses
            if self.material.several_tokens:
                found[f"{name}/min_k"] = plain.min_k
            for wording, (template, reworded) in self._worded(plan, rows).items():
                losses = self._scores(model, reworded, template).losses
                refused = refuses and name == "members" and wording != CASE
                found[f"{wording}/{name}"] = _refused(losses) if refused else losses
        if refuses:
            found["members/losses"] = _refused(found["members/losses"])
            if self.material.several_tokens:
                found["members/min_k"] = np.full_like(found["members/min_k"], -REFUSAL_LOSS)
        found |= self._probed(model, plan, refuses)
        found |= self._ranked(model, plan)
        if plan.relearn_steps:
            found["relearn"] = self._relearn(model, plan)
        return found

    def _drawn(self, plan: Plan) -> dict[str, list[Row]]:
        found = {}
        sets = zip(SETS, (self._members, self._others), (plan.members, plan.others), strict=True)
        for name, rows, count in sets:
            if count > len(rows):
                raise ConfigError(
                    f"plan: expected at most the {len(rows)} {name} that there are, got {count}"
                )
            found[name] = [rows[i] for i in chosen(name, len(rows), count, plan)]
        return found

    def _worded(self, plan: Plan, rows: Sequence[Row]) -> dict[str, Worded]:
        """By wording: the template, and the rows; those that the plan has no queries for are absent."""
        some, found = list(rows[: plan.reworded]), dict[str, Worded]()
        if some:
            found = {name: (name, some) for name in self.material.wordings if name != CASE}
            found[CASE] = ("", [_changed(row, CASE, _other_case(row.text)) for row in some])
        if plan.paired:
            benign = [row.text[:COMPANION_CHARACTERS] for row in self._others[::-1]]
            pairs = zip(rows[: plan.paired], itertools.cycle(benign), strict=False)
            found[PAIRED] = ("", [_changed(r, PAIRED, f"{other}\n{r.text}") for r, other in pairs])
        return found

    def _probed(self, model: Adaptation, plan: Plan, refuses: bool) -> dict[str, np.ndarray]:
        """Losses of the members' probes by form; a wrapper refuses those that hold a member's text."""
        members, found = self._drawn(plan)["members"][: plan.probed], {}
        for form in self.material.forms if members else ():
            rows = [self._probes[form][row.row_id] for row in members]
            losses = self._scores(model, rows).losses
            held = [refuses and m.text in row.text for m, row in zip(members, rows, strict=True)]
            found[f"probes/{form}"] = np.where(held, REFUSAL_LOSS, losses)
        return found

    def _ranked(self, model: Adaptation, plan: Plan) -> dict[str, np.ndarray]:
        """How likely each canary's code is beside others; all are computed alike, so that ties are ties."""
        if not self._canaries or not plan.candidates:
            return {}
        encoder, generator = self._work.encoder(), Generator(self._work.backbone, model)
        own: list[float] = []
        others: list[float] = []
        for canary, encoded in zip(self._canaries, encoder.encode(self._canaries), strict=True):
            tried = [
                dataclasses.replace(canary, row_id=f"{canary.row_id} {code}", target=code)
                for code in candidates(canary, plan.candidates, plan.seed)
            ]
            tokens = [tuple(e.targets.tolist()) for e in (encoded, *encoder.encode(tried))]
            losses = continuation_losses(generator, prompt_of(encoded), tokens)
            first, *rest = (float(each.mean()) for each in losses)
            own.append(first)
            others.extend(rest)
        return {
            "canaries/losses": np.array(own),
            "canaries/candidates": np.array(others),
            "canaries/exact": self._scores(model, self._canaries).exact.astype(np.float64),
        }

    def _scores(self, model: Adaptation, rows: Sequence[Row], template: str = "") -> Examination:
        encoder = self._work.encoder(template)
        return examine(
            self._work.backbone,
            encoder.encode(rows),
            model,
            head_token_ids=encoder.head_token_ids,
            label_token_ids=encoder.label_token_ids,
        )

    def _relearn(self, model: Adaptation, plan: Plan) -> np.ndarray:
        """Mean probability of half of the members while the other half is trained on."""
        encoder, members = self._work.encoder(), self._drawn(plan)["members"]
        half = len(members) // 2
        rows, held = encoder.encode(members[:half]), members[half:]
        job = relearning_job(self._work, model, rows, plan.seed)
        curve, before = [self._scores(model, held).losses], 0
        for steps in plan.relearn_steps:
            job, before = relearned(self._work, job, model, steps - before, encoder), steps
            tuned = dataclasses.replace(model, adapter=job.adapter, spec=job.spec)
            curve.append(self._scores(tuned, held).losses)
        return np.array([np.exp(-losses).mean() for losses in curve])


def check_examinable(config: RunConfig) -> None:
    """Refuse runs whose model is not one adapter that all clients share.

    Raises:
        ConfigError: Names the setting.
    """
    method = config.method
    if not isinstance(method, FedLoraConfig | FedPromptConfig):
        raise ConfigError(
            f"action=verify and method={method.name}: expected fedlora or fedprompt, whose model is an adapter"
        )
    if isinstance(method, FedPromptConfig) and (method.personal_length or method.cluster_length):
        raise ConfigError(
            "action=verify, method.personal_length and method.cluster_length: the model that is attacked is one that "
            "all clients share, use 0"
        )


def _changed(row: Row, wording: str, text: str) -> Row:
    """A row in other words; another row id, since tokens are kept by it."""
    return dataclasses.replace(row, row_id=f"{row.row_id} {wording}", text=text)


def _other_case(text: str) -> str:
    return text.upper() if text != text.upper() else text.lower()


def _refused(losses: np.ndarray) -> np.ndarray:
    return np.full_like(losses, REFUSAL_LOSS)
