"""Bytes of values that cross the wire, without the headers of messages; the byte ledger of a run has those too.

Axes: as in `shapes`; l soft tokens of a prompt, r rank, i inputs and o outputs of a linear layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedllm_flwr.costs.shapes import ModelShape, SplitSizes

FLOAT_BYTES = 4
TARGET_BYTES = 4
"""A target id as int32."""
SEED_BYTES = 8
"""What a client needs to build the reservoir."""


def prompt_bytes(length: int, width: int) -> int:
    """One soft prompt one way, 4 l d: the whole of prompt tuning's update, and of an exchange's prompt or gradient.

    Args:
        length: Soft tokens, l.
        width: Of the embeddings, d.

    Source:
        Lester et al. 2021 (prompt tuning), section 2, for the l d values.
    """
    return FLOAT_BYTES * length * width


def lora_parameters(layers: Iterable[tuple[int, int]], rank: int) -> int:
    """Parameters of LoRA on real layers, Σ r (i + o).

    Args:
        layers: Inputs i and outputs o of each adapted layer.
        rank: r.

    Source:
        Hu et al. 2022 (LoRA), section 4.1.
    """
    return sum(rank * (inputs + outputs) for inputs, outputs in layers)


def lora_bytes(shape: ModelShape, sizes: SplitSizes) -> int:
    """One LoRA adapter one way, under the source's assumption that every adapted layer is square, d x d."""
    layers = [(shape.width, shape.width)] * (shape.layers * sizes.lora_layers)
    return FLOAT_BYTES * lora_parameters(layers, sizes.lora_rank)


def controller_parameters(shape: ModelShape, sizes: SplitSizes) -> int:
    """Parameters of the controller: W_out [k, 1 + n_in + N] and P [m d, k]."""
    return sizes.code_size * (sizes.state_size + sizes.prompt_tokens * shape.width)


@dataclass(frozen=True)
class ExchangeBytes:
    """What crosses the wire for one example of FedResPrompt.

    Attributes:
        prompt_up: The soft prompt.
        gradient_down: The loss's gradient with respect to it.
        target_up: The target id; 0 if labels stay private.
        loss_down: The loss; 0 if labels stay private, since the client computes it.
        logits_down: Logits of the K classes; 0 unless labels stay private.
        slope_up: Softmax minus one-hot; 0 unless labels stay private.
    """

    prompt_up: int
    gradient_down: int
    target_up: int = 0
    loss_down: int = 0
    logits_down: int = 0
    slope_up: int = 0

    @property
    def up(self) -> int:
        """From the client."""
        return self.prompt_up + self.target_up + self.slope_up

    @property
    def down(self) -> int:
        """To the client."""
        return self.gradient_down + self.loss_down + self.logits_down

    @property
    def total(self) -> int:
        """Both ways."""
        return self.up + self.down


def exchange_bytes(
    shape: ModelShape, sizes: SplitSizes, *, label_private: bool = False
) -> ExchangeBytes:
    """Bytes of one example's exchange.

    Args:
        shape: The server's model.
        sizes: Of the split.
        label_private: Whether logits go down and their slope comes up instead of the target id.

    Returns:
        2·4 m d + 4 + 4 in all with targets on the wire, 2·4 m d + 8 K without.
    """
    prompt = prompt_bytes(sizes.prompt_tokens, shape.width)
    if label_private:
        logits = FLOAT_BYTES * sizes.classes
        return ExchangeBytes(prompt, prompt, logits_down=logits, slope_up=logits)
    return ExchangeBytes(prompt, prompt, target_up=TARGET_BYTES, loss_down=FLOAT_BYTES)
