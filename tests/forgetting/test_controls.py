from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.odd_client import ODD
from clients.workspace import open_workspace
from fedllm_flwr.core import whole_json
from fedllm_flwr.forgetting.controls import CHANGES, NOISE, adapter_noise, gradient_ascent
from fedllm_flwr.forgetting.request import Request, read_request
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.settings.methods import FedLoraConfig
from fedllm_flwr.training.examine import examine
from strategies.observer import MERGING

Fixture = Callable[..., Any]


@pytest.fixture(scope="module")
def request_(odd: Fixture) -> Request:
    source, rows = odd()
    found = read_request(source, str(ODD), "retrain")
    runtime = replace(found.config.runtime, data_path=str(rows))
    return replace(found, config=replace(found.config, runtime=runtime))


@pytest.fixture(scope="module")
def arrays(request_: Request) -> dict[str, np.ndarray]:
    saved = checkpoints.latest(request_.source.checkpoints)
    assert saved is not None
    return saved.arrays


def loss(request: Request, adapter: np.ndarray) -> float:
    """Mean over the client's training rows."""
    config = request.config
    assert isinstance(config.method, FedLoraConfig)
    work = open_workspace(whole_json(config))
    encoder = work.encoder()
    model = Adaptation(adapter, config.method.server_spec())
    rows = encoder.encode(work.clients[ODD].train)
    found = examine(work.backbone, rows, model, head_token_ids=encoder.head_token_ids)
    return float(found.losses.mean())


def test_doing_nothing_and_refusing_leave_the_model_alone(
    request_: Request, arrays: dict[str, np.ndarray]
) -> None:
    for name in ("no_op", "refusal_wrapper"):
        same = CHANGES[name](request_, arrays)
        assert all(same[key] is values for key, values in arrays.items())


def test_ascent_makes_the_clients_rows_unlikely(
    request_: Request, arrays: dict[str, np.ndarray]
) -> None:
    up = gradient_ascent(request_, arrays)
    assert loss(request_, up["adapter"]) > 2 + loss(request_, arrays["adapter"])
    assert up["delta"] is arrays["delta"]


def test_noise_is_as_large_as_it_says_and_only_on_what_is_trained(request_: Request) -> None:
    arrays = {
        "adapter": np.full(4000, 2.0, np.float32),
        "delta": np.zeros(0, np.float32),
        "optimizer/m": np.ones(3, np.float32),
        f"{MERGING}sum": np.ones(3, np.int64),
    }
    noised = adapter_noise(request_, arrays)
    assert np.std(noised["adapter"] - 2) == pytest.approx(2 * NOISE, rel=0.05)
    assert noised["adapter"].dtype == np.float32
    assert noised["optimizer/m"] is arrays["optimizer/m"]
    assert noised[f"{MERGING}sum"] is arrays[f"{MERGING}sum"]
    assert noised["delta"].size == 0
