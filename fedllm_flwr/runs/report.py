"""report.html: one self-contained page that says what a run found, what it cost and how to repeat it.

It is drawn from the run directory alone, at any moment of a run: what is not there yet is left out.
"""

from pathlib import Path

from fedllm_flwr.fairness import LEAST_ROWS
from fedllm_flwr.runs import breakdown, charts, page
from fedllm_flwr.runs.atomic import write_text
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.ledger import ledger_table
from fedllm_flwr.runs.page import Cell
from fedllm_flwr.runs.results import (
    BASELINES,
    FEDERATED,
    METRICS,
    OF_SERIES,
    Interval,
    Result,
    headline,
    main_metric,
    result_rows,
    worst_columns,
)
from fedllm_flwr.runs.snapshot import Snapshot, flatten
from fedllm_flwr.runs.units import human_bytes, human_figure, human_seconds

REPORT = "report.html"
LONG = 24
"""Tables longer than this are folded."""
MANY = 200
"""Tables of clients and failures show this many rows; metrics.jsonl holds all."""


def write_report(run: RunDirectory) -> Path:
    """Write report.html from what the run directory holds now, replacing an older one in one step.

    Args:
        run: A run, finished or not, with any number of rounds.

    Returns:
        The page.

    Raises:
        DataError: metrics.jsonl is damaged before its last line.
    """
    snapshot = Snapshot.read(run)
    results = result_rows(snapshot)
    first, *more = headline(snapshot, results)
    text = page.page(
        f"{snapshot.experiment} · {snapshot.method}",
        f"<h1>{page.escape(snapshot.experiment)} · {page.escape(snapshot.status)}</h1>",
        page.paragraph(first, "headline"),
        page.paragraph(" ".join(more)) if more else "",
        _facts(snapshot),
        page.section("Result beside its baselines", _result_table(results)),
        page.section(
            "Rounds",
            page.figure_row(charts.round_figures(snapshot, results)),
            _round_table(snapshot),
        ),
        page.section("Clients", *_clients(snapshot, main_metric(results))),
        page.section("Groups", _group_table(snapshot)),
        page.section("Privacy", ledger_table(snapshot)),
        page.section("Bytes on the wire", _byte_table(snapshot)),
        page.section("Time", charts.time_figure(snapshot), _phase_table(snapshot)),
        page.section("Failures and events", *_failures(snapshot)),
        page.section("Configuration and environment", *_settings(snapshot)),
        page.section("How to reproduce", *_reproduce(snapshot)),
    )
    write_text(run.path / REPORT, text)
    return run.path / REPORT


def _facts(snapshot: Snapshot) -> str:
    seconds = snapshot.summary.get("seconds", sum(r.get("seconds", 0.0) for r in snapshot.rounds))
    memory = max((r.get("server_memory_bytes", 0) for r in snapshot.rounds), default=0)
    sent = [
        (way, (breakdown.cumulative_bytes(snapshot, way) or [0])[-1])
        for way in ("uplink", "downlink")
    ]
    pairs = [
        ("rounds", f"{snapshot.completed_rounds} of {snapshot.planned_rounds}"),
        *((way, human_bytes(count)) for way, count in sent),
        ("time", human_seconds(seconds)),
    ]
    pairs += [("server memory", human_bytes(memory))] if memory else []
    dropped = snapshot.summary.get(
        "dropped_replies", sum(r.get("dropped_replies", 0) for r in snapshot.rounds)
    )
    return page.facts([*pairs, ("dropped replies", human_figure(dropped))])


def _result_table(results: list[Result]) -> str:
    if not results:
        return page.paragraph("Nothing was evaluated yet.")
    shown = [m for m in METRICS if any(row.value(m) is not None for row in results)]
    worst_shown = worst_columns(results)
    header = ["", *(METRICS[m] for m in shown), *worst_shown.values(), "how"]
    rows: list[list[str | Cell]] = []
    for row in results:
        figures = [
            Cell(human_figure(row.value(m)), _range(row.interval) if m == "accuracy" else "")
            for m in shown
        ]
        worst = [human_figure(getattr(row, name)) for name in worst_shown]
        rows.append([row.label, *figures, *worst, row.detail])
    has_interval = any(row.interval for row in results)
    caption = "Test figures" + (
        "; ranges are 95 % intervals of the accuracy" if has_interval else ""
    )
    measured = {row.name for row in results}
    # A task that is not classified has no majority class and no bag of words.
    special = () if "accuracy" in shown else ("majority", "bag_of_words")
    possible = [n for n in BASELINES if n not in (*special, *OF_SERIES)]
    missing = ", ".join(BASELINES[name].lower() for name in possible if name not in measured)
    ours = [i for i, row in enumerate(results) if row.name == FEDERATED]
    table = page.table(caption, header, rows, text_columns=(0, len(header) - 1), marked=ours)
    return table + (
        page.paragraph(f"Not measured in this run: {missing}.", "note") if missing else ""
    )


