"""Settings of a cascade: who answers in each tier, what a token costs there, and from which agreement on it answers."""

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from fedllm_flwr.models.catalog import MODELS, ModelRef
from fedllm_flwr.settings.tree import require

Kind = Literal["ensemble", "self_consistency"]
MEMBER_URL = re.compile(r"https?://[^\s/]+(/\S*)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class MemberConfig:
    """One who answers: one of three things, told apart by what is set.

    ``run``: a run directory, that is, its model with what the run trained (``path``: where the model is, if it was a
    local folder, which runs do not keep). ``model`` (with ``hub_id`` and ``revision``,
    or ``path``): a model of the catalog as it is. ``base_url``: a server with OpenAI's interface, where ``model`` is
    the name that it knows the model by, and ``key_variable`` the environment variable that holds the key.
    ``clusters``: of a run with prompts of clusters, each row is asked with that of its group.
    ``template``: which of the task's questions is asked, empty = ``task.template``; runs ask their own.
    """

    name: str = ""
    run: str = ""
    model: str = ""
    hub_id: str = ""
    revision: str = ""
    path: str = ""
    base_url: str = ""
    key_variable: str = ""
    template: str = ""
    clusters: bool = False

    def __post_init__(self) -> None:
        """Check that it is one of the three, with no setting of another."""
        others = ("hub_id", "revision")
        if self.run:
            self._has_no("run", "model", "base_url", "key_variable", "template", *others)
        elif self.base_url:
            self._has_no("base_url", *others, "path", "clusters")
            require(
                bool(self.model),
                f"cascade member base_url={self.base_url}: expected the name of its model, got none",
            )
            require(
                MEMBER_URL.fullmatch(self.base_url) is not None and _has_address(self.base_url),
                f"cascade member base_url: expected http:// or https:// with a host, got {self.base_url!r}",
            )
            require(
                not self.key_variable or VARIABLE.fullmatch(self.key_variable) is not None,
                "cascade member key_variable: expected the name of an environment variable, not a key",
            )
        else:
            self._has_no("model", "key_variable", "clusters")
            require(
                self.model in MODELS,
                f"cascade member: expected run, base_url, or model as one of {', '.join(MODELS)}, got {self.model!r}",
            )
            self.ref()

    def _has_no(self, kind: str, *names: str) -> None:
        for name in names:
            require(
                not getattr(self, name),
                f"cascade member with {kind}={getattr(self, kind)}: it reads no {name}, got {getattr(self, name)!r}",
            )

    def ref(self) -> ModelRef:
        """The catalog's model; only for a member that is one."""
        return ModelRef(name=self.model, hub_id=self.hub_id, path=self.path, revision=self.revision)

    @property
    def label(self) -> str:
        """Its name in recorded answers; a run is called by its folder."""
        folder = (self.run or self.path).rstrip("/").rpartition("/")[2]
        return self.name or folder or self.hub_id or self.model


def _has_address(url: str) -> bool:
    """Whether host and port can be read."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """A tier: several members that answer once each (``ensemble``), or one that is sampled (``self_consistency``).

    Prices are per token in any unit. ``rho`` in [0, 1] is how its members run: 1 one after the other, 0 all at once.
    """

    name: str
    members: tuple[MemberConfig, ...]
    kind: Kind = "ensemble"
    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 16
    price_in: float = 1.0
    price_out: float = 1.0
    rho: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges, and what belongs to the kind."""
        where = f"cascade tier {self.name!r}"
        require(
            bool(self.name)
            and self.name == self.name.strip()
            and not self.name.removeprefix("-").isdecimal(),
            f"cascade tier: expected a name that is no number, without outer spaces, got {self.name!r}",
        )
        require(bool(self.members), f"{where}: expected at least one member, got none")
        for name in ("price_in", "price_out", "temperature"):
            require(
                getattr(self, name) >= 0,
                f"{where}: expected {name} >= 0, got {getattr(self, name):g}",
            )
        names = [name.strip() for name in self.names]
        require(
            all(names) and len(set(names)) == len(names),
            f"{where}: expected members with different names, got {', '.join(map(repr, names))}",
        )
        require(0 <= self.rho <= 1, f"{where}: expected rho in [0, 1], got {self.rho:g}")
        require(
            self.max_new_tokens >= 1,
            f"{where}: expected max_new_tokens >= 1, got {self.max_new_tokens}",
        )
        if self.kind == "ensemble":
            require(
                self.samples == 1 and self.temperature == 0,
                f"{where}: members of an ensemble answer once and greedily, use kind=self_consistency for samples",
            )
            return
        require(
            len(self.members) == 1,
            f"{where}: self_consistency samples one member, got {len(self.members)}; use kind=ensemble",
        )
        require(
            self.samples >= 2,
            f"{where}: expected samples >= 2 with self_consistency, got {self.samples}",
        )
        require(
            self.temperature > 0,
            f"{where}: expected temperature > 0 with self_consistency, got 0: equal samples always agree",
        )

    @property
    def size(self) -> int:
        """k, answers to each query."""
        return self.samples if self.kind == "self_consistency" else len(self.members)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its k answers, all different."""
        if self.kind == "self_consistency":
            return tuple(f"{self.members[0].label}#{number + 1}" for number in range(self.samples))
        labels = [member.label for member in self.members]
        return tuple(
            label if labels.count(label) == 1 else f"{label}#{place + 1}"
            for place, label in enumerate(labels)
        )


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """A chain of tiers; empty where there is none.

    ``thetas``: from which agreement on each tier but the last answers; empty = chosen on validation rows for
    ``risk``, the share of wrong answers among those that a tier gives, which holds with ``confidence``.

    ``agreement``: how free texts are compared where a task has no labels, by votes for equal texts or by similarity.

    ``samples_temperature`` and ``timed_queries`` are read by ``action=cascade``: as many samples of the first tier's
    first member as it has members stand beside it, at that temperature (0 = none); and so many test queries are asked
    one by one, for their times (0 = none). ``arrivals_per_second`` is too: queries arrive at random in virtual time,
    the first tier is at the devices and the last one, of two, behind a queue (0 = no arrivals).
    """

    name: str
    tiers: tuple[TierConfig, ...] = ()
    thetas: tuple[float, ...] = ()
    risk: float = 0.05
    confidence: float = 0.95
    among: Literal["accepted", "all"] = "accepted"
    agreement: Literal["vote", "minilm", "rouge_l"] = "vote"
    samples_temperature: float = 0.0
    timed_queries: int = 0
    arrivals_per_second: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges and lengths."""
        names = [tier.name for tier in self.tiers]
        require(len(self.tiers) != 1, "cascade.tiers: expected two or more, or none, got one")
        require(
            len(set(names)) == len(names),
            f"cascade.tiers: expected different names, got {', '.join(names)}",
        )
        for name in ("risk", "confidence"):
            value = getattr(self, name)
            require(0 < value < 1, f"cascade.{name}: expected in (0, 1), got {value:g}")
        require(
            len(self.thetas) in (0, max(0, len(self.tiers) - 1)),
            f"cascade.thetas: expected one for every tier but the last, got {len(self.thetas)} for {len(self.tiers)}",
        )
        for name in ("samples_temperature", "timed_queries", "arrivals_per_second"):
            value = getattr(self, name)
            require(value >= 0, f"cascade.{name}: expected >= 0, got {value:g}")
        require(
            self.samples_temperature == 0 or not self.tiers or self.tiers[0].kind == "ensemble",
            f"cascade.samples_temperature={self.samples_temperature:g}: the first tier is samples of one member "
            "already, expected 0 beside kind=self_consistency",
        )
        require(
            self.arrivals_per_second == 0 or len(self.tiers) == 2,
            f"cascade.arrivals_per_second={self.arrivals_per_second:g}: expected two tiers, devices and a server, got "
            f"{len(self.tiers)}",
        )
        odd = [theta for theta in self.thetas if not 0 <= theta <= 1]
        require(not odd, f"cascade.thetas: expected in [0, 1], got {odd[:1]}")
