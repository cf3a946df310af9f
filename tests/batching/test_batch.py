import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.batching.batch import Batcher, ClosedError, QueueFullError
from fedllm_flwr.errors import ConfigError


class Worker:
    """Answers x by 10 x, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()

    def __call__(self, requests: list[int]) -> list[int]:
        self.batches.append(list(requests))
        assert self.open.wait(10)
        if -1 in requests:
            raise ValueError("minus one")
        return [10 * x for x in requests]


def play(
    scene: Callable[[Batcher[int, int], Worker], Awaitable[Any]], **options: Any
) -> tuple[Any, Worker]:
    worker = Worker()

    async def run() -> Any:
        batcher: Batcher[int, int] = Batcher(worker, **options)
        batcher.start()
        try:
            return await asyncio.wait_for(scene(batcher, worker), 20)
        finally:
            worker.open.set()
            await batcher.close()

    return asyncio.run(run()), worker


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 999), max_size=40), st.integers(1, 7))
def test_every_request_gets_its_own_answer(requests: list[int], max_batch: int) -> None:
    async def scene(batcher: Batcher[int, int], _: Worker) -> list[int]:
        return await asyncio.gather(*[batcher.submit(x) for x in requests])

    answers, worker = play(scene, max_batch=max_batch, max_wait_seconds=0.0)
    assert answers == [10 * x for x in requests]
    assert [x for batch in worker.batches for x in batch] == requests
    assert all(1 <= len(batch) <= max_batch for batch in worker.batches)


def test_a_full_batch_does_not_wait_and_a_small_one_waits_no_longer_than_it_may() -> None:
    async def scene(batcher: Batcher[int, int], worker: Worker) -> float:
        first = [batcher.submit(x) for x in range(3)]
        await asyncio.gather(*first)
        assert worker.batches == [[0, 1, 2]]
        began = asyncio.get_running_loop().time()
        alone = batcher.submit(3)
        assert await alone == 30
        return asyncio.get_running_loop().time() - began

    waited, _ = play(scene, max_batch=3, max_wait_seconds=0.3)
    assert waited >= 0.3


def test_requests_that_come_during_a_batch_are_the_next_one() -> None:
    async def scene(batcher: Batcher[int, int], worker: Worker) -> list[int]:
        worker.open.clear()
        first = batcher.submit(1)
        await until(lambda: worker.batches == [[1]])
        others = [batcher.submit(x) for x in (2, 3, 4)]
        assert batcher.waiting == 3
        worker.open.set()
        return [await first, *[await other for other in others]]

    answers, worker = play(scene, max_batch=2, max_wait_seconds=0.01)
    assert answers == [10, 20, 30, 40]
    assert worker.batches == [[1], [2, 3], [4]]


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room() -> None:
    async def scene(batcher: Batcher[int, int], worker: Worker) -> list[int]:
        worker.open.clear()
        running = batcher.submit(1)
        await until(lambda: worker.batches == [[1]])
        waiting = [batcher.submit(2), batcher.submit(3)]
        with pytest.raises(QueueFullError, match="at most 2 waiting requests"):
            batcher.submit(4)
        waiting[0].cancel()
        await until(lambda: batcher.waiting == 1)
        late = batcher.submit(5)
        running.cancel()  # too late to stop it, its answer is thrown away
        worker.open.set()
        return [await waiting[1], await late]

    answers, worker = play(scene, max_batch=2, max_queue=2, max_wait_seconds=0.0)
    assert answers == [30, 50]
    assert worker.batches == [[1], [3, 5]]


def test_an_error_reaches_its_batch_and_no_other() -> None:
    async def scene(batcher: Batcher[int, int], worker: Worker) -> list[Any]:
        tasks = [batcher.submit(x) for x in (1, -1, 2, 3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers, _ = play(scene, max_batch=2)
    assert [str(a) for a in answers[:2]] == ["minus one", "minus one"]
    assert answers[2:] == [20, 30]


def test_a_wrong_number_of_answers_is_an_error() -> None:
    async def scene() -> None:
        batcher: Batcher[int, int] = Batcher(lambda requests: requests[1:], max_wait_seconds=0.0)
        batcher.start()
        with pytest.raises(RuntimeError, match="expected 1 answers, got 0"):
            await batcher.submit(1)
        await batcher.close()

    asyncio.run(scene())


def test_closing_answers_what_waits_and_takes_nothing_new() -> None:
    async def scene() -> list[int]:
        worker = Worker()
        batcher: Batcher[int, int] = Batcher(worker, max_wait_seconds=60.0)
        batcher.start()
        waiting = [batcher.submit(1), batcher.submit(2)]
        await batcher.close()  # long before the wait is over
        with pytest.raises(ClosedError):
            batcher.submit(3)
        return [await own for own in waiting]

    assert asyncio.run(scene()) == [10, 20]


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait_seconds": -0.1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batch: expected max_batch >= 1"):
        Batcher(list, **wrong)
