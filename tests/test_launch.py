"""Flower's commands are faked by scripts beside the interpreter; real ones run in the simulation tier."""

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from fedllm_flwr import launch
from fedllm_flwr.errors import RunStoppedError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.runtime import DATA_PATH_VARIABLE

Fixture = Callable[..., Any]
SCRIPT = """#!/bin/sh
for word in "$@"; do case "$word" in *.toml) cp "$word" "{folder}/run.toml" ;; esac; done
printf '%s\\n' "$@" > "{folder}/$1.words"
echo "$FLWR_HOME" > "{folder}/$1.home"
cat "{folder}/$1.answer"
"""


class FakeFlower:
    """A ``flwr`` whose answers are files, in a folder that also has the interpreter's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = folder / "flwr"
        script.write_text(SCRIPT.format(folder=folder))
        script.chmod(0o755)
        self.answers(
            run={"success": True, "run-id": 7},
            ls={"runs": [{"status": "finished:completed"}]},
            log="",
        )

    def answers(self, **texts: Any) -> None:
        for command, text in texts.items():
            content = text if isinstance(text, str) else json.dumps(text)
            (self.folder / f"{command}.answer").write_text(content)

    def words(self, command: str) -> list[str]:
        return (self.folder / f"{command}.words").read_text().splitlines()


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFlower:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(launch.sys, "executable", str(folder / "python"))
    monkeypatch.setattr(launch, "FIRST_STATUS_SECONDS", 0.05)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.01)
    return FakeFlower(folder)


@pytest.fixture
def link(tmp_path: Path) -> launch.SuperLink:
    home = tmp_path / "home"
    home.mkdir()
    return launch.SuperLink(home, home / "log", dict(os.environ) | {"FLWR_HOME": str(home)}, None)  # type: ignore[arg-type]


@pytest.fixture
def config(micro: Fixture, tmp_path: Path) -> Any:
    simulated = micro("runtime=simulation", "runtime.num_nodes=3", "runtime.workers=1")
    return replace(simulated, out_dir=str(tmp_path / "a run"))


def left(config: Any, *, finished: bool = True, text: str = "") -> RunDirectory:
    """What the ServerApp leaves in the run directory."""
    run = RunDirectory.create(config.out_dir, {})
    if text:
        run.append({"kind": "event", "text": text})
    if finished:
        run.write_summary({"accuracy": 0.5})
    return run


def test_a_completed_run_gives_its_summary(flower: FakeFlower, link: Any, config: Any) -> None:
    left(config)
    assert launch.launch(config, [], link) == {"accuracy": 0.5}
    assert (flower.folder / "run.home").read_text().strip() == str(link.home)


def test_what_is_submitted_composes_the_same_run(
    flower: FakeFlower, link: Any, config: Any
) -> None:
    left(config)
    overrides = ["experiment=smoke", "task.instruction='a \"b\" Ω 𝄞'", "out_dir=elsewhere",
                 "runtime.data_path=/secret/x.csv", "runtime.model_path=/secret/m"]  # fmt: skip
    launch.launch(config, overrides, link)
    words = flower.words("run")
    assert words[:5] == ["run", str(launch.PROJECT), launch.CONNECTION, "--format", "json"]
    given = parse_config_args([str(flower.folder / "run.toml")])
    assert given["experiment"] == ""
    assert shlex.split(str(given["overrides"])) == [
        *overrides[:2],
        f"out_dir={Path(config.out_dir).resolve()}",
    ]
    assert "secret" not in " ".join(words)


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "expected"),
    [
        (3, 1, 0.0, "num-supernodes=3 client-resources-num-cpus=4"),
        (9, 2, 0.0, "num-supernodes=4 client-resources-num-cpus=2"),
        (2, 9, 0.5, "num-supernodes=2 client-resources-num-cpus=1 client-resources-num-gpus=0.5"),
    ],
)
def test_workers_share_the_cores_and_no_node_is_without_clients(
    nodes: int, workers: int, gpus: float, expected: str, flower: FakeFlower, link: Any, config: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 4)
    left(config)
    runtime = replace(config.runtime, num_nodes=nodes, workers=workers, gpus_per_worker=gpus)
    launch.launch(replace(config, runtime=runtime), [], link)
    words = flower.words("run")
    assert words[words.index("--federation-config") + 1] == expected


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_failed_run_is_told_by_flwr_ls_and_its_reason_by_the_run(
    status: str, flower: FakeFlower, link: Any, config: Any
) -> None:
    left(config, finished=False, text="stopped: round 3: too few")
    flower.answers(ls={"runs": [{"status": f"finished:{status}"}]})
    with pytest.raises(
        RunStoppedError, match=r"^round 3: too few; to go on: fedllm action=resume run=.*a run$"
    ):
        launch.launch(config, [], link)
    assert flower.words("ls") == ["ls", launch.CONNECTION, "--run-id", "7", "--format", "json"]


def test_a_run_that_failed_before_it_had_a_directory_shows_the_end_of_flowers_log(
    flower: FakeFlower, link: Any, config: Any
) -> None:
    flower.answers(
        ls={"runs": [{"status": "finished:failed"}]},
        log="INFO fine\nValueError: no such layer\nbye\n",
    )
    with pytest.raises(
        RunStoppedError, match="the run failed under Flower: ValueError: no such layer"
    ):
        launch.launch(config, [], link)


def test_completed_without_a_summary_is_not_success(
    flower: FakeFlower, link: Any, config: Any
) -> None:
    left(config, finished=False)
    with pytest.raises(RunStoppedError, match="the run completed under Flower"):
        launch.launch(config, [], link)


GONE = "Connection refused"


def test_a_superlink_that_is_gone_ends_the_wait_and_says_how_to_go_on(
    flower: FakeFlower, link: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SILENCE_SECONDS", 0.3)
    left(config, finished=False)
    flower.answers(ls=GONE)
    expected = rf"connection {launch.CONNECTION} has not answered for 0\.3 s.*: fedllm action=resume run=.*a run$"
    with pytest.raises(RunStoppedError, match=expected):
        launch.launch(config, [], link)


def test_a_superlink_that_comes_back_is_listened_to(
    flower: FakeFlower, link: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SILENCE_SECONDS", 60.0)
    flower.answers(ls=GONE)
    ask = launch._ask_flower
    asked: list[str] = []

    def counted(*words: Any) -> str:
        asked.append(words[1])
        if len(asked) == 3:
            left(config)
            flower.answers(ls={"runs": [{"status": "finished:completed"}]})
        return ask(*words)

    monkeypatch.setattr(launch, "_ask_flower", counted)
    assert launch.launch(config, [], link) == {"accuracy": 0.5}
    assert asked == ["ls"] * 3


@pytest.mark.parametrize("finished", [True, False])
def test_of_a_run_that_ended_the_directory_has_the_last_word_if_the_superlink_is_gone(
    finished: bool, flower: FakeFlower, link: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "LAST_WORDS_SECONDS", 0.1)
    flower.answers(ls=GONE)
    ask = launch._ask_flower

    def ended(*words: Any) -> str:
        if not (Path(config.out_dir) / "manifest.json").exists():
            left(config, finished=finished, text="" if finished else "stopped: too few")
        return ask(*words)

    monkeypatch.setattr(launch, "_ask_flower", ended)
    if finished:
        assert launch.launch(config, [], link) == {"accuracy": 0.5}
    else:
        with pytest.raises(RunStoppedError, match=r"^too few; to go on: fedllm action=resume"):
            launch.launch(config, [], link)


def test_a_command_of_flowers_that_hangs_is_given_up(
    flower: FakeFlower, link: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "COMMAND_SECONDS", 0.2)
    (flower.folder / "flwr").write_text("#!/bin/sh\nexec sleep 60\n")
    assert launch._status(link, launch.CONNECTION, "7") == launch.UNKNOWN


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (
            {"success": False, "error-message": "[code: 15]\nInvalid run configuration."},
            r"\[code: 15\] Invalid run",
        ),
        ("Traceback: nobody listens", "not accepted: Traceback: nobody listens"),
        ({"success": True}, "not accepted"),
    ],
)
def test_a_run_that_is_not_accepted_says_why_on_one_line(
    answer: Any, match: str, flower: FakeFlower, link: Any, config: Any
) -> None:
    flower.answers(run=answer)
    with pytest.raises(RunStoppedError, match=match) as caught:
        launch.launch(config, [], link)
    assert "\n" not in str(caught.value)


def test_text_before_the_answer_is_skipped() -> None:
    assert launch._run_id('Building the FAB\n{"success": true, "run-id": 123}', "") == "123"


def test_a_deployment_goes_to_the_users_own_connection(
    flower: FakeFlower, link: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(link.home))
    left(config)
    deployed = replace(config.runtime, name="deployment", connection="hospitals")
    launch.launch(replace(config, runtime=deployed), [], None)
    words = flower.words("run")
    assert words[2] == "hospitals"
    assert "--federation-config" not in words, "a real SuperLink ignores it"


def test_the_environment_of_a_simulation_is_its_own(micro: Fixture, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    config = micro("runtime=simulation", "runtime.threads=3", f"runtime.data_path={file}")
    found = launch.simulation_environment(config, tmp_path)
    assert found["FLWR_HOME"] == str(tmp_path)
    assert found["OMP_NUM_THREADS"] == "3"
    assert found[DATA_PATH_VARIABLE] == str(file.resolve())
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    first = found["PATH"].split(os.pathsep)[0]
    assert (Path(first) / "flower-superlink").exists(), "an environment need not be activated"


def test_a_superlink_that_does_not_start_shows_the_end_of_its_log(
    flower: FakeFlower, micro: Fixture
) -> None:
    script = flower.folder / "flower-superlink"
    script.write_text("#!/bin/sh\necho first; echo 'port is taken'; exit 1\n")
    script.chmod(0o755)
    with (
        pytest.raises(
            RunStoppedError, match=r"did not start to listen on port \d+: first \| port is taken"
        ),
        launch.simulation_superlink(micro("runtime=simulation")),
    ):
        pytest.fail("it did start")


def test_loopback_offers_no_more_nodes_than_clients(micro: Fixture, tmp_path: Path) -> None:
    config = micro("runtime.num_nodes=16", "num_rounds=1")
    summary = launch.launch(replace(config, out_dir=str(tmp_path / "run")), [])
    assert summary["num_clients"] == 4
    queries = [
        b for b in RunDirectory.open(tmp_path / "run").records("bytes") if b["message"] == "query"
    ]
    assert {b["messages"] for b in queries} == {4}
