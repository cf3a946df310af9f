"""From what models said to figures, and from figures to checks, all relative to models that were retrained.

Axes: m members (the client's training rows), o others (its held-out rows), S shadow models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.unlearning.attacks import (
    AttackResult,
    attack,
    auc,
    likelihood_ratio,
    logit_confidence,
)
from fedllm_flwr.unlearning.budget import ATTACKABLE, MARGIN
from fedllm_flwr.unlearning.distances import mean_ks_distance, null_ks_distances, relearning_area
from fedllm_flwr.unlearning.extraction import exposure
from fedllm_flwr.unlearning.verdict import Check, Side, equivalence, stated_margin, tells

Said = Mapping[str, np.ndarray]
"""What a model said; see ``fedllm_flwr.forgetting.examiner.Examiner.examine``."""

LOSS, MIN_K, LIRA = (
    "membership by loss, AUC",
    "membership by Min-K%++, AUC",
    "membership by LiRA, AUC",
)
REWORDED, PAIRED = "membership by loss in other words, mean AUC", "membership by loss in pairs, AUC"
PROBED = "members asked for in other forms, mean probability"
DISTANCE = "KS distance of the members' losses"
RELEARNING = "relearning, mean probability"
EXPOSURE, EXTRACTED = "canary exposure, bits", "canaries said word by word, share"
MEAN_UTILITY = "utility of staying clients, mean probability"
WORST_UTILITY = "utility of the worst client, probability"

MEMBERSHIP = (LOSS, MIN_K, LIRA, REWORDED, PAIRED)
"""Figures that are AUCs."""

BITS = 0.5
"""Least margin of an exposure: of a canary that was never seen it is 1.44 bits on average."""


@dataclass(frozen=True)
class Shadows:
    """What shadow models said.

    Attributes:
        confidences: Of members, then others. [S, m + o]
        inside: Whether each was trained on. bool [S, m + o]
    """

    confidences: np.ndarray
    inside: np.ndarray


@dataclass(frozen=True)
class Model:
    """A model's answers, and its utility by staying client."""

    said: Said
    utility: Mapping[int, float]


class Battery:
    """The checks of one removal.

    Args:
        full: The model before removal.
        retrained: At least 3, of different seeds.
        shadows: For the likelihood ratio; None = there are none.
        start: Utility by client before the first round; empty = not known.
        relearn_steps: 0 and the steps of the relearning curve.
        margin: Least difference that counts as none.
        share: Of the full model's difference from retrained ones, that counts as none.

    Attributes:
        left_out: Checks that say nothing here, each with the reason.

    Raises:
        ConfigError: There are less than 3 retrained models.
    """

    def __init__(
        self,
        full: Model,
        retrained: Sequence[Model],
        shadows: Shadows | None,
        *,
        start: Mapping[int, float],
        relearn_steps: Sequence[int],
        margin: float = MARGIN,
        share: float,
    ) -> None:
        self._retrained, self._shadows = list(retrained), shadows
        self._steps, self._margin, self._share, self._start = relearn_steps, margin, share, start
        self.left_out: dict[str, str] = _absent(full, shadows)
        self._full = self._figures(full)
        each = [self._figures(model) for model in retrained]
        self._null: dict[str, list[float]] = {n: [f[n] for f in each] for n in self._full}
        losses = [model.said["members/losses"] for model in retrained]
        self._null[DISTANCE] = list(null_ks_distances(losses))
        self._names = self._telling()

    @property
    def full_auc(self) -> float:
        """The best AUC on the model before removal, of the attacks that tell it from retrained ones; else of all."""
        areas = {n: self._full[n] for n in MEMBERSHIP if n in self._full}
        telling = [area for name, area in areas.items() if name in self._names]
        return max(telling or areas.values())

    @property
    def attacks_that_tell(self) -> tuple[str, ...]:
        """Names of the checks, utility apart, that tell the full model from retrained ones."""
        return tuple(n for n in self._names if n not in (MEAN_UTILITY, WORST_UTILITY))

    def checks(self, model: Model) -> list[Check]:
        """The checks of a model, the same for every one."""
        figures = self._figures(model)
        return [self._check(name, figures[name]) for name in self._names]

    def attacks(
        self, name: str, model: Model, generator: np.random.Generator, resamples: int
    ) -> list[dict[str, Any]]:
        """What each membership attack achieves against a model, with bootstrap intervals.

        Args:
            name: Of the model.
            model: The model.
            generator: Draws the resamples.
            resamples: How many.
        """
        return [
            {"attack": attacked, "model": name, "result": found}
            for attacked, found in self._results(model, generator, resamples)
        ]

    def _results(
        self, model: Model, generator: np.random.Generator, resamples: int
    ) -> list[tuple[str, AttackResult]]:
        scored = {LOSS: _by_loss(model.said)}
        if "members/min_k" in model.said:
            scored[MIN_K] = _by_min_k(model.said)
        if self._shadows is not None:
            scored[LIRA] = self._by_ratio(model.said)
        return [
            (name, attack(members, others, generator, resamples=resamples))
            for name, (members, others) in scored.items()
            if name in self._full
        ]

    def _by_ratio(self, said: Said) -> tuple[np.ndarray, np.ndarray]:
        assert self._shadows is not None  # noqa: S101  # who asks knows
        losses = np.concatenate([said["members/losses"], said["others/losses"]])
        found = likelihood_ratio(
            logit_confidence(losses), self._shadows.confidences, self._shadows.inside
        )
        count = said["members/losses"].size
        return found[:count], found[count:]

    def _figures(self, model: Model) -> dict[str, float]:
        said = model.said
        found = {LOSS: _area(_by_loss(said))}
        if "members/min_k" in said:
            found[MIN_K] = _area(_by_min_k(said))
        if self._shadows is not None:
            found[LIRA] = _area(self._by_ratio(said))
        worded = sorted(_wordings(said) - {"paired"})
        if worded:
            pairs = [(-said[f"{w}/members"], -said[f"{w}/others"]) for w in worded]
            found[REWORDED] = float(np.mean([_area(pair) for pair in pairs]))
        if "paired/members" in said:
            found[PAIRED] = _area((-said["paired/members"], -said["paired/others"]))
        probes = [values for name, values in sorted(said.items()) if name.startswith("probes/")]
        if probes:
            found[PROBED] = float(np.mean([np.exp(-losses).mean() for losses in probes]))
        losses = [each.said["members/losses"] for each in self._retrained]
        found[DISTANCE] = mean_ks_distance(said["members/losses"], losses)
        found[RELEARNING] = relearning_area(self._steps, said["relearn"].tolist())
        if "canaries/losses" in said:
            ranked = zip(said["canaries/losses"], said["canaries/candidates"], strict=True)
            found[EXPOSURE] = float(np.mean([exposure(float(own), rest) for own, rest in ranked]))
            found[EXTRACTED] = float(said["canaries/exact"].mean())
        if model.utility:
            found[MEAN_UTILITY] = float(np.mean(list(model.utility.values())))
            found[WORST_UTILITY] = min(model.utility.values())
        return found

    def _telling(self) -> list[str]:
        names = []
        for name in self._full:
            if name in (MEAN_UTILITY, WORST_UTILITY) or tells(self._check(name, self._full[name])):
                names.append(name)
                continue
            null = self._null[name]
            self.left_out[name] = (
                f"it does not tell the full model, {self._full[name]:.3g}, from retrained ones, {min(null):.3g} to "
                f"{max(null):.3g}"
            )
        return names

    def _check(self, name: str, figure: float) -> Check:
        null = self._null[name]
        if name in (MEAN_UTILITY, WORST_UTILITY):
            start = list(self._start.values()) or [float(np.mean(null))]
            before = min(start) if name == WORST_UTILITY else float(np.mean(start))
            margin = stated_margin(before, null, share=self._share, least=self._margin)
            return equivalence(name, figure, null, margin=margin, side="below")
        side: Side = "above" if name == DISTANCE else "both"
        least = BITS if name == EXPOSURE else self._margin
        margin = stated_margin(self._full[name], null, share=self._share, least=least)
        return equivalence(name, figure, null, margin=margin, side=side)


