"""The oracle for a cohort is the same clients trained one after the other through PEFT's own layers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedllm_flwr.averaging import LoraFactors, LowRank
from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, Side, attach
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.cohort import CohortLora, delta_active

MakeAdapter = Callable[..., dict[str, LoraFactors]]
MakeDelta = Callable[..., dict[str, LowRank]]
TARGETS = ("q_proj", "k_proj", "down_proj")
SPEC = LoraSpec(4, 16.0, target_modules=TARGETS)
CLIENTS, ROWS, TOKENS = 3, 2, 7
IDS = torch.randint(0, 372, (CLIENTS * ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0


def losses(model: Backbone, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden = model.hidden(ids, mask)[:, :-1].reshape(-1, model.hidden_size)
    weights = mask[:, 1:].reshape(-1).float()
    return model.row_losses(hidden, ids[:, 1:].reshape(-1)) * weights


def rows_of(position: int) -> slice:
    return slice(position * ROWS, (position + 1) * ROWS)


def serial(
    model: Backbone,
    spec: LoraSpec,
    adapter: dict[str, LoraFactors],
    position: int,
    **options: object,
) -> tuple[torch.Tensor, np.ndarray]:
    """Loss and flat gradient of one client through PEFT."""
    side: Side = options.get("side", "both")  # type: ignore[assignment]
    attached = attach(model, spec)
    attached.load(adapter)
    attached.seed_dropout(100 + position)
    with attached.active(train=True, side=side):
        loss = losses(model, IDS[rows_of(position)], MASK[rows_of(position)]).sum()
        gradients = torch.autograd.grad(loss, attached.parameters(side))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients]).numpy()


def relative(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


@pytest.mark.parametrize("side", ["both", "a", "b"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_clients_one_by_one(
    tiny: Backbone, make_adapter: MakeAdapter, side: Side, dropout: float
) -> None:
    spec = LoraSpec(4, 16.0, dropout, TARGETS, use_rslora=True)
    cohort = CohortLora(tiny, spec, CLIENTS, side=side)
    shapes = attach(tiny, spec).shapes
    adapters = [make_adapter(shapes, spec, seed) for seed in range(CLIENTS)]
    order = [2, 0, 1]
    with cohort:
        for client, adapter in enumerate(adapters):
            cohort.load(client, adapter)
        cohort.bind(order, dropout_seeds=[100, 101, 102] if dropout else ())
        together = losses(tiny, IDS, MASK).view(CLIENTS, -1).sum(1)
        together.sum().backward()
    for position, client in enumerate(order):
        loss, gradient = serial(tiny, spec, adapters[client], position, side=side)
        torch.testing.assert_close(together[position].detach(), loss, rtol=1e-5, atol=1e-5)
        own = cohort.leaves[client].grad
        assert own is not None
        assert own.shape == (AdapterLayout(shapes, 4, side).size,)
        assert relative(own.numpy(), gradient) < 1e-4


def test_equals_the_clients_one_by_one_in_bfloat16(make_adapter: MakeAdapter) -> None:
    model = load(ModelRef("tiny"), dtype="bfloat16")
    shapes = attach(model, SPEC).shapes
    adapters = [make_adapter(shapes, SPEC, seed) for seed in range(CLIENTS)]
    cohort = CohortLora(model, SPEC, CLIENTS)
    for client, adapter in enumerate(adapters):
        cohort.load(client, adapter)
    with cohort:
        losses(model, IDS, MASK).sum().backward()
    for client in range(CLIENTS):
        _, gradient = serial(model, SPEC, adapters[client], client)
        grad = cohort.leaves[client].grad
        assert grad is not None
        # both sum the adapter in float32 and round once, so only products of another blocking differ (2**-8 each)
        assert relative(grad.numpy(), gradient) < 1e-2


def test_sgd_steps_equal_the_clients_one_by_one(tiny: Backbone, make_adapter: MakeAdapter) -> None:
    shapes = attach(tiny, SPEC).shapes
    adapters = [make_adapter(shapes, SPEC, seed) for seed in range(CLIENTS)]
    cohort = CohortLora(tiny, SPEC, CLIENTS)
    optimizer = torch.optim.SGD(cohort.leaves, lr=0.01)
    for client, adapter in enumerate(adapters):
        cohort.load(client, adapter)
    with cohort:
        for _ in range(3):
            optimizer.zero_grad()
            losses(tiny, IDS, MASK).sum().backward()
            optimizer.step()
    attached = attach(tiny, SPEC)
    for client, adapter in enumerate(adapters):
        start = attached.layout.pack(adapter)
        flat = start.copy()
        for _ in range(3):
            values = attached.layout.unpack(flat, SPEC.scaling)
            flat = flat - 0.01 * serial(tiny, SPEC, values, client)[1]
        assert np.linalg.norm(cohort.read_flat(client) - flat) < 1e-4 * np.linalg.norm(flat - start)


def test_subset_of_clients(tiny: Backbone, make_adapter: MakeAdapter) -> None:
    shapes = attach(tiny, SPEC).shapes
    cohort = CohortLora(tiny, SPEC, CLIENTS)
    adapters = [make_adapter(shapes, SPEC, seed) for seed in range(CLIENTS)]
    with cohort:
        for client, adapter in enumerate(adapters):
            cohort.load(client, adapter)
        cohort.bind([1])
        losses(tiny, IDS[:ROWS], MASK[:ROWS]).sum().backward()
    assert cohort.leaves[0].grad is None
    assert cohort.leaves[2].grad is None
    grad = cohort.leaves[1].grad
    assert grad is not None
    assert relative(grad.numpy(), serial(tiny, SPEC, adapters[1], 0)[1]) < 1e-4


@pytest.mark.parametrize("side", ["both", "a", "b"])
def test_values_come_back_as_loaded(tiny: Backbone, make_adapter: MakeAdapter, side: Side) -> None:
    attached = attach(tiny, SPEC)
    cohort = CohortLora(tiny, SPEC, 2, side=side)
    adapter = make_adapter(attached.shapes, SPEC, seed=9)
    flat = attached.layout.pack(adapter)
    cohort.load_flat(1, flat)
    assert np.array_equal(cohort.read_flat(1), flat)
    assert not cohort.read_flat(0).any()
    read = cohort.read(1)
    with torch.no_grad():
        cohort.leaves[1].zero_()
    assert np.array_equal(attached.layout.pack(read), flat)  # a copy, not a view


def test_model_is_plain_again_even_after_an_error(tiny: Backbone) -> None:
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    with torch.no_grad():
        output = tiny.hidden(IDS)

    def fail_inside() -> None:
        with CohortLora(tiny, SPEC, CLIENTS):
            tiny.hidden(IDS)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    with torch.no_grad():
        assert torch.equal(tiny.hidden(IDS), output)
    assert not tiny.model.base_model._forward_pre_hooks
    after = tiny.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_entering_inside_another_adapter_is_refused(tiny: Backbone) -> None:
    with (
        attach(tiny, SPEC).active(train=False),
        pytest.raises(RuntimeError, match="another adapter is active"),
    ):
        CohortLora(tiny, SPEC, 2).__enter__()
    with CohortLora(tiny, SPEC, CLIENTS):
        tiny.hidden(IDS)


def test_bad_bindings_and_batches_are_named(tiny: Backbone) -> None:
    cohort = CohortLora(tiny, SPEC, CLIENTS)
    for indices in ([], [0, 0], [3], [-1]):
        with pytest.raises(ShapeError, match="cohort of 3: expected distinct client indices"):
            cohort.bind(indices)
    with pytest.raises(ShapeError, match="expected 2 seeds, one per client, got 1"):
        cohort.bind([0, 1], dropout_seeds=[5])
    with cohort, pytest.raises(ShapeError, match="cohort of 3: expected equal batch rows, got 4"):
        tiny.hidden(IDS[:4])


@pytest.mark.parametrize("rank", [2, 40])  # factored, and dense: 40 is wider than most layers
def test_delta_is_the_dense_update_in_every_mode(
    tiny: Backbone, make_adapter: MakeAdapter, make_delta: MakeDelta, rank: int
) -> None:
    attached = attach(tiny, SPEC)
    adapter = make_adapter(attached.shapes, SPEC, seed=1)
    attached.load(adapter)
    delta = make_delta(attached.shapes[1:4], rank, seed=2)
    cohort = CohortLora(tiny, SPEC, CLIENTS)
    for client in range(CLIENTS):
        cohort.load(client, adapter)

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            found = [tiny.hidden(IDS, MASK)]
            with attached.active(train=False):
                found.append(tiny.hidden(IDS, MASK))
            with cohort:
                found.append(tiny.hidden(IDS, MASK))
        return found

    with delta_active(tiny, delta):
        ours = outputs()
    without = outputs()
    originals = {name: tiny.linear_layers[name].weight.data for name in delta}
    try:
        for name, update in delta.items():
            dense = torch.from_numpy(update.left @ update.right)
            tiny.linear_layers[name].weight.data = originals[name] + dense
        expected = outputs()
    finally:
        for name, value in originals.items():
            tiny.linear_layers[name].weight.data = value
    for found, wanted, plain in zip(ours, expected, without, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        assert (found - plain).abs().max() > 0.05
