"""What leaves a client after its training: values, or its update under a codec that leaves something out.

What is left out of an update is not lost. The client keeps it, in the node's context and on its disk as
:mod:`clients.personal` does, and adds it to its next update. A node that loses it begins at 0 again.

Axes: n values of a part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Context

from clients.personal import PersonalStore
from clients.private import protected
from clients.workspace import Asked
from fedllm_flwr.codecs import Shapes
from fedllm_flwr.errors import WireError

RESIDUAL = "residual"


@dataclass(frozen=True, eq=False)
class Trained:
    """One part of what a client has trained.

    Attributes:
        values: After training, float32 [n].
        received: The same part as the server's message gave it, and so as the server knows it, float32 [n].
        shapes: Of the matrices in it.
    """

    values: np.ndarray
    received: np.ndarray
    shapes: Shapes


def encoded_parts(
    asked: Asked,
    context: Context,
    partition_id: int,
    trained: Mapping[str, Trained],
    kind: str = "",
) -> dict[str, np.ndarray]:
    """A client's parts as they are put into a reply.

    With error feedback e, an update u travels as c = encode(u + e), and u + e - decode(c) is kept. It is kept under
    the round's number and read from a round before it, so a round that is asked again starts from the same e.

    Args:
        asked: The message that is answered.
        context: The node's.
        partition_id: The client.
        trained: Its parts by name.
        kind: Names what is trained where rounds differ in it; each kind has an e of its own.

    Returns:
        float32 [n] for codecs that carry values, else bytes.

    Raises:
        WireError: An update is not finite; nothing is kept then.

    Source:
        Seide et al. 2014 (1-bit SGD) and Stich et al. 2018, Algorithm 1, for error feedback; on LoRA's factors as the
        sparse communication of Kuo et al. 2024 (FLASC), which has none.
    """
    wire = asked.work.config.wire
    values = protected(
        asked.work.config.privacy,
        {name: part.values for name, part in trained.items()},
        {name: part.received for name, part in trained.items()},
    )
    if not wire.sends_updates:
        return dict(values)
    updates = {name: values[name] - part.received for name, part in trained.items()}
    if wire.error_feedback:
        _add_residual(_store(asked, context, kind), partition_id, _round(asked), updates)
    codec = wire.codec("uplink")
    sent, left_out = {}, {}
    for name, part in trained.items():
        try:
            sent[name] = codec.encode(updates[name], part.shapes)
        except WireError as error:
            raise WireError(f"client {partition_id}, part {name}: {error}") from error
        left_out[name] = updates[name] - codec.decode(sent[name], part.shapes)
    if wire.error_feedback:
        residual = np.concatenate([left_out[name] for name in sorted(left_out)])
        _store(asked, context, kind).save(partition_id, _round(asked), residual)
    return sent


def _add_residual(
    store: PersonalStore, partition_id: int, server_round: int, updates: dict[str, np.ndarray]
) -> None:
    """Add what earlier rounds left out; parts lie in the order of their names.

    Raises:
        WireError: What is kept has another size.
    """
    kept = store.load(partition_id, server_round)
    if kept is None:
        return
    total = sum(values.size for values in updates.values())
    if kept.size != total:
        raise WireError(
            f"client {partition_id}: expected a kept residual of {total} values, got {kept.size}"
        )
    start = 0
    for name in sorted(updates):
        stop = start + updates[name].size
        updates[name] = updates[name] + kept[start:stop]
        start = stop


def _store(asked: Asked, context: Context, kind: str) -> PersonalStore:
    name = f"{RESIDUAL}-{kind}" if kind else RESIDUAL
    versions = asked.work.config.keep_checkpoints + 1
    return PersonalStore(context, str(asked.body.get("run", "")), versions, name)


def _round(asked: Asked) -> int:
    return int(asked.body["server-round"])
