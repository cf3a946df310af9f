"""Cost tables as Markdown, CSV and JSON. Integers are exact everywhere; Markdown shows ratios with two decimals."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from fedllm_flwr.costs.account import FullRow, PublishedRow, full_row, published_row
from fedllm_flwr.costs.memory import MemoryRow, SparsityRow, sparsity_rows
from fedllm_flwr.costs.shapes import PUBLISHED_SHAPES, ModelShape, SplitSizes
from fedllm_flwr.errors import ConfigError

Row = PublishedRow | FullRow | MemoryRow | SparsityRow


@dataclass(frozen=True)
class CostTables:
    """Two tables of the same models in the same order, and where there are matrices two about memory.

    Attributes:
        published: The published table.
        full: What it leaves out.
        memory: Values held and sent by method, for the chosen model; may be empty.
        sparsity: What sparse rows leave of the memory of full training; with ``memory`` only.
    """

    published: tuple[PublishedRow, ...]
    full: tuple[FullRow, ...]
    memory: tuple[MemoryRow, ...] = ()
    sparsity: tuple[SparsityRow, ...] = ()

    @property
    def named(self) -> dict[str, Sequence[Row]]:
        """The tables that have rows by name, in order."""
        tables: dict[str, Sequence[Row]] = {"published": self.published, "full": self.full}
        tables |= {"memory": self.memory, "sparsity": self.sparsity}
        return {name: rows for name, rows in tables.items() if rows}


def cost_tables(
    shapes: Sequence[ModelShape] = PUBLISHED_SHAPES,
    sizes: SplitSizes | None = None,
    memory: Sequence[MemoryRow] = (),
) -> CostTables:
    """All tables.

    Args:
        shapes: The models, at least one.
        sizes: Of the methods; by default those of the source.
        memory: Rows of the memory table.

    Raises:
        ConfigError: There is no model.
    """
    if not shapes:
        raise ConfigError("cost tables: expected at least one model, got none")
    return CostTables(
        tuple(published_row(shape, sizes) for shape in shapes),
        tuple(full_row(shape, sizes) for shape in shapes),
        tuple(memory),
        sparsity_rows() if memory else (),
    )


def to_markdown(tables: CostTables) -> str:
    """All tables for reading; models are the rows of the first and the columns of the second."""
    published = [asdict(row) for row in tables.published]
    full = [asdict(row) for row in tables.full]
    figures = [[name, *(_cell(row[name]) for row in full)] for name in full[0] if name != "model"]
    return "\n".join(
        [
            "## Published: one example of FedResPrompt beside one round of federated LoRA\n",
            _grid(list(published[0]), [[_cell(v) for v in row.values()] for row in published]),
            "## In full: what that leaves out\n",
            _grid(["figure", *(row["model"] for row in full)], figures),
            *_plain("Memory: values held and sent by method, without activations", tables.memory),
            *_plain("Memory of full training, and what sparse rows leave of it", tables.sparsity),
        ]
    )


def to_csv(tables: CostTables) -> str:
    """All tables, a header before each and an empty line between them."""
    return "\n".join(_csv([asdict(row) for row in rows]) for rows in tables.named.values())


def to_json(tables: CostTables) -> str:
    """One list of rows; ``table`` says which table a row is of."""
    rows = [{"table": name} | asdict(row) for name, rows in tables.named.items() for row in rows]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[CostTables], str]] = {
    "markdown": to_markdown,
    "csv": to_csv,
    "json": to_json,
}
"""The closed table of formats; each ends with a line break."""


def _plain(title: str, rows: Sequence[Row]) -> list[str]:
    """A table whose rows are its rows, with its title; nothing where there is none."""
    if not rows:
        return []
    cells = [asdict(row) for row in rows]
    return [f"## {title}\n", _grid(list(cells[0]), [[_cell(v) for v in c.values()] for c in cells])]


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, its first column to the left and the others to the right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, marks, *rows))


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|")
