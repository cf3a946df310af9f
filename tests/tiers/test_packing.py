import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError, WireError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.settings.adaptation import TaskConfig
from fedllm_flwr.settings.cascade import MemberConfig, TierConfig
from fedllm_flwr.tasks.base import Task
from fedllm_flwr.tiers import Computing, Endpoint, Tier, load_tier, pack_tier, unpack_tier

Fixture = Callable[..., Any]
CPU = Computing("float32", "cpu")


@pytest.fixture
def mixed(lora_run: Path, prompt_run: Path) -> Tier:
    runs = tuple(MemberConfig(run=str(folder)) for folder in (lora_run, prompt_run))
    config = TierConfig(name="t", members=(*runs, MemberConfig(model="tiny")))
    return load_tier(config, TaskConfig(name="synthetic"), CPU, 4)


def test_a_tier_answers_the_same_at_a_client(mixed: Tier, task: Task) -> None:
    body, parts = pack_tier(mixed)
    there = unpack_tier(json.loads(json.dumps(body)), parts, "", CPU)
    assert there.config.names == mixed.config.names
    assert there.seed == 4
    assert there.ask(task, task.splits["test"]) == mixed.ask(task, task.splits["test"])
    assert sorted(parts) == ["member-0", "member-1"]


def test_no_path_of_this_machine_travels(mixed: Tier, adapted: Fixture, tmp_path: Path) -> None:
    body, _ = pack_tier(mixed)
    assert str(Path(mixed.config.members[0].run).parent) not in json.dumps(body)
    folder = str(tmp_path / "private" / "mine")
    local = replace(adapted(0), ref=ModelRef("path", path=folder))
    config = TierConfig(name="t", members=(MemberConfig(model="path", path=folder),))
    body, _ = pack_tier(Tier(config, (local,)))
    assert "private" not in json.dumps(body)
    there = unpack_tier(body, {}, "/models/own", CPU)
    assert there.members[0].ref.path == "/models/own"  # type: ignore[union-attr]


def test_samples_of_one_member_travel_too(task: Task, tier: Fixture) -> None:
    here = tier("t", 1, kind="self_consistency", samples=3, temperature=1.0)
    there = unpack_tier(*pack_tier(here), "", CPU)
    assert there.config.names == here.config.names
    assert there.ask(task, task.splits["test"]) == here.ask(task, task.splits["test"])


def test_an_endpoint_is_no_tier_of_clients() -> None:
    member = MemberConfig(base_url="http://far", model="big")
    tier = Tier(TierConfig(name="t", members=(member,)), (Endpoint("far", "http://far", "big"),))
    with pytest.raises(
        ConfigError, match=r"the first tier answers at the clients, .* endpoint far"
    ):
        pack_tier(tier)


def test_a_missing_array_is_named(mixed: Tier) -> None:
    body, parts = pack_tier(mixed)
    parts.pop("member-1")
    with pytest.raises(WireError, match="expected the values of member-1, got"):
        unpack_tier(body, parts, "", CPU)
