"""What the server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fedllm_flwr.serving.answering import Reply


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        waiting: Tells how many requests are in the queue.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        own = self._registry = CollectorRegistry()
        self._responses = Counter(
            "fedllm_responses", "Responses by path and status", ["path", "status"], registry=own
        )
        self._seconds = Histogram(
            "fedllm_answer_seconds", "From arrival to the whole answer", registry=own,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
        )  # fmt: skip
        self._batch = Histogram(
            "fedllm_batch_requests", "Requests in one batch", registry=own,
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )  # fmt: skip
        self._tokens = Counter(
            "fedllm_tokens", "Tokens read and written by tier", ["tier", "direction"], registry=own
        )
        self._answers = Counter(
            "fedllm_answers", "Requests answered by tier", ["tier"], registry=own
        )
        self._cost = Counter("fedllm_cost", "Cost of the answers by tier", ["tier"], registry=own)
        gauge = Gauge("fedllm_queue_requests", "Requests that wait", registry=own)
        gauge.set_function(waiting)

    def responded(self, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(path, str(status)).inc()

    def batch(self, size: int) -> None:
        """Count a batch."""
        self._batch.observe(size)

    def answered(self, reply: Reply, seconds: float) -> None:
        """Count an answer that reached its request."""
        self._answers.labels(reply.tier).inc()
        self._tokens.labels(reply.tier, "input").inc(reply.input_tokens)
        self._tokens.labels(reply.tier, "output").inc(reply.output_tokens)
        self._cost.labels(reply.tier).inc(reply.cost)
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
