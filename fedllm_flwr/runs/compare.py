"""Several runs against each other: what differs in their configuration, and what came of it.

Runs that differ in their seed only are one group, shown as mean and standard deviation. A run that did not finish, or
a folder that is no run, is named and left out of every mean.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm_flwr.runs.atomic import write_bytes, write_text
from fedllm_flwr.runs.figures import Point, comparison_figure
from fedllm_flwr.runs.groups import (
    COSTS,
    QUALITIES,
    Group,
    Row,
    differing_keys,
    make_groups,
    read_rows,
)
from fedllm_flwr.runs.rendering import save
from fedllm_flwr.runs.tables import print_tables, table_box
from fedllm_flwr.runs.units import human_bytes, human_figure, human_seconds

STEM = "comparison"
CAPTION = (
    "Mean ± standard deviation (n - 1) over the n finished runs that differ in their seed only; in brackets the 95 % "
    "interval of the mean (Student's t)."
)
FORMATS = {"uplink_bytes": human_bytes, "downlink_bytes": human_bytes, "seconds": human_seconds}


def compare(
    run_paths: Sequence[str | Path], out_folder: str | Path, console: Console | None = None
) -> Path:
    """Compare runs: a table on the console, comparison.csv, comparison.md, comparison.svg and comparison.png.

    Args:
        run_paths: Run directories, finished or not; a path that is none becomes a row that says so.
        out_folder: Where the files go; made when absent.
        console: Where the table is printed; standard output when None.

    Returns:
        comparison.md.
    """
    rows = read_rows([Path(path) for path in run_paths])
    keys = differing_keys(rows)
    groups = make_groups(rows, keys)
    folder = Path(out_folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns = [
        figure for figure in (*QUALITIES, *COSTS) if any(figure in row.figures for row in rows)
    ]
    write_text(folder / f"{STEM}.csv", _csv(rows, keys, columns))
    quality = next((q for q in ("accuracy", "bits_per_character", "loss") if q in columns), None)
    plot = _plot(groups, quality) if quality else {}
    for name in (f"{STEM}.svg", f"{STEM}.png"):
        # A plot of an earlier comparison would contradict the tables beside it.
        (folder / name).unlink(missing_ok=True)
    for name, content in plot.items():
        write_bytes(folder / name, content)
    cells = _cells(groups, keys, columns)
    notes = [f"Not counted: {row.name}: {row.status}." for row in rows if row.status != "finished"]
    write_text(folder / f"{STEM}.md", _markdown(cells, rows, columns, notes, has_plot=bool(plot)))
    console = console or Console()
    print_tables(console, [_console_table(cells, len(keys), console)], "\n".join([CAPTION, *notes]))
    return folder / f"{STEM}.md"


def _csv(rows: Sequence[Row], keys: Sequence[str], columns: Sequence[str]) -> str:
    """One line per run, with figures in full precision; a figure that is absent is an empty field."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["run", "status", "seed", *keys, *columns])
    for row in rows:
        settings = [row.config.get(key, "") for key in keys]
        writer.writerow(
            [row.name, row.status, row.seed, *settings, *(row.figures.get(c, "") for c in columns)]
        )
    return stream.getvalue()


def _cells(groups: Sequence[Group], keys: Sequence[str], columns: Sequence[str]) -> list[list[str]]:
    """The table of groups as text, header first: number, settings, runs counted, figures."""
    figures = (
        "time" if c == "seconds" else c.removesuffix("_bytes").replace("_", " ") for c in columns
    )
    header = ["#", *keys, "n", *figures]
    lines = [header]
    for number, group in enumerate(groups, start=1):
        counted, all_runs = len(group.finished), len(group.runs)
        settings = [human_figure(group.settings[key], 6) if not isinstance(group.settings[key], float)
                    else f"{group.settings[key]:g}" for key in keys]  # fmt: skip
        share = str(counted) if counted == all_runs else f"{counted} of {all_runs}"
        lines.append([str(number), *settings, share, *(_mean(group, column) for column in columns)])
    return lines


def _mean(group: Group, column: str) -> str:
    found = group.mean(column)
    if found is None:
        return "–"
    mean, deviation = found
    show = FORMATS.get(column, human_figure)
    # Bytes and the like often do not vary at all; a quality that does not vary is worth telling.
    varies = deviation > 0 or column in QUALITIES
    if len(group.finished) < 2 or not varies:
        return show(mean)
    interval = group.interval(column) if column in QUALITIES else None
    bounds = f"\n({show(interval[0])} to {show(interval[1])})" if interval else ""
    return f"{show(mean)} ± {show(deviation)}{bounds}"


def _markdown(
    cells: Sequence[Sequence[str]],
    rows: Sequence[Row],
    columns: Sequence[str],
    notes: Sequence[str],
    *,
    has_plot: bool,
) -> str:
    runs = [["run", "status", "seed", *columns]]
    for row in rows:
        figures = (row.figures.get(column) for column in columns)
        shown = (
            "–" if v is None else FORMATS.get(c, human_figure)(v)
            for c, v in zip(columns, figures, strict=True)
        )
        runs.append([row.name, row.status, row.seed, *shown])
    parts = ["# Comparison", _markdown_table(cells), CAPTION, *notes]
    parts += [f"![quality against uplink bytes]({STEM}.svg)"] if has_plot else []
    return "\n\n".join([*parts, "## Runs", _markdown_table(runs)]) + "\n"


def _markdown_table(cells: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    header, *body = cells
    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, body)])


def _console_table(cells: Sequence[Sequence[str]], settings: int, console: Console) -> Table:
    header, *body = cells
    table = Table(title="Comparison", title_justify="left", box=table_box(console))
    for position, name in enumerate(header):
        table.add_column(Text(name), justify="left" if 0 < position <= settings else "right")
    for row in body:
        table.add_row(*map(Text, row))
    return table


def _plot(groups: Sequence[Group], quality: str) -> dict[str, bytes]:
    """The plot's files; none when no finished run has both figures."""
    points = []
    for number, group in enumerate(groups, start=1):
        cost, value = group.mean("uplink_bytes"), group.mean(quality)
        if cost and value:
            points.append(
                Point(
                    number,
                    group.label,
                    (cost[0], value[0]),
                    (cost[1], value[1]),
                    len(group.finished),
                )
            )
    if not points:
        return {}
    return save(comparison_figure(points, quality.replace("_", " ")), STEM)
