from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import Share
from fedllm_flwr.training.full_layers import private_weight
from fedllm_flwr.training.full_passes import GraphModel, LeanModel, forward, hooked_model

NAMES = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.gate_proj")


@pytest.mark.parametrize("kind", ["lean", "graph", "checkpoints"])
def test_receivers_see_the_gradient_of_their_own_weights(
    served: Backbone, make_row: Callable[..., Encoded], kind: str
) -> None:
    """Every way computes with the private weights, and lets receivers change them for the next pass."""
    layers = {name: served.linear_layers[name] for name in NAMES}
    plain = {name: layer.weight for name, layer in layers.items()}
    weights = {name: private_weight(layer, None, "out") for name, layer in layers.items()}
    gradients: dict[str, Tensor] = {}

    def receiver(name: str) -> Callable[[Tensor, Tensor], None]:
        def receive(slope: Tensor, inputs: Tensor) -> None:
            gradients[name] = slope.t() @ inputs
            weights[name].sub_(0.2 * gradients[name])

        return receive

    model = hooked_model(
        served,
        weights,
        {name: receiver(name) for name in NAMES},
        checkpointing=kind == "checkpoints",
    )
    share = Share([make_row(1, 6), make_row(2, 4)], 1 / 10)
    with pytest.raises(ConfigError, match="no such"), model.active():
        served.target_layers(("no such layer",))
    served.check_plain(NAMES)
    assert all(layer.weight is plain[name] for name, layer in layers.items())
    losses = []
    with model.active():
        for _ in range(3):
            hidden, slope, loss = forward(served, model, share, None)
            losses.append(loss)
            model.backward(hidden, slope)
    assert losses[0] > losses[1] > losses[2]
    assert all(layer.weight is plain[name] for name, layer in layers.items())
    assert all(not torch.equal(weights[name], plain[name]) for name in NAMES)
    eps = 1e-2  # central difference along the gradient of the last pass
    steps = []
    for sign in (1, -1):
        moved = {name: weights[name] + sign * eps * gradients[name] for name in NAMES}
        probe = hooked_model(served, moved, dict.fromkeys(NAMES, lambda *_: None))
        with probe.active():
            steps.append(forward(served, probe, share, None)[2])
    with model.active():
        hidden, slope, _ = forward(served, model, share, None)
        before = {name: gradients[name].clone() for name in NAMES}
        model.backward(hidden, slope)
    wanted = sum(float((before[name] * gradients[name]).sum()) for name in NAMES)
    assert (steps[0] - steps[1]) / (2 * eps) == pytest.approx(wanted, rel=1e-2)


def test_the_lean_way_is_taken_where_it_can_be(backbone: Backbone, served: Backbone) -> None:
    assert isinstance(hooked_model(backbone, {}, {}), LeanModel)
    assert isinstance(hooked_model(backbone, {}, {}, checkpointing=True), LeanModel)
    kind = LeanModel if served is backbone else GraphModel
    assert isinstance(hooked_model(served, {}, {}), kind)
