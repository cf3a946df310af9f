"""Every file under conf/ is complete, composes, and says what it is for."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedllm_flwr import config as typed
from fedllm_flwr.compose import CONF, compose_run
from fedllm_flwr.config import RunConfig
from fedllm_flwr.models.catalog import MODELS
from fedllm_flwr.settings.adaptation import TaskConfig
from fedllm_flwr.settings.cascade import CascadeConfig
from fedllm_flwr.settings.methods import METHODS
from fedllm_flwr.settings.privacy import PRIVACY
from fedllm_flwr.settings.serving import ServingConfig
from fedllm_flwr.settings.verification import VerificationConfig
from fedllm_flwr.tasks.base import TaskOptions
from fedllm_flwr.tasks.catalog import TASKS
from fedllm_flwr.tasks.dealing import SCHEMES

GROUPS = {f.name: f.type for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.type)}
GROUPS |= {"method": METHODS["fedlora"], "privacy": PRIVACY["none"]}
GROUPS["serving"] = ServingConfig
GROUPS["cascade"] = CascadeConfig
GROUPS["verification"] = VerificationConfig
LEAVES = sorted(p for p in CONF.glob("*/*.yaml") if p.parent.name != "experiment")
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
NEEDED = {
    ("model", "hub"): ["model.hub_id=owner/name"],
    ("partition", "natural"): ["partition.num_clients=2"],
    ("partition", "site"): [
        "partition.num_clients=2",
        "task=csv",
        "task.labels=[no,yes]",
        "runtime=deployment",
    ],
    ("task", "headlines"): ["partition=iid"],
    ("task", "keyboard"): ["partition=iid"],
    ("task", "author_facts"): ["partition=natural", "partition.num_clients=8"],
    ("task", "csv"): ["task.loss=labels"],
    ("method", "fedprompt"): ["strategy=prompt_mean"],
    ("strategy", "prompt_mean"): ["method=fedprompt"],
    ("method", "fedresprompt"): ["strategy=controller_mean", "baselines=none"],
    ("strategy", "controller_mean"): ["method=fedresprompt", "baselines=none"],
    ("method", "fedgrass"): ["strategy=row_mean", "client.clip_norm=0"],
    ("strategy", "row_mean"): ["method=fedgrass", "client.clip_norm=0"],
    ("fairness", "q_ffl"): ["method=fedprompt", "strategy=prompt_mean"],
    ("strategy", "sift_merge"): ["num_rounds=1", "method.sharing=b_only"],
    ("privacy", "central"): ["strategy.weighting=uniform"],
    ("privacy", "sample"): ["client.clip_norm=0"],
    ("cascade", "prompt_lora"): ["action=cascade", "cascade.tiers.0.rho=0.5"],
    ("cascade", "headlines"): ["action=cascade", "cascade.tiers.0.rho=0.5"],
    ("cascade", "keyboard"): ["action=cascade", "cascade.tiers.0.rho=0.5"],
    ("robust", "norm_bound"): ["strategy.weighting=uniform"],
    ("robust", "median"): ["strategy.weighting=uniform"],
    ("robust", "trimmed_mean"): ["strategy.weighting=uniform"],
    ("robust", "krum"): ["strategy.weighting=uniform", "partition.num_clients=10"],
    ("robust", "multi_krum"): ["strategy.weighting=uniform", "partition.num_clients=10"],
}
"""What a leaf leaves to the user."""


def typed_by(leaf: Path) -> Any:
    """The dataclass of a leaf; methods and kinds of privacy have one each."""
    unions: dict[str, dict[str, Any]] = {"method": METHODS, "privacy": PRIVACY}
    return unions.get(leaf.parent.name, {}).get(leaf.stem, GROUPS[leaf.parent.name])


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def read(path: Path) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(OmegaConf.load(path))
    return found


def test_every_group_is_a_dataclass_and_every_dataclass_is_a_group() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*GROUPS, "experiment"}
    for folder in folders:
        assert {path.suffix for path in (CONF / folder).iterdir()} == {".yaml"}


@pytest.mark.parametrize("leaf", LEAVES, ids=name_of)
def test_a_leaf_names_fields_of_its_dataclass_and_itself(leaf: Path) -> None:
    fields = {field.name for field in dataclasses.fields(typed_by(leaf))}
    keys = set(read(leaf))
    assert keys <= fields, f"unknown: {keys - fields}"
    if "name" in fields:
        assert read(leaf)["name"] == leaf.stem


@pytest.mark.parametrize(
    "group", [g for g in GROUPS if g not in ("task", "partition", "optimizer", "runtime")]
)
def test_a_leaf_lists_every_field_where_all_leaves_read_the_same_ones(group: str) -> None:
    for leaf in LEAVES:
        if leaf.parent.name == group:
            fields = {field.name for field in dataclasses.fields(typed_by(leaf))}
            assert set(read(leaf)) == fields, name_of(leaf)


@pytest.mark.parametrize("group", ["task", "partition", "optimizer", "runtime"])
def test_together_the_leaves_of_a_group_offer_every_field(group: str) -> None:
    fields = {field.name for field in dataclasses.fields(GROUPS[group])}
    offered = set().union(*(read(leaf) for leaf in LEAVES if leaf.parent.name == group))
    assert fields - offered == ({"data_path"} if group == "task" else set()), (
        "a file is a fact of the node"
    )


@pytest.mark.parametrize("leaf", LEAVES, ids=name_of)
def test_a_leaf_composes_and_types(leaf: Path) -> None:
    group, name = leaf.parent.name, leaf.stem
    loss = "vocabulary" if name in ("headlines", "author_facts", "keyboard") else "labels"
    extra = [f"task.loss={loss}"] if group == "task" else []
    wanted = [f"{group}={name}", *extra, *NEEDED.get((group, name), [])]
    if (group, name) == ("runtime", "deployment"):
        wanted.append("baselines=none")
    wanted += {"serving": ["action=serve"], "verification": ["action=verify"]}.get(group, [])
    composed = compose_run(["experiment=smoke", *wanted])
    found = getattr(composed if hasattr(composed, group) else composed.config, group)
    values = read(leaf) | {key.split(".")[1]: None for key in wanted if key.startswith(f"{group}.")}
    for key, value in values.items():
        if value is not None and value != "???" and (group, key) not in EXPERIMENT_SETS:
            got = getattr(found, key)
            assert (list(got) if isinstance(got, tuple) else got) == value, key


EXPERIMENT_SETS = {("partition", "num_clients"), ("runtime", "dtype")}
"""What the smoke experiment changes in a group's defaults."""


