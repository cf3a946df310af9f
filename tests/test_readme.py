"""What the README and docs/ tell people to type and to open exists: commands compose, links lead somewhere."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from flwr.cli.app import typer_click_object as flwr_cli
from flwr.common.config import parse_config_args

from fedllm_flwr.actions import ACTIONS
from fedllm_flwr.cli import expand
from fedllm_flwr.compose import CONF, compose_run
from fedllm_flwr.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
SHELL = ("bash", "console", "sh")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*")
OWN = ("fedllm_flwr", "clients", "strategies", "benchmarks")


def described(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(document: Path) -> list[tuple[str, str]]:
    return FENCE.findall(described(document))


def inline(document: Path) -> list[str]:
    return INLINE.findall(FENCE.sub("", described(document)).replace(r"\|", "|"))


def shell_lines(language: str, text: str) -> Iterator[str]:
    """The commands of a block; in a console transcript those are the lines after a prompt."""
    for line in text.replace("\\\n", " ").splitlines():
        if language != "console":
            yield line.strip()
        elif line.startswith("$ "):
            yield line.removeprefix("$ ").strip()


def words_of(line: str) -> list[str]:
    """A command's words without comment, variables set before it, and placeholders such as ``<run dir>`` and ``…``."""
    words = shlex.split(re.sub(r"<[^<>]+>", "placeholder", line), comments=True)
    words = [word for word in words if "…" not in word and "..." not in word]
    while len(words) > 1 and ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    return words


# One checker for each command that the documents may use ---------------------------------------------------------


def check_fedllm(words: list[str]) -> None:
    if words[0] in (
        "daemon",
        "deploy",
        "init",
    ):  # tests/deployment/test_guide.py reads them with their own parsers
        return
    words = [word.replace("experiment=NAME", "experiment=smoke") for word in words]
    words = [word for word in words if word != "experiment=my-app"]  # of a project that init made
    overrides = [word for word in words if not word.startswith("-")]
    flags = {word for word in words if word.startswith("-")}
    assert flags <= {"-m", "--multirun", "--cfg", "--help"}, f"unknown flags {flags}"
    if "--cfg" in flags:
        overrides.remove("job")
    jobs = expand(overrides) if flags & {"-m", "--multirun"} else [overrides]
    for job in jobs:
        composed = compose_run(job)
        assert composed.action in ACTIONS
        chained = bool(composed.cascade.tiers)
        without = composed.action in ("run", "costs", "cascade") or chained
        # the action alone, in a sentence; what cannot be typed at all is another test's
        named = words == [f"action={composed.action}"] and composed.action != "resume"
        assert named or without == (not composed.run)
        assert (composed.action == "cascade" and not chained) == bool(composed.replay)


def check_flwr(words: list[str]) -> None:
    assert words[0] in flwr_cli.commands, f"flwr has no command {words[0]}"
    if words[0] != "run":
        return
    for flag, given in zip(words, [*words[1:], ""], strict=True):
        if flag in ("--run-config", "-c"):
            settings = parse_config_args([given])
            assert set(settings) <= set(project()["tool"]["flwr"]["app"]["config"])
            name = [f"experiment={settings['experiment']}"] if settings.get("experiment") else []
            compose_run([*name, *shlex.split(str(settings.get("overrides", "")))])


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = [word for word in words if not ASSIGNMENT.fullmatch(word)]
    assert set(asked) <= set(targets), f"the Makefile has {targets}"


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        top = words[1].partition(".")[0]
        assert top not in OWN or importlib.util.find_spec(words[1]), f"no module {words[1]}"
    elif words[0] != "-c":
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"


def check_nothing(words: list[str]) -> None:
    """The command is not ours and changes nothing that we could check."""


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "fedllm": check_fedllm,
    "flwr": check_flwr,
    "make": check_make,
    "python": check_python,
    "cd": check_nothing,
    "export": check_nothing,
    "git": check_nothing,
    "pip": check_nothing,
    "source": check_nothing,
    "tensorboard": check_nothing,
    "flower-superlink": check_nothing,
    "flower-supernode": check_nothing,
    "flower-superexec": check_nothing,
    "openssl": check_nothing,
    "ssh-keygen": check_nothing,
    "chmod": check_nothing,
    "printf": check_nothing,
}


