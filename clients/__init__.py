"""What a node does with a message: train, go on with a round, evaluate, or say who it is."""

from collections.abc import Callable

from flwr.app import Context, Message

from clients import grass, lora, prompt, resprompt

Handler = Callable[[Message, Context], Message]

TRAIN: dict[str, Handler] = {
    "fedlora": lora.train,
    "fedprompt": prompt.train,
    "fedresprompt": resprompt.train,
    "fedgrass": grass.train,
}
"""Method name -> what a training message does."""

EVALUATE: dict[str, Handler] = {
    "fedlora": lora.evaluate,
    "fedprompt": prompt.evaluate,
    "fedresprompt": resprompt.evaluate,
    "fedgrass": grass.evaluate,
}
"""Method name -> what an evaluation message does."""

EXCHANGE: dict[str, Handler] = {"fedresprompt": resprompt.exchange, "fedgrass": grass.train}
"""Method name -> what the further training messages of a round do, where a round has several."""

SCORE: dict[str, Handler] = {"fedresprompt": resprompt.score}
"""Method name -> what the second message of an evaluation does, where there is one."""
