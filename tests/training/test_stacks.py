import numpy as np
import pytest
import torch

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.stacks import make_stack


def flats(layout: AdapterLayout, count: int) -> list[np.ndarray]:
    draws = np.random.default_rng(3)
    return [draws.standard_normal(layout.size).astype(np.float32) for _ in range(count)]


LEAN = pytest.mark.parametrize("plain_layers", [True, False], ids=["lean", "transformers"])


@LEAN
@pytest.mark.parametrize("num_clients", [1, 3])
@pytest.mark.parametrize("side", ["both", "a", "b"])
def test_what_is_loaded_is_read_back(
    backbone: Backbone,
    spec: LoraSpec,
    layout: AdapterLayout,
    num_clients: int,
    side: str,
    plain_layers: bool,
) -> None:
    stack = make_stack(backbone, spec, num_clients, side, plain_layers=plain_layers)
    loaded = flats(layout, num_clients)
    for client, flat in enumerate(loaded):
        stack.load(client, flat)
    for client, flat in enumerate(loaded):
        assert np.array_equal(stack.read(client), flat)
    held = AdapterLayout(layout.layers, layout.rank, side).size
    assert sum(parameter.numel() for parameter in stack.parameters(0)) == held


@LEAN
@pytest.mark.parametrize("num_clients", [1, 3])
def test_a_wrong_size_is_refused(
    backbone: Backbone,
    spec: LoraSpec,
    layout: AdapterLayout,
    num_clients: int,
    plain_layers: bool,
) -> None:
    stack = make_stack(backbone, spec, num_clients, "both", plain_layers=plain_layers)
    with pytest.raises(ShapeError, match="flat adapter: expected"):
        stack.load(0, np.zeros(layout.size + 1, dtype=np.float32))


@LEAN
def test_a_stack_computes_what_each_single_adapter_computes(
    backbone: Backbone, spec: LoraSpec, layout: AdapterLayout, plain_layers: bool
) -> None:
    ids = torch.arange(12).view(2, 6)
    loaded = flats(layout, 3)
    together = make_stack(backbone, spec, 3, "both", plain_layers=plain_layers)
    for client, flat in enumerate(loaded):
        together.load(client, flat)
    with torch.no_grad(), together.active():
        together.bind([2, 0], [0, 0])
        joint = together.hidden(ids)
    for row, client in enumerate([2, 0]):
        single = make_stack(backbone, spec, 1, "both", plain_layers=False)
        single.load(0, loaded[client])
        with torch.no_grad(), single.active():
            single.bind([0], [0])
            alone = single.hidden(ids[row : row + 1])
        assert (joint[row] - alone[0]).norm() < 1e-5 * alone.norm()
