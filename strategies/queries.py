"""Federated queries: clients answer what their own tier may, the server answers the rest, many clients at a time.

Two exchanges. In the first each client answers its queries and sends the text of those that it defers; that text is
the only text on the wire. The server puts what all clients defer into batches for the tiers that follow. In the second
each client gets the answers to its own queries, in a message of its own, and says how many of all are right.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import WireError
from strategies.client_tier import Account, ClientTier, whole_numbers
from strategies.exchange import ClientReply, by_client, checked_number, stream
from strategies.hosting import Hosting

BATCH_QUERIES = 32
"""Deferred queries, of whatever clients, that the server's tiers are asked at a time."""
LONGEST_TEXT = 100_000
"""Characters of a deferred query; a longer one is refused."""

Answering = Callable[[Sequence[str]], Sequence[str | None]]
"""The server's tiers: texts to answers, in their order."""


@dataclass
class Served:
    """What became of the clients' queries.

    Attributes:
        queries: Of all clients that finished.
        deferred: Of these, answered by the server.
        correct: Of all, right.
        deferred_correct: Of the deferred, right.
        input_tokens: Read by the clients' tier.
        output_tokens: Written by it.
        text_bytes: Of deferred text, in UTF-8.
        clients: That finished.
    """

    queries: int = 0
    deferred: int = 0
    correct: int = 0
    deferred_correct: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    text_bytes: int = 0
    clients: int = 0


@dataclass
class _Waiting:
    """By client: how many queries it has, places and texts of the deferred ones, then answers."""

    queries: dict[int, int] = field(default_factory=dict)
    texts: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    answers: dict[int, list[tuple[int, str | None]]] = field(default_factory=dict)