def _round_table(snapshot: Snapshot) -> str:
    columns = {
        "round": "round",
        "train_loss": "training loss",
        "loss": "test loss",
        "validation_loss": "validation loss",
        "bits_per_character": "bits per character",
        "accuracy": "accuracy",
        "validation_accuracy": "validation accuracy",
        "worst_client_accuracy": "worst client",
        "worst_group_accuracy": "worst group",
        "uplink_bytes": "training uplink",
        "downlink_bytes": "training downlink",
        "seconds": "time",
    }
    shown = {key: name for key, name in columns.items() if any(key in r for r in snapshot.rounds)}
    formats = {"uplink_bytes": human_bytes, "downlink_bytes": human_bytes, "seconds": human_seconds}
    rows = [
        [
            formats[key](r[key]) if key in r and key in formats else human_figure(r.get(key))
            for key in shown
        ]
        for r in snapshot.rounds
    ]
    if not rows:
        return page.paragraph("No round was recorded.")
    return page.details(
        "The figures of every round",
        page.table("Rounds", list(shown.values()), rows, text_columns=()),
    )


def _clients(snapshot: Snapshot, metric: str) -> list[str]:
    clients = breakdown.client_rows(snapshot)
    if not clients:
        return []
    figure = "accuracy" if metric == "accuracy" else "loss"
    spread = breakdown.spread(clients, figure)
    parts = []
    if spread and spread.clients > 1:
        parts.append(
            page.paragraph(
                f"Test {figure} over {spread.clients:,} clients, each counted once: mean {spread.mean:.3f} "
                f"(standard deviation {spread.deviation:.3f}), "
                f"worst {spread.worst:.3f} (client {spread.worst_client}), "
                f"worst tenth {spread.worst_decile:.3f}, best {spread.best:.3f}."
            )
        )
        parts.append(charts.clients_chart(clients, spread, figure))
    clients = sorted(clients, key=lambda row: _badness(row, figure))
    table = _client_table(clients[:MANY])
    left_out = len(clients) - MANY
    note = (
        f"The {MANY} worst clients are shown; {left_out:,} more are in metrics.jsonl."
        if left_out > 0
        else ""
    )
    table += page.paragraph(note, "note") if note else ""
    return [
        *parts,
        page.details("The figures of every client", table) if len(clients) > LONG else table,
    ]


def _client_table(clients: list[breakdown.ClientRow]) -> str:
    header = ["client", "rank", "rounds", "examples", "steps", "tokens", "CPU time", "training loss",
              "test rows", "accuracy", "test loss"]  # fmt: skip
    rows: list[list[str | Cell]] = [
        [
            row.label, human_figure(row.rank), human_figure(row.rounds),
            human_figure(row.num_examples), human_figure(row.steps), human_figure(row.tokens),
            human_seconds(row.cpu_seconds), human_figure(row.train_loss), human_figure(row.test_rows),
            Cell(human_figure(row.accuracy), _range(row.interval)), human_figure(row.loss),
        ]
        for row in clients
    ]  # fmt: skip
    return page.table("Clients, the worst first; ranges are 95 % intervals", header, rows)


def _group_table(snapshot: Snapshot) -> str:
    groups = breakdown.group_rows(snapshot)
    weighed = any(g.multiplier is not None for g in groups)
    rows: list[list[str | Cell]] = [
        [
            g.group,
            human_figure(g.test_rows),
            Cell(human_figure(g.accuracy), _range(g.interval)),
            human_figure(g.loss),
            *([human_figure(g.multiplier)] if weighed else []),
        ]
        for g in groups
    ]
    header = ["group", "test rows", "accuracy", "loss", *(["multiplier"] if weighed else [])]
    return (
        page.table(
            f"Test rows by group; those below {LEAST_ROWS} rows do not count as the worst group",
            header,
            rows,
        )
        if rows
        else ""
    )


