"""The federated result beside its baselines, and what the comparison says in words."""

import math
from dataclasses import dataclass

from fedllm_flwr.runs.snapshot import Record, Snapshot

BASELINES = {
    "majority": "Majority class",
    "bag_of_words": "Bag of words",
    "persistence": "The last value again",
    "logistic_on_states": "Logistic regression on pooled reservoir states",
    "zero_shot": "Zero-shot base model",
    "local_only": "Local-only training",
    "centralised": "Centralised training",
    "local_tuning": "Federated, then tuned by each client",
}
OF_SERIES = ("persistence", "logistic_on_states")
"""Baselines of tasks and methods that read numbers; others do not lack them."""
TEMPLATE = "template_"
"""Begins the names of the baselines that are hard prompts alone."""
SENTENCE_NAMES = {
    "majority": "the majority class",
    "bag_of_words": "the bag of words",
    "persistence": "repeating the last value",
    "logistic_on_states": "logistic regression on the reservoir's states",
    "zero_shot": "the zero-shot base model",
    "local_only": "local-only training",
    "centralised": "centralised training",
    "local_tuning": "the same, tuned by each client",
}
WORST = {
    "worst_client_accuracy": "worst client",
    "worst_decile_accuracy": "worst decile",
    "worst_group_accuracy": "worst group",
}
"""Accuracies of those that are served worst: a client, the mean of the worst tenth of clients, a group of rows."""
METRICS = {
    "accuracy": "accuracy",
    "bits_per_character": "bits per character",
    "loss": "loss",
}
FEDERATED = "federated"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Result:
    """One row of the result table; a figure that does not apply is None.

    Attributes:
        name: ``federated`` or the baseline's name.
        label: The name as a table shows it.
        accuracy: Fraction of test rows that are right, in [0, 1].
        interval: 95 % interval of the accuracy.
        loss: Mean test loss in nats.
        bits_per_character: Test loss per character of text, in bits.
        worst_client_accuracy: The lowest accuracy of any client.
        worst_decile_accuracy: Mean over the tenth of the clients with the lowest accuracies, at least one.
        worst_group_accuracy: The lowest accuracy of any group with enough rows.
        detail: How the row was made.
    """

    name: str
    label: str
    accuracy: float | None = None
    interval: Interval | None = None
    loss: float | None = None
    bits_per_character: float | None = None
    worst_client_accuracy: float | None = None
    worst_decile_accuracy: float | None = None
    worst_group_accuracy: float | None = None
    detail: str = ""

    def value(self, metric: str) -> float | None:
        """The figure of one of ``METRICS``."""
        figures = {
            "accuracy": self.accuracy,
            "bits_per_character": self.bits_per_character,
            "loss": self.loss,
        }
        return figures[metric]


def result_rows(snapshot: Snapshot) -> list[Result]:
    """The result table: baselines in their fixed order, then the federated method when a round was evaluated."""
    total = count_test_rows(snapshot)[1]
    latest = {record["name"]: record for record in snapshot.of("baseline")}
    order = [*BASELINES, *sorted(set(latest) - set(BASELINES))]
    rows = [_baseline(latest[name], total) for name in order if name in latest]
    federated = _federated(snapshot)
    return [*rows, federated] if federated else rows


def worst_columns(rows: list[Result]) -> dict[str, str]:
    """Which of ``WORST`` a table shows: those with a figure; the decile only where it is not just the worst client."""
    shown = {
        name: label for name, label in WORST.items()
        if any(getattr(row, name) is not None for row in rows)
    }  # fmt: skip
    if all(row.worst_decile_accuracy in (None, row.worst_client_accuracy) for row in rows):
        shown.pop("worst_decile_accuracy", None)
    return shown


def main_metric(rows: list[Result]) -> str:
    """The metric that the rows are compared by: accuracy where any row has one, else bits per character, else loss."""
    return next((m for m in METRICS if any(row.value(m) is not None for row in rows)), "loss")


def count_test_rows(snapshot: Snapshot) -> tuple[int, int]:
    """Right and all test rows of all clients in the round that is reported; zeros when they were not counted."""
    chosen = [
        record
        for record in snapshot.of("evaluation")
        if record.get("split") == "test"
        and record.get("round") == snapshot.reported_round
        and "correct" in record
    ]
    return sum(r["correct"] for r in chosen), sum(r["total"] for r in chosen)


