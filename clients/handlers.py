"""What a node does with each kind of message."""

from flwr.app import Context, Message

from clients import EVALUATE, EXCHANGE, SCORE, TRAIN, Handler, cascade, examination
from fedllm_flwr import records

BY_METHOD: dict[str, dict[str, Handler]] = {
    records.TRAIN: TRAIN,
    records.EVALUATE: EVALUATE,
    records.EXCHANGE: EXCHANGE,
    records.SCORE: SCORE,
}
"""Kind of message -> what a node does, by the method that the message names."""

OTHERS: dict[str, Handler] = {
    records.CALIBRATE: cascade.calibrate,
    records.PENDING: cascade.pending,
    records.ANSWERS: cascade.answers,
    records.EXAMINE: examination.examine,
}
"""Kind of message -> what a node does, whatever the method."""


def handle(message: Message, context: Context) -> Message:
    """Do what a message asks for.

    Args:
        message: Of one of the kinds above.
        context: The node's; its state may change.

    Returns:
        The reply.

    Raises:
        KeyError: There is no such kind, or no such method.
        WireError: The message does not decode, or does not fit this node.
    """
    kind = message.metadata.message_type
    if kind in OTHERS:
        return OTHERS[kind](message, context)
    method = str(records.read_body(message)["config"]["method"]["name"])
    return BY_METHOD[kind][method](message, context)
