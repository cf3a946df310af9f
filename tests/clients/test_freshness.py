import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clients.freshness import Freshness, stamp
from fedllm_flwr.models import backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.tasks.base import TaskOptions
from fedllm_flwr.tasks.catalog import load_task

Fixture = Callable[..., Any]


def rows(path: Path, word: str) -> TaskOptions:
    path.write_text("text,label\n" + "".join(f"{word} {n},{'ab'[n % 2]}\n" for n in range(40)))
    return TaskOptions(name="csv", data_path=str(path))


def words(options: TaskOptions) -> set[str]:
    return {row.text.split()[0] for row in load_task(options, 1).splits["train"]}


def test_a_file_that_has_changed_is_read_again_and_another_is_not(tmp_path: Path) -> None:
    fresh = Freshness(models=2)
    path = tmp_path / "rows.csv"
    facts = {"data-path": str(path), "device": "cpu"}
    options = rows(path, "old")
    fresh.before(facts)
    assert words(options) == {"old"}
    task = load_task(options, 1)
    fresh.before(facts)
    assert load_task(options, 1) is task, "nothing has changed"
    rows(path, "new")
    assert words(options) == {"old"}, "without a look nothing is noticed"
    fresh.before(facts)
    assert words(options) == {"new"}


def test_models_are_dropped_with_the_folder_that_they_came_from_and_when_they_are_too_many(
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("a")
    facts = {"model-path": str(tmp_path / "model")}
    fresh = Freshness(models=1)
    backbone.reset()
    fresh.before(facts)
    model = backbone.load(ModelRef("tiny"), dtype="float32", device="cpu")
    fresh.before(facts)
    assert backbone.load(ModelRef("tiny"), dtype="float32", device="cpu") is model
    (tmp_path / "model" / "more").write_text("b")
    fresh.before(facts)
    assert backbone.loaded() == 0
    for dtype in ("float32", "bfloat16"):
        backbone.load(ModelRef("tiny"), dtype=dtype, device="cpu")
        fresh.after()
        assert backbone.loaded() == (dtype == "float32")


def test_switches_of_the_process_are_as_in_a_new_one() -> None:
    torch.set_float32_matmul_precision("medium")
    Freshness(models=1).before({})
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_stamp_knows_what_a_change_changes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert stamp(str(path)) == ()
    path.write_text("one")
    before = stamp(str(path))
    assert stamp(str(path)) == before
    path.write_text("two")
    os.utime(path, ns=(1, before[0][2]))
    replaced = tmp_path / "b"
    replaced.write_text("two")
    os.utime(replaced, ns=(1, before[0][2]))
    replaced.rename(path)
    assert stamp(str(path)) != before, "another file of the same size and time"
    assert len(stamp(str(tmp_path))) == 1
