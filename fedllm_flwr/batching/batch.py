"""Dynamic batching: requests that arrive within a short time are answered together.

Nothing here knows what a request is. One thread does the work; the event loop stays free.

Source:
    A batch is begun when it is full or its oldest request has waited for the longest time, as in most model servers;
    32 requests and 100 ms by default. So an idle server adds at most the longest wait.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from fedllm_flwr.errors import ConfigError, FedLLMError

Request = TypeVar("Request")
Answer = TypeVar("Answer")
MAX_BATCH = 32
MAX_WAIT_SECONDS = 0.1
MAX_QUEUE = 256


class QueueFullError(FedLLMError):
    """The queue holds as many requests as it may; the caller may try again later."""


class ClosedError(FedLLMError):
    """The batcher takes no more requests."""


@dataclass(eq=False)
class _Waiting(Generic[Request, Answer]):
    request: Request
    future: "asyncio.Future[Answer]"
    arrived: float


class Batcher(Generic[Request, Answer]):
    """Collects requests and hands them out in batches, in the order of their arrival.

    Use it in one event loop, between :meth:`start` and :meth:`close`.

    Args:
        run: Answers a list of requests, one answer for each in the same order. Called in a thread of its own, one call
            at a time.
        max_batch: Largest list, at least 1.
        max_wait_seconds: How long a request waits for others, at least 0.
        max_queue: Requests that may wait, at least 1; those being answered are not counted.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        run: Callable[[list[Request]], Sequence[Answer]],
        *,
        max_batch: int = MAX_BATCH,
        max_wait_seconds: float = MAX_WAIT_SECONDS,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or max_wait_seconds < 0:
            raise ConfigError(
                f"batch: expected max_batch >= 1, max_queue >= 1 and max_wait_seconds >= 0, got {max_batch}, "
                f"{max_queue} and {max_wait_seconds}"
            )
        self._run = run
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait_seconds, max_queue
        self._queue: deque[_Waiting[Request, Answer]] = deque()
        self._changed = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "batch")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to hand out batches; to be called inside the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._serve())

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def submit(self, request: Request) -> "asyncio.Future[Answer]":
        """Put a request into the queue.

        Returns:
            The answer to come, or the error of the batch. Cancelling it takes the request out of the queue; once it
            is being answered, the answer is thrown away.

        Raises:
            QueueFullError: Too many requests wait.
            ClosedError: :meth:`close` was called.
        """
        if self._closing:
            raise ClosedError("batch: closing, no more requests are taken")
        if len(self._queue) >= self._max_queue:
            raise QueueFullError(
                f"batch: expected at most {self._max_queue} waiting requests, got one more"
            )
        loop = asyncio.get_running_loop()
        entry: _Waiting[Request, Answer] = _Waiting(request, loop.create_future(), loop.time())
        entry.future.add_done_callback(lambda _: self._forget(entry))
        self._queue.append(entry)
        self._changed.set()
        return entry.future

    async def close(self) -> None:
        """Take no more requests, answer those that wait, and end the thread."""
        self._closing = True
        self._changed.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    def _forget(self, entry: _Waiting[Request, Answer]) -> None:
        with suppress(ValueError):  # it is not in the queue any more once it is being answered
            self._queue.remove(entry)
            self._changed.set()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while await self._batch_is_due():
            size = min(self._max_batch, len(self._queue))
            taken = [self._queue.popleft() for _ in range(size)]
            batch = [entry for entry in taken if not entry.future.done()]
            if not batch:
                continue
            requests = [entry.request for entry in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self._run, requests)
                if len(answers) != len(batch):
                    raise RuntimeError(f"batch: expected {len(batch)} answers, got {len(answers)}")
            except Exception as error:
                for entry in batch:
                    if not entry.future.done():
                        entry.future.set_exception(error)
                continue
            for entry, answer in zip(batch, answers, strict=True):
                if not entry.future.done():
                    entry.future.set_result(answer)

    async def _batch_is_due(self) -> bool:
        """Wait for the next batch; False when there will be none."""
        loop = asyncio.get_running_loop()
        while True:
            left = None
            if self._queue:
                left = self._queue[0].arrived + self._max_wait - loop.time()
                if self._closing or len(self._queue) >= self._max_batch or left <= 0:
                    return True
            elif self._closing:
                return False
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
