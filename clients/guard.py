"""What is done to a prompt before it leaves a client: clipping, and noise that nobody can subtract.

Noise is drawn from the operating system and not from the run's seed, which the server knows. So a run with noise cannot
be repeated to the bit; without it, it can. The controllers that clients send for averaging carry no noise of their own.

Axes: B prompts of a message, m tokens of a prompt, d width of the model's embeddings.
"""

import numpy as np
import torch
from torch import Tensor

from fedllm_flwr.privacy import clip_and_noise
from fedllm_flwr.settings.methods import FedResPromptConfig


def guarded(method: FedResPromptConfig, prompts: Tensor) -> Tensor:
    """The prompts as they may leave: at most ``clip_norm`` long, with noise of ``noise_multiplier`` clip norms.

    Args:
        method: The settings.
        prompts: [B, m, d]

    Returns:
        [B, m, d]; the same object where clipping is off.
    """
    if not method.clip_norm:
        return prompts
    random = np.random.default_rng()  # from the operating system, not from the run's seed
    sent = clip_and_noise(
        prompts.flatten(1).numpy(), method.clip_norm, method.noise_multiplier, random
    )
    return torch.from_numpy(sent).view_as(prompts)


def slope_before_clip(method: FedResPromptConfig, prompts: Tensor, slope: Tensor) -> Tensor:
    """The gradient by the prompts before clipping, from that by what left.

    With p' = c p / ‖p‖ for a clipped prompt, dL/dp = c / ‖p‖ (g - p̂ p̂ᵀg); added noise changes nothing.

    Args:
        method: The settings.
        prompts: Before clipping. [B, m, d]
        slope: g. [B, m, d]

    Returns:
        [B, m, d]; the same object where clipping is off.
    """
    if not method.clip_norm:
        return slope
    flat, g = prompts.flatten(1), slope.flatten(1)
    scale = _scales(method, flat)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    along = unit * (unit * g).sum(1, keepdim=True)
    return (scale * torch.where(scale < 1, g - along, g)).view_as(slope)


def _scales(method: FedResPromptConfig, flat: Tensor) -> Tensor:
    """What each prompt is multiplied with [B, 1], in (0, 1]."""
    norms = flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return (method.clip_norm / norms).clamp_max(1.0)
