"""A tier as it goes to clients: its settings, and what its runs have trained, as named flat arrays.

Frozen models do not travel: a client has them, or loads them by name. Paths do not travel either: a model that is a
local folder is the node's own ``model-path``.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.settings.cascade import TierConfig
from fedllm_flwr.settings.tree import from_tree
from fedllm_flwr.tiers.adapted import pack_adaptation, unpack_adaptation
from fedllm_flwr.tiers.endpoint import Endpoint
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
                f"compute there under one prompt, got the "
                f"{'endpoint' if isinstance(member, Endpoint) else 'clusters of'} {member.name}"
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
    added = Adaptation(member.prompt, member.spec, member.delta, member.fixed_ids)
    facts, values = pack_adaptation(added)
    return {"template": member.template, "max_tokens": member.max_tokens, **facts}, values


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
    added = unpack_adaptation(facts, parts, part, ref)
    assert not isinstance(added.spec, LoraSpec)  # noqa: S101  # factors travel as updates
    return LocalMember(
        name,
        ref,
        str(facts["template"]),
        int(facts["max_tokens"]),
        prompt=added.adapter,
        spec=added.spec,
        delta=added.delta,
        fixed_ids=added.fixed_ids,
        computing=computing,
    )
