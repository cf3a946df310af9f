from fedllm_flwr.serving.answering import Reply
from fedllm_flwr.serving.metrics import Metrics


def test_two_servers_of_a_process_count_apart() -> None:
    first, second = Metrics(lambda: 3), Metrics(lambda: 0)
    first.responded("/health", 200)
    first.batch(4)
    first.answered(Reply(("a",), ("stop",), 5, 6, "small", 0.5, 1.5), 0.3)
    lines = first.text().decode().splitlines()
    for line in (
        'fedllm_responses_total{path="/health",status="200"} 1.0',
        'fedllm_tokens_total{direction="input",tier="small"} 5.0',
        'fedllm_tokens_total{direction="output",tier="small"} 6.0',
        'fedllm_cost_total{tier="small"} 1.5',
        'fedllm_answer_seconds_bucket{le="0.25"} 0.0',
        'fedllm_answer_seconds_bucket{le="0.5"} 1.0',
        'fedllm_batch_requests_bucket{le="4.0"} 1.0',
        "fedllm_queue_requests 3.0",
    ):
        assert line in lines
    assert b"small" not in second.text()
