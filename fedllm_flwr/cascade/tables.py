"""Rows of a replay as Markdown, CSV and JSON; the same rows in each."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
TITLES = {
    "curve": "Accuracy and cost over the threshold, and what to beat",
    "signals": "Whether agreement tells right from wrong",
    "words": "The next word among one and three suggestions, by group",
    "arrivals": "Seconds of queries that arrive at random",
    "contradictions": "What a similarity takes for agreement, at thresholds that accept so many queries",
}
"""The tables in order."""
MARKDOWN_LEAVES_OUT = ("table", "queries", "input_tokens", "output_tokens")


def to_markdown(rows: Sequence[Row]) -> str:
    """The tables for reading, figures with four digits; columns without a value are left out."""
    return "\n".join(
        f"## {TITLES[name]}\n\n{_grid(_flat_table(rows, name))}"
        for name in TITLES
        if _flat_table(rows, name)
    )


def to_csv(rows: Sequence[Row]) -> str:
    """The tables, a header before each and an empty line between them; figures of a tier have its name in front."""
    blocks = []
    for name in TITLES:
        flat = _flat_table(rows, name)
        if flat:
            out = io.StringIO()
            writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat)
            blocks.append(out.getvalue())
    return "\n".join(blocks)


def to_json(rows: Sequence[Row]) -> str:
    """One list of rows; ``table`` says which table a row is of."""
    return json.dumps(list(rows), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "markdown": to_markdown,
    "csv": to_csv,
    "json": to_json,
}
"""The closed table of formats; each ends with a line break."""


def _flat_table(rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
    """The rows of one table without nesting: ``small.cost`` is the cost of tier small."""
    found = []
    for row in rows:
        if row["table"] == name:
            flat = {key: value for key, value in row.items() if key != "tiers"}
            for tier in row.get("tiers", ()):
                flat |= {f"{tier['tier']}.{k}": v for k, v in tier.items() if k != "tier"}
            found.append(flat)
    return found


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [
        name
        for name in rows[0]
        if name.rpartition(".")[2] not in MARKDOWN_LEAVES_OUT
        and any(row[name] is not None for row in rows)
    ]
    marks = ["---", *["---:"] * (len(shown) - 1)]
    body = [[_cell(row[name]) for name in shown] for row in rows]
    header = [_cell(name) for name in shown]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, marks, *body))


def _cell(value: object) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
