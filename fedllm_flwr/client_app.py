"""The ClientApp: the door through which messages reach a node, in simulation and in deployment alike.

In a deployment Flower starts a process for every message. So nothing here imports torch: a message that a daemon
handles, or that asks for the node's place, needs none.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedllm_flwr import records
from fedllm_flwr.daemon import asking
from fedllm_flwr.limits import NODE_LIMIT, check_size, limit_of_node
from fedllm_flwr.settings.runtime import place_of

app = ClientApp()

KINDS = (
    records.TRAIN,
    records.EXCHANGE,
    records.EVALUATE,
    records.SCORE,
    records.CALIBRATE,
    records.PENDING,
    records.ANSWERS,
    records.EXAMINE,
)
"""Kinds of messages that are handled by ``clients.handlers``, here or by the node's daemon."""


def handle(message: Message, context: Context) -> Message:
    """Do what a message asks for: by the daemon that the node config names, or else in this process.

    Raises:
        WireError: The message is larger than the node takes; nothing of it has been decoded.
        FedLLMError: What doing it raises.
    """
    limit_mb = limit_of_node(context.node_config)
    check_size(message, limit_mb, "instruction", f"{NODE_LIMIT} of the node's facts")
    reply = asking.ask(message, context)
    if reply is not None:
        return reply
    from clients import handlers

    return handlers.handle(message, context)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say which place this node takes among the nodes that host clients."""
    place, total = place_of(context.node_config)
    said = {"partition-id": place, "num-partitions": total}
    return Message(records.answer(said, {}, "float32", 0), reply_to=message)


for _kind in KINDS:
    _category, _, _action = _kind.partition(".")
    getattr(app, _category)(_action or "default")(handle)
