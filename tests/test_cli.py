import csv
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fedllm_flwr
from fedllm_flwr import cli
from fedllm_flwr.core import open_or_create
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.runs.directory import RunDirectory

ROOT = Path(fedllm_flwr.__file__).parents[1]
SMALL = ["experiment=smoke", "task.train_rows=24", "task.validation_rows=8", "task.test_rows=8", "partition=iid",
         "client.local_epochs=0", "client.local_steps=1", "num_rounds=1", "baselines=none"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test is typed in an empty folder; handlers of signals are put back."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield folder
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def type_it(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Type a command; returns exit code, standard output and standard error."""

    def typed(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return typed


Typed = Callable[..., tuple[int, str, str]]
CSV = ["experiment=smoke", "task=csv", "partition=iid", "partition.num_clients=2"]
FILES = {
    "short.csv": "text,label\nfirst,yes\nsecond\n",
    "empty.csv": "",
    "other.csv": "subject,body\na,b\n",
    "latin.csv": b"text,label\ncaf\xe9,yes\n",
    "bad.jsonl": '{"text": "a", "label": "x"}\n{"text": "b" "label": "y"}\n',
}

WRONG: dict[str, tuple[list[str], str]] = {
    "experiment": (["experiment=nothing"], "experiment: expected one of .*smoke.*, got 'nothing'"),
    "group": (["experiment=smoke", "task=poems"], "task: expected one of .*csv, .*, got 'poems'"),
    "key": (["experiment=smoke", "method.rnak=4"], "method.rnak: unknown key"),
    "added key": (["experiment=smoke", "+method.rnak=4"], "method: unknown key 'rnak'; known keys: name, rank"),
    "no key": (["smoke"], "smoke"),
    "value": (["experiment=smoke", "method.sharing=a_only"], "method.sharing: expected one of .*, got 'a_only'"),
    "range": (["experiment=smoke", "num_rounds=0"], "num_rounds: expected >= 1, got 0"),
    "type": (["experiment=smoke", "num_rounds=three"], "num_rounds: expected int, got 'three'"),
    "infinite": (["experiment=smoke", "method.alpha=inf"], "method.alpha: expected float, got inf"),
    "sweep without -m": (["experiment=smoke", "seed=0,1"], "seed=0,1.*--multirun"),
    "flag": (["--experiment=smoke"], "--experiment=smoke: unknown flag; settings are written key=value"),
    "pair": (["experiment=smoke", "strategy=stack", "method.sharing=b_only"],
             "method.sharing=b_only and strategy=stack"),
    "pair of optimizer": (["experiment=smoke", "strategy=svd", "strategy.server_optimizer=fedadam"],
                          "server_optimizer=fedadam and strategy=svd"),
    "no data file": (CSV, "data_path, the file to read, got none"),
    "missing data file": ([*CSV, "runtime.data_path=absent.csv"], "data file absent.csv: expected a readable file"),
    "malformed row": ([*CSV, "runtime.data_path=../short.csv"], "short.csv, line 3, column .*: expected"),
    "empty data file": ([*CSV, "runtime.data_path=../empty.csv"], "empty.csv, line 1, column 1: expected records"),
    "columns": ([*CSV, "runtime.data_path=../other.csv"], "other.csv, line 2: .*'prompt' .*, got subject, body"),
    "encoding": ([*CSV, "runtime.data_path=../latin.csv"], "latin.csv, line 2, column 4: expected UTF-8 text"),
    "malformed JSON": ([*CSV, "task=jsonl", "runtime.data_path=../bad.jsonl"],
                       "bad.jsonl, line 2, column 14: expected JSON"),
    "clients": ([*SMALL, "partition.num_clients=25"], "25 clients .* 24 training rows"),
    "rank": (["experiment=smoke", "method.rank=33"], "expected at most 32, the width of layer .*k_proj, got 33"),
    "device": (["experiment=smoke", "runtime.device=cuda"], "device 'cuda' is not present; this machine has cpu"),
    "template": (["experiment=smoke", "task.template=poem"], "unknown template 'poem', expected one of topic, about"),
    "action": (["experiment=smoke", "action=dance"], "action: expected one of run, .*, got 'dance'"),
    "resume what": (["action=resume"], "action=resume: needs run=<run directory>, got none"),
    "evaluate what": (["action=evaluate"], "action=evaluate: needs run="),
    "report what": (["action=report"], "action=report: needs run="),
    "replay what": (["action=cascade"], "action=cascade: needs .*replay="),
    "replay of nothing": (["action=cascade", "replay=absent"], "data file absent: expected a readable file"),
    "format of a run": (["experiment=smoke", "format=json"], "format=json: expected with action=costs or cascade"),
    "format in a sweep": (["-m", "experiment=smoke", "format=json"], "format=json: expected with action=costs"),
    "no run": (["action=report", "run=absent"], "absent is not a run directory: there is no such folder"),
    "sweep of unknown key": (["-m", "experiment=smoke", "speed=0,1"], "speed: unknown key"),
    "sweep of wrong values": (["-m", "experiment=smoke", "strategy=svd,best"],
                              "strategy: expected one of .*, got 'best'"),
    "sweep of an action": (["-m", "experiment=smoke", "action=costs", "seed=0,1"], "action=costs and --multirun"),
    "sweep that cannot run": (["-m", "experiment=smoke", "method.rank=8,64"], "expected at most 32, .*, got 64"),
    "sweep that cannot be read": (["-m", "experiment=smoke", "seed=[1"], r"\[1"),
    "folder": (["experiment=smoke", "out_dir=/dev/null/x"], "out_dir: expected a folder that can be written"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    what: str, type_it: Typed, own_folder: Path, request: pytest.FixtureRequest
) -> None:
    for name, content in FILES.items():
        data = content if isinstance(content, bytes) else content.encode()
        (own_folder.parent / name).write_bytes(data)
    words, match = WRONG[what]
    code, out, err = type_it(*words)
    assert code == cli.WRONG_INPUT == 2
    assert out == ""
    assert err.startswith("fedllm: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    with pytest.raises(ConfigError, match=match):
        raise ConfigError(err)
    assert list(own_folder.iterdir()) == []


def test_a_process_prints_that_line_and_no_other(own_folder: Path) -> None:
    command = [sys.executable, "-m", "fedllm_flwr", "experiment=nothing"]
    ended = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert list(own_folder.iterdir()) == []


def test_a_run_is_shown_and_leaves_its_directory(type_it: Typed, own_folder: Path) -> None:
    code, out, err = type_it(*SMALL, "out_dir=mine")
    assert code == cli.DONE == 0
    assert "Federated (fedlora)" in out
    assert "finished: accuracy" in err
    assert "report: mine/report.html" in err
    assert RunDirectory.open(own_folder / "mine").is_finished
    assert [path.name for path in own_folder.iterdir()] == ["mine"]


def test_the_same_command_again_shows_what_is_there(type_it: Typed, own_folder: Path) -> None:
    _, first, _ = type_it(*SMALL, "out_dir=mine")
    before = RunDirectory.open(own_folder / "mine").records()
    code, again, err = type_it(*SMALL, "out_dir=mine")
    assert (code, again) == (0, first)
    assert "round 1" not in err
    assert RunDirectory.open(own_folder / "mine").records() == before
    code, _, err = type_it(*SMALL, "out_dir=mine", "seed=1")
    assert code == 2
    assert "mine: holds a run with fingerprint" in err


def test_a_run_that_gives_up_ends_with_three_and_can_go_on(
    type_it: Typed, own_folder: Path
) -> None:
    # A scaling beyond float32 breaks every client's training.
    code, out, err = type_it(*SMALL, "out_dir=mine", "method.alpha=1e300")
    assert code == cli.GAVE_UP == 3
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("fedllm: round 1: 0 of 4 clients gave a good reply in 3 attempts")
    assert not RunDirectory.open(own_folder / "mine").is_finished
    assert type_it("action=resume", "run=mine")[0] == 3


def test_an_interruption_says_how_to_go_on(
    type_it: Typed, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedllm_flwr.actions.launch", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    code, _, err = type_it(*SMALL, "out_dir=mine")
    assert code == cli.INTERRUPTED == 130
    assert err == "fedllm: interrupted\n", "nothing was begun"

    def begun(config: Any, *_: object) -> None:
        open_or_create(config, Path(config.out_dir))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("fedllm_flwr.actions.launch", begun)
    _, _, err = type_it(*SMALL)
    (made,) = (own_folder / "outputs").rglob("manifest.json")
    expected = made.parent.relative_to(own_folder)
    assert err == f"fedllm: interrupted; fedllm action=resume run={expected} goes on\n"


def test_a_sweep_runs_every_job_and_leaves_one_comparison(type_it: Typed, own_folder: Path) -> None:
    code, out, err = type_it(
        "-m", *SMALL, "seed=0,1", "strategy=factor_mean,svd", "hydra.sweep.dir=all"
    )
    assert code == 0
    folder = own_folder / "all"
    jobs = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert jobs == ["0", "1", "2", "3"]
    left = {path.name for path in (folder / "0").iterdir()} - {".lock"}
    assert left == {"manifest.json", "metrics.jsonl", "checkpoints", "adapter", "tensorboard", "report.html",
                    "summary.json"}  # fmt: skip
    for name in ("comparison.md", "comparison.csv", "comparison.png"):
        assert (folder / name).stat().st_size > 100, name
    with (folder / "comparison.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["status"] for row in rows] == ["finished"] * 4
    pairs = {(row["seed"], row["strategy.name"]) for row in rows}
    assert pairs == {(seed, rule) for seed in "01" for rule in ("factor_mean", "svd")}
    assert len({RunDirectory.open(folder / job).summary()["adapter_sha256"] for job in jobs}) == 4
    assert "comparison.md" in err
    named = [line for line in err.splitlines() if line.startswith("run ")]
    assert len(named) == 4
    assert named[1].startswith("run 2 of 4: experiment=smoke")
    assert named[1].endswith("seed=0 strategy=svd")
    assert "Comparison" in out


def test_a_job_of_a_sweep_is_the_run_that_would_be_typed_alone(
    type_it: Typed, own_folder: Path
) -> None:
    type_it("-m", *SMALL, "seed=3,4")
    assert [path.name for path in own_folder.iterdir()] == ["outputs"]
    (sweep,) = (own_folder / "outputs" / "sweeps").iterdir()
    type_it(*SMALL, "seed=4", "out_dir=alone")
    job, alone = (RunDirectory.open(path).summary() for path in (sweep / "1", own_folder / "alone"))
    assert job["fingerprint"] == alone["fingerprint"]
    assert job["adapter_sha256"] == alone["adapter_sha256"]


def test_a_job_that_gives_up_does_not_stop_the_sweep(type_it: Typed, own_folder: Path) -> None:
    code, _, err = type_it("-m", *SMALL, "method.alpha=1e300,8", "hydra.sweep.dir=all")
    assert code == 3
    assert (
        "1 of 2 runs of the sweep stopped: all/0: round 1: 0 of 4 clients" in err.splitlines()[-1]
    )
    assert RunDirectory.open(own_folder / "all" / "1").is_finished
    assert (own_folder / "all" / "comparison.csv").exists()


def test_the_configuration_can_be_looked_at(type_it: Typed, own_folder: Path) -> None:
    code, out, _ = type_it("--cfg", "job", "experiment=smoke", "num_rounds=9")
    assert code == 0
    assert "num_rounds: 9" in out.splitlines()
    assert list(own_folder.iterdir()) == []


def test_a_configuration_that_does_not_compose_is_not_shown(
    type_it: Typed, own_folder: Path
) -> None:
    code, out, err = type_it("--cfg", "job", "experiment=nothing")
    assert (code, out) == (2, "")
    assert err.startswith("fedllm: experiment: expected one of ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_what_can_be_typed(flag: str, type_it: Typed) -> None:
    code, out, err = type_it(flag)
    assert (code, err) == (0, "")
    for word in ("experiment=NAME", "smoke", "r8_demo", "resume", "fairness", "--hydra-help"):
        assert word in out


def test_hydras_own_help_is_there(own_folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fedllm_flwr",
        "--hydra-help",
    ]  # it takes the process's streams along
    ended = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0
    assert "Hydra" in ended.stdout


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        (["a=1"], [["a=1"]]),
        (["a=1,2", "b=x"], [["a=1", "b=x"], ["a=2", "b=x"]]),
        (["a=1,2", "b=x,y"], [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]),
        (["a=[1,2],[3]"], [["a=[1,2]"], ["a=[3]"]]),
        (["a=range(1,4)"], [["a=1"], ["a=2"], ["a=3"]]),
        (["a='1,2'", "hydra.sweep.dir=x"], [["a='1,2'"]]),
    ],
)
def test_sweeps_expand_as_hydras_own_sweeper_does(words: list[str], jobs: list[list[str]]) -> None:
    assert cli.expand(words) == jobs
