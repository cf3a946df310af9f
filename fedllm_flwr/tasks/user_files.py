"""The user's own data, in a file (CSV, JSON Lines, Parquet) or a folder of the ``datasets`` library.

A file with a prompt and a response column is an instruction task; one with a text and a label column is a
classification task whose labels are its own label words. A file that has both pairs needs one of the
pairs' column names set to an empty one. Columns for the client and the group are optional. A column
``split`` (train, validation, test) decides the split; without it rows are divided 80 : 10 : 10, seeded
and balanced by label, group and client.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.tasks.base import SPLITS, Kind, Row, Split, Task, TaskOptions, Template
from fedllm_flwr.tasks.records import Record, read_csv, read_json_lines
from fedllm_flwr.tasks.sampling import hold_out
from fedllm_flwr.tasks.tables import SPLIT_COLUMN, read_dataset_folder, read_parquet

TEST_FRACTION = 0.1
VALIDATION_FRACTION = 1 / 9  # of what the test rows leave: a tenth of the whole
LISTED_LABELS = 20
"""A question lists the labels when there are at most this many."""


def load_csv(options: TaskOptions, seed: int) -> Task:
    """The task in a CSV file; see :func:`build` for the arguments and errors."""
    return build(read_csv, options, seed)


def load_json_lines(options: TaskOptions, seed: int) -> Task:
    """The task in a JSON Lines file; see :func:`build` for the arguments and errors."""
    return build(read_json_lines, options, seed)


def load_parquet(options: TaskOptions, seed: int) -> Task:
    """The task in a Parquet file; see :func:`build` for the arguments and errors."""
    return build(read_parquet, options, seed)


def load_dataset_folder(options: TaskOptions, seed: int) -> Task:
    """The task in a folder of the ``datasets`` library; see :func:`build` for the arguments and errors."""
    return build(read_dataset_folder, options, seed)


def build(read: Callable[[Path], list[Record]], options: TaskOptions, seed: int) -> Task:
    """The task in a user's file.

    Args:
        read: Reads the file's records.
        options: ``data_path``, ``instruction``, ``labels`` and the column names are read.
        seed: Decides the division into splits where the file has none.

    Raises:
        ConfigError: No file is given, or the file's columns fit neither or both kinds of task.
        DataError: A record is malformed; names file, line and column.
    """
    if not options.data_path:
        raise ConfigError(f"task {options.name}: expected data_path, the file to read, got none")
    records = read(Path(options.data_path))
    kind = _kind(records[0], options)
    names = _label_names(records, options) if kind == "classification" else ()
    rows = [_row(record, kind, names, records[0], options) for record in records]
    if SPLIT_COLUMN in records[0].values:
        splits = _given_splits(rows, records, seed)
    else:
        splits = _drawn_splits(rows, records[0].file_name, seed)
    return Task(
        name=options.name,
        kind=kind,
        splits=splits,
        label_names=names,
        label_words=names,
        templates=_templates(kind, names, options.instruction),
    )


def _kind(first: Record, options: TaskOptions) -> Kind:
    columns = [column for column in first.values if column]
    instruction = {options.prompt_column, options.response_column} <= set(columns)
    classification = {options.text_column, options.label_column} <= set(columns)
    if instruction == classification:
        raise DataError(
            f"{first.place}: expected either the columns "
            f"{options.prompt_column!r} and {options.response_column!r}, or {options.text_column!r} "
            f"and {options.label_column!r}, got {', '.join(columns) or 'no columns'}"
        )
    return "instruction" if instruction else "classification"


def _label_names(records: Sequence[Record], options: TaskOptions) -> tuple[str, ...]:
    column = options.label_column
    if len(set(options.labels)) < len(options.labels) or "" in options.labels:
        raise ConfigError(f"task.labels: expected different names, got {', '.join(options.labels)}")
    names = {record.name(column): record for record in reversed(records)}
    for name, record in names.items():
        if options.labels and name not in options.labels:
            raise record.error(column, f"one of {', '.join(options.labels)}", repr(name))
    known = options.labels or tuple(sorted(names))
    if len(known) < 2:
        raise records[0].error(column, "at least two different labels", f"only {known[0]!r}")
    return known


def _row(
    record: Record, kind: Kind, names: tuple[str, ...], first: Record, options: TaskOptions
) -> Row:
    classification = kind == "classification"
    text = record.text(options.text_column if classification else options.prompt_column)
    target = (
        record.name(options.label_column)
        if classification
        else record.text(options.response_column)
    )
    part = record.file_name.partition("/")[2] or "line"  # a folder's splits count their rows alike
    return Row(
        row_id=f"{part}-{record.line:07d}",
        text=text,
        target=target,
        label=names.index(target) if classification else None,
        group=_optional(record, first, options.group_column, "group"),
        client=_optional(record, first, options.client_column, "client"),
    )


def _optional(record: Record, first: Record, column: str, default: str) -> str | None:
    """A value of a column that the file need not have, unless the user named the column."""
    if not column or (column == default and column not in first.values):
        return None
    return record.name(column)


def _given_splits(
    rows: Sequence[Row], records: Sequence[Record], seed: int
) -> dict[Split, tuple[Row, ...]]:
    found: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    for row, record in zip(rows, records, strict=True):
        name = record.name(SPLIT_COLUMN)
        if name not in SPLITS:
            raise record.error(SPLIT_COLUMN, ", ".join(SPLITS), repr(name))
        found[name].append(row)
    for split in ("train", "test"):
        if not found[split]:
            raise records[0].error(SPLIT_COLUMN, f"at least one {split} row in the file", "none")
    splits = {split: tuple(found[split]) for split in SPLITS}
    if not splits["validation"]:
        parts = hold_out(splits["train"], TEST_FRACTION, seed, "validation", unit=_content)
        splits["train"], splits["validation"] = parts
    return splits


def _drawn_splits(rows: Sequence[Row], file_name: str, seed: int) -> dict[Split, tuple[Row, ...]]:
    rest, test = hold_out(rows, TEST_FRACTION, seed, "test", unit=_content)
    train, validation = hold_out(rest, VALIDATION_FRACTION, seed, "validation", unit=_content)
    if not (train and validation and test):
        different = len({_content(row) for row in rows})
        raise DataError(
            f"{file_name}: expected at least 3 different rows (training, validation, test), "
            f"got {different}"
        )
    return {"train": train, "validation": validation, "test": test}


def _content(row: Row) -> str:
    return f"{row.text}\x1f{row.target}"


def _templates(kind: Kind, labels: tuple[str, ...], instruction: str) -> tuple[Template, ...]:
    if instruction:
        text = instruction if "{text}" in instruction else f"{instruction}\n\n{{text}}"
        return (Template("own", text, chat=True),)
    if kind == "instruction":
        return (Template("prompt", "{text}", chat=True),)
    listed = f" ({', '.join(labels)})" if len(labels) <= LISTED_LABELS else ""
    return (
        Template("question", f"{{text}}\n\nWhat is the label of this text{listed}?", chat=True),
        Template("plain", "{text}\nLabel:"),
    )
