"""A frozen linear stand-in for a server's language model, for tests and cost studies.

    h = mean of the prompt's tokens,   logits = U h,   dL/dp = Uᵀ (softmax - onehot) / m for every token

Its call signatures are those of the server half of a real model.

Axes: B examples, m prompt tokens, d width, V tokens of the vocabulary, K classes (= V unless restricted).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError, ShapeError, WireError
from fedllm_flwr.seeding import numpy_generator


class SurrogateLM:
    """A linear language model with weights U ~ N(0, 1) / √d.

    Args:
        vocabulary: V.
        width: d.
        seed: Draws U.
        token_ids: The tokens that stand for the classes, all different; a target is a place in this list, and the
            cross-entropy is over these tokens only. None for the whole vocabulary.

    Raises:
        ConfigError: A size is below 1, or the tokens repeat or are not of the vocabulary.
    """

    def __init__(
        self, vocabulary: int, width: int, *, seed: int = 0, token_ids: Sequence[int] | None = None
    ) -> None:
        if min(vocabulary, width) < 1:
            raise ConfigError(f"surrogate: expected sizes >= 1, got {vocabulary} and {width}")
        ids = list(range(vocabulary) if token_ids is None else token_ids)
        if not ids or len(set(ids)) != len(ids) or not all(0 <= i < vocabulary for i in ids):
            raise ConfigError(
                f"surrogate classes: expected different tokens below {vocabulary}, got {ids}"
            )
        drawn = numpy_generator(seed, "surrogate").standard_normal((vocabulary, width))
        self.weights = torch.from_numpy(drawn / width**0.5).float()[ids]

    def logits(self, prompts: Tensor) -> Tensor:
        """Class logits.

        Args:
            prompts: Their dtype is that of the computation. [B, m, d]

        Returns:
            [B, K]

        Raises:
            ShapeError: The prompts have no token or another width.
        """
        width = self.weights.shape[1]
        if prompts.ndim != 3 or not prompts.shape[1] or prompts.shape[2] != width:
            raise ShapeError(
                f"prompts: expected shape [examples, tokens, {width}], got {list(prompts.shape)}"
            )
        pooled = prompts.sum(1) / prompts.shape[1]
        return pooled @ self.weights.to(prompts.dtype).T

    def gradient_from_logit_slope(self, prompts: Tensor, slope: Tensor) -> Tensor:
        """The backward pass alone, for clients that keep their labels.

        Args:
            prompts: [B, m, d]
            slope: Derivatives of each example's loss by its logits. [B, K]

        Returns:
            Gradient [B, m, d], a view in which an example's tokens share their memory.

        Raises:
            ShapeError: The slope is not [B, K].
        """
        wanted = (len(prompts), len(self.weights))
        if tuple(slope.shape) != wanted:
            raise ShapeError(f"logit slope: expected shape {list(wanted)}, got {list(slope.shape)}")
        tokens = prompts.shape[1]
        pooled = slope @ self.weights.to(slope.dtype)
        return (pooled / tokens)[:, None].expand(-1, tokens, -1)

    def loss_and_gradient(self, prompts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward pass.

        Args:
            prompts: [B, m, d]
            targets: Places in the list of classes, int64. [B]

        Returns:
            Each example's loss in nats [B] and the gradient of that loss by its prompt [B, m, d].

        Raises:
            ShapeError: The prompts or the targets have another shape.
            WireError: A target is outside the list of classes.
        """
        loss, slope = cross_entropy(self.logits(prompts), targets)
        return loss, self.gradient_from_logit_slope(prompts, slope)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's loss and its derivatives; what a client computes that keeps its labels.

    Args:
        logits: [B, K]
        targets: int64, in [0, K). [B]

    Returns:
        Losses in nats [B] and slopes softmax - onehot [B, K].

    Raises:
        ShapeError: The targets are not [B].
        WireError: A target is outside the list of classes; names the example.
    """
    if tuple(targets.shape) != tuple(logits.shape[:1]):
        raise ShapeError(f"targets: expected shape [{len(logits)}], got {list(targets.shape)}")
    classes, places = logits.shape[1], targets[:, None]
    if len(targets) and not all(0 <= int(extreme) < classes for extreme in targets.aminmax()):
        example = int(((targets < 0) | (targets >= classes)).nonzero()[0])
        raise WireError(
            f"example {example}: expected a target below {classes}, got {int(targets[example])}"
        )
    logs = torch.log_softmax(logits, dim=1)
    losses = -logs.gather(1, places)[:, 0]
    slopes = logs.exp_()
    return losses, slopes.scatter_add_(1, places, slopes.new_full(places.shape, -1.0))
