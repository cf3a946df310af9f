"""A cascade behind the HTTP server: the queries of one task, each answered by the first tier that may."""

import hashlib
from collections.abc import Sequence

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.generation import Listener
from fedllm_flwr.serving.answering import Ask, Reply
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tiers import Chain


class ChainModel:
    """One cascade; an :class:`fedllm_flwr.serving.answering.Answerer`.

    A request is one user turn, or one plain text: what the task's question is asked about. Tiers decide themselves how
    they sample, so a request that asks for something else is refused.

    Attributes:
        name: What clients call it.

    Args:
        name: As above.
        chain: Who answers, and from which agreement on.
        task: Whose questions are asked, and whose labels are answered.
    """

    def __init__(self, name: str, chain: Chain, task: Task) -> None:
        self.name = name
        self._chain = chain
        self._task = task
        self._sizes = {tier.config.name: tier.config.size for tier in chain.tiers}
        lengths = [tier.config.max_new_tokens for tier in chain.tiers]
        self._longest = max(lengths) if task.kind == "instruction" else 1

    @property
    def tiers(self) -> tuple[str, ...]:
        """From the first to the last."""
        return tuple(tier.config.name for tier in self._chain.tiers)

    def check(self, ask: Ask) -> None:
        """See :meth:`fedllm_flwr.serving.answering.Answerer.check`."""
        text_of(ask)
        asked = ask.sampling
        for name, wanted, holds in (
            ("n", "1: a cascade gives one answer", len(asked.seeds) == 1),
            ("stop", "none with a cascade", not asked.stop),
            ("top_p", "1 with a cascade", asked.top_p == 1),
            ("temperature", "0, 1 or none: a cascade's tiers have their own", asked.temperature in (0, 1)),
            ("max_tokens", f"at least {self._longest}, what tiers write", asked.max_new_tokens >= self._longest),
        ):  # fmt: skip
            if not holds:
                raise ConfigError(f"{name}: expected {wanted}")

    def answer(self, asks: Sequence[Ask], listener: Listener) -> list[Reply]:
        """See :meth:`fedllm_flwr.serving.answering.Answerer.answer`; a text comes as a whole."""
        rows = [row_of(text_of(ask)) for ask in asks]
        replies = []
        for place, found in enumerate(self._chain.answer(self._task, rows)):
            text = found.text or ""
            listener(place, 0, text)
            replies.append(
                Reply(
                    texts=(text,),
                    finishes=("stop",),
                    input_tokens=sum(read for _, read, _ in found.tokens),
                    output_tokens=sum(written for _, _, written in found.tokens),
                    tier=found.tier,
                    agreement=found.level if self._sizes[found.tier] > 1 else None,
                    cost=float(found.cost),
                )
            )
        return replies


def text_of(ask: Ask) -> str:
    """What the task's question is asked about.

    Raises:
        ConfigError: There is no such text, or more than one turn.
    """
    if isinstance(ask.content, str):
        text = ask.content
    else:
        roles = [turn.role for turn in ask.content]
        if roles != ["user"]:
            raise ConfigError(
                f"messages: expected one user turn, whose text is put into the task's question, got {', '.join(roles)}"
            )
        text = ask.content[0].content
    if not text.strip():
        raise ConfigError("messages: expected a text, got an empty one")
    return text


def row_of(text: str) -> Row:
    """A query under the name of its text, so that its samples do not depend on what else is asked."""
    return Row(hashlib.sha256(text.encode()).hexdigest(), text, "")
