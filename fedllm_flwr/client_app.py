"""The ClientApp: the door through which messages reach a node, in simulation and in deployment alike."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import clients
from clients import cascade, examination
from clients.workspace import place_of
from fedllm_flwr import records

app = ClientApp()


def _method(message: Message) -> str:
    return str(records.read_body(message)["config"]["method"]["name"])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients that the message names."""
    return clients.TRAIN[_method(message)](message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on the held-out rows of the clients that the message names."""
    return clients.EVALUATE[_method(message)](message, context)


@app.train("exchange")
def exchange(message: Message, context: Context) -> Message:
    """Go on with a round that takes several messages."""
    return clients.EXCHANGE[_method(message)](message, context)


@app.evaluate("score")
def score(message: Message, context: Context) -> Message:
    """Finish an evaluation that takes two messages."""
    return clients.SCORE[_method(message)](message, context)


@app.query("calibrate")
def calibrate(message: Message, context: Context) -> Message:
    """Count how often a cascade's first tier is right, by agreement."""
    return cascade.calibrate(message, context)


@app.query("pending")
def pending(message: Message, context: Context) -> Message:
    """Answer pending queries with a cascade's first tier, and hand over the text of those that it defers."""
    return cascade.pending(message, context)


@app.query("answers")
def answers(message: Message, context: Context) -> Message:
    """Take the answers to the deferred queries."""
    return cascade.answers(message, context)


@app.query("examine")
def examine(message: Message, context: Context) -> Message:
    """Ask a model about the rows of a client that wants to be forgotten."""
    return examination.examine(message, context)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Say which place this node takes among the nodes that host clients."""
    place, total = place_of(context)
    said = {"partition-id": place, "num-partitions": total}
    return Message(records.answer(said, {}, "float32", 0), reply_to=message)
