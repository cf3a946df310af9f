"""Clipping and noise, the ε that they buy, and an attack that measures what is left.

`noise` is what a client does to what it sends, `clipped_mean` and `clip_norm` what a server does to a sum,
`accounting` what either may claim, `reconstruction` what an attacker still reads.
"""

from fedllm_flwr.privacy.accounting import (
    fixed_size_epsilon,
    single_release_epsilon,
    sum_epsilon,
    sum_rdp_epsilon,
)
from fedllm_flwr.privacy.clip_norm import next_clip_norm, noise_beside_count
from fedllm_flwr.privacy.clipped_mean import ClippedMean, clip_factor, update_norm
from fedllm_flwr.privacy.noise import clip_and_noise
from fedllm_flwr.privacy.reconstruction import RIDGES, reconstruction_r2, recovered_codes

__all__ = [
    "RIDGES",
    "ClippedMean",
    "clip_and_noise",
    "clip_factor",
    "fixed_size_epsilon",
    "next_clip_norm",
    "noise_beside_count",
    "reconstruction_r2",
    "recovered_codes",
    "single_release_epsilon",
    "sum_epsilon",
    "sum_rdp_epsilon",
    "update_norm",
]