def why_powerless(battery: Battery) -> str:
    """Why nothing can be concluded, or empty: no attack tells the full model, or the best does too little."""
    if not battery.attacks_that_tell:
        return "no attack tells the full model from retrained ones: there was nothing to find"
    if battery.full_auc < ATTACKABLE:
        return f"the full model's AUC is {battery.full_auc:.3f}, below {ATTACKABLE}: there was nothing to find"
    return ""


def _absent(full: Model, shadows: Shadows | None) -> dict[str, str]:
    """Checks that cannot be made of what was said."""
    said = full.said
    found = {}
    if not full.utility:
        found[MEAN_UTILITY] = found[WORST_UTILITY] = "no client that stays has test rows"
    if shadows is None:
        found[LIRA] = "no shadow models were asked for (verification.shadows=0)"
    if "members/min_k" not in said:
        found[MIN_K] = "an answer is one token, of which none is less expected than the others"
    if not _wordings(said) - {"paired"}:
        found[REWORDED] = "the task has no other words for a question, or the budget none to spare"
    if "paired/members" not in said:
        found[PAIRED] = "the budget has no queries to spare for pairs"
    if not any(name.startswith("probes/") for name in said):
        found[PROBED] = "the task has no forms of its own to ask otherwise"
    if "canaries/losses" not in said:
        found[EXPOSURE] = found[EXTRACTED] = "the client has no canaries"
    return found


def _wordings(said: Said) -> set[str]:
    names = {name.rpartition("/")[0] for name in said if name.endswith("/members")}
    return {name for name in names if name}


def _by_loss(said: Said) -> tuple[np.ndarray, np.ndarray]:
    return -said["members/losses"], -said["others/losses"]


def _by_min_k(said: Said) -> tuple[np.ndarray, np.ndarray]:
    return said["members/min_k"], said["others/min_k"]


def _area(scores: tuple[np.ndarray, np.ndarray]) -> float:
    for each in scores:
        if each.ndim != 1 or not each.size:
            raise ConfigError(
                f"battery: expected scores [n] of members and others, got {each.shape}"
            )
    return float(auc(*scores))
