"""Token embeddings as the input of a reservoir.

A model's embeddings have a standard deviation of some hundredths, so that the reservoir's bias drowns them and its
state hardly depends on the text. They are brought to a root mean square of 1, then projected to a few values.

Axes: T tokens, d width of the embeddings, n_in values of a step.
"""

import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.seeding import numpy_generator


def rms_normalised(embeddings: Tensor) -> Tensor:
    """Every token's embedding divided by its root mean square.

    Args:
        embeddings: Of any float type; a row of zeros, such as that of a padding token, stays one. [..., T, d]

    Returns:
        float32, the same shape.
    """
    wide = embeddings.float()
    rms = wide.square().mean(-1, keepdim=True).sqrt()
    return wide / rms.masked_fill(rms == 0, 1.0)


def random_projection(width: int, input_size: int, seed: int) -> Tensor:
    """A frozen projection that all holders of the seed share.

    Args:
        width: d, at least 1.
        input_size: n_in, at least 1.
        seed: Of the reservoir that it feeds.

    Returns:
        float32 N(0, 1/d), which keeps the expected mean square of a row. [d, n_in]

    Raises:
        ConfigError: A size is below 1.
    """
    if min(width, input_size) < 1:
        raise ConfigError(f"projection: expected sizes >= 1, got {width} and {input_size}")
    drawn = numpy_generator(seed, "projection").standard_normal((width, input_size))
    return torch.from_numpy(drawn / width**0.5).float()


def token_series(embeddings: Tensor, projection: Tensor) -> Tensor:
    """What a reservoir reads of a text.

    Args:
        embeddings: [..., T, d]
        projection: [d, n_in]

    Returns:
        The normalised embeddings, projected; float32 [..., T, n_in].

    Raises:
        ShapeError: The widths differ.
    """
    if embeddings.shape[-1] != len(projection):
        raise ShapeError(
            f"token embeddings: expected width {len(projection)}, got {embeddings.shape[-1]}"
        )
    return rms_normalised(embeddings) @ projection