def _byte_table(snapshot: Snapshot) -> str:
    ledger = breakdown.byte_rows(snapshot)
    rows = [
        [f"{row.direction}, {row.message}", human_bytes(row.bytes), human_figure(row.bytes), human_figure(row.messages),
         human_bytes(row.bytes / row.messages) if row.messages else "–"]
        for row in ledger
    ]  # fmt: skip
    for direction in ("uplink", "downlink"):
        chosen = [row for row in ledger if row.direction == direction]
        total, messages = sum(row.bytes for row in chosen), sum(row.messages for row in chosen)
        if chosen:
            rows.append([f"all {direction}", human_bytes(total), human_figure(total), human_figure(messages),
                         human_bytes(total / messages) if messages else "–"])  # fmt: skip
    header = ["direction and message", "size", "bytes", "messages", "per message"]
    caption = "Serialized messages; uplink is from clients to the server"
    return page.table(caption, header, rows, marked=range(len(ledger), len(rows))) if rows else ""


def _phase_table(snapshot: Snapshot) -> str:
    phases = breakdown.phase_seconds(snapshot)
    sums = {name: sum(entry[name] for entry in phases) for name in (*breakdown.PHASES, "other")}
    total = sum(sums.values())
    if not total:
        return ""
    rows = [
        [name, human_seconds(seconds), f"{seconds / total:.0%}"] for name, seconds in sums.items()
    ]
    return page.table("Wall time of all rounds by phase", ["phase", "time", "share"], rows)


def _failures(snapshot: Snapshot) -> list[str]:
    failures, events = (
        snapshot.of("failure"),
        [str(r.get("text", "")) for r in snapshot.of("event")],
    )
    rows = [
        [
            human_figure(r.get("round")),
            human_figure(r.get("partition_id")),
            str(r.get("reason", "")),
        ]
        for r in failures[:MANY]
    ]
    parts = [page.paragraph("No reply failed.") if not rows else ""]
    if rows:
        caption = f"Failed replies: {len(failures):,}" + (
            f", the first {MANY}" if len(failures) > MANY else ""
        )
        table = page.table(caption, ["round", "client", "reason"], rows, text_columns=(2,))
        parts.append(page.details(caption, table) if len(rows) > LONG else table)
    if events:
        parts.append(
            "<ul>" + "".join(f"<li>{page.escape(text)}</li>" for text in events[:MANY]) + "</ul>"
        )
    return parts


def _settings(snapshot: Snapshot) -> list[str]:
    environment = flatten(snapshot.manifest.get("environment") or {})
    if "memory_bytes" in environment:
        environment["memory"] = human_bytes(environment.pop("memory_bytes"))
    tables = [
        ("Configuration", snapshot.config),
        ("Environment", environment),
        ("Summary", snapshot.summary),
    ]
    return [
        page.details(
            name,
            page.table(
                name,
                ["key", "value"],
                [[key, str(v)] for key, v in values.items()],
                text_columns=(0, 1),
            ),
        )
        for name, values in tables
        if values
    ]


def _reproduce(snapshot: Snapshot) -> list[str]:
    manifest = snapshot.manifest
    environment = manifest.get("environment") or {}
    command = manifest.get("command") or environment.get("command")
    if not command:
        command = f"fedllm experiment={snapshot.experiment} {_words(manifest.get('overrides'))}"
    facts = {
        "seed": snapshot.config.get("seed"),
        "fingerprint": manifest.get("fingerprint") or snapshot.summary.get("fingerprint"),
        "commit": environment.get("commit"),
        "adapter SHA-256": snapshot.summary.get("adapter_sha256"),
    }
    known = "; ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    return [
        page.code_block(_words(command).strip()),
        page.paragraph(known, "note") if known else "",
    ]


def _range(interval: Interval | None) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else ""


def _badness(row: breakdown.ClientRow, figure: str) -> tuple[bool, float]:
    """Sorts the worst client first and those that were not evaluated last."""
    value = getattr(row, figure)
    return value is None, 0.0 if value is None else value if figure == "accuracy" else -value


def _words(command: object) -> str:
    return " ".join(map(str, command)) if isinstance(command, list) else str(command or "")
