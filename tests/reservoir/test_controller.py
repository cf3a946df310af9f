import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.reservoir import Controller, ControllerSpec, SurrogateLM

SPEC = ControllerSpec(readout_size=7, bottleneck=3, prompt_length=2, width=5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def double(spec: ControllerSpec = SPEC, seed: int = 0) -> Controller:
    return Controller(spec, spec.start(seed).double())


def mean_loss(flat: torch.Tensor, z: torch.Tensor, targets: torch.Tensor, model: SurrogateLM):
    """The whole graph, from the values to the mean loss, by definition."""
    readout, lift = flat[:21].view(3, 7), flat[21:].view(10, 3)
    prompts = torch.stack([(lift @ (readout @ row)).reshape(2, 5) for row in z])
    logits = prompts.mean(1) @ model.weights.double().T
    return torch.nn.functional.cross_entropy(logits, targets)


def test_the_layout_is_readout_then_lift_by_rows() -> None:
    assert (SPEC.readout_values, SPEC.size) == (21, 51)
    flat = torch.arange(51.0)
    readout, lift = SPEC.split(flat)
    assert readout.tolist() == torch.arange(21.0).view(3, 7).tolist()
    assert lift.tolist() == torch.arange(21.0, 51.0).view(10, 3).tolist()
    readout[0, 0] = -1
    assert flat[0] == -1


def test_the_sizes_are_those_of_the_published_table() -> None:
    """Averaging a controller for GPT-2 costs 1,008,896 bytes there and back."""
    gpt2 = ControllerSpec(readout_size=202, bottleneck=16, prompt_length=10, width=768)
    assert gpt2.size == 16 * 202 + 10 * 768 * 16
    assert 2 * 4 * gpt2.size == 1_008_896


def test_start_values_are_shared_by_seed_and_of_the_scale() -> None:
    spec = ControllerSpec(readout_size=100, bottleneck=16, prompt_length=4, width=100)
    start = spec.start(1)
    assert start.dtype == torch.float32
    assert torch.equal(start, spec.start(1))
    assert not torch.equal(start, spec.start(2))
    # 8,000 draws: 5 standard errors of the deviation.
    assert start.std().item() == pytest.approx(0.1, abs=0.004)


def test_prompts_by_hand() -> None:
    spec = ControllerSpec(readout_size=2, bottleneck=1, prompt_length=2, width=2)
    controller = Controller(spec, torch.tensor([1.0, 2.0, 1.0, 0.0, -1.0, 3.0]))
    b, prompts = controller.prompts(torch.tensor([[1.0, 1.0], [0.0, -1.0]]))
    assert b.tolist() == [[3.0], [-2.0]]
    assert prompts.tolist() == [[[3.0, 0.0], [-3.0, 9.0]], [[-2.0, 0.0], [2.0, -6.0]]]


def test_one_sgd_step_by_hand_uses_the_old_lift() -> None:
    """W_out = (1), P = (2), z = 1, g = 1: dP = 1 and dW = 2; with the new P = 1, dW would be 1."""
    spec = ControllerSpec(readout_size=1, bottleneck=1, prompt_length=1, width=1)
    controller = Controller(spec, torch.tensor([1.0, 2.0]))
    z = torch.ones(1, 1)
    b, _ = controller.prompts(z)
    gradient = controller.gradient(z, b, torch.ones(1, 1, 1))
    assert gradient.tolist() == [2.0, 1.0]
    controller.step(controller.optimizer("sgd", 1.0), gradient)
    assert controller.flat.tolist() == [-1.0, 1.0]


@given(st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_the_split_gradient_is_that_of_the_whole_graph(batch: int, seed: int) -> None:
    model = SurrogateLM(6, SPEC.width, seed=seed)
    z, targets = random(batch, 7, seed=seed), torch.arange(batch) % 6
    controller = double(seed=seed)
    b, prompts = controller.prompts(z)
    loss, prompt_gradient = model.loss_and_gradient(prompts, targets)
    found = controller.gradient(z, b, prompt_gradient)
    whole = controller.flat.detach().clone().requires_grad_()
    joint = mean_loss(whole, z, targets, model)
    joint.backward()
    torch.testing.assert_close(loss.mean(), joint.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, whole.grad, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    model, z, targets = SurrogateLM(6, 5), random(4, 7), torch.tensor([0, 5, 2, 2])
    controller = double()
    b, prompts = controller.prompts(z)
    found = controller.gradient(z, b, model.loss_and_gradient(prompts, targets)[1])
    start, width = controller.flat.data, 1e-5
    for place in range(SPEC.size):
        shift = torch.zeros_like(start)
        shift[place] = width
        up, down = (mean_loss(start + s * shift, z, targets, model) for s in (1, -1))
        # Central differences err by the square of the width, 1e-10, and by rounding, 1e-16 / 1e-5.
        assert float((up - down) / (2 * width)) == pytest.approx(float(found[place]), abs=1e-8)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_training_goes_where_autograd_goes(name: str) -> None:
    model, z, targets = SurrogateLM(4, 5, seed=1), random(8, 7), torch.arange(8) % 4
    controller = double()
    optimizer = controller.optimizer(name, 0.1)
    whole = controller.flat.detach().clone().requires_grad_()
    makers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    other = makers[name]([whole], lr=0.1)
    losses = []
    for _ in range(30):
        b, prompts = controller.prompts(z)
        loss, gradient = model.loss_and_gradient(prompts, targets)
        losses.append(float(loss.mean()))
        controller.step(optimizer, controller.gradient(z, b, gradient))
        other.zero_grad()
        mean_loss(whole, z, targets, model).backward()
        other.step()
    torch.testing.assert_close(controller.flat.data, whole.detach(), rtol=0, atol=1e-6)
    assert losses[-1] < losses[0]


def test_adam_by_its_own_equations() -> None:
    controller = double()
    optimizer, values = controller.optimizer("adam", 0.01), controller.flat.numpy().copy()
    first = second = np.zeros(SPEC.size)
    for step in range(1, 6):
        gradient = random(SPEC.size, seed=step)
        controller.step(optimizer, gradient)
        g = gradient.numpy()
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        scaled = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        values -= 0.01 * first / (1 - 0.9**step) / scaled
    np.testing.assert_allclose(controller.flat.numpy(), values, rtol=0, atol=1e-12)


def test_a_batch_s_gradient_is_the_mean_of_its_examples_in_float32() -> None:
    controller = Controller(SPEC, SPEC.start(3))
    z, g = random(6, 7).float(), random(6, 2, 5, seed=1).float()
    b, prompts = controller.prompts(z)
    singles = []
    for row, gradient in zip(z, g, strict=True):
        own, _ = controller.prompts(row[None])
        singles.append(controller.gradient(row[None], own, gradient[None]))
    torch.testing.assert_close(
        controller.gradient(z, b, g), torch.stack(singles).mean(0), rtol=0, atol=1e-6
    )
    assert prompts.dtype == torch.float32


def test_values_are_copied_in_and_loaded_in_place() -> None:
    values = SPEC.start(0)
    controller = Controller(SPEC, values)
    controller.load(torch.ones(51))
    assert not (values == 1).any()
    assert controller.readout.eq(1).all()
    assert controller.lift.eq(1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.prompts(torch.ones(2, 8)), r"states: expected shape \[examples, 7\]"),
        (lambda c: c.prompts(torch.ones(7)), r"states: expected shape \[examples, 7\], got \[7\]"),
        (lambda c: c.load(torch.ones(50)), r"expected 51 values, got \[50\]"),
        (lambda c: Controller(SPEC, torch.ones(52)), r"expected 51 values, got \[52\]"),
        (
            lambda c: c.gradient(torch.ones(2, 7), torch.ones(2, 3), torch.ones(2, 2, 6)),
            r"prompt gradient: expected shape \[2, 2, 5\].*got \[2, 2, 6\]",
        ),
        (
            lambda c: c.gradient(torch.ones(0, 7), torch.ones(0, 3), torch.ones(0, 2, 5)),
            "with at least one example",
        ),
    ],
)
def test_wrong_shapes_are_refused(call, message) -> None:
    with pytest.raises(ShapeError, match=message):
        call(Controller(SPEC, SPEC.start(0)))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sizes >= 1, got \(7, 0, 2, 5\)"):
        ControllerSpec(7, 0, 2, 5)
    controller = double()
    with pytest.raises(ConfigError, match="expected sgd or adam, got 'lion'"):
        controller.optimizer("lion", 0.1)
    for rate in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="learning rate: expected > 0"):
            controller.optimizer("sgd", rate)
