"""What a model does between its decoder and its logits, found out by trying.

Most models multiply the final hidden state by the output embedding and stop. Some scale or bound the logits
after that. The configuration's field names are not uniform (one model divides by the field that another
multiplies by), so each candidate is compared with the model's own logits on random hidden states.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedllm_flwr.models.loss import LogitTransform

PROBE_ROWS = 4


def full_logits(model: Any, hidden: Tensor) -> Tensor:
    """The model's own logits for given final hidden states, whatever the model does to them.

    The decoder runs on one dummy token and its output is replaced, so that the model's own code computes the rest.

    Args:
        model: A causal language model of transformers.
        hidden: Final hidden states [n, d]; gradients flow through.

    Returns:
        Logits [n, V], all held in memory.
    """

    def replace(module: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (hidden[None], *output[1:])
        output.last_hidden_state = hidden[None]
        return output

    handle = model.base_model.register_forward_hook(replace)
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        return model(input_ids=token, use_cache=False).logits[0]
    finally:
        handle.remove()


@torch.no_grad()
def find_transform(model: Any) -> LogitTransform | None:
    """The transform of a model's logits.

    Args:
        model: A causal language model of transformers, with its weights loaded.

    Returns:
        The transform, or None if no candidate reproduces the model's logits: then only :func:`full_logits` is right.
    """
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        return None
    generator = torch.Generator().manual_seed(0)
    # 4 sqrt(d) is large enough for a soft cap to show
    hidden = 4 * torch.randn(PROBE_ROWS, head.weight.shape[1], generator=generator)
    hidden = hidden.to(head.weight.device, head.weight.dtype)
    wanted = full_logits(model, hidden).float()
    product = (hidden @ head.weight.t()).float()
    if getattr(head, "bias", None) is not None:
        product = product + head.bias.float()
    # half precision rounds product, scaled and capped product; float32 sums in another order
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2
    best, least = None, tolerance * float(wanted.norm())
    for transform in _candidates(model.config):
        guess = product * transform.scale
        if transform.softcap:
            guess = transform.softcap * torch.tanh(guess / transform.softcap)
        error = float((guess - wanted).norm()) if guess.shape == wanted.shape else math.inf
        if error < least:
            best, least = transform, error
    return best


def _candidates(config: Any) -> Iterator[LogitTransform]:
    config = config.get_text_config()
    scales = [1.0]
    for name in ("logit_scale", "logits_scaling", "logits_scale"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value and not math.isclose(value, 1.0):
            scales += [float(value), 1 / float(value)]
    caps = [0.0]
    for name in ("final_logit_softcapping", "logits_soft_cap", "logit_softcap"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value:
            caps.append(float(value))
    # declared values first, so that they win a tie: a large cap hardly differs from none here
    yield from (LogitTransform(scale, cap) for scale in reversed(scales) for cap in reversed(caps))
