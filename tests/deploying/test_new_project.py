import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from benchmarks import fab
from fedllm_flwr import __version__, cli
from fedllm_flwr.compose import compose_run
from fedllm_flwr.deploying.new_project import STRATEGY, make_project
from fedllm_flwr.deploying.templates import SITES
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.tasks.catalog import load_task

Fixture = Callable[..., Any]
SMALL = ("num_rounds=1", "baselines=none", "client.local_epochs=0", "client.local_steps=1")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("method", STRATEGY)
def test_a_project_of_every_method_composes_here_and_for_its_nodes(
    method: str, own_folder: Path
) -> None:
    folder = make_project(own_folder, "my-app", method, "tiny")
    config = compose_run(["experiment=my-app"], folder).config
    assert (config.method.name, config.model.name) == (method, "tiny")
    assert config.partition.num_clients == len(SITES)
    page = (folder / "README.md").read_text()
    (real,) = (line.split() for line in page.splitlines() if "runtime=deployment" in line)
    assert real[0] == "fedllm"
    assert compose_run(real[1:], folder).config.runtime.connection == "fedllm"
    (trial,) = (line for line in page.splitlines() if "fedllm deploy --data-path" in line or
                line.strip().startswith("fedllm deploy experiment="))  # fmt: skip
    assert ("data-path" in trial) == (folder / "data").exists()


@pytest.mark.parametrize(
    ("model", "name", "hub_id"),
    [
        ("smollm2_135m", "smollm2_135m", ""),
        ("path", "path", ""),
        ("owner/some-model", "hub", "owner/some-model"),
    ],
)
def test_a_model_is_one_of_ours_or_of_a_hub(
    model: str, name: str, hub_id: str, own_folder: Path
) -> None:
    folder = make_project(own_folder, "my-app", model=model)
    found = compose_run(["experiment=my-app"], folder).config.model
    assert (found.name, found.hub_id) == (name, hub_id)


def test_an_app_names_itself_and_the_version_that_it_was_made_for(own_folder: Path) -> None:
    folder = make_project(own_folder, "my-app")
    table = tomllib.loads((folder / "pyproject.toml").read_text())
    assert table["project"]["name"] == table["tool"]["flwr"]["app"]["config"]["experiment"]
    assert table["project"]["dependencies"] == [f"fedllm-flwr=={__version__}"]


def test_facts_of_nodes_are_read_by_flower(own_folder: Path) -> None:
    folder = make_project(own_folder, "my-app")
    for place in range(len(SITES)):
        facts = parse_config_args([str(folder / "nodes" / f"site-{place}.toml")])
        assert (facts["partition-id"], facts["num-partitions"]) == (place, len(SITES))
        assert {"data-path", "state-path"} <= set(facts)