@pytest.mark.parametrize(
    ("group", "name"), [*(("method", m) for m in METHODS), *(("privacy", p) for p in PRIVACY)]
)
def test_defaults_of_a_leaf_are_those_of_its_dataclass_unless_it_says_otherwise(
    group: str, name: str
) -> None:
    leaf = CONF / group / f"{name}.yaml"
    found = read(leaf)
    for field in dataclasses.fields(typed_by(leaf)):
        if field.default is not dataclasses.MISSING:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert found[field.name] == default, field.name


@pytest.mark.parametrize(
    ("group", "table"),
    [
        ("model", MODELS),
        ("task", TASKS),
        ("partition", SCHEMES),
        ("method", METHODS),
        ("privacy", PRIVACY),
    ],
)
def test_a_table_and_its_group_offer_the_same_names(group: str, table: dict[str, Any]) -> None:
    assert {leaf.stem for leaf in LEAVES if leaf.parent.name == group} == set(table)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name_of)
def test_an_experiment_composes_under_its_own_name(experiment: Path) -> None:
    composed = compose_run([f"experiment={experiment.stem}"])
    assert composed.config.experiment == experiment.stem
    assert composed.action == ("cascade" if composed.cascade.tiers else "run")


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name_of)
def test_an_experiment_says_its_question_its_minutes_and_its_command(experiment: Path) -> None:
    lines = experiment.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    comments = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    question = next(line for line in comments if line.startswith("Question: "))
    assert "?" in question
    minutes = next(line for line in comments if line.startswith("Minutes on two cores: "))
    assert re.search(r"\d", minutes)
    run = next(line for line in comments if line.startswith("Run: "))
    assert experiment.stem in run or "make demo" in run


def test_fingerprints_of_experiments_differ() -> None:
    found = [compose_run([f"experiment={e.stem}"]).config.fingerprint() for e in EXPERIMENTS]
    assert len(set(found)) == len(EXPERIMENTS)


def test_nothing_in_conf_imports_code() -> None:
    for path in CONF.rglob("*.yaml"):
        assert "_target_" not in path.read_text(), name_of(path)
    source = inspect.getsource(typed)
    called = {
        node.func.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec", "__import__"}


def test_the_task_group_adds_its_fields_to_the_loaders() -> None:
    added = {f.name for f in dataclasses.fields(TaskConfig)} - {
        f.name for f in dataclasses.fields(TaskOptions)
    }
    assert added == {"loss", "template", "max_tokens"}
