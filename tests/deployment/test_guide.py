"""The operators' pages: what they print can be typed."""

import re
import shlex
import ssl
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import entry_points
from io import StringIO
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

import fedllm_flwr
from fedllm_flwr.compose import compose_run
from fedllm_flwr.daemon.asking import SOCKET
from fedllm_flwr.deploying.command import deploy, real_commands
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.limits import NODE_LIMIT

ROOT = Path(fedllm_flwr.__file__).parents[1]
PAGE = (ROOT / "docs" / "deployment.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language, in the page's order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def commands(program: str) -> list[list[str]]:
    """Every command line of a program in the page's blocks, fenced or indented."""
    indented = [line[4:] for line in PAGE.splitlines() if line.startswith("    ")]
    lines = [*"".join(blocks("bash")).splitlines(), *indented]
    return [shlex.split(line) for line in lines if line.split(" ")[0] == program]


@cache
def usage(*words: str) -> str:
    """What a program of Flower's says of itself; in this process, for importing it takes a process seconds."""
    program = entry_points(group="console_scripts", name=words[0])[words[0]].load()
    shown = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown):
        patch.setenv("COLUMNS", "200")
        patch.setenv("NO_COLOR", "1")
        patch.setattr(sys, "argv", [*words, "--help"])
        with pytest.raises(SystemExit) as ended:
            program()
    assert not ended.value.code
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())


def test_links_lead_to_pages_that_are_there() -> None:
    for page in ("deployment.md", "security.md"):
        text = (ROOT / "docs" / page).read_text()
        for target in re.findall(r"\]\(([\w.]+\.md)\)", text):
            assert (ROOT / "docs" / target).is_file(), f"{page}: {target}"


def test_tables_of_toml_are_read_as_they_are_meant() -> None:
    node, connection = map(tomllib.loads, blocks("toml"))
    places = {"partition-id", "num-partitions"}
    assert set(node) == places | {
        "data-path",
        "state-path",
        "model-path",
        "device",
        "forget",
        SOCKET,
        NODE_LIMIT,
    }
    assert connection["superlink"]["fedllm"]["address"] == "127.0.0.1:8000"


def test_runs_compose() -> None:
    typed = [words for words in commands("fedllm") if words[1].startswith("experiment=")]
    settings = [words[1:] for words in typed if "my-app" not in words[1]]
    assert len(settings) == 1
    for words in settings:
        assert compose_run(words).config.runtime.name == "deployment"


def test_a_trial_network_is_deployed_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = (words for words in commands("fedllm") if words[1] == "deploy")
    assert deploy(["--dry-run", *words[2:]]) == 0
    assert capsys.readouterr().out.endswith("\n".join(real_commands(2)) + "\n")


def test_real_machines_are_told_what_the_page_says() -> None:
    lines = real_commands(2)
    printed = [shlex.split(line) for line in lines if not line.startswith("#")]
    daemon = [words for words in printed if words[:2] == ["fedllm", "daemon"]]
    assert daemon == [words for words in commands("fedllm") if words[1] == "daemon"]
    assert daemon[0][-1] == tomllib.loads(blocks("toml")[0])[SOCKET]
    for program in ("flower-superlink", "flower-superexec"):
        assert [words for words in printed if words[0] == program] == commands(program), program
    ((*ours, facts),) = [words for words in printed if words[0] == "flower-supernode"]
    ((*theirs, file),) = commands("flower-supernode")
    assert (ours, file) == (theirs, "node.toml")
    node, connection = map(tomllib.loads, blocks("toml"))
    assert parse_config_args([facts]).items() <= node.items()
    assert [words for words in printed if words[0] == "flwr"] == commands("flwr")[:1]
    table = [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]
    assert tomllib.loads("\n".join(table)) == connection


def test_strangers_reach_the_proxy_and_only_the_nodes_api_through_it() -> None:
    (superlink,) = commands("flower-superlink")
    (node,) = commands("flower-supernode")
    host, port = (superlink[superlink.index(name) + 1] for name in ("--host", "--port"))
    assert host == "127.0.0.1"
    (proxy,) = blocks("nginx")
    assert re.findall(r"proxy_pass (\S+);", proxy) == [f"https://{host}:{port}"]
    assert re.findall(r"location (\S+) ", proxy) == ["/v1/fleet/", "/"]
    assert "location / { return 404; }" in proxy
    name, listening = re.findall(r"server_name (\S+);|listen (\d+) ssl", proxy)[::-1]
    assert node[node.index("--superlink") + 1] == f"{name[0]}:{listening[1]}"


def test_settings_in_the_table_of_other_tools_options_are_ours() -> None:
    _, table = PAGE.split("| Elsewhere | Here |")
    named = re.findall(r"`([a-z_.]+=[\w.]+)`", table)
    assert {"wire=top_k", "fairness=group_dro", "runtime.cohort_tokens=512"} <= set(named)
    needed = {
        "fairness": ["method=fedprompt", "strategy=prompt_mean"],
        "privacy": ["strategy.weighting=uniform"],
        "method": ["strategy=prompt_mean"],
        "serving": ["action=serve", "run=outputs/a"],
        "strategy": ["method=fedgrass", "client.clip_norm=0"],
    }
    for setting in named:
        group, _, option = setting.partition("=")
        if setting.startswith(("action", "experiment")):
            continue
        more = needed.get(group, [])
        if option == "fedresprompt":
            more = ["strategy=controller_mean", "baselines=none"]
        if option == "fedgrass":
            more = ["strategy=row_mean", "client.clip_norm=0"]
        compose_run(["experiment=smoke", setting, *more])


@pytest.mark.parametrize("flag", ["--cascade-models", "--sparse-gradients", "--fairness", "--batching"])  # fmt: skip
def test_options_of_other_tools_are_errors(flag: str) -> None:
    from fedllm_flwr import cli

    assert flag in PAGE
    assert cli.main([flag, "a"]) == cli.WRONG_INPUT
    with pytest.raises(ConfigError, match="unrecognized arguments"):
        deploy([f"{flag}=a"])


@pytest.mark.slow
@pytest.mark.parametrize("program", ["flower-superlink", "flower-supernode", "flower-superexec"])
def test_options_of_flowers_programs_exist(program: str) -> None:
    found = commands(program)
    assert found
    for words in found:
        for option in (word for word in words if word.startswith("--")):
            assert f"{option} " in usage(program) or f"{option}]" in usage(program), option
    for option in re.findall(rf"`{program} ([^`]*)`", PAGE):
        for word in (w for w in option.split() if w.startswith("--")):
            assert word in usage(program), word


@pytest.mark.slow
def test_flowers_own_commands_exist() -> None:
    found = commands("flwr")
    assert len(found) >= 5
    for words in found:
        path = words[:3] if words[1] == "supernode" else words[:2]
        text = usage(*path)
        for option in (word for word in words if word.startswith("--")):
            assert option in text, (words, option)


@pytest.mark.slow
def test_certificates_and_keys_are_made_as_printed(tmp_path: Path) -> None:
    (made,) = (block for block in blocks("bash") if "openssl req" in block)
    keys = [shlex.join(words) for words in commands("ssh-keygen")]
    script = "\n".join(["set -e", made, *keys])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    assert context.get_ca_certs()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    verify = ["openssl", "verify", "-CAfile", "ca.crt", "-verify_hostname", "superlink.example.org"]
    verified = subprocess.run(
        [*verify, "server.pem"], cwd=tmp_path, capture_output=True, check=False
    )
    assert verified.returncode == 0, verified
    for name in ("ca.key", "server.key", "node"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0, name
    assert (tmp_path / "node.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