def wilson_interval(correct: float, total: int) -> Interval:
    """The 95 % score interval of a fraction: honest for small samples and near 0 and 1.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = 1.959963984540054
    fraction = correct / total
    centre = (fraction + z * z / (2 * total)) / (1 + z * z / total)
    half = (
        z
        * math.sqrt(fraction * (1 - fraction) / total + z * z / (4 * total * total))
        / (1 + z * z / total)
    )
    # Rounding must not push the fraction out of its own interval.
    return max(0.0, min(fraction, centre - half)), min(1.0, max(fraction, centre + half))


def headline(snapshot: Snapshot, rows: list[Result]) -> list[str]:
    """The result in plain sentences, the most important first; a bag of words that wins is named in it."""
    federated = next((row for row in rows if row.name == FEDERATED), None)
    metric = main_metric(rows)
    value = federated.value(metric) if federated else None
    if federated is None or value is None:
        return [
            f"There is no federated result: the run is {snapshot.status}, and no evaluation was recorded."
        ]
    sentences = [_reached(snapshot, federated, metric)]
    if snapshot.status != "finished":
        sentences.append(
            f"The run is {snapshot.status}: these are its latest figures, not its result."
        )
    others = {row.name: row.value(metric) for row in rows if row.name != FEDERATED}
    compared = [
        f"{_difference(value, other, metric)} {SENTENCE_NAMES[name]}"
        for name, other in others.items()
        if other is not None and name in SENTENCE_NAMES and name != "bag_of_words"
    ]
    if compared:
        sentences.append(f"The federated result is {_joined(compared)}.")
    bag_of_words = others.get("bag_of_words")
    if bag_of_words is not None and metric == "accuracy":
        verdict = _bag_of_words(value, bag_of_words, federated.interval)
        if bag_of_words > value:
            sentences[0] += f" {verdict}"
        else:
            sentences.append(verdict)
    return sentences


def _federated(snapshot: Snapshot) -> Result | None:
    """The reported round's figures, overruled by the summary's where it has them."""
    reported: Record = next(
        (r for r in snapshot.rounds if r["round"] == snapshot.reported_round), {}
    )
    figures = {
        name: snapshot.summary.get(name, reported.get(name))
        for name in ("accuracy", "loss", "bits_per_character", *WORST)
    }
    if figures["accuracy"] is None and figures["loss"] is None:
        return None
    correct, total = count_test_rows(snapshot)
    accuracy = figures["accuracy"]
    agrees = total > 0 and accuracy is not None and abs(correct - accuracy * total) < 0.01
    return Result(
        name=FEDERATED,
        label=f"Federated ({snapshot.method})",
        interval=wilson_interval(correct, total) if agrees else None,
        detail=f"adapter of round {snapshot.reported_round} of {snapshot.planned_rounds}",
        **figures,
    )


def _baseline(record: Record, total: int) -> Result:
    """A baseline's row.

    Baselines are scored on the federated method's test rows. Where its accuracy is a whole number of those rows, that
    is confirmed and the interval follows; a mean of fractions gets none.
    """
    accuracy = record.get("accuracy")
    total = record.get("total", total)
    correct = round(accuracy * total) if accuracy is not None else 0
    counted = accuracy is not None and total > 0 and abs(correct - accuracy * total) < 0.01
    parts = [f"learning rate {record['learning_rate']:g}"] if "learning_rate" in record else []
    parts += [str(record["detail"])] if record.get("detail") else []
    return Result(
        name=record["name"],
        label=_label(record["name"]),
        accuracy=accuracy,
        interval=wilson_interval(correct, total) if counted else None,
        loss=record.get("loss"),
        bits_per_character=record.get("bits_per_character"),
        detail="; ".join(parts),
        **{name: record.get(name) for name in WORST},
    )


def _label(name: str) -> str:
    if name.startswith(TEMPLATE):
        return f"Base model, prompt {name.removeprefix(TEMPLATE)}"
    return BASELINES.get(name, name)


def _reached(snapshot: Snapshot, federated: Result, metric: str) -> str:
    correct_of = count_test_rows(snapshot)[1] if federated.interval else 0
    text = f"{snapshot.method} reached {federated.value(metric):.3f} {METRICS[metric]}"
    if federated.interval and metric == "accuracy":
        text += f" (95 % interval {federated.interval[0]:.3f} to {federated.interval[1]:.3f}, {correct_of:,} test rows)"
    text += f" after {_counted(snapshot.reported_round, 'round')}"
    clients = snapshot.summary.get("num_clients") or len(
        {r["partition_id"] for r in snapshot.of("client")}
    )
    return text + (f" with {_counted(clients, 'client')}." if clients else ".")


def _bag_of_words(accuracy: float, bag_of_words: float, interval: Interval | None) -> str:
    gap = accuracy - bag_of_words
    unsure = (
        " The gap is inside the 95 % interval."
        if interval and interval[0] <= bag_of_words <= interval[1]
        else ""
    )
    if gap == 0:
        return f"The bag of words is as good: {bag_of_words:.3f}, without a language model."
    if gap < 0:
        return f"The bag of words wins: {bag_of_words:.3f} against {accuracy:.3f}.{unsure}"
    return f"It beats the bag of words ({bag_of_words:.3f}) by {gap:.3f}.{unsure}"


def _difference(value: float, other: float, metric: str) -> str:
    """``0.120 above``; for metrics where less is better, ``0.120 better than`` leaves no doubt."""
    gap = value - other
    if metric == "accuracy":
        return f"{abs(gap):.3f} {'above' if gap >= 0 else 'below'}"
    return f"{abs(gap):.3f} {'better' if gap <= 0 else 'worse'} than"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
