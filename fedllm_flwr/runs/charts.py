"""A run's figures as page elements: which lines and bars a run has, and what they are called."""

from collections.abc import Sequence

from fedllm_flwr.runs import breakdown, page
from fedllm_flwr.runs.figures import Line, client_figure, line_figure, phase_figure
from fedllm_flwr.runs.rendering import inline_svg
from fedllm_flwr.runs.results import BASELINES, FEDERATED, Result
from fedllm_flwr.runs.snapshot import Snapshot

LEVEL_COLORS = {
    "majority": "muted",
    "bag_of_words": "warm",
    "persistence": "sand",  # of series, which have no zero-shot prompts
    "logistic_on_states": "ink",  # and no local tuning
    "zero_shot": "sand",
    "local_only": "violet",
    "centralised": "green",
    "local_tuning": "ink",
}


def round_figures(snapshot: Snapshot, results: Sequence[Result]) -> list[str]:
    """Accuracy, loss, bits per character and bytes over rounds; those that were measured."""
    figures = []
    accuracy = [
        Line("test", _points(snapshot, "accuracy"), "accent"),
        Line("validation", _points(snapshot, "validation_accuracy"), "accent", "--"),
        Line("worst client", _points(snapshot, "worst_client_accuracy"), "ink", ":"),
    ]
    if accuracy[0].points:
        lines = [*accuracy, *_levels(results, "accuracy")]
        figures.append(_figure("accuracy", "Accuracy by round", lines, "accuracy"))
    if bits := _points(snapshot, "bits_per_character"):
        lines = [Line("test", bits), *_levels(results, "bits_per_character")]
        figures.append(_figure("bits", "Bits per character by round", lines, "bits per character"))
    loss = [
        Line("test", _points(snapshot, "loss"), "accent"),
        Line("validation", _points(snapshot, "validation_loss"), "accent", "--"),
        Line("training", _points(snapshot, "train_loss"), "green", "--"),
    ]
    if any(line.points for line in loss):
        figures.append(_figure("loss", "Loss by round", loss, "mean loss (nats)"))
    rounds = [record["round"] for record in snapshot.rounds]
    traffic = [
        Line(
            direction,
            list(zip(rounds, breakdown.cumulative_bytes(snapshot, direction), strict=True)),
            color,
            dashes,
        )
        for direction, color, dashes in (("uplink", "accent", "-"), ("downlink", "warm", "--"))
    ]
    if any(value for line in traffic for _, value in line.points):
        svg = inline_svg(
            line_figure(traffic, "bytes", counts_bytes=True), "bytes", "Cumulative bytes by round"
        )
        figures.append(page.figure("Cumulative bytes by round", svg))
    return figures


def clients_chart(
    clients: Sequence[breakdown.ClientRow], spread: breakdown.Spread, figure: str
) -> str:
    """Each client's test accuracy or loss, the worst first."""
    known = [
        (row.label, getattr(row, figure)) for row in clients if getattr(row, figure) is not None
    ]
    known.sort(key=lambda pair: pair[1], reverse=figure == "loss")
    title = f"Test {figure} by client"
    drawn = client_figure(known, spread.mean, f"test {figure}")
    return page.figure_row([page.figure(title, inline_svg(drawn, "clients", title))])


def time_figure(snapshot: Snapshot) -> str:
    """Seconds of each round by phase; nothing when no time was recorded."""
    seconds = breakdown.phase_seconds(snapshot)
    if not any(value for entry in seconds for value in entry.values()):
        return ""
    phases = {name: [entry[name] for entry in seconds] for name in (*breakdown.PHASES, "other")}
    title = "Wall time of each round by phase"
    drawn = phase_figure([record["round"] for record in snapshot.rounds], phases)
    return page.figure_row([page.figure(title, inline_svg(drawn, "time", title))])


def _figure(name: str, title: str, lines: Sequence[Line], y_label: str) -> str:
    return page.figure(title, inline_svg(line_figure(lines, y_label), name, title))


def _points(snapshot: Snapshot, key: str) -> list[tuple[float, float]]:
    return [(record["round"], record[key]) for record in snapshot.rounds if key in record]


def _levels(results: Sequence[Result], metric: str) -> list[Line]:
    return [
        Line(
            BASELINES[row.name].lower(), [(0.0, value)], LEVEL_COLORS[row.name], "-", is_level=True
        )
        for row in results
        if row.name != FEDERATED
        and row.name in BASELINES
        and (value := row.value(metric)) is not None
    ]
