from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from clients.contexts import contexts_of, method_of
from clients.guard import guarded
from clients.leaks import leaks, readings
from clients.workspace import open_workspace
from fedllm_flwr.core import whole_json
from fedllm_flwr.reservoir import Controller, energy_share

Fixture = Callable[..., Any]
SERIES = ("method=fedresprompt", "task=level_routing", "partition=iid", "partition.num_clients=2",
          "method.reservoir_size=60")  # fmt: skip


@pytest.fixture
def measured(micro: Fixture) -> Callable[..., dict[str, float]]:
    """What the first client says under some settings, of a controller at its start value."""

    def found(*overrides: str) -> dict[str, float]:
        work = open_workspace(whole_json(micro(*overrides)))
        method, contexts = method_of(work), contexts_of(work)
        controller = Controller(contexts.spec, contexts.spec.start(3))
        prompts = {
            split: guarded(method, controller.prompts(contexts.states(0, split))[1])
            for split in ("validation", "test")
        }
        return leaks(method, contexts, 0, controller, prompts)

    return found


def test_levels_are_rebuilt_from_prompts_and_noise_hides_them(
    measured: Fixture, micro: Fixture
) -> None:
    plain = measured(*SERIES)
    contexts = contexts_of(open_workspace(whole_json(micro(*SERIES))))
    assert plain["energy-share"] == energy_share(contexts.states(0, "train"))
    assert plain["reconstruction-r2"] > 0.95
    noised = measured(*SERIES, "method.clip_norm=1", "method.noise_multiplier=4")
    assert noised["reconstruction-r2"] < 0.5


def test_controls_that_do_not_see_the_rows_give_nothing_away(measured: Fixture) -> None:
    constant = measured(*SERIES, "method.states=constant")
    assert constant["energy-share"] == pytest.approx(0, abs=1e-12)
    assert constant["reconstruction-r2"] == 0
    assert measured(*SERIES, "method.states=random")["reconstruction-r2"] < 0.2


def test_texts_of_different_lengths_have_their_mean(measured: Fixture) -> None:
    found = measured("method=fedresprompt")
    assert set(found) == {"energy-share", "reconstruction-r2"}
    assert 0 <= found["reconstruction-r2"] <= 1


def test_too_few_rows_are_not_measured(measured: Fixture) -> None:
    none = ("task.validation_rows=-1", "task.test_rows=2")
    assert set(measured(*SERIES, *none)) == {"energy-share"}


def test_readings_are_whole_contexts_where_they_have_one_length() -> None:
    series = [np.array([[1.0], [3.0]], np.float32), np.array([[5.0], [7.0]], np.float32)]
    np.testing.assert_array_equal(readings(series), [[1, 3], [5, 7]])
    longer = [*series, np.array([[1.0], [2.0], [6.0]], np.float32)]
    np.testing.assert_array_equal(readings(longer), [[2], [6], [3]])
    assert readings(longer).dtype == np.float64


def test_a_clients_series_are_what_its_states_come_from(micro: Fixture) -> None:
    contexts = contexts_of(open_workspace(whole_json(micro(*SERIES))))
    series = torch.from_numpy(np.stack(contexts.series(0, "test")))
    torch.testing.assert_close(contexts.reservoir.harvest(series), contexts.states(0, "test"))
