"""Read the records of a user's CSV or JSON Lines file; every complaint names file, line and column.

Both formats are UTF-8, with or without a byte-order mark, and empty lines are skipped. Lines and columns
count from 1. A CSV file has a header and comma-separated cells; a record may span lines, and is named by its
first. Each line of a JSON Lines file is one flat object.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One record and the place it comes from.

    Attributes:
        file_name: Name of the file, without folders.
        line: The record's first line.
        values: Column name to value: text in CSV, any JSON value in JSON Lines.
        unit: What ``line`` counts: lines of a text file, or rows of a table.
    """

    file_name: str
    line: int
    values: dict[str, Any]
    unit: str = "line"

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.file_name}, {self.unit} {self.line}"

    def error(self, column: str, expected: str, got: str) -> DataError:
        """An error about one value of this record."""
        return DataError(f"{self.place}, column {column!r}: expected {expected}, got {got}")

    def text(self, column: str) -> str:
        """A value that must be text with something in it, without outer white space.

        Raises:
            DataError: The value is absent, empty or not text.
        """
        value = self._present(column)
        if not isinstance(value, str):
            raise self.error(column, "text", f"{type(value).__name__} {value!r}")
        if not value.strip():
            raise self.error(column, "text", "an empty value")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error(column, "text", "half of a surrogate pair")
        return value.strip()

    def name(self, column: str) -> str:
        """A value that names something: text, an integer or a truth value, given as text.

        Raises:
            DataError: The value is absent, empty or of another type.
        """
        value = self._present(column)
        if isinstance(value, bool):
            return str(value).lower()
        return str(value) if isinstance(value, int) else self.text(column)

    def _present(self, column: str) -> Any:
        if self.values.get(column) is None:
            found = ", ".join(self.values) or "none"
            raise self.error(column, "a value", f"none (the record's columns: {found})")
        return self.values[column]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark.

    Raises:
        DataError: The file is absent, unreadable or not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"data file {path}: expected a readable file, got: {error.strerror or error}"
        ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise DataError(
            f"{path.name}, line {line}, column {column}: expected UTF-8 text, "
            f"got byte 0x{content[error.start]:02x}"
        ) from None


def read_json_lines(path: Path) -> list[Record]:
    """All records of a JSON Lines file.

    Raises:
        DataError: The file cannot be read, has no records, or a line is not a JSON object.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path.name}, line {number}, column {error.colno}: expected JSON, got: {error.msg}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path.name}, line {number}, column 1: {error}") from None
        if not isinstance(values, dict):
            raise DataError(
                f"{path.name}, line {number}, column 1: expected a JSON object, "
                f"got {type(values).__name__}"
            )
        records.append(Record(path.name, number, values))
    return _not_empty(path, records)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"expected each key once, got {repeated!r} again")
    return values


def read_csv(path: Path) -> list[Record]:
    """All records of a CSV file.

    Raises:
        DataError: The file cannot be read, has no records, its header repeats a name, or a record has
            another number of cells than the header.
    """
    rows = _csv_rows(path)
    line, cells = next(rows, (1, []))
    header = [cell.strip() for cell in cells]
    for number, name in enumerate(header, start=1):
        if name in header[: number - 1]:
            raise DataError(
                f"{path.name}, line {line}, column {number}: expected each header name once, "
                f"got {name!r} again"
            )
    records = []
    for number, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{path.name}, line {number}, column {min(len(cells), len(header)) + 1}: "
                f"expected {len(header)} cells, got {len(cells)}"
            )
        records.append(Record(path.name, number, dict(zip(header, cells, strict=True))))
    return _not_empty(path, records, "a header alone" if header else "an empty file")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """First line and cells of each record that is not an empty line."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path.name}, line {line}, column 1: expected comma-separated cells, got: {error}"
            ) from None
        if len(cells) > 1 or any(cell.strip() for cell in cells):
            yield line, cells


def _not_empty(path: Path, records: list[Record], otherwise: str = "an empty file") -> list[Record]:
    if not records:
        raise DataError(f"{path.name}, line 1, column 1: expected records, got {otherwise}")
    return records
