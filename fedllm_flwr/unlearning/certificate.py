"""What a client gets that asked to be forgotten: one certificate, for programs and for people."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.unlearning.attacks import Interval
from fedllm_flwr.unlearning.deletion_log import Head
from fedllm_flwr.unlearning.removal import Exactness
from fedllm_flwr.unlearning.verdict import Check, Verdict

FORMAT = 1

PROMISES: dict[Exactness, str] = {
    "exact": "the same bytes as if the client had never taken part",
    "rounding": "the same as if the client had never taken part, but for the rounding of floats",
    "approximate": "not the same as if the client had never taken part",
}

NO_VERIFICATION = (
    "No verification by attacks was made: nothing was measured of what the model still knows of the client. "
    "What is promised rests on the method alone."
)


@dataclass(frozen=True)
class Cost:
    """What something took.

    Attributes:
        cpu_seconds: CPU time of all processes, >= 0.
        flops: Floating point operations, >= 0, by the project's formulas.
    """

    cpu_seconds: float
    flops: float


@dataclass(frozen=True)
class Retained:
    """Something that the client touched and that was kept.

    Attributes:
        what: For example a checkpoint, a moment of the server optimizer, a line of a log.
        reason: Why it was kept.
    """

    what: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The record of one removal.

    Attributes:
        run: Name of the run, not its place.
        client: Who was removed.
        time: When, ISO 8601 in UTC.
        method: Key of ``removal.METHODS``; after a fallback the one that was fallen back to.
        exactness: What that method promises.
        fallen_back_from: The method whose result did not pass, or empty.
        fallen_back_because: The check that it did not pass, and why, or empty.
        verdict: Of the battery; None if it was not asked for.
        queries: Queries of each check.
        budget: Queries that were allowed.
        removal: What it cost.
        retraining: What training anew without the client costs, measured; None if it was not.
        model_sha256: Of the unlearned adapter's arrays.
        purged: What else was deleted.
        retained: What was kept, each with its reason.
        retention: Policy of the ledger, in words.
        log_head: Head of the deletion log behind this removal; None if there is no log.
        rows: Training rows and held-out rows of the client that were asked about.
        attacks: Of each membership attack on the full and the unlearned model, the intervals of its AUC and its hits.
        left_out: Checks that say nothing here, each with the reason.
        verification: What training the models for the verification cost; None if there was none.

    Raises:
        ConfigError: Something is retained without a reason.
    """

    run: str
    client: int
    time: str
    method: str
    exactness: Exactness
    verdict: Verdict | None
    queries: Mapping[str, int]
    budget: int
    removal: Cost
    retraining: Cost | None
    model_sha256: str
    purged: tuple[str, ...]
    retained: tuple[Retained, ...]
    retention: str
    log_head: Head | None = None
    fallen_back_from: str = ""
    fallen_back_because: str = ""
    rows: tuple[int, int] | None = None
    attacks: tuple[Mapping[str, Any], ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    verification: Cost | None = None

    def __post_init__(self) -> None:
        """Check that nothing is kept without a word."""
        silent = [kept.what for kept in self.retained if not kept.reason.strip()]
        if silent:
            raise ConfigError(
                f"certificate: expected a reason for what is retained, got none for {silent[0]}"
            )

    @property
    def cpu_ratio(self) -> float | None:
        """CPU time of retraining over that of the removal; None if either is not known."""
        if self.retraining is None or not self.removal.cpu_seconds:
            return None
        return self.retraining.cpu_seconds / self.removal.cpu_seconds


def as_dict(certificate: Certificate) -> dict[str, Any]:
    """The certificate as plain JSON values. What does not apply is absent, never zero or null."""
    fields = asdict(certificate)
    fields["verified_by_attacks"] = certificate.verdict is not None
    fields["queries"] = dict(certificate.queries)
    fields["queries_spent"] = sum(certificate.queries.values())
    fields["retrain_cpu_ratio"] = certificate.cpu_ratio
    fields["attacks"] = [dict(line) for line in certificate.attacks] or None
    fields["left_out"] = dict(certificate.left_out) or None
    if certificate.verdict is not None and certificate.verdict.by_attacks is None:
        del fields["verdict"]["by_attacks"]
    present = {name: value for name, value in fields.items() if value not in (None, "")}
    plain: dict[str, Any] = _plain({"format": FORMAT, **present})
    return plain


def to_markdown(certificate: Certificate) -> str:
    """The certificate for people: what was done, how well it is proved, what it cost, what is left."""
    lines = [f"# Removal of client {certificate.client} from {certificate.run}", ""]
    lines += [*_method(certificate), "", *_verification(certificate), "", *_costs(certificate), ""]
    lines += ["## What else remembers", ""]
    lines += [f"- Deleted: {name}" for name in certificate.purged]
    lines += [f"- Kept: {kept.what}. Reason: {kept.reason}" for kept in certificate.retained]
    lines += [f"- Ledger: {certificate.retention}", ""]
    return "\n".join(lines)


def _method(certificate: Certificate) -> list[str]:
    lines = [
        f"- Time: {certificate.time}",
        f"- Method: `{certificate.method}`, {certificate.exactness}: {PROMISES[certificate.exactness]}",
    ]
    if certificate.fallen_back_from:
        why = f": {certificate.fallen_back_because}" if certificate.fallen_back_because else ""
        lines.append(
            f"- Fallen back from: `{certificate.fallen_back_from}`, which did not pass{why}"
        )
    lines.append(f"- Model: SHA-256 `{certificate.model_sha256}`")
    if certificate.log_head:
        head = certificate.log_head
        lines.append(f"- Deletion log: {head.entries} entries, the last with hash `{head.sha256}`")
    return lines


def _verification(certificate: Certificate) -> list[str]:
    verdict = certificate.verdict
    if verdict is None:
        return ["## Verification", "", NO_VERIFICATION]
    spent = sum(certificate.queries.values())
    lines = [
        f"## Verification: {verdict.decision}",
        "",
        f"{verdict.reason[:1].upper()}{verdict.reason[1:]}.",
        "",
        f"- AUC of the attack before removal: {verdict.full_auc:.3f}",
        f"- Queries: {spent} of {certificate.budget}"
        + (
            f", about {certificate.rows[0]} training and {certificate.rows[1]} held-out rows"
            if certificate.rows
            else ""
        ),
        *(f"- Control `{name}`: {outcome}" for name, outcome in verdict.controls.items()),
        "",
        "| check | unlearned | retrained | difference (interval) | margin | outcome |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(check) for check in verdict.checks]
    return lines + _attacks(certificate) + _left_out(certificate)


def _attacks(certificate: Certificate) -> list[str]:
    """Of each attack, what it achieves, with bootstrap intervals."""
    if not certificate.attacks:
        return []
    lines = [
        "",
        "| attack | model | AUC (interval) | hits at 1 % false alarms (interval) |",
        "|---|---|---|---|",
    ]
    for line in certificate.attacks:
        result = line["result"]
        lines.append(
            f"| {line['attack']} | {line['model']} | {_interval(result.auc)} | {_interval(result.low_rate_hits)} |"
        )
    return lines


def _interval(found: Interval) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _left_out(certificate: Certificate) -> list[str]:
    lines = [f"- Left out: {name}: {why}" for name, why in certificate.left_out.items()]
    return ["", *lines] if lines else []


def _row(check: Check) -> str:
    null = ", ".join(f"{value:.4g}" for value in check.null) or "same bytes"
    found = check.difference
    interval = f"{found.value:+.4g} ({found.low:+.4g} to {found.high:+.4g})"
    return (
        f"| {check.name} | {check.measured:.4g} | {null} | {interval} | {check.margin:.4g}, {check.side} "
        f"| {check.outcome} |"
    )


def _costs(certificate: Certificate) -> list[str]:
    lines = ["## Cost", "", "| | CPU seconds | FLOPs |", "|---|---|---|"]
    costs = {
        "removal": certificate.removal,
        "retraining": certificate.retraining,
        "models for the verification": certificate.verification,
    }
    for name, cost in costs.items():
        if cost is not None:
            lines.append(f"| {name} | {cost.cpu_seconds:.4g} | {cost.flops:.4g} |")
    ratio = certificate.cpu_ratio
    if ratio is not None:
        lines += ["", f"Retraining takes {ratio:.4g} times the CPU time of the removal."]
    return lines


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
