import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedllm_flwr
from fedllm_flwr.runs.environment import _command, environment

PROGRAM = "import json; from fedllm_flwr.runs.environment import environment; print(json.dumps(environment()))"


def test_the_environment_names_what_a_run_depends_on() -> None:
    facts = environment()
    assert facts["versions"]["fedllm-flwr"] == fedllm_flwr.__version__
    assert {"flwr", "torch", "transformers", "peft", "ray", "hydra-core"} <= facts[
        "versions"
    ].keys()
    assert facts["python"].startswith("3.")
    assert facts["cpu_count"] >= 1
    assert facts["memory_bytes"] > 2**28
    assert facts["cpu"]
    assert facts["platform"]
    json.dumps(facts, allow_nan=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder outside every checkout that holds only what `environment` needs."""
    source = Path(fedllm_flwr.__file__).parent
    (tmp_path / "fedllm_flwr" / "runs").mkdir(parents=True)
    for name in ("__init__.py", "runs/__init__.py", "runs/environment.py"):
        shutil.copy(source / name, tmp_path / "fedllm_flwr" / name)
    return tmp_path


def _commit(folder: Path) -> str | None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)["commit"]


def _git(folder: Path, *arguments: str) -> str:
    identity = (
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.org",
        "-c",
        "commit.gpgsign=false",
    )
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_that_tracks_this_code(copy: Path) -> None:
    assert _commit(copy) is None  # outside a checkout
    _git(copy, "init", "--quiet")
    (copy / ".gitignore").write_text("__pycache__/\n")
    _git(copy, "add", ".gitignore")
    _git(
        copy,
        "commit",
        "--quiet",
        "--message",
        "someone else's project, with our code installed inside it",
    )
    assert _commit(copy) is None
    _git(copy, "add", ".")
    _git(copy, "commit", "--quiet", "--message", "ours")
    head = _git(copy, "rev-parse", "HEAD")
    assert _commit(copy) == head
    (copy / "notes.txt").write_text("an untracked file changes no code")
    assert _commit(copy) == head
    (copy / ".gitignore").write_text("__pycache__/\n# changed\n")
    assert _commit(copy) == f"{head}-dirty"


def test_no_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


@pytest.mark.parametrize(
    ("typed", "program", "command"),
    [
        (
            ["/venv/bin/python", "/venv/bin/fedllm", "experiment=a b"],
            "/venv/bin/fedllm",
            "fedllm 'experiment=a b'",
        ),
        (
            ["/venv/bin/python", "-m", "fedllm_flwr.cli", "seed=1"],
            "/x/cli.py",
            "python -m fedllm_flwr.cli seed=1",
        ),
        (["/venv/bin/python", "study.py", "--quick"], "study.py", "python study.py --quick"),
        (["/venv/bin/python"], "", "python"),
    ],
)
def test_the_command_can_be_typed_again_elsewhere(
    typed: list[str], program: str, command: str
) -> None:
    assert _command(typed, program) == command
