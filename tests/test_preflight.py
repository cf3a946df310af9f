import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.preflight import check_groups, check_out_dir, preflight
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.partitions import partition

Fixture = Callable[..., Any]


@pytest.mark.parametrize(
    ("overrides", "error", "match"),
    [
        (
            ["method.rank=33"],
            ConfigError,
            "method.rank: expected at most 32, the width of layer .*v_proj, got 33",
        ),
        (["method.client_ranks=[4,64]"], ConfigError, "expected at most 32, .*, got 64"),
        (["runtime.device=cuda:3"], ConfigError, "device 'cuda:3' is not present"),
        (
            ["partition.num_clients=40", "partition=iid"],
            ConfigError,
            "40 clients .* 36 training rows",
        ),
        (["method.target_modules=[nowhere]"], ConfigError, "nowhere"),
        (["task.template=poem"], ConfigError, "unknown template 'poem'"),
        (["task=csv", "task.train_rows=0"], ConfigError, "data_path"),
        (
            ["partition.label_conventions=5"],
            ConfigError,
            "label_conventions: expected at most the 4 labels",
        ),
        (
            [
                "task.max_tokens=16",
                "task=vader_sentiment",
                "task.train_rows=40",
                "task.domains=[movie]",
                "partition=iid",
            ],
            ConfigError,
            "max_tokens",
        ),
        (["method=fedprompt", "method.length=9000"], ConfigError, "9000 soft tokens"),
        (
            ["fairness.groups=inferred"],
            ConfigError,
            "fairness.groups=inferred and task=synthetic: the task has no attribute",
        ),
        (
            ["fairness.groups=data", "task=r8_topics", "partition=iid"],
            ConfigError,
            "fairness.groups=data and task=r8_topics: expected rows with groups, got none",
        ),
        (
            [
                "method=fedprompt",
                "method.cluster_length=2",
                "task=r8_topics",
                "task.template=topic",
                "partition=iid",
            ],
            ConfigError,
            "method.cluster_length > 0 and task=r8_topics: expected rows with groups, got none",
        ),
        (["task=csv", "runtime.data_path=absent.csv"], DataError, "absent.csv"),
    ],
)
def test_preflight_finds_what_is_wrong_and_writes_nothing(
    overrides: list[str], error: type[Exception], match: str, micro: Fixture, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match) as caught:
        preflight(micro(*overrides))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_preflight_lets_a_good_run_through(micro: Fixture) -> None:
    preflight(micro())


def test_the_data_of_a_deployment_is_on_its_nodes(micro: Fixture) -> None:
    deployed = micro("task=csv", "task.train_rows=0", "runtime=deployment")
    preflight(deployed)


def test_a_group_without_rows_to_test_is_named(micro: Fixture) -> None:
    config = micro("fairness.groups=data")
    task = load_task(config.task.options(""), config.seed)
    clients = partition(task, config.partition, config.seed)
    check_groups(config, task, clients)
    only_east = [
        replace(client, test=tuple(row for row in client.test if row.group == "east"))
        for client in clients
    ]
    with pytest.raises(ConfigError, match="group 'west' has no test rows, expected at least one"):
        check_groups(config, task, only_east)


def test_label_words_that_begin_alike_are_found_before_anything_starts(
    micro: Fixture, tmp_path: Path
) -> None:
    file = tmp_path / "alike.csv"
    lines = [f"row {n},{'grain one' if n % 2 else 'grain two'}" for n in range(60)]
    file.write_text("\n".join(["text,label", *lines]))
    config = micro("task=csv", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0",
                   "task.loss=labels", "partition=iid", f"runtime.data_path={file}")  # fmt: skip
    with pytest.raises(ConfigError, match="begin with the same token"):
        preflight(config)


def test_a_run_directory_that_cannot_be_written_is_found_without_writing(tmp_path: Path) -> None:
    check_out_dir(tmp_path / "a" / "b")
    check_out_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ConfigError, match=r"out_dir: expected a folder that can be written, got .*file is a file"
    ):
        check_out_dir(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("columns", "overrides", "match"),
    [
        ("prompt,response", ["task.loss=vocabulary", "fairness.groups=label"],
         "expected rows with labels, got free text"),
        ("prompt,response", ["task.loss=vocabulary", "fairness=accuracy_gap", "fairness.groups=client"],
         "expected rows with labels, got free text"),
        ("text,label,group", ["task.loss=labels", "fairness.groups=data"], "names of at most 64 characters"),
    ],
)  # fmt: skip
def test_groups_of_a_users_file_are_checked(
    columns: str, overrides: list[str], match: str, micro: Fixture, tmp_path: Path
) -> None:
    file = tmp_path / "own.csv"
    rows = [f"row {n},{'harvest' if n % 2 else 'market'}" for n in range(60)]
    rows = [f"{row},{'x' * 65}" for row in rows] if "group" in columns else rows
    file.write_text("\n".join([columns, *rows]))
    config = micro("task=csv", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0",
                   "partition=iid", f"runtime.data_path={file}", *overrides)  # fmt: skip
    with pytest.raises(ConfigError, match=match):
        preflight(config)


def test_the_device_of_a_deployment_is_its_nodes_own(micro: Fixture) -> None:
    absent = ("runtime=deployment", "runtime.device=cuda:3")
    preflight(micro(*absent))
    with pytest.raises(ConfigError, match="device 'cuda:3' is not present"):
        preflight(micro("method=fedresprompt", *absent))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("model.quantization=nf4",), "model.quantization=nf4: expected the package bitsandbytes"),
        (
            ("method=fedgrass", "strategy=row_mean", "client.clip_norm=0", "method.eight_bit=true"),
            "adam8bit: expected the package bitsandbytes",
        ),
    ],
)
def test_an_absent_package_is_named_before_anything_starts(
    overrides: tuple[str, ...], match: str, smoke: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=match):
        preflight(smoke(*overrides))
