from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.cascade import CascadeConfig, MemberConfig, TierConfig
from fedllm_flwr.settings.tree import from_tree

TINY = {"model": "tiny"}
TIER = {"name": "small", "members": [TINY]}


def cascade(**values: Any) -> CascadeConfig:
    return from_tree(CascadeConfig, {"name": "c", **values}, "cascade")


def test_a_cascade_is_read_from_a_plain_tree() -> None:
    found = cascade(
        tiers=[TIER, {"name": "large", "members": [{"run": "outputs/big/"}]}], thetas=[1]
    )
    assert [tier.names for tier in found.tiers] == [("tiny",), ("big",)]
    assert found.thetas == (1.0,)
    assert found.tiers[0].members[0].ref().name == "tiny"


def test_answers_of_a_tier_have_different_names() -> None:
    twins = TierConfig(name="t", members=(MemberConfig(model="tiny"), MemberConfig(model="tiny")))
    assert twins.names == ("tiny#1", "tiny#2")
    one = MemberConfig(model="tiny")
    sampled = TierConfig(name="t", members=(one,), kind="self_consistency", samples=3, temperature=1)  # fmt: skip
    assert (sampled.names, sampled.size) == (("tiny#1", "tiny#2", "tiny#3"), 3)


def test_a_folder_is_no_name() -> None:
    """Names are recorded and go to clients; where a model lies on this machine does not."""
    assert MemberConfig(model="path", path="/models/mine").label == "mine"
    assert MemberConfig(run="a/b/run").label == "run"


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({}, "expected run, base_url, or model as one of .*, got ''"),
        ({"model": "huge"}, "got 'huge'"),
        ({"run": "r", "model": "tiny"}, "with run=r: it reads no model, got 'tiny'"),
        ({"run": "r", "base_url": "http://x"}, "it reads no base_url"),
        ({"base_url": "http://x"}, "expected the name of its model, got none"),
        ({"base_url": "file:///etc", "model": "m"}, "expected http:// or https://"),
        ({"base_url": "http://x:port/v1", "model": "m"}, "with a host, got 'http://x:port/v1'"),
        ({"base_url": "http://[::1/v1", "model": "m"}, "with a host"),
        ({"base_url": "http://:80/v1", "model": "m"}, "with a host"),
        ({"base_url": "http://x", "model": "m", "path": "p"}, "it reads no path"),
        ({"base_url": "http://x", "model": "m", "key_variable": "sk-12"}, "an environment variable, not a key"),
        ({"model": "tiny", "key_variable": "KEY"}, "it reads no key_variable"),
        ({"model": "path"}, "expected path to a checkpoint"),
    ],
)  # fmt: skip
def test_a_member_is_one_of_three_things(member: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemberConfig(**member)


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ({"name": " "}, "expected a name"),
        ({"name": "2"}, "a name that is no number"),
        ({"name": "-2"}, "a name that is no number"),
        ({"name": "small "}, "without outer spaces, got 'small '"),
        ({"members": [{**TINY, "name": name} for name in ("a", "a", "a#1")]}, "members with different names"),
        ({"members": [{**TINY, "name": name} for name in ("a", " a")]}, "members with different names"),
        ({"members": [{"run": "/"}]}, "members with different names, got ''"),
        ({"members": []}, "at least one member"),
        ({"price_in": -1.0}, "expected price_in >= 0"),
        ({"rho": 1.5}, r"expected rho in \[0, 1\], got 1.5"),
        ({"max_new_tokens": 0}, "expected max_new_tokens >= 1"),
        ({"samples": 3}, "use kind=self_consistency for samples"),
        ({"temperature": 0.5}, "use kind=self_consistency for samples"),
        ({"kind": "self_consistency", "temperature": 1.0}, "expected samples >= 2"),
        ({"kind": "self_consistency", "samples": 2}, "equal samples always agree"),
        ({"kind": "self_consistency", "samples": 2, "temperature": 1.0, "members": [TINY, TINY]}, "samples one member"),
    ],
)  # fmt: skip
def test_what_a_tier_cannot_be_is_named(tier: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_tree(TierConfig, {**TIER, **tier}, "tier")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tiers": [TIER]}, "expected two or more, or none, got one"),
        ({"tiers": [TIER, TIER]}, "expected different names, got small, small"),
        ({"thetas": [0.5]}, "one for every tier but the last, got 1 for 0"),
        ({"risk": 0.0}, r"cascade.risk: expected in \(0, 1\)"),
        ({"confidence": 1.0}, "cascade.confidence"),
        ({"tiers": [TIER, {**TIER, "name": "b"}], "thetas": [1.1]}, r"cascade.thetas: expected in \[0, 1\]"),
    ],
)  # fmt: skip
def test_what_a_chain_cannot_be_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cascade(**values)
