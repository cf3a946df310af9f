"""Tables for a terminal or a log, and the result table of a run."""

from rich.box import ASCII2, SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.results import (
    FEDERATED,
    METRICS,
    Result,
    headline,
    result_rows,
    worst_columns,
)
from fedllm_flwr.runs.snapshot import Snapshot
from fedllm_flwr.runs.units import human_figure


def render_result_table(run: RunDirectory, console: Console | None = None) -> str:
    """Print the result beside its baselines, and the sentence that sums it up.

    Args:
        run: A run, finished or not.
        console: Where to print; standard output when None. On a terminal the table has colour and lines, elsewhere it
            is plain text that never wraps.

    Returns:
        What was printed, as plain text.

    Raises:
        DataError: metrics.jsonl is damaged before its last line.
    """
    console = console or Console()
    snapshot = Snapshot.read(run)
    rows = result_rows(snapshot)
    title = Text(f"{snapshot.experiment}: {snapshot.status}")
    table = Table(title=title, title_justify="left", box=table_box(console))
    columns = _columns(rows)
    table.add_column("method")
    for name in columns:
        table.add_column(name, justify="right")
    for position, row in enumerate(rows):
        style = "bold" if row.name == FEDERATED else ""
        table.add_row(
            Text(row.label), *(cells[position] for cells in columns.values()), style=style
        )
    return print_tables(console, [table] if rows else [], " ".join(headline(snapshot, rows)))


def _columns(rows: list[Result]) -> dict[str, list[str]]:
    """The cells of each column in which any row has a figure; the interval stands beside its accuracy."""
    columns = {METRICS[metric]: [row.value(metric) for row in rows] for metric in METRICS}
    for name, label in worst_columns(rows).items():
        columns[label] = [getattr(row, name) for row in rows]
    shown = {}
    for name, values in columns.items():
        if any(value is not None for value in values):
            shown[name] = [human_figure(value) for value in values]
        if name == METRICS["accuracy"] and any(row.interval for row in rows):
            shown["95 % interval"] = [
                f"{row.interval[0]:.3f} to {row.interval[1]:.3f}" if row.interval else "–"
                for row in rows
            ]
    return shown


def print_tables(console: Console, tables: list[Table], text: str = "") -> str:
    """Print tables and then a text; tables for a file or a pipe are as wide as they need to be.

    Args:
        console: Where to print.
        tables: Tables in order.
        text: A paragraph after them; markup in it is shown as it is.

    Returns:
        The same as plain text, without colours.
    """
    width = console.width if console.is_terminal else 400
    plain = Console(width=width, color_system=None, force_terminal=False, no_color=True)
    with plain.capture() as capture:
        for table in tables:
            plain.print(table)
        if text:
            plain.print(Text(text), soft_wrap=not console.is_terminal)
    rendered = "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
    if console.is_terminal:
        for table in tables:
            console.print(table)
        console.print(Text(text))
    else:
        console.file.write(rendered)
        console.file.flush()
    return rendered


def table_box(console: Console) -> Box:
    """Lines for a terminal, characters that survive any log elsewhere."""
    return SIMPLE_HEAD if console.is_terminal else ASCII2
