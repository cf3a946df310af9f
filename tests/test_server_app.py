import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from fedllm_flwr import records, server_app
from fedllm_flwr.actions import act
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.runtime import DATA_PATH_VARIABLE
from fedllm_flwr.tasks.catalog import load_task

Fixture = Callable[..., Any]
SMALL = ("runtime.cohort_tokens=0", "baselines=none", "num_rounds=1", "task.train_rows=16", "task.test_rows=8",
         "task.validation_rows=8", "partition=iid", "partition.num_clients=2")  # fmt: skip


@pytest.fixture
def serve(edge_grid: Fixture) -> Callable[..., Any]:
    """Call the ServerApp as Flower does, with the run config's two texts; returns the grid."""

    def called(experiment: str, *overrides: str, grid: Any = None) -> Any:
        config = {"experiment": experiment, "overrides": shlex.join(overrides)}
        context = Context(
            run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config
        )  # type: ignore[arg-type]
        grid = grid or edge_grid(2)
        server_app.app(grid, context)
        return grid

    return called


def test_the_app_is_what_pyproject_names() -> None:
    assert isinstance(server_app.app, ServerApp)


def test_run_config_names_experiment_and_overrides(serve: Fixture, tmp_path: Path) -> None:
    serve("smoke", *SMALL, f"out_dir={tmp_path / 'a run'}")
    summary = RunDirectory.open(tmp_path / "a run").summary()
    assert summary["experiment"] == "smoke"
    assert (summary["num_rounds"], summary["num_clients"]) == (1, 2)


def test_an_experiment_among_the_overrides_is_enough(serve: Fixture, tmp_path: Path) -> None:
    serve("", "experiment=smoke", *SMALL, f"out_dir={tmp_path / 'run'}")
    assert RunDirectory.open(tmp_path / "run").is_finished


