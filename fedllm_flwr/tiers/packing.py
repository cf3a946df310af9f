"""A tier as it goes to clients: its settings, and what its runs have trained, as named flat arrays.

Frozen models do not travel: a client has them, or loads them by name. Paths do not travel either: a model that is a
local folder is the node's own ``model-path``.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fedllm_flwr.errors import ConfigError, WireError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.models.shapes import layer_shapes
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.records import pack_delta, unpack_delta
from fedllm_flwr.settings.cascade import TierConfig
from fedllm_flwr.settings.tree import from_tree
from fedllm_flwr.tiers.members import Computing, LocalMember
from fedllm_flwr.tiers.tier import Tier

Packed = tuple[dict[str, Any], dict[str, np.ndarray]]


def pack_tier(tier: Tier) -> Packed:
    """Settings that JSON can hold, and arrays by name, float32 [m].

    Raises:
        ConfigError: A member is an endpoint: the clients' text would go there.
    """
    members, parts = [], {}
    for number, member in enumerate(tier.members):
        if not isinstance(member, LocalMember):
            raise ConfigError(
                f"cascade tier {tier.config.name!r}: the first tier answers at the clients, expected models that "
                f"compute there, got the endpoint {member.name}"
            )
        facts, values = _pack(member)
        members.append(facts)
        if values is not None:
            parts[f"member-{number}"] = values
    plain = [
        {"name": setting.label, "model": member.ref.name, "hub_id": member.ref.hub_id,
         "revision": member.ref.revision, "path": "node" if member.ref.path else ""}
        for setting, member in zip(tier.config.members, tier.members, strict=True)
        if isinstance(member, LocalMember)
    ]  # fmt: skip
    config = {**asdict(tier.config), "members": plain}
    return {"tier": config, "members": members, "seed": tier.seed}, parts


def unpack_tier(
    body: Mapping[str, Any], parts: Mapping[str, np.ndarray], model_path: str, computing: Computing
) -> Tier:
    """Undo :func:`pack_tier`.

    Args:
        body: The settings.
        parts: The arrays.
        model_path: The node's own folder, for models that are one.
        computing: Where the members compute here.

    Raises:
        WireError: An array is missing.
        ConfigError: A setting is malformed.
    """
    config = from_tree(TierConfig, body["tier"], "cascade tier")
    members = tuple(
        _unpack(
            facts, parts, f"member-{number}", setting.ref(), model_path, computing, setting.label
        )
        for number, (facts, setting) in enumerate(zip(body["members"], config.members, strict=True))
    )
    return Tier(config, members, int(body["seed"]))


def _pack(member: LocalMember) -> tuple[dict[str, Any], np.ndarray | None]:
    facts: dict[str, Any] = {
        "template": member.template,
        "max_tokens": member.max_tokens,
        "fixed_ids": list(member.fixed_ids),
    }
    if member.delta is not None:
        values, ranks = pack_delta(member.delta)
        return {**facts, "kind": "delta", "ranks": ranks}, values
    if member.spec is None or member.prompt is None:
        return {**facts, "kind": "plain"}, None
    kind = "soft" if isinstance(member.spec, PromptSpec) else "peft"
    return {**facts, "kind": kind, "spec": asdict(member.spec)}, member.prompt


def _unpack(
    facts: Mapping[str, Any],
    parts: Mapping[str, np.ndarray],
    part: str,
    ref: ModelRef,
    model_path: str,
    computing: Computing,
    name: str,
) -> LocalMember:
    ref = replace(ref, path=model_path) if ref.path else ref
    plain = LocalMember(
        name,
        ref,
        str(facts["template"]),
        int(facts["max_tokens"]),
        fixed_ids=tuple(facts["fixed_ids"]),
        computing=computing,
    )
    if facts["kind"] == "plain":
        return plain
    if part not in parts:
        raise WireError(f"cascade tier: expected the values of {part}, got {sorted(parts)}")
    values = parts[part]
    if facts["kind"] == "delta":
        ranks = facts["ranks"]
        return replace(plain, delta=unpack_delta(values, ranks, layer_shapes(ref, tuple(ranks))))
    spec = facts["spec"]
    if facts["kind"] == "peft":
        return replace(plain, prompt=values, spec=PeftPromptSpec(**spec))
    segments = tuple(Segment(**segment) for segment in spec["segments"])
    return replace(plain, prompt=values, spec=PromptSpec(segments, spec["placement"]))
