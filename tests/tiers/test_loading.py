import json
import shutil
from pathlib import Path

import pytest

from fedllm_flwr.actions import run_experiment
from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.evaluation import evaluate_run
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.adaptation import TaskConfig
from fedllm_flwr.settings.cascade import MemberConfig, TierConfig
from fedllm_flwr.tasks.base import Task, TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tiers import (
    Computing,
    Endpoint,
    LocalMember,
    check_unseen,
    is_right,
    load_member,
    load_tier,
)
from fedllm_flwr.tiers.grouped import GroupedMember
from fedllm_flwr.tiers.members import Asking

CPU = Computing("float32", "cpu")
SYNTHETIC = TaskConfig(name="synthetic", template="about", max_tokens=40)


@pytest.mark.parametrize("kind", ["lora_run", "prompt_run"])
def test_a_member_from_a_run_is_as_good_as_the_run(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    wanted = evaluate_run(RunDirectory.open(folder), None)
    task = load_task(TaskOptions(name="synthetic", train_rows=24, validation_rows=8, test_rows=24), 0)  # fmt: skip
    tier = load_tier(TierConfig(name="t", members=(MemberConfig(run=str(folder)),)), SYNTHETIC, CPU, 0)  # fmt: skip
    rows = task.splits["test"]
    right = [
        is_right(task, row, reply.text)
        for row, (reply,) in zip(rows, tier.ask(task, rows), strict=True)
    ]
    assert sum(right) / len(rows) == pytest.approx(wanted["accuracy"])


def test_a_prompts_soft_tokens_are_read_too(prompt_run: Path, task: Task) -> None:
    member = load_member(MemberConfig(run=str(prompt_run)), "p", SYNTHETIC, CPU)
    assert isinstance(member, LocalMember)
    assert (member.template, member.max_tokens, member.soft_tokens) == ("read", 48, 3)
    with_prompt = member.ask(task, task.splits["test"][:1], Asking())
    same = TaskConfig(name="synthetic", template="read", max_tokens=48)
    plain = load_member(MemberConfig(model="tiny"), "t", same, CPU)
    without = plain.ask(task, task.splits["test"][:1], Asking())
    assert with_prompt[0][0].input_tokens == without[0][0].input_tokens + 3


def test_other_members_ask_as_the_queries_task_does() -> None:
    plain = load_member(MemberConfig(model="tiny"), "n", SYNTHETIC, CPU)
    assert isinstance(plain, LocalMember)
    assert (plain.template, plain.max_tokens) == ("about", 40)
    far = load_member(MemberConfig(base_url="http://x", model="m"), "n", SYNTHETIC, CPU)
    assert far == Endpoint("n", "http://x", "m", "", "about")


def test_a_run_that_cannot_be_a_member_is_named(lora_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a run of task intents, got one of synthetic"):
        load_member(MemberConfig(run=str(lora_run)), "n", TaskConfig(name="intents"), CPU)
    shutil.copytree(lora_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(ConfigError, match=r"expected a finished run .* found none"):
        load_member(MemberConfig(run=str(tmp_path / "run")), "n", SYNTHETIC, CPU)
    with pytest.raises(ConfigError, match="is not a run directory"):
        load_member(MemberConfig(run=str(tmp_path / "absent")), "n", SYNTHETIC, CPU)


def test_a_run_of_a_local_folders_model_is_told_where_that_is(
    lora_run: Path, tmp_path: Path
) -> None:
    """Runs keep no paths, so the member has to say it."""
    with pytest.raises(ConfigError, match="of a local folder's model only, got one of tiny"):
        load_member(MemberConfig(run=str(lora_run), path="/models/mine"), "n", SYNTHETIC, CPU)
    shutil.copytree(lora_run, tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    kept = json.loads(manifest.read_text())
    kept["config"]["model"]["name"] = "path"
    manifest.write_text(json.dumps(kept))
    member = load_member(
        MemberConfig(run=str(tmp_path / "run"), path="/models/mine"), "n", SYNTHETIC, CPU
    )
    assert isinstance(member, LocalMember)
    assert (member.ref.name, member.ref.path) == ("path", "/models/mine")


def test_a_missing_key_is_named_before_anybody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAR_KEY", raising=False)
    far = MemberConfig(base_url="http://x", model="m", key_variable="FAR_KEY")
    with pytest.raises(ConfigError, match="environment variable FAR_KEY, got none"):
        load_tier(TierConfig(name="t", members=(far,)), SYNTHETIC, CPU, 0)


def test_queries_that_a_member_was_trained_on_are_refused(lora_run: Path) -> None:
    task = load_task(TaskOptions(name="synthetic", train_rows=24, validation_rows=8, test_rows=24), 0)  # fmt: skip
    member = MemberConfig(run=str(lora_run))
    check_unseen([member, MemberConfig(model="tiny")], task.splits["test"], "")
    with pytest.raises(ConfigError, match="one that has on 3 of 27"):
        check_unseen([member], [*task.splits["train"][:3], *task.splits["test"]], "")


def test_prompts_of_clusters_are_a_member_by_group(tmp_path: Path) -> None:
    """Clusters are named after their rows' groups; a run without any is refused."""
    words = ["experiment=smoke", "task.train_rows=24", "task.validation_rows=8", "task.test_rows=24", "partition=iid",
             "partition.num_clients=2", "client.local_epochs=0", "client.local_steps=1", "num_rounds=1",
             "baselines=none", "method=fedprompt", "strategy=prompt_mean", "method.length=2", "task.template=read",
             "fairness.groups=label"]  # fmt: skip
    for name, length in (("with", 2), ("without", 0)):
        given = [*words, f"method.cluster_length={length}"]
        run_experiment(compose_run(given).config, given, str(tmp_path / name))
    member = load_member(
        MemberConfig(run=str(tmp_path / "with"), clusters=True), "m", SYNTHETIC, CPU
    )
    assert isinstance(member, GroupedMember)
    places = {p.name for p in (tmp_path / "with" / "adapter" / "clusters").iterdir()}
    assert set(member.members) == places
    assert {own.soft_tokens for own in member.members.values()} == {4}
    with pytest.raises(
        ConfigError, match=r"clusters=true: expected a run with method\.cluster_length above 0"
    ):
        load_member(MemberConfig(run=str(tmp_path / "without"), clusters=True), "m", SYNTHETIC, CPU)
    for wrong in ({"model": "tiny"}, {"base_url": "http://x", "model": "m"}):
        with pytest.raises(ConfigError, match="it reads no clusters"):
            MemberConfig(**wrong, clusters=True)  # type: ignore[arg-type]
