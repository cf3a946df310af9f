from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from clients.contexts import contexts_of, method_of
from clients.workspace import open_workspace
from fedllm_flwr.core import whole_json
from fedllm_flwr.errors import DataError
from fedllm_flwr.models import backbone
from fedllm_flwr.reservoir import energy_share
from fedllm_flwr.tasks.base import Row
from fedllm_flwr.tasks.series_tasks import parse_series

Fixture = Callable[..., Any]
METHOD = "method=fedresprompt"


@pytest.fixture
def work(micro: Fixture) -> Callable[..., Any]:
    return lambda *overrides: open_workspace(whole_json(micro(METHOD, *overrides)))


def test_states_of_a_series_are_those_of_the_reservoir_one_by_one(work: Fixture) -> None:
    opened = work("task=level_routing")
    contexts = contexts_of(opened)
    found = contexts.states(1, "train")
    for row, state in zip(opened.rows(1).train, found, strict=True):
        alone = contexts.reservoir.harvest(torch.from_numpy(parse_series(row, 1))[None])[0]
        torch.testing.assert_close(state, alone, rtol=0, atol=1e-6)
    assert contexts.spec.readout_size == found.shape[1] == 1 + 1 + 20


def test_states_are_computed_once(work: Fixture) -> None:
    opened = work()
    contexts = contexts_of(opened)
    assert contexts_of(opened) is contexts
    assert contexts.states(0, "train") is contexts.states(0, "train")


def test_texts_move_the_state_and_no_layer_of_the_model_is_loaded(work: Fixture) -> None:
    backbone.reset()
    opened = work()
    found = contexts_of(opened).states(0, "train")
    assert found.shape == (len(opened.rows(0).train), 1 + 6 + 20)
    assert energy_share(found) > 0.2
    assert backbone._LOADED == {}


def test_controls_do_not_see_the_rows(work: Fixture) -> None:
    constant = contexts_of(work("method.states=constant")).states(0, "train")
    assert torch.equal(constant, constant[:1].expand_as(constant))
    random = contexts_of(work("method.states=random"))
    assert energy_share(random.states(0, "train")) > 0.5
    again = contexts_of(work("method.states=random", "optimizer.learning_rate=0.5"))
    assert torch.equal(random.states(0, "train"), again.states(0, "train"))
    assert not np.allclose(random.states(0, "train")[0], random.states(0, "test")[0])


def test_a_client_without_rows_of_a_split_has_no_states(work: Fixture) -> None:
    found = contexts_of(work("task.validation_rows=-1")).states(0, "validation")
    assert found.shape == (0, 27)


def test_a_row_without_tokens_is_named(work: Fixture) -> None:
    contexts = contexts_of(work())
    with pytest.raises(DataError, match=r"^row empty: expected a text with tokens, got none$"):
        contexts._embedded([Row("empty", "", "x", 0)])


def test_the_method_is_the_configured_one(work: Fixture) -> None:
    assert method_of(work()).reservoir_size == 20
