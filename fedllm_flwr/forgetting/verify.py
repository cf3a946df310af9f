"""The verification of a removal over run directories: plan, models, answers, verdict; each step kept as it is done."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.forgetting.controls import REFUSING
from fedllm_flwr.forgetting.examiner import Examiner, examiner_for
from fedllm_flwr.forgetting.request import Request
from fedllm_flwr.forgetting.rivals import (
    RUNS,
    Answers,
    Carry,
    Rival,
    answers_from,
    answers_of,
    control,
    read_answers,
    reference,
    shadow,
    utility_of,
    write_answers,
)
from fedllm_flwr.runs.atomic import write_bytes
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.seeding import derive_seed, numpy_generator
from fedllm_flwr.settings.verification import VerificationConfig
from fedllm_flwr.unlearning.attacks import logit_confidence
from fedllm_flwr.unlearning.battery import Battery, Model, Shadows, why_powerless
from fedllm_flwr.unlearning.budget import QueryBudget, least_queries
from fedllm_flwr.unlearning.questions import Material, Plan, queries
from fedllm_flwr.unlearning.verdict import CONTROLS, Verdict, by_bytes, identity, judge

VERIFICATION = "verification"
"""Folder of the new run with what every model said, and the runs that are not asked yet."""

OWN = ("unlearned", "retrain-0")
"""Answers that are of one removal alone; all others serve whatever method took the client out."""

BYTES = "arrays that differ from a model retrained from the same seed"
PLAIN_SHARE = 0.6
"""Share of the budget for rows as they are; what they leave is divided among the other ways to ask."""

MOST_CANDIDATES = 100
"""Secrets that a canary is ranked among: 6.7 bits."""


@dataclass(frozen=True)
class Verified:
    """What a verification found.

    Attributes:
        verdict: The decision.
        attacks: What each membership attack achieves against the full and the unlearned model.
        left_out: Checks that say nothing here, with the reason of each.
        queries: Of each kind.
        retraining: CPU seconds and tokens of training without the client, the mean of the retrained models.
        training: The same of all the models that were made for the verification, together.
        rows: Members and others that were asked about.
    """

    verdict: Verdict
    attacks: tuple[Mapping[str, Any], ...]
    left_out: Mapping[str, str]
    queries: Mapping[str, int]
    retraining: tuple[float, float]
    training: tuple[float, float]
    rows: tuple[int, int]


def check_verifiable(
    request: Request, settings: VerificationConfig, overrides: Sequence[str] = ()
) -> Examiner:
    """Find out whether a removal can be verified, before anything is written.

    Args:
        request: The removal.
        settings: Of the verification.
        overrides: Of the runtime, for a question that goes to the client's node.

    Returns:
        Who asks: this process where it has the rows, else the client's node.

    Raises:
        ConfigError: The budget gives too little power, or the rows or the model cannot be looked at here.
    """
    QueryBudget(settings.budget)
    return examiner_for(request.source, request.config, request.client, overrides)


def plan_of(request: Request, settings: VerificationConfig, material: Material) -> Plan:
    """How the budget is spent: most of it on rows as they are, at least what the stated power needs.

    What they leave is divided evenly: canaries, the task's own probes, and other words and pairs together.
    """
    plain = max(least_queries(), int(PLAIN_SHARE * settings.budget))
    members, others = (min(n, plain // 2) for n in (material.members, material.others))
    ways = 1 + bool(material.canaries) + bool(material.forms)
    part = (settings.budget - members - others) // ways
    reworded = int(0.6 * part) // (2 * max(1, len(material.wordings)))
    return Plan(
        members=members,
        others=others,
        reworded=min(reworded, members, others),
        paired=min(int(0.4 * part) // 2, members, others),
        probed=min(part // len(material.forms), members) if material.forms else 0,
        candidates=min(max(0, part // material.canaries - 1), MOST_CANDIDATES)
        if material.canaries
        else 0,
        relearn_steps=settings.relearn_steps,
        seed=derive_seed(request.config.seed, "verification", request.client),
    )


def spent(plan: Plan, material: Material, limit: int) -> QueryBudget:
    """The budget after a plan's queries.

    Raises:
        ConfigError: The plan asks for more than it has.
    """
    budget = QueryBudget(limit)
    for check, count in queries(plan, material).items():
        budget.spend(check, count)
    return budget


def verify(
    request: Request,
    new: RunDirectory,
    settings: VerificationConfig,
    *,
    examiner: Examiner,
    carry: Carry,
    overrides: Sequence[str],
) -> Verified:
    """Attack the new run's model, and hold it against models that never had the client.

    Args:
        request: The removal.
        new: The new run, finished; what models say is kept in it.
        settings: Of the verification.
        examiner: Who asks.
        carry: Carries the runs of the other models to their ends.
        overrides: Of the runtime.

    Raises:
        RunStoppedError: A training stopped; the same command goes on.
    """
    material = examiner.material()
    plan = plan_of(request, settings, material)
    budget = spent(plan, material, settings.budget)
    asked = Asking(request, new, plan, examiner, carry, overrides)
    full, unlearned = asked.told("full", request.source), asked.told("unlearned", new)
    same_seed = asked.made(reference(request, 0)) if request.exactness == "exact" else None
    retrained = [asked.made(reference(request, n)) for n in range(1, settings.retrains + 1)]
    shadows = [asked.made(shadow(request, n)) for n in range(settings.shadows)]
    controls = {name: asked.made(control(request, name)) for name in CONTROLS}
    shutil.rmtree(asked.folder / RUNS, ignore_errors=True)
    stay = set(unlearned.utility)
    battery = Battery(
        model_of(full, stay),
        [model_of(each, stay) for each in retrained],
        _shadows(shadows, examiner, plan),
        start={c: q for c, q in utility_of(request.source, 0).items() if c in stay},
        relearn_steps=(0, *plan.relearn_steps),
        margin=settings.margin,
        share=settings.share,
    )
    battery.left_out.update({f"in the words of {n}": why for n, why in material.unfit.items()})
    tried = {name: battery.checks(model_of(each, stay)) for name, each in controls.items()}
    verdict = judge(
        battery.checks(model_of(unlearned, stay)),
        full_auc=battery.full_auc,
        controls=tried,
        powerless=why_powerless(battery),
    )
    if same_seed is not None:
        verdict = by_bytes(identity(BYTES, same_seed.different), verdict)
    random = numpy_generator(plan.seed, "bootstrap")
    attacks = [
        line
        for name, model in (("full", full), ("unlearned", unlearned))
        for line in battery.attacks(name, model_of(model, stay), random, settings.resamples)
    ]
    made = [*retrained, *shadows, *([same_seed] if same_seed else [])]
    return Verified(
        verdict=verdict,
        attacks=tuple(attacks),
        left_out=battery.left_out,
        queries=budget.spent,
        retraining=(
            float(np.mean([each.cpu_seconds for each in retrained])),
            float(np.mean([each.tokens for each in retrained])),
        ),
        training=(sum(a.cpu_seconds for a in made), float(sum(a.tokens for a in made))),
        rows=(plan.members, plan.others),
    )


def hand_over(old: RunDirectory, new: RunDirectory) -> None:
    """Let a second removal of the same client use what models said for the first."""
    for path in sorted((old.path / VERIFICATION).glob("*.safetensors")):
        target = new.path / VERIFICATION / path.name
        if path.stem not in OWN and not target.exists():
            target.parent.mkdir(exist_ok=True)
            write_bytes(target, path.read_bytes())


@dataclass(frozen=True)
class Asking:
    """One verification's questions, and the answers that are there.

    Attributes:
        request: The removal.
        new: The new run.
        plan: What is asked.
        examiner: Who asks.
        carry: Carries the runs of other models to their ends.
        overrides: Of the runtime.
    """

    request: Request
    new: RunDirectory
    plan: Plan
    examiner: Examiner
    carry: Carry
    overrides: Sequence[str]

    @property
    def folder(self) -> Path:
        """Where answers are kept."""
        return self.new.path / VERIFICATION

    def question(self, config: str, name: str) -> str:
        """Digest of what is asked, of whom, and about which removal; what only compares runs is the new run's own."""
        own = str(self.new.manifest["fingerprint"]) if name in OWN else ""
        source = self.request.source.manifest["fingerprint"]
        about = [config, own, source, self.request.client, dataclasses.asdict(self.plan)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def told(self, name: str, run: RunDirectory) -> Answers:
        """What a run that is there says, from its file if it was asked before."""
        path = self.folder / f"{name}.safetensors"
        question = self.question(str(run.manifest["fingerprint"]), name)
        found = read_answers(path, question)
        if found is None:
            found = answers_from(run, self.new, self.examiner.examine(run, self.plan))
            write_answers(path, question, found)
        return found

    def made(self, rival: Rival) -> Answers:
        """What a model says that has to be made first."""
        refuses = rival.change == REFUSING
        return answers_of(
            rival,
            self.request,
            self.folder,
            self.new,
            self.question(rival.config.fingerprint(), rival.name),
            lambda run: self.examiner.examine(run, self.plan, refuses=refuses),
            self.carry,
            self.overrides,
        )


def model_of(answers: Answers, stay: set[int]) -> Model:
    """A model for the battery: what it said, and its utility for the clients that stay."""
    return Model(answers.arrays, {c: q for c, q in answers.utility.items() if c in stay})


def _shadows(answers: Sequence[Answers], examiner: Examiner, plan: Plan) -> Shadows | None:
    if not answers:
        return None
    losses = [
        np.concatenate([a.arrays["members/losses"], a.arrays["others/losses"]]) for a in answers
    ]
    inside = [examiner.seen(number, plan) for number in range(len(answers))]
    return Shadows(logit_confidence(np.stack(losses)), np.stack(inside))
