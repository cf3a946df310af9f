"""Tiers of real models: what recorded answers stand for while somebody waits.

`members` is who answers on this machine, `endpoint` who answers elsewhere, `loading` makes them from settings, `tier`
asks the members of a tier, `chain` walks through tiers, `recorded` writes what everybody answers, `thresholds` chooses
from which agreement on a tier answers, and `packing` brings members to clients.
"""

from fedllm_flwr.tiers.adapted import pack_adaptation, unpack_adaptation
from fedllm_flwr.tiers.chain import Answered, Chain
from fedllm_flwr.tiers.endpoint import Endpoint
from fedllm_flwr.tiers.loading import check_unseen, load_member, load_tier
from fedllm_flwr.tiers.members import Computing, LocalMember, Reply
from fedllm_flwr.tiers.packing import pack_tier, unpack_tier
from fedllm_flwr.tiers.recorded import record_lines, timed_lines
from fedllm_flwr.tiers.thresholds import calibrated_thetas, tier_histogram
from fedllm_flwr.tiers.tier import Tier, is_right

__all__ = [
    "Answered",
    "Chain",
    "Computing",
    "Endpoint",
    "LocalMember",
    "Reply",
    "Tier",
    "calibrated_thetas",
    "check_unseen",
    "is_right",
    "load_member",
    "load_tier",
    "pack_adaptation",
    "pack_tier",
    "record_lines",
    "tier_histogram",
    "timed_lines",
    "unpack_adaptation",
    "unpack_tier",
]
