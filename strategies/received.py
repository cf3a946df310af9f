"""What a client's answer says of its values, where messages carry updates or differences.

The server's own values are G, what the message made of them at the client is R, and the client trained R to T.

Axes: n values of a part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.codecs import Shapes, count_values, decode_difference, encode_difference
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.settings.wire import WireConfig
from strategies.exchange import COUNTED, ClientReply


@dataclass(frozen=True, eq=False)
class Start:
    """Where a client began a round with one part, at its own rank and scaling.

    Attributes:
        own: As the server has it, G, float32 [n].
        received: As the client decoded it, R, float32 [n].
    """

    own: np.ndarray
    received: np.ndarray

    def counted_from(self, wire: WireConfig) -> np.ndarray:
        """The values that a client's update is added to, float32 [n]; see :func:`counted_values`."""
        return self.own if wire.sends_differences else self.received


def received_values(
    wire: WireConfig, values: np.ndarray, known: np.ndarray, shapes: Shapes
) -> np.ndarray:
    """The values [n] that clients make of a training message; the same bits as theirs.

    Args:
        wire: The codecs.
        values: The server's, float32 [n].
        known: What both sides know, float32 [n]; only codecs of differences look at it.
        shapes: Of the matrices in the part.
    """
    codec = wire.codec("downlink")
    if not wire.sends_differences:
        return codec.decode(codec.encode(values, shapes), shapes)
    return decode_difference(codec, encode_difference(codec, values, known, shapes), known, shapes)


@dataclass(frozen=True, eq=False)
class Part:
    """What one part of an answer must be.

    Attributes:
        who: Client and part, for messages.
        shapes: Of the matrices in it.
        start: Where the client began; asked only where an answer means nothing without it.
        why: What decides its size, for messages.
    """

    who: str
    shapes: Shapes
    start: Callable[[], Start]
    why: str = ""


def counted_values(wire: WireConfig, reply: ClientReply, name: str, part: Part) -> np.ndarray:
    """The values that one part of an answer counts as, float32 [n].

    They are the client's own, T. Where the way down leaves something out of G, T lacks it too, so what the client has
    changed counts from G: G + (T - R). Otherwise every round would cut the server's model down to what it sent.

    Args:
        wire: The codecs.
        reply: The answer.
        name: Of the part.
        part: What it must be.

    Raises:
        WireError: It came as something else than what was asked, or the codec cannot have made these bytes.
        ShapeError: There are more or fewer values.

    Source:
        Kuo et al. 2024 (FLASC, arXiv 2406.05233): the server's weights stay dense and get the mean of sparse updates of
        clients that began with sparse weights.
    """
    sent = reply.parts[name]
    made_here = reply.codec == COUNTED
    if not made_here and reply.codec != wire.uplink:
        raise WireError(f"{part.who}: expected the codec {wire.uplink}, got {reply.codec}")
    if wire.sends_updates and not made_here:
        try:
            update = wire.codec("uplink").decode(sent, part.shapes)
        except WireError as error:
            raise WireError(f"{part.who}: {error}{part.why}") from error
        return part.start().counted_from(wire) + update
    expected = count_values(part.shapes)
    if sent.size != expected:
        raise ShapeError(f"{part.who}: expected {expected} values{part.why}, got {sent.size}")
    if made_here or not wire.sends_differences:
        return sent
    start = part.start()
    return sent + (start.own - start.received)
