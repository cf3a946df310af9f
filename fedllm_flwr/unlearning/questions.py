"""What is asked of every model in a verification: how many rows, in which words, and what the answers are called.

The client that leaves has the rows, so it asks, perhaps on another machine; what comes back is figures by name, whose
sizes are known beforehand.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.seeding import numpy_generator

PAIRED = "paired"
"""The wording in which a row is asked about together with another one."""

SETS = ("members", "others")
"""The client's training rows, and rows that are dealt alike and were never trained on."""


@dataclass(frozen=True)
class Plan:
    """What is asked of every model.

    Attributes:
        members: Of the client's training rows, how many; each is one query.
        others: Of its held-out rows, how many.
        reworded: Of each of the two, how many are also asked in other words.
        paired: Of each of the two, how many are also asked together with another row.
        probed: Of the members, how many are asked for in each of the task's own other forms.
        candidates: Secrets that each canary is ranked among; 0 = canaries are not asked for.
        relearn_steps: Optimizer steps after which relearning is looked at, rising; the first half of the members is
            trained on, and the other half looked at. Empty = no relearning.
        seed: Of the draws.

    Raises:
        ConfigError: A number is negative, more rows are asked about again than at all, or the steps do not rise.
    """

    members: int
    others: int
    reworded: int
    paired: int
    probed: int
    candidates: int
    relearn_steps: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "relearn_steps", tuple(self.relearn_steps))
        steps = (0, *self.relearn_steps)
        both = min(self.members, self.others)
        counts = (
            self.members,
            self.others,
            self.reworded,
            self.paired,
            self.probed,
            self.candidates,
        )
        if min(counts) < 0 or max(self.reworded, self.paired) > both or self.probed > self.members:
            raise ConfigError(
                f"plan: expected counts >= 0 and no more rows asked again than at all, got {counts}"
            )
        if list(steps) != sorted(set(steps)):
            raise ConfigError(
                f"plan: expected rising steps from 1 on, got {list(self.relearn_steps)}"
            )


@dataclass(frozen=True)
class Material:
    """What a client has to ask with; counts and names, which may be told to a server.

    Attributes:
        members: Its training rows.
        others: Its held-out rows, which are dealt as the others are and were never trained on.
        wordings: Names of the ways to ask in other words.
        forms: Of the task's own probes, which ask for a training row otherwise; those that every member has.
        canaries: Secrets among the client's training rows.
        unfit: Ways to ask that do not fit the task, each with the reason.
        several_tokens: Whether answers have several tokens, so that some are less expected than others.
    """

    members: int
    others: int
    wordings: tuple[str, ...]
    forms: tuple[str, ...]
    canaries: int
    unfit: Mapping[str, str]
    several_tokens: bool = False


def sizes(plan: Plan, material: Material) -> dict[str, int]:
    """The arrays that a model's answers are, and how many values each has.

    ``<set>/losses`` are nats a token; ``<set>/min_k`` Min-K%++ scores; ``<wording>/<set>`` losses in other words;
    ``probes/<form>`` losses of members in another form; ``relearn`` the mean probability of the held half before and
    after each number of steps; ``canaries/losses`` nats a token, ``canaries/candidates`` the same of each one's
    candidates, and ``canaries/exact`` 1 where greedy decoding says the code.
    """
    found: dict[str, int] = {}
    for name, count in zip(SETS, (plan.members, plan.others), strict=True):
        found[f"{name}/losses"] = count
        if material.several_tokens:
            found[f"{name}/min_k"] = count
        again = dict.fromkeys(material.wordings, plan.reworded) | {PAIRED: plan.paired}
        found |= {f"{wording}/{name}": rows for wording, rows in again.items() if rows}
    found |= {f"probes/{form}": plan.probed for form in material.forms if plan.probed}
    if plan.relearn_steps:
        found["relearn"] = len(plan.relearn_steps) + 1
    if plan.candidates and material.canaries:
        found |= {
            "canaries/losses": material.canaries,
            "canaries/candidates": material.canaries * plan.candidates,
            "canaries/exact": material.canaries,
        }
    return found


def queries(plan: Plan, material: Material) -> dict[str, int]:
    """The queries that a plan puts to one model; every other model is asked the same, which is not counted."""
    return {
        "membership": plan.members + plan.others,
        "in other words": 2 * plan.reworded * len(material.wordings),
        "in pairs": 2 * plan.paired,
        "in other forms": plan.probed * len(material.forms),
        "canaries": material.canaries * (plan.candidates + 1) if plan.candidates else 0,
    }


def shaped(said: Mapping[str, np.ndarray], plan: Plan) -> dict[str, np.ndarray]:
    """Flat answers as the battery reads them: the candidates of each canary as a row of their own."""
    found = dict(said)
    if "canaries/candidates" in found:
        found["canaries/candidates"] = found["canaries/candidates"].reshape(-1, plan.candidates)
    return found


def chosen(name: str, rows: int, count: int, plan: Plan) -> np.ndarray:
    """Which rows of a set a plan takes, in the order in which they are asked about.

    Args:
        name: Of the set.
        rows: How many it has.
        count: How many are taken.
        plan: Whose seed draws them.
    """
    return numpy_generator(plan.seed, name).permutation(rows)[:count]
