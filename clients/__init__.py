"""What a node does with a message: train, evaluate, or say who it is."""

from collections.abc import Callable

from flwr.app import Context, Message

from clients import lora

Handler = Callable[[Message, Context], Message]

TRAIN: dict[str, Handler] = {"fedlora": lora.train}
"""Method name -> what a training message does."""

EVALUATE: dict[str, Handler] = {"fedlora": lora.evaluate}
"""Method name -> what an evaluation message does."""