class FederatedQueries(ClientTier):
    """Gathers pending queries, answers what is deferred, and returns the answers.

    Attributes:
        served: Figures so far.

    Args:
        config: As in the base class, as are ``hosting``, ``account`` and ``tier``.
        hosting: See there.
        account: See there.
        tier: See there.
        theta: From which agreement on the clients' tier answers.
        answer: The tiers at the server.
    """

    def __init__(
        self,
        config: RunConfig,
        hosting: Hosting,
        account: Account,
        tier: tuple[Mapping[str, Any], Mapping[str, np.ndarray]],
        theta: float,
        answer: Answering,
    ) -> None:
        super().__init__(config, hosting, account, tier)
        self.theta = theta
        self.answer = answer
        self.served = Served()
        self._waiting = _Waiting()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Odd rounds ask for pending queries; even rounds return answers, to each client its own and no other's."""
        if server_round % 2:
            self._waiting = _Waiting()
            # JSON has no infinity; agreement is at most 1, so 2 defers all as well
            body = {"theta": min(self.theta, 2.0)}
            self._sent = self._messages(records.PENDING, server_round, self.clients, body)
        else:
            self._sent = [
                message
                for partition_id, answers in sorted(self._waiting.answers.items())
                for message in self._messages(
                    records.ANSWERS,
                    server_round,
                    [partition_id],
                    {"answers": answers},
                    with_tier=False,
                )
            ]
        return self._sent

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Odd rounds gather and answer what is deferred; even rounds sum counts.

        Raises:
            RunStoppedError: Too few clients answered.
        """
        take = self._gathered if server_round % 2 else self._finished
        good = 0
        for reply in by_client(self._sent, replies):
            try:
                take(reply)
            except WireError as error:
                self.account.failure(server_round, reply.partition_id, str(error))
                continue
            good += 1
        self._enough(good, len(self.clients), "queries")
        if server_round % 2:
            self._answer()
            return None
        served = self.served
        return MetricRecord(
            {"queries": served.queries, "deferred": served.deferred, "correct": served.correct}
        )

    def serve(self, grid: Grid) -> Served:
        """Both exchanges.

        Raises:
            RunStoppedError: Too few clients answered, or a simulation worker died.
        """
        seconds = self.config.strategy.round_timeout_seconds
        for server_round in (1, 2):
            messages = self.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), grid)
            self.aggregate_evaluate(
                server_round, stream(grid, messages, seconds, self.account.count)
            )
        return self.served

    def _gathered(self, reply: ClientReply) -> None:
        if reply.error:
            raise WireError(reply.error)
        who = f"client {reply.partition_id}"
        numbers = [
            checked_number(who, reply.info, name, whole=True)
            for name in ("queries", "input-tokens", "output-tokens")
        ]
        if min(numbers) < 0:
            raise WireError(f"{who}: expected counts >= 0, got {numbers}")
        deferred = reply.info.get("deferred")
        texts = checked_texts(who, deferred, numbers[0])
        self._waiting.texts[reply.partition_id] = texts
        self._waiting.queries[reply.partition_id] = numbers[0]
        self.served.input_tokens += numbers[1]
        self.served.output_tokens += numbers[2]
        self.served.text_bytes += sum(len(text.encode()) for _, text in texts)

    def _answer(self) -> None:
        """Batches over all clients; who asked what is kept here, beside the texts."""
        flat = [
            (partition_id, place, text)
            for partition_id, texts in sorted(self._waiting.texts.items())
            for place, text in texts
        ]
        self._waiting.answers = {partition_id: [] for partition_id in self._waiting.texts}
        for start in range(0, len(flat), BATCH_QUERIES):
            batch = flat[start : start + BATCH_QUERIES]
            answers = self.answer([text for _, _, text in batch])
            for (partition_id, place, _), answer in zip(batch, answers, strict=True):
                self._waiting.answers[partition_id].append((place, answer))

    def _finished(self, reply: ClientReply) -> None:
        if reply.error:
            raise WireError(reply.error)
        names = ("queries", "deferred", "correct", "deferred-correct")
        queries, deferred, correct, deferred_correct = (
            int(
                whole_numbers(
                    ClientReply(reply.partition_id, {name: [reply.info.get(name)]}, {}), name, 1
                )[0]
            )
            for name in names
        )
        wanted = len(self._waiting.answers.get(reply.partition_id, []))
        asked = self._waiting.queries.get(reply.partition_id, 0)
        own_correct = correct - deferred_correct
        if (
            (queries, deferred) != (asked, wanted)
            or deferred_correct > deferred
            or not 0 <= own_correct <= queries - deferred
        ):
            raise WireError(
                f"client {reply.partition_id}: expected counts of {wanted} deferred of {asked} queries, got "
                f"{deferred} of {queries}, {correct} right and {deferred_correct} of the deferred"
            )
        self.served.queries += queries
        self.served.deferred += deferred
        self.served.correct += correct
        self.served.deferred_correct += deferred_correct
        self.served.clients += 1


def checked_texts(who: str, deferred: Any, queries: int) -> list[tuple[int, str]]:
    """Places and texts of deferred queries.

    Raises:
        WireError: It is something else, a place is given twice or out of range, or a text is too long or no text.
    """
    if not isinstance(deferred, list):
        raise WireError(f"{who}: deferred: expected a list, got {deferred!r:.60}")
    found: dict[int, str] = {}
    for entry in deferred:
        good = isinstance(entry, list) and len(entry) == 2
        place, text = entry if good else (None, None)
        if type(place) is not int or not isinstance(text, str) or not 0 <= place < queries:
            raise WireError(f"{who}: deferred: expected places and texts, got {entry!r:.60}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise WireError(f"{who}: deferred: expected Unicode text, got half of a surrogate pair")
        if place in found or len(text) > LONGEST_TEXT:
            raise WireError(
                f"{who}: deferred: expected each place once and at most {LONGEST_TEXT} characters, got place {place} "
                f"with {len(text)}"
            )
        found[place] = text
    return sorted(found.items())
