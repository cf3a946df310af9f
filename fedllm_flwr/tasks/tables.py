"""Read a user's rows from a Parquet file or a folder of the ``datasets`` library; complaints name file, row and column.

Rows count from 1. Neither format can hold code: a Parquet file is parsed by pyarrow, and a ``datasets`` folder, as
``save_to_disk`` writes it, is Arrow files with JSON beside them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks.records import Record

if TYPE_CHECKING:  # the library takes seconds to import
    from datasets import Dataset

SPLIT_COLUMN = "split"


def read_parquet(path: Path) -> list[Record]:
    """All records of a Parquet file.

    Raises:
        DataError: The file cannot be read, is no Parquet file, repeats a column, or has no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except OSError as error:
        raise DataError(
            f"data file {path}: expected a readable Parquet file, got: {_said(error)}"
        ) from None
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path.name}: expected a Parquet file, got: {_said(error)}") from None
    _no_repeats(path, table.column_names)
    return _not_empty(
        path, [Record(path.name, n, row, "row") for n, row in enumerate(table.to_pylist(), start=1)]
    )


def read_dataset_folder(path: Path) -> list[Record]:
    """All records of a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote.

    Columns of class labels give the labels' names. In a dictionary of splits the split's name becomes the
    column ``split``.

    Raises:
        DataError: The folder is absent or not of this form, has no rows, or has splits and a column of that name.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise DataError(
            f"data folder {path}: expected a folder that datasets' save_to_disk wrote, got: {_said(error)}"
        ) from None
    if not isinstance(loaded, Mapping):
        return _not_empty(path, list(_rows(path.name, loaded, {})))
    records: list[Record] = []
    for split, table in loaded.items():
        if SPLIT_COLUMN in table.column_names:
            raise DataError(
                f"{path.name}/{split}: expected splits as folders or as a column {SPLIT_COLUMN!r}, got both"
            )
        records += _rows(f"{path.name}/{split}", table, {SPLIT_COLUMN: str(split)})
    return _not_empty(path, records)


def _rows(name: str, table: "Dataset", more: Mapping[str, str]) -> Iterator[Record]:
    from datasets import ClassLabel

    named = {
        column: kind for column, kind in table.features.items() if isinstance(kind, ClassLabel)
    }
    for number, row in enumerate(table.with_format(None), start=1):
        names = {  # -1 stands for a label that is not known
            column: kind.int2str(row[column]) if row[column] != -1 else None
            for column, kind in named.items()
            if row[column] is not None
        }
        yield Record(name, number, {**row, **names, **more}, "row")


def _no_repeats(path: Path, columns: list[str]) -> None:
    for name in columns:
        if columns.count(name) > 1:
            raise DataError(f"{path.name}: expected each column once, got {name!r} again")


def _not_empty(path: Path, records: list[Record]) -> list[Record]:
    if not records:
        raise DataError(f"{path.name}: expected records, got no rows")
    return records


def _said(error: Exception) -> str:
    """A library's message on one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
