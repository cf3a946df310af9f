from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.evaluate import row_scores
from fedllm_flwr.training.full_layers import (
    checkpointed,
    hooked,
    private_weight,
    updated_rows,
    updates_active,
    weight_of,
)

LAYER = "model.layers.1.mlp.up_proj"  # [96, 64]


def update(*indices: int, width: int = 64) -> RowUpdate:
    values = np.random.default_rng(3).standard_normal((len(indices), width))
    return RowUpdate(np.array(indices), (0.3 * values).astype(np.float32))


def test_a_weight_is_outputs_by_inputs_however_it_is_stored() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 5)
    for layer in (nn.Linear(5, 3, bias=False), Conv1D(3, 5)):
        wanted = inputs @ weight_of(layer).t()
        assert torch.allclose(layer(inputs), wanted + (0 if layer.bias is None else layer.bias))


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_private_weight_is_the_shared_one_plus_its_update(side: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 6) if kind == "linear" else Conv1D(6, 5)
    before = layer.weight.detach().clone()
    change = update(1, 3, width=5 if side == "out" else 6)
    private = private_weight(layer, change, side)
    wanted = weight_of(layer).clone()
    if side == "out":
        wanted[[1, 3]] += torch.from_numpy(change.values)
    else:
        wanted[:, [1, 3]] += torch.from_numpy(change.values).t()
    assert torch.equal(private, wanted)
    assert torch.equal(layer.weight, before)
    for chosen in ([0, 3, 4], [1, 3], []):
        found = updated_rows(weight_of(layer), change, np.array(chosen, dtype=np.int64), side)
        assert torch.equal(found, (wanted if side == "out" else wanted.t())[chosen])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])  # through the lean decoder, and not
def test_an_evaluation_sees_updates_and_nothing_stays(
    backbone: Backbone, make_row: Callable[..., Encoded], attention: str
) -> None:
    served = replace(backbone, kernels=replace(backbone.kernels, attention=attention))
    rows = [make_row(1, 7), make_row(2, 4)]
    plain = row_scores(served, rows)[0]
    layer = backbone.linear_layers[LAYER]
    weight = layer.weight
    bits = weight.detach().clone()
    dense = nn.Linear(64, 96, bias=False)
    dense.weight = nn.Parameter(private_weight(layer, update(0, 50), "out"))
    with torch.no_grad(), backbone.swapped({LAYER: dense}):
        unused_fast_path = replace(served, kernels=replace(served.kernels, attention="sdpa"))
        wanted = row_scores(unused_fast_path, rows)[0]
    with (
        pytest.raises(ConfigError, match="no such"),
        updates_active(served, {LAYER: update(0, 50)}),
    ):
        served.target_layers(("no such layer",))
    assert layer.weight is weight
    with updates_active(served, {LAYER: update(0, 50)}):
        found = row_scores(served, rows)[0]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert np.abs(found - plain).max() > 1e-2
    assert layer.weight is weight
    assert torch.equal(weight, bits)
    assert row_scores(served, rows)[0] == pytest.approx(plain, rel=1e-12)


def test_updates_that_do_not_fit_are_refused(backbone: Backbone) -> None:
    for updates, message in (
        ({"model.layers.9": update(0)}, "layer model.layers.9 is no linear layer of"),
        ({LAYER: update(96)}, f"layer {LAYER}: .* got row 96 of 64 values"),
        ({LAYER: update(0, width=3)}, "got row 0 of 3 values"),
    ):
        with pytest.raises(ShapeError, match=message), updates_active(backbone, updates):
            pass


def states_and_gradient(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states, and the gradient of one layer from its factors."""
    taken: list[torch.Tensor] = []
    weight = weight_of(backbone.linear_layers[LAYER]).clone()
    receive = {LAYER: lambda slope, inputs: taken.append(slope.t() @ inputs)}
    with hooked(backbone, {LAYER: weight}, receive):
        states = backbone.hidden(torch.tensor([[5, 9, 100, 7]]))
        states.square().sum().backward()
    [gradient] = taken
    return states.detach(), gradient


def test_checkpoints_change_nothing_but_what_is_kept(backbone: Backbone) -> None:
    wanted = states_and_gradient(backbone)
    calls: list[int] = []
    block = backbone.model.base_model.layers[1].mlp
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
    with checkpointed(backbone):
        found = states_and_gradient(backbone)
    handle.remove()
    assert len(calls) == 2  # once on the way there and once on the way back
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert "forward" not in vars(backbone.model.base_model.layers[0])


def test_a_model_without_blocks_cannot_be_checkpointed(backbone: Backbone) -> None:
    class Bare:
        base_model = nn.Linear(2, 2)

    bare = replace(backbone, model=Bare(), linear_layers={}, _places={})
    with pytest.raises(ConfigError, match="expected a model with blocks"), checkpointed(bare):
        pass