def test_every_data_file_is_a_task_with_all_labels(own_folder: Path) -> None:
    folder = make_project(own_folder, "my-app")
    task = compose_run(["experiment=my-app"], folder).config.task
    files = sorted((folder / "data").iterdir())
    assert [file.name for file in files] == ["example.csv", "site-0.csv", "site-1.csv"]
    for file in files:
        found = load_task(task.options(str(file)), 0)
        assert found.label_names == task.labels
        assert {row.label for row in found.splits["train"]} == {0, 1, 2}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ((), "init: the following arguments are required: name"),
        (("two", "names"), "init: unrecognized arguments: names"),
        (("my_app",), "name: expected a letter, then at most 31 .* got 'my_app'"),
        (("../up",), "name: expected a letter"),
        (("a" * 33,), "name: expected a letter"),
        (("app", "--method", "fedavg"), "--method: expected one of fedlora, .* got 'fedavg'"),
        (("app", "--model", "gpt"), "--model: expected .*tiny.* or a hub's owner/name, got 'gpt'"),
        (("app", "--model", "hub"), "--model: expected .* got 'hub'"),
        (("app", "--model", "/some/folder"), "--model: expected .* got '/some/folder'"),
        (("smoke",), r"fedllm has conf/experiment/smoke\.yaml too"),
        (("app", "--cascade-models", "a"), "init: unrecognized arguments: --cascade-models"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    words: tuple[str, ...], match: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", *words]) == cli.WRONG_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(ConfigError, match=match):
        raise ConfigError(said)
    assert list(own_folder.iterdir()) == []


def test_a_name_that_is_taken_is_refused_and_what_has_it_is_left_alone(own_folder: Path) -> None:
    (own_folder / "full").mkdir()
    (own_folder / "full" / "file").write_text("mine")
    (own_folder / "link").symlink_to("nowhere")
    (own_folder / "file").write_text("mine")
    for name in ("full", "link", "file"):
        with pytest.raises(ConfigError, match=f"{name}: expected a name that is free"):
            make_project(own_folder, name)
    assert sorted(p.name for p in own_folder.iterdir()) == ["file", "full", "link"]
    assert [p.name for p in (own_folder / "full").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_named(own_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"init: .*absent: expected a folder to write to"):
        make_project(own_folder / "absent", "my-app")


def test_a_project_runs_where_it_is_typed_and_only_there(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", "my-app", "--model", "tiny"]) == 0
    assert "cd my-app" in capsys.readouterr().out
    assert cli.main(["experiment=my-app", *SMALL]) == cli.WRONG_INPUT
    assert "experiment: expected one of" in capsys.readouterr().err
    monkeypatch.chdir(own_folder / "my-app")
    assert cli.main(["--help"]) == 0
    assert "my-app" in capsys.readouterr().out
    assert cli.main(["experiment=my-app", *SMALL, "out_dir=outputs/one"]) == 0
    summary = RunDirectory.open("outputs/one").summary()
    assert (summary["experiment"], summary["dropped_replies"]) == ("my-app", 0)
    assert cli.main(["-m", "experiment=my-app", *SMALL, "seed=0,1", "hydra.sweep.dir=outputs/two"]) == 0  # fmt: skip
    again, _ = (RunDirectory.open(f"outputs/two/{n}").summary() for n in (0, 1))
    assert again["adapter_sha256"] == summary["adapter_sha256"]


PROBE = """
import importlib, json, sys
from pathlib import Path
server, client = (importlib.import_module(name) for name in ("server", "client"))
assert Path(server.__file__).parent == Path(sys.argv[1]), server.__file__
import shlex
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from fedllm_flwr.loopback import LoopbackGrid
overrides = shlex.join([*sys.argv[3:], "out_dir=" + sys.argv[2]])
config = {"experiment": "my-app", "overrides": overrides}
server.app(LoopbackGrid(client.app, 2), Context(1, 1, {}, RecordDict(), config))
"""
"""What Flower does with a FAB, in one process: load both apps from it, and run."""


@pytest.mark.slow
def test_the_apps_run_from_the_fab_alone_and_no_data_is_in_it(own_folder: Path) -> None:
    import os
    import subprocess
    import sys

    from flwr.cli.install import install_from_fab

    folder = make_project(own_folder, "my-app", model="tiny")
    (own_folder / "home").mkdir()
    done = fab.run_flwr("build", "--app", str(folder), folder=own_folder / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (own_folder / "home").glob("*.fab")
    unpacked = install_from_fab(built, own_folder / "installed", skip_prompt=True)
    found = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    assert found == {"pyproject.toml", "README.md", "server.py", "client.py",
                     "conf/experiment/my-app.yaml"}  # fmt: skip
    environment = {
        "PYTHONPATH": f"{unpacked}{os.pathsep}{fab.ROOT}",
        "FEDLLM_DATA_PATH": str(folder / "data" / "example.csv"),
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, str(unpacked), str(own_folder / "run"), *SMALL],
        env=os.environ | environment,
        cwd=own_folder / "home",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert RunDirectory.open(own_folder / "run").summary()["experiment"] == "my-app"
