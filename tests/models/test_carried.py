from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedllm_flwr.averaging import LowRank
from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.carried import delta_active
from fedllm_flwr.models.shapes import LayerShape

MakeDelta = Callable[..., dict[str, LowRank]]
NAME = "model.layers.0.self_attn.k_proj"
SHAPE = (LayerShape(NAME, 64, 32),)
IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    "rank", [1, 21, 22, 90]
)  # 64 * 32 / (64 + 32) = 21.3 is where dense gets cheaper
def test_one_layer_gets_the_update(tiny: Backbone, make_delta: MakeDelta, rank: int) -> None:
    delta = make_delta(SHAPE, rank, seed=1)
    layer = tiny.linear_layers[NAME]
    features = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with delta_active(tiny, delta):
        ours = layer(features)
    update = torch.from_numpy(delta[NAME].left @ delta[NAME].right)
    torch.testing.assert_close(ours, layer(features) + features @ update.t(), rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_update(tiny: Backbone, make_delta: MakeDelta) -> None:
    delta = make_delta(SHAPE, 3, seed=1)
    features = torch.ones(1, 64, requires_grad=True)
    with delta_active(tiny, delta):
        (gradient,) = torch.autograd.grad(tiny.linear_layers[NAME](features).sum(), features)
    update = torch.from_numpy(delta[NAME].left @ delta[NAME].right)
    expected = (tiny.linear_layers[NAME].weight + update).sum(0, keepdim=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_nothing_to_add_changes_nothing(tiny: Backbone) -> None:
    empty = {NAME: LowRank(np.zeros((32, 0), np.float32), np.zeros((0, 64), np.float32))}
    with torch.no_grad():
        plain = tiny.hidden(IDS)
        for delta in ({}, empty):
            with delta_active(tiny, delta):
                assert torch.equal(tiny.hidden(IDS), plain)


def test_hooks_are_removed_after_an_error(tiny: Backbone, make_delta: MakeDelta) -> None:
    def fail_inside() -> None:
        with delta_active(tiny, make_delta(SHAPE, 2, seed=1)):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert not tiny.linear_layers[NAME]._forward_hooks


def test_deltas_add_up(tiny: Backbone, make_delta: MakeDelta) -> None:
    first, second = make_delta(SHAPE, 2, seed=1), make_delta(SHAPE, 3, seed=2)
    features = torch.ones(1, 64)
    layer = tiny.linear_layers[NAME]
    plain = layer(features)
    with delta_active(tiny, first):
        one = layer(features) - plain
    with delta_active(tiny, second):
        two = layer(features) - plain
    with delta_active(tiny, first), delta_active(tiny, second):
        both = layer(features) - plain
    torch.testing.assert_close(both, one + two, rtol=1e-4, atol=1e-4)


def test_misfits_are_named(tiny: Backbone, make_delta: MakeDelta) -> None:
    unknown = make_delta((LayerShape("nowhere", 4, 4),), 1, seed=0)
    with pytest.raises(ShapeError, match="layer nowhere is no linear layer of tiny"):
        delta_active(tiny, unknown).__enter__()
    wide = make_delta((LayerShape(NAME, 65, 32),), 1, seed=0)
    with pytest.raises(ShapeError, match=r"k_proj: expected \(32, 64\), got \(32, 65\)"):
        delta_active(tiny, wide).__enter__()
    assert not tiny.linear_layers[NAME]._forward_hooks
