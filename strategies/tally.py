"""Sums of an evaluation: checked as they arrive, added over clients, kept apart by group, and turned into figures."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm_flwr.errors import WireError
from fedllm_flwr.fairness import LEAST_ROWS, GroupSums
from strategies.exchange import ClientReply, checked_number

WORST_SHARE = 0.1
"""Of the clients: the worst decile."""
MIN_GROUP_ROWS = LEAST_ROWS
"""Groups with fewer scored rows are reported, and left out of the worst group: their accuracy is mostly chance."""


@dataclass
class Tally:
    """Sums of one evaluation over clients, kept apart from their counts until the end."""

    correct: int = 0
    total: int = 0
    loss_sum: float = 0.0
    label_tokens: int = 0
    characters: int = 0

    def add(self, sums: Mapping[str, Any]) -> None:
        """Add one client's sums."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + sums[name])

    def figures(self, kind: str) -> dict[str, float]:
        """Accuracy (where there are labels), mean loss, and bits per character (where there is text)."""
        found: dict[str, float] = {}
        if kind == "classification" and self.total:
            found["accuracy"] = self.correct / self.total
        if self.label_tokens:
            found["loss"] = self.loss_sum / self.label_tokens
        if kind == "instruction" and self.characters:
            found["bits_per_character"] = self.loss_sum / math.log(2) / self.characters
        return found


@dataclass
class SplitTally:
    """One split of one evaluation: over all clients, by client and by group.

    Attributes:
        whole: Sums over all clients.
        own: Accuracy of each client that scored rows.
        groups: Sums of each group over all clients.
    """

    whole: Tally = field(default_factory=Tally)
    own: list[float] = field(default_factory=list)
    groups: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))

    def add(self, sums: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Add one client's sums and those of its groups."""
        self.whole.add(sums)
        if sums["total"]:
            self.own.append(sums["correct"] / sums["total"])
        for name, part in groups.items():
            self.groups[name].add(part)

    def group_sums(self) -> dict[str, GroupSums]:
        """The groups' sums as the objectives of ``fairness`` read them; a row with several label tokens counts them."""
        return {
            name: GroupSums(tally.loss_sum, tally.correct, tally.label_tokens)
            for name, tally in sorted(self.groups.items())
            if tally.label_tokens
        }

    def figures(self, kind: str) -> dict[str, float]:
        """Over all rows, and for classification over clients (mean, worst, worst decile) and groups (worst, gap)."""
        found = self.whole.figures(kind)
        if kind != "classification":
            return found
        found |= client_figures(self.own)
        large = [g.correct / g.total for g in self.groups.values() if g.total >= MIN_GROUP_ROWS]
        if large:
            found["worst_group_accuracy"] = min(large)
            found["max_group_gap"] = max(large) - min(large)
        return found


def client_figures(own: Sequence[float]) -> dict[str, float]:
    """Mean over clients, the worst client, and the mean of the worst tenth of the clients (at least one).

    Args:
        own: Accuracy of each client that has rows; without any there are no figures.

    Source:
        Li et al. 2020 (q-FFL), section 4, for the worst tenth.
    """
    if not own:
        return {}
    ordered = sorted(own)
    decile = ordered[: max(1, math.ceil(WORST_SHARE * len(ordered)))]
    return {
        "worst_client_accuracy": ordered[0],
        "worst_decile_accuracy": sum(decile) / len(decile),
        "mean_client_accuracy": sum(ordered) / len(ordered),
    }


def checked_splits(
    reply: ClientReply, wanted: Sequence[str], name: str = "splits"
) -> dict[str, dict[str, Any]]:
    """A client's evaluation sums by split, each of them a number.

    Raises:
        WireError: The client did not answer, or a sum is absent, not finite, or impossible.
    """
    if reply.error:
        raise WireError(reply.error)
    splits: Any = reply.info.get(name)
    right = isinstance(splits, dict) and set(splits) == set(wanted)
    if not right or not all(isinstance(sums, dict) for sums in splits.values()):
        raise WireError(
            f"client {reply.partition_id}: expected the splits {', '.join(wanted)}, got {splits!r:.60}"
        )
    return {split: _checked(f"client {reply.partition_id}", splits[split]) for split in wanted}


def checked_groups(
    reply: ClientReply, wanted: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """A client's evaluation sums by split and group; empty if it sends none.

    Raises:
        WireError: A sum is absent, not finite, or impossible.
    """
    splits: Any = reply.info.get("groups", {})
    if not isinstance(splits, dict) or not all(isinstance(s, dict) for s in splits.values()):
        raise WireError(
            f"client {reply.partition_id}: expected groups by split, got {splits!r:.60}"
        )
    client = f"client {reply.partition_id}"
    return {
        split: {str(name): _checked(f"{client}, group {name}", sums)
                for name, sums in splits.get(split, {}).items()}
        for split in wanted
    }  # fmt: skip


def _checked(who: str, sums: Any) -> dict[str, Any]:
    if not isinstance(sums, dict):
        raise WireError(f"{who}: expected sums by name, got {sums!r:.60}")
    found = {
        name: checked_number(who, sums, name, whole=name != "loss_sum")
        for name in Tally.__dataclass_fields__
    }
    if min(found.values()) < 0 or found["correct"] > min(found["total"], found["label_tokens"]):
        raise WireError(
            f"{who}: expected sums >= 0 and no more correct than total rows and label tokens, got {found}"
        )
    return found
