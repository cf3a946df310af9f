"""Cost tables as Markdown, CSV and JSON. Integers are exact everywhere; Markdown shows ratios with two decimals."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from fedllm_flwr.costs.account import FullRow, PublishedRow, full_row, published_row
from fedllm_flwr.costs.shapes import PUBLISHED_SHAPES, ModelShape, SplitSizes
from fedllm_flwr.errors import ConfigError


@dataclass(frozen=True)
class CostTables:
    """Both tables, of the same models in the same order.

    Attributes:
        published: The published table.
        full: What it leaves out.
    """

    published: tuple[PublishedRow, ...]
    full: tuple[FullRow, ...]

    @property
    def named(self) -> dict[str, tuple[PublishedRow, ...] | tuple[FullRow, ...]]:
        """The tables by name, in order."""
        return {"published": self.published, "full": self.full}


def cost_tables(
    shapes: Sequence[ModelShape] = PUBLISHED_SHAPES, sizes: SplitSizes | None = None
) -> CostTables:
    """Both tables.

    Args:
        shapes: The models, at least one.
        sizes: Of the methods; by default those of the source.

    Raises:
        ConfigError: There is no model.
    """
    if not shapes:
        raise ConfigError("cost tables: expected at least one model, got none")
    return CostTables(
        tuple(published_row(shape, sizes) for shape in shapes),
        tuple(full_row(shape, sizes) for shape in shapes),
    )


def to_markdown(tables: CostTables) -> str:
    """Both tables for reading; models are the rows of the first and the columns of the second."""
    published = [asdict(row) for row in tables.published]
    full = [asdict(row) for row in tables.full]
    figures = [[name, *(_cell(row[name]) for row in full)] for name in full[0] if name != "model"]
    return "\n".join(
        [
            "## Published: one example of FedResPrompt beside one round of federated LoRA\n",
            _grid(list(published[0]), [[_cell(v) for v in row.values()] for row in published]),
            "## In full: what that leaves out\n",
            _grid(["figure", *(row["model"] for row in full)], figures),
        ]
    )


def to_csv(tables: CostTables) -> str:
    """Both tables, a header before each and an empty line between them."""
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
