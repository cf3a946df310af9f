"""Tables for a terminal or a log, and the result table of a run."""

from rich.box import ASCII2, SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.results import FEDERATED, METRICS, headline, result_rows
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
    table = Table(
        title=f"{snapshot.experiment} ({snapshot.status})",
        title_justify="left",
        box=table_box(console),
    )
    shown = [metric for metric in METRICS if any(row.value(metric) is not None for row in rows)]
    table.add_column("method")
    for name in (*(METRICS[metric] for metric in shown), "95 % interval", "worst client"):
        table.add_column(name, justify="right")
    for row in rows:
        interval = (
            f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
            if row.interval
            else human_figure(None)
        )
        figures = [human_figure(row.value(metric)) for metric in shown]
        style = "bold" if row.name == FEDERATED else ""
        table.add_row(
            Text(row.label),
            *figures,
            interval,
            human_figure(row.worst_client_accuracy),
            style=style,
        )
    return print_tables(console, [table] if rows else [], " ".join(headline(snapshot, rows)))


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
