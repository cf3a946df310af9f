"""Parquet files and folders of ``datasets``, and what is wrong with them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks.base import TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.tables import read_dataset_folder, read_parquet

ROWS: dict[str, list[Any]] = {
    "text": [f"text {n}" for n in range(40)],
    "label": ["no" if n % 2 else "yes" for n in range(40)],
}


def parquet(folder: Path, columns: dict[str, list[Any]] = ROWS) -> Path:
    pq.write_table(pa.table(columns), folder / "own.parquet")
    return folder / "own.parquet"


def saved(data: Dataset | DatasetDict, folder: Path) -> Path:
    data.save_to_disk(str(folder / "own"))
    return folder / "own"


def test_a_parquet_file_is_a_task_like_any_other_file(tmp_path: Path) -> None:
    table = TaskOptions(name="parquet", data_path=str(parquet(tmp_path)))
    lines = tmp_path / "own.csv"
    lines.write_text("text,label\n" + "".join(f"{t},{n}\n" for t, n in zip(*ROWS.values(), strict=True)))  # fmt: skip
    ours, theirs = load_task(table, 0), load_task(TaskOptions(name="csv", data_path=str(lines)), 0)
    assert ours.label_names == theirs.label_names == ("no", "yes")
    for split, rows in theirs.splits.items():
        assert sorted((r.text, r.target) for r in rows) != []
        assert len(rows) == len(ours.splits[split])


def test_columns_of_any_kind_are_read_and_rows_are_counted_from_one(tmp_path: Path) -> None:
    columns = {"text": ["a", None], "label": [3, 4], "lists": [[1], []], "odd": [0.5, float("nan")]}
    first, second = read_parquet(parquet(tmp_path, columns))
    assert (first.place, first.text("text"), first.name("label")) == ("own.parquet, row 1", "a", "3")  # fmt: skip
    with pytest.raises(DataError, match=r"own\.parquet, row 2, column 'text': expected a value"):
        second.text("text")
    with pytest.raises(DataError, match=r"row 1, column 'odd': expected text, got float 0\.5"):
        first.name("odd")


def test_a_folder_gives_the_names_of_its_class_labels(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [1, 0, None, -1]}, features)
    records = read_dataset_folder(saved(data, tmp_path))
    assert [r.values["label"] for r in records] == ["yes", "no", None, None]
    with pytest.raises(DataError, match="own, row 4, column 'label': expected a value, got none"):
        records[3].name("label")  # -1 is how such folders say that a label is not known
    with pytest.raises(DataError, match="own, row 3, column 'label': expected a value, got none"):
        records[2].name("label")


def test_a_dictionary_of_splits_decides_the_splits(tmp_path: Path) -> None:
    whole = Dataset.from_dict(ROWS)
    splits = {"train": range(30), "validation": range(30, 34), "test": range(34, 40)}
    path = saved(DatasetDict({s: whole.select(n) for s, n in splits.items()}), tmp_path)
    task = load_task(TaskOptions(name="dataset_folder", data_path=str(path)), 0)
    for split, numbers in splits.items():
        assert sorted(r.text for r in task.splits[split]) == sorted(f"text {n}" for n in numbers)
    ids = [row.row_id for rows in task.splits.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_splits_twice_are_refused(tmp_path: Path) -> None:
    data = Dataset.from_dict({**ROWS, "split": ["train"] * 40})
    with pytest.raises(DataError, match=r"own/train: expected splits .* got both"):
        read_dataset_folder(saved(DatasetDict({"train": data}), tmp_path))


def test_a_split_of_another_name_is_named(tmp_path: Path) -> None:
    path = saved(DatasetDict({"dev": Dataset.from_dict(ROWS)}), tmp_path)
    with pytest.raises(DataError, match=r"own/dev, row 1, column 'split': expected train, .*'dev'"):
        load_task(TaskOptions(name="dataset_folder", data_path=str(path)), 0)


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"text,label\na,b\n"])
def test_what_is_no_parquet_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"own\.parquet: expected a .*Parquet file, got") as caught:
        read_parquet(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="expected a readable Parquet file"):
        read_parquet(tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"own\.parquet: expected a .*Parquet file, got"):
        read_parquet(path)


def test_columns_and_rows_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"own\.parquet: expected records, got no rows"):
        read_parquet(parquet(tmp_path, {"text": [], "label": []}))
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "own.parquet")
    with pytest.raises(DataError, match=r"expected each column once, got 'text' again"):
        read_parquet(tmp_path / "own.parquet")


@pytest.mark.parametrize("name", ["absent", "plain", "broken"])
def test_what_is_no_folder_of_datasets_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    saved(Dataset.from_dict(ROWS), tmp_path).rename(tmp_path / "broken")
    (tmp_path / "broken" / "state.json").write_text("{}")
    expected = f"{name}: expected a folder that datasets' save_to_disk wrote"
    with pytest.raises(DataError, match=expected) as caught:
        read_dataset_folder(tmp_path / name)
    assert "\n" not in str(caught.value)