def test_without_a_directory_it_makes_its_own(
    serve: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    serve("smoke", *SMALL)
    (folder,) = (tmp_path / "outputs" / "smoke").iterdir()
    assert RunDirectory.open(folder).is_finished


def test_a_wrong_run_config_is_one_clear_error(serve: Fixture) -> None:
    with pytest.raises(ConfigError, match=r"experiment: expected one of .*smoke"):
        serve("nothing")
    with pytest.raises(ConfigError, match="num_rounds: expected int, got 'many'"):
        serve("smoke", "num_rounds=many")
    with pytest.raises(ConfigError, match=r"client\.minimum_fraction: expected together with"):
        serve("smoke", "client.schedule=constant", "client.minimum_fraction=0.2")


def test_what_one_job_of_a_sweep_does_not_read_was_checked_where_it_was_typed(
    serve: Fixture, tmp_path: Path
) -> None:
    words = ("client.schedule=constant", "client.minimum_fraction=0.2")
    serve("", "experiment=smoke", *SMALL, *words, f"out_dir={tmp_path / 'run'}")
    assert RunDirectory.open(tmp_path / "run").is_finished


def test_a_file_is_named_by_the_environment_only(
    serve: Fixture, edge_grid: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.csv"
    file.write_text(
        "text,label\n" + "".join(f"row {n},{'no' if n % 2 else 'yes'}\n" for n in range(30))
    )
    own = (
        "task=csv",
        *SMALL,
        "task.train_rows=0",
        "task.test_rows=0",
        "task.validation_rows=0",
        "baselines=quick",
    )
    out = f"out_dir={tmp_path / 'run'}"
    with pytest.raises(ConfigError, match="data_path"):
        serve("smoke", *own, f"runtime.data_path={file}", out)
    monkeypatch.setenv(DATA_PATH_VARIABLE, str(file))
    grid = serve("smoke", *own, out)
    assert RunDirectory.open(tmp_path / "run").summary()["dropped_replies"] == 0
    assert all(str(file) not in str(m.content) for m in grid.sent)


def test_resume_goes_on_with_the_runs_own_settings(
    serve: Fixture, edge_grid: Fixture, tmp_path: Path
) -> None:
    whole = ("num_rounds=2", "optimizer.learning_rate=0.02", *SMALL[:2], *SMALL[3:])
    serve("smoke", *whole, f"out_dir={tmp_path / 'whole'}")

    def stops(asked: Any, replies: Any) -> Any:
        return (
            replies
            if '"server-round": 2' not in str(asked[0].content["instruction"]["body"])
            else []
        )

    with pytest.raises(Exception, match="round 2"):
        serve("smoke", *whole, f"out_dir={tmp_path / 'run'}", grid=edge_grid(2, stops))
    serve("", "action=resume", f"run={tmp_path / 'run'}", "runtime.clients_per_wave=1")
    run, expected = (RunDirectory.open(tmp_path / name).summary() for name in ("run", "whole"))
    assert run["adapter_sha256"] == expected["adapter_sha256"]
    assert run["resumed_rounds"] == 1


def test_what_no_node_could_do_is_said_before_anything_is_written(
    serve: Fixture, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"method\.rank: expected at most 32, .* got 33"):
        serve("smoke", *SMALL, "method.rank=33", f"out_dir={tmp_path / 'run'}")


CASCADE = (
    "task.test_rows=24", "task.validation_rows=20", "cascade.among=all", "cascade.risk=0.5", "cascade.confidence=0.5",
    "cascade.tiers=[{name:small,members:[{model:tiny}],kind:self_consistency,samples:3,temperature:0.7},"
    "{name:large,members:[{model:tiny}]}]",
)  # fmt: skip


def test_a_cascades_queries_go_through_the_same_door(
    serve: Fixture, tmp_path: Path, wire_bytes: Fixture, capsys: Any
) -> None:
    """Calibration and queries of one command: loopback's figures, counts and deferred text alone on the wire."""
    words = ("experiment=smoke", *CASCADE, "action=query")
    here = compose_run([*words, f"out_dir={tmp_path / 'here'}"])
    assert act(here, [*words, f"out_dir={tmp_path / 'here'}"]) == 0
    grid = serve("smoke", *words[1:], f"out_dir={tmp_path / 'there'}")
    one, other = (RunDirectory.open(tmp_path / name) for name in ("here", "there"))
    timed = {"seconds", "uplink_bytes", "downlink_bytes"}
    found = {key: value for key, value in other.summary().items() if key not in timed}
    assert found == {key: value for key, value in one.summary().items() if key not in timed}
    assert 0 < found["deferral_rate"] < 1
    assert (one.path / "thresholds.json").read_text() == (
        other.path / "thresholds.json"
    ).read_text()
    kinds = {
        (r["message"], r["direction"]): (r["bytes"], r["messages"]) for r in other.records("bytes")
    }
    for message_type in (records.CALIBRATE, records.PENDING, records.ANSWERS):
        replies = [m for m in grid.replies if m.metadata.message_type == message_type]
        counted = sum(records.serialized_bytes(m) for m in replies)
        assert kinds[message_type, "uplink"] == (counted, len(replies))
    task = load_task(here.config.task.options(""), here.config.seed)
    texts = [row.text.encode() for row in task.splits["test"]]
    uplink = {
        m: b"".join(
            wire_bytes(r) for r in grid.replies if (r.metadata.message_type == records.PENDING) is m
        )
        for m in (True, False)
    }
    sent = [text for text in texts if text in uplink[True]]
    assert len(sent) == found["deferred"] < len(texts)
    assert sum(map(len, sent)) == found["deferred_text_bytes"]
    assert not any(text in uplink[False] for text in texts)


def test_what_is_no_work_of_a_server_app_is_refused(serve: Fixture, tmp_path: Path) -> None:
    """It used to be taken for a training run."""
    for action in ("cascade", "costs", "report"):
        with pytest.raises(
            ConfigError, match=f"action={action}: expected run, resume, calibrate or query"
        ):
            serve("smoke", f"action={action}", f"out_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