def commands() -> list[tuple[str, str]]:
    """Every command of every document: the lines of shell blocks, and text in backticks that is a whole command."""
    found = []
    for document in DOCUMENTS:
        lines = [line for language, text in blocks(document) if language in SHELL
                 for line in shell_lines(language, text)]  # fmt: skip
        names = [name for name, checker in COMMANDS.items() if checker is not check_nothing]
        lines += [
            span for span in inline(document) if span.startswith(tuple(f"{n} " for n in names))
        ]
        found += [
            (document.name, line)
            for line in dict.fromkeys(lines)
            if line and not line.startswith("#")
        ]
    return found


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(("document", "line"), commands())
def test_a_command_can_be_typed(document: str, line: str) -> None:
    words = words_of(line)
    program = Path(words[0]).name
    assert program in COMMANDS, f"{document}: expected one of {sorted(COMMANDS)}, got {line!r}"
    if len(words) > 1:
        COMMANDS[program](words[1:])


def test_the_readme_names_the_two_commands_and_both_doors() -> None:
    lines = [words_of(line) for document, line in commands() if document == "README.md"]
    for start in (
        ["make", "demo"],
        ["make", "test"],
        ["fedllm"],
        ["fedllm", "-m"],
        ["flwr", "run"],
    ):
        assert any(words[: len(start)] == start for words in lines), start


@pytest.mark.parametrize(
    "line",
    [
        "fedllm experiment=nowhere",
        "fedllm experiment=smoke client.batch=1",
        "fedllm -m experiment=smoke strategy=svd,nothing",
        "fedllm action=dance",
        "fedllm action=resume",
        "fedllm --fast",
        "flwr run . --run-config 'experiment=\"smoke\" rounds=3'",
        'flwr run . -c \'experiment="smoke" overrides="rounds=3"\'',
        "flwr fly",
        "make haste",
        "python -m benchmarks.nothing",
        "python benchmarks/nothing.py",
        "rm -r outputs",
    ],
)
def test_a_command_that_cannot_be_typed_is_found(line: str) -> None:
    with pytest.raises((AssertionError, ConfigError)):
        test_a_command_can_be_typed("a document", line)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_other_blocks_parse(document: Path) -> None:
    parsers: dict[str, Callable[[str], object]] = {
        "python": check_source, "json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load,
        "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    }  # fmt: skip
    for language, text in blocks(document):
        if language not in (*SHELL, "", "text", "csv", "nginx"):
            assert language in parsers, f"{document.name}: a block in {language}"
            parsers[language](text)


def check_source(text: str) -> None:
    """The code compiles, and what it imports from this project exists."""
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.partition(".")[0] in OWN
        ):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"


def slugs(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", described(document)), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(FENCE.sub("", described(document))):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name} links to {target}"
        assert file.is_relative_to(ROOT), f"{document.name} links out of the project: {target}"
        assert not anchor or anchor in slugs(file), f"{document.name}: {target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_what_is_named_exists(document: Path) -> None:
    text = described(document)
    for name in re.findall(r"benchmarks[/.](\w+)", text):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), f"benchmarks/{name}.py"
    for names in re.findall(r"\bexperiment=\"?([\w,]+)", text):
        for name in names.split(","):
            if name not in ("NAME", "my"):  # placeholders, and a project's own
                assert (CONF / "experiment" / f"{name}.yaml").is_file(), f"experiment={name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_settings_in_backticks_exist(document: Path) -> None:
    """``group=choice`` is a file of conf/, ``group.key=value`` a key of one of the group's leaves."""
    for span in inline(document):
        if match := re.fullmatch(r"([a-z][a-z_.]*)=([\w,.\-\[\]]+)", span):
            key, value = match.groups()
            leaves = sorted((CONF / key.partition(".")[0]).glob("*.yaml"))
            if "." in key:
                keys = {k for leaf in leaves for k in yaml.safe_load(leaf.read_text()) or {}}
                assert key.partition(".")[2] in keys, span
            elif leaves:
                assert set(value.split(",")) <= {leaf.stem for leaf in leaves}, span
            else:
                assert key in yaml.safe_load((CONF / "config.yaml").read_text()), span
