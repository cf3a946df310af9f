"""From a request to its answer: queue, batch, time limit, and a client that goes away."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm_flwr.batching.batch import Batcher, ClosedError, QueueFullError
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.serving.answering import Answerer, Ask, Reply
from fedllm_flwr.serving.metrics import Metrics
from fedllm_flwr.serving.protocol import ApiError
from fedllm_flwr.settings.serving import ServingConfig

LOG = logging.getLogger(__name__)
Heard = Callable[[int, str], None]
"""Told the index of an answer and its text so far."""
Part = tuple[int, int, str] | list[Reply]
"""Of a stream: indices of a prompt and of an answer to it with the text so far; at the end the replies."""


@dataclass(eq=False)
class Job:
    """One prompt on its way.

    Attributes:
        ask: What is asked.
        heard: Told as texts grow, in the worker's thread; None if nobody listens.
        stopped: Whether nobody waits for the answer any more; read by the worker.
    """

    ask: Ask
    heard: Heard | None = None
    stopped: bool = False

    def stop(self, _: object) -> None:
        """To be called when its reply is there or not wanted any more."""
        self.stopped = True


@dataclass(eq=False)
class Ticket:
    """Jobs of one HTTP request, in the queue or being answered.

    Attributes:
        futures: Their replies to come.
        deadline: On the event loop's clock.
        began: On the same clock.
        grown: Of each job, answer and text so far, as they grow.
    """

    futures: "list[asyncio.Future[Reply]]"
    deadline: float
    began: float
    grown: "asyncio.Queue[tuple[int, int, str]]" = field(default_factory=asyncio.Queue)

    def cancel(self) -> None:
        """Free the places in the queue, and let the worker drop the rows."""
        for future in self.futures:
            future.cancel()


class Service:
    """The queue in front of an answerer.

    Attributes:
        answerer: Who answers.
        metrics: What was counted.

    Args:
        answerer: As above.
        config: Sizes and limits.
    """

    def __init__(self, answerer: Answerer, config: ServingConfig) -> None:
        self.answerer = answerer
        self._config = config
        self._batcher: Batcher[Job, Reply] = Batcher(
            self._run,
            max_batch=config.max_batch,
            max_wait_seconds=config.max_wait_seconds,
            max_queue=config.max_queue,
        )
        self.metrics = Metrics(lambda: self._batcher.waiting)

    def start(self) -> None:
        """Begin to answer; inside the event loop."""
        self._batcher.start()

    async def close(self) -> None:
        """Answer what waits, then end."""
        await self._batcher.close()

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return self._batcher.waiting

    def submit(self, asks: Sequence[Ask], *, stream: bool = False) -> Ticket:
        """Put prompts into the queue, all or none.

        Raises:
            ApiError: 400 a prompt cannot be answered, 429 the queue is full, 503 the server is stopping.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        ticket = Ticket([], began + self._config.timeout_seconds, began)
        try:
            for ask in asks:
                self.answerer.check(ask)
            for index, ask in enumerate(asks):
                job = Job(ask, self._tell(ticket, index, loop) if stream else None)
                future = self._batcher.submit(job)
                future.add_done_callback(job.stop)
                ticket.futures.append(future)
        except ConfigError as error:
            ticket.cancel()
            raise ApiError(400, str(error), "bad_prompt") from None
        except QueueFullError:
            ticket.cancel()
            raise ApiError(429, "the queue is full, try again later", "queue_full") from None
        except ClosedError:
            ticket.cancel()
            raise ApiError(503, "the server is stopping", "stopping") from None
        return ticket

    async def replies(self, ticket: Ticket, gone: Awaitable[Any]) -> list[Reply]:
        """Wait for the replies.

        Args:
            ticket: From :meth:`submit`.
            gone: Done when the client has gone away.

        Raises:
            ApiError: 504 the time is over, 499 the client has gone, 500 the model failed.
        """
        everything = asyncio.gather(*ticket.futures)
        leaving = asyncio.ensure_future(gone)
        try:
            left = max(0.0, ticket.deadline - asyncio.get_running_loop().time())
            await asyncio.wait({everything, leaving}, timeout=left, return_when="FIRST_COMPLETED")
            if everything.done():
                return self._counted(ticket, everything)
            if leaving.done():
                raise client_gone()
            raise _timeout(self._config.timeout_seconds)
        finally:
            leaving.cancel()
            everything.cancel()
            ticket.cancel()

    async def stream(self, ticket: Ticket) -> AsyncIterator[Part]:
        """Texts as they grow, each with the index of its prompt and of its answer; the replies at the end.

        Raises:
            ApiError: 504 the time is over, 500 the model failed.
        """
        everything = asyncio.gather(*ticket.futures)
        try:
            while not (everything.done() and ticket.grown.empty()):
                more = asyncio.ensure_future(ticket.grown.get())
                left = max(0.0, ticket.deadline - asyncio.get_running_loop().time())
                awaited: set[asyncio.Future[Any]] = {everything, more}
                try:
                    await asyncio.wait(awaited, timeout=left, return_when="FIRST_COMPLETED")
                finally:
                    heard = more.done()
                    more.cancel()
                if heard:
                    yield more.result()
                    continue
                if not everything.done():
                    raise _timeout(self._config.timeout_seconds)
            yield self._counted(ticket, everything)
        finally:
            everything.cancel()
            ticket.cancel()

    def _counted(self, ticket: Ticket, everything: "asyncio.Future[list[Reply]]") -> list[Reply]:
        try:
            replies = everything.result()
        except Exception as error:
            LOG.exception("a batch failed")
            raise ApiError(500, "the model failed; the server's log says why", "failed") from error
        seconds = asyncio.get_running_loop().time() - ticket.began
        for reply in replies:
            self.metrics.answered(reply, seconds)
        return replies

    def _tell(self, ticket: Ticket, index: int, loop: asyncio.AbstractEventLoop) -> Heard:
        def heard(sample: int, text: str) -> None:
            loop.call_soon_threadsafe(ticket.grown.put_nowait, (index, sample, text))

        return heard

    def _run(self, jobs: list[Job]) -> list[Reply]:
        """One batch, in the worker's thread."""
        self.metrics.batch(len(jobs))

        def listener(query: int, sample: int, text: str) -> bool:
            job = jobs[query]
            if job.heard is not None and not job.stopped:
                job.heard(sample, text)
            return not job.stopped

        return self.answerer.answer([job.ask for job in jobs], listener)


def _timeout(seconds: float) -> ApiError:
    return ApiError(504, f"no answer within {seconds:g} s", "timeout")


def client_gone() -> ApiError:
    """What ends a request that nobody waits for any more; only the metrics see it."""
    return ApiError(499, "the client has gone", "gone")
