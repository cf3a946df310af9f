"""Clipping and noise, the ε that they buy, and an attack that measures what is left.

`noise` is what a client does, `accounting` what it may claim, `reconstruction` what an attacker still reads.
"""

from fedllm_flwr.privacy.accounting import single_release_epsilon, sum_epsilon
from fedllm_flwr.privacy.noise import clip_and_noise
from fedllm_flwr.privacy.reconstruction import RIDGES, reconstruction_r2, recovered_codes

__all__ = [
    "RIDGES",
    "clip_and_noise",
    "reconstruction_r2",
    "recovered_codes",
    "single_release_epsilon",
    "sum_epsilon",
]
