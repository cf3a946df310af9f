"""What a node does with a message: train, evaluate, or say who it is."""

from collections.abc import Callable

from flwr.app import Context, Message

from clients import lora, prompt

Handler = Callable[[Message, Context], Message]

TRAIN: dict[str, Handler] = {"fedlora": lora.train, "fedprompt": prompt.train}
"""Method name -> what a training message does."""

EVALUATE: dict[str, Handler] = {"fedlora": lora.evaluate, "fedprompt": prompt.evaluate}
"""Method name -> what an evaluation message does."""
