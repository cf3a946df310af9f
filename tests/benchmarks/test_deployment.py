from pathlib import Path

import numpy as np
import pytest

from benchmarks import deployment
from clients import handlers
from fedllm_flwr import records
from fedllm_flwr.daemon import protocol


def test_the_figures_are_ratios_of_medians(capsys: pytest.CaptureFixture[str]) -> None:
    costs = {
        "without": [deployment.Cost(cpu, 0.0, 2 * cpu) for cpu in (10.0, 9.0, 99.0)],
        "with": [deployment.Cost(cpu, 1.5, cpu) for cpu in (2.0, 1.0, 9.0)],
    }
    found = deployment.figures_of(costs)
    assert found == {"daemon_ratio": 5.0, "daemon_wall_ratio": 10.0, "daemon_idle_ratio": 17.0}
    assert "1.50 CPU s" in capsys.readouterr().out
    assert set(deployment.GATES) <= set(found)


def test_a_reply_that_differs_in_a_bit_is_not_equal(tmp_path: Path) -> None:
    message, context = deployment.training_message("tiny", steps=1)
    folders = [deployment.written(tmp_path / name, message, context, None) for name in "ab"]
    for folder in folders:
        reply = handlers.handle(message, context)
        (folder / "reply").write_bytes(protocol.message_bytes(reply))
    deployment.check_equal(*folders)
    body, parts = deployment.answer_of(folders[1])
    body["clients"] = [{**info, "cpu-seconds": 1.0} for info in body["clients"]]
    (name, values) = next(iter(parts.items()))
    changed = {**parts, name: np.nextafter(values, np.float32(np.inf))}
    content = records.answer(body, changed, "float32", 1)
    reply.content = content
    (folders[1] / "reply").write_bytes(protocol.message_bytes(reply))
    with pytest.raises(AssertionError):
        deployment.check_equal(*folders)


def test_one_message_goes_to_one_client() -> None:
    message, context = deployment.training_message("tiny", steps=2)
    body = records.read_body(message)
    assert len(body["partition-ids"]) == 1
    assert body["config"]["client"]["local_steps"] == 2
    assert body["partition-ids"] == [context.node_config["partition-id"]]
