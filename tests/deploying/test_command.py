import re
import shlex
from pathlib import Path

import pytest

from fedllm_flwr import cli
from fedllm_flwr.deploying.command import deploy, real_commands
from fedllm_flwr.errors import ConfigError


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_prints_commands_and_starts_nothing(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deploy(["--dry-run", "--nodes", "3", "experiment=smoke"]) == 0
    out = capsys.readouterr().out
    assert out.count("flower-supernode ") == 3 + 1
    assert out.count("flwr supernode register") == 3 + 1
    assert list(own_folder.iterdir()) == []


def test_a_daemon_is_started_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert deploy(["--dry-run", "--daemon"]) == 0
    here = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [line.split()[:2] for line in here[-3:]] == [
        ["fedllm", "daemon"],
        *[["flower-supernode", "--superlink"]] * 2,
    ]
    assert all('daemon-socket="' in line for line in here[-2:])
    assert deploy(["--dry-run"]) == 0
    here = capsys.readouterr().out.partition("\n\n")[0]
    assert "fedllm daemon" not in here
    assert "daemon-socket" not in here


def test_the_real_commands_can_be_read_by_a_shell_and_are_not_insecure() -> None:
    lines = real_commands(5)
    for line in lines:
        shlex.split(line, comments=True)
    together = "\n".join(lines)
    assert "--insecure" not in together
    hosts = set(re.findall(r"--host (\S+)", together))
    assert hosts == {"127.0.0.1"}, "whoever reaches the control port runs code on every node"
    assert "num-partitions=5" in together
    assert "runtime.num_nodes=5" in together


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--nodes", "-1"], "--nodes: expected >= 1, got -1"),
        (["--nodes", "two"], "deploy: argument --nodes: invalid int value: 'two'"),
        (["--cascade-models", "a"], "deploy: unrecognized arguments: --cascade-models"),
        (["experiment=smoke", "--nodes", "9"], r"as many nodes as clients \(4\), got 9"),
        (
            ["experiment=smoke", "runtime=loopback"],
            "deploy: runtime=loopback: the trial network sets it",
        ),
        (
            ["experiment=smoke", "runtime.connection=x"],
            "runtime.connection=x: the trial network sets",
        ),
        (["experiment=nothing"], "experiment: expected one of"),
        (
            [
                "experiment=smoke",
                "baselines=none",
                "client.schedule=constant",
                "client.minimum_fraction=0.2",
            ],
            "client.minimum_fraction: expected together with",
        ),
        (
            ["experiment=smoke", "baselines=all"],
            "baselines.centralised=true and runtime=deployment",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    words: list[str], match: str, own_folder: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        deploy(words)
    assert list(own_folder.iterdir()) == []


def test_it_is_a_word_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deploy", "--dry-run"]) == 0
    assert "flower-superlink" in capsys.readouterr().out
    assert cli.main(["deploy", "--insecure"]) == cli.WRONG_INPUT
