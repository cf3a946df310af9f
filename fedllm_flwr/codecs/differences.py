"""Values on the wire as what differs from values that both sides know.

The codecs that leave something out are for small differences. A random A, or a prompt of real embeddings, has no small
entries to leave out; what training has added to it does, and before the first round that is nothing at all.

Axes: n values of a part.
"""

import numpy as np

from fedllm_flwr.codecs.base import Codec, Shapes


def encode_difference(
    codec: Codec, values: np.ndarray, known: np.ndarray, shapes: Shapes
) -> np.ndarray:
    """Encode values [n] as their difference from known ones [n].

    Raises:
        WireError: A difference is not finite.
    """
    return codec.encode(values - known, shapes)


def decode_difference(
    codec: Codec, stored: np.ndarray, known: np.ndarray, shapes: Shapes
) -> np.ndarray:
    """The values [n] that a receiver has; the sender gets the same bits.

    Raises:
        WireError: The array is not what the codec makes of these shapes.
    """
    return known + codec.decode(stored, shapes)
