from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedllm_flwr.errors import ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.peft_prompts import PeftPromptSpec, flat_size, start_module, wrap
from fedllm_flwr.models.prompt_start import embeddings_of
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.loop import Trainee, run
from fedllm_flwr.training.peft_prompt_stacks import PeftPromptStack
from fedllm_flwr.training.settings import LocalSettings

MakeRow = Callable[..., Encoded]
SPECS = {
    "prompt": PeftPromptSpec("prompt_tuning", 4),
    "p-tuning": PeftPromptSpec("p_tuning", 4, 9),
    "prefix": PeftPromptSpec("prefix_tuning", 4),
    "projected prefix": PeftPromptSpec("prefix_tuning", 4, 9),
}
EACH = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def train_round(
    backbone: Backbone,
    spec: PeftPromptSpec,
    flat: np.ndarray,
    rows: list[Encoded],
    settings: LocalSettings,
) -> tuple[np.ndarray, Trainee]:
    stack = PeftPromptStack(backbone, spec)
    stack.load(0, flat)
    trainee = Trainee(0, rows, stack.parameters(0), settings=settings, seed=3)
    run(backbone, stack, [trainee], None)
    assert not trainee.error
    return stack.read(0), trainee


@EACH
def test_a_step_is_that_of_plain_autograd_through_peft(
    backbone: Backbone, make_row: MakeRow, spec: PeftPromptSpec
) -> None:
    """Rows of different lengths with several targets, against PEFT's model row by row without padding."""
    rows = [make_row(seed, length, prompt=2) for seed, length in enumerate((5, 9, 7))]
    start = start_module(backbone.ref, spec, embeddings_of(backbone), 1)
    settings = LocalSettings(batch_size=3, local_steps=1, learning_rate=0.1, optimizer="sgd")
    found, trainee = train_round(backbone, spec, start, rows, settings)

    model = wrap(backbone.model, spec).eval()
    encoder = model.prompt_encoder["default"]
    torch.nn.utils.vector_to_parameters(torch.from_numpy(start.copy()), encoder.parameters())
    offset = 0 if spec.kind == "prefix_tuning" else spec.length
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, offset:][list(row.predict_from)]
        total = total + cross_entropy(
            logits, torch.from_numpy(row.targets.astype(np.int64)), reduction="sum"
        )
    loss = total / sum(len(row.targets) for row in rows)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in encoder.parameters()]).numpy()
    assert trainee.losses == [pytest.approx(loss.item(), rel=1e-5)]
    assert np.linalg.norm(gradient) > 1e-3
    distance = np.linalg.norm((start - found) / 0.1 - gradient)
    assert distance < 1e-3 * np.linalg.norm(gradient)


@EACH
def test_two_rounds_change_the_module_and_nothing_else(
    backbone: Backbone, make_row: MakeRow, spec: PeftPromptSpec
) -> None:
    rows = [make_row(seed, 8, prompt=2) for seed in range(4)]
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        plain = backbone.hidden(ids)
    state = torch.random.get_rng_state()
    start = start_module(backbone.ref, spec, embeddings_of(backbone), 1)
    settings = LocalSettings(batch_size=4, local_steps=15, learning_rate=0.02)
    once, first = train_round(backbone, spec, start, rows, settings)
    twice, second = train_round(backbone, spec, once, rows, settings)
    assert second.losses[0] < first.losses[0]
    assert second.losses[-1] < second.losses[0]
    assert not np.array_equal(once, twice)
    again, _ = train_round(backbone, spec, once, rows, settings)
    assert np.array_equal(twice, again)
    assert all(
        torch.equal(weights[name], value) for name, value in backbone.model.state_dict().items()
    )
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        assert torch.equal(backbone.hidden(ids), plain)


@EACH
def test_states_do_not_depend_on_what_pads_the_row(
    backbone: Backbone, spec: PeftPromptSpec
) -> None:
    stack = PeftPromptStack(backbone, spec)
    stack.load(0, start_module(backbone.ref, spec, embeddings_of(backbone), 1))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad(), stack.active():
        stack.bind([0], [0])
        alone = stack.hidden(ids)
        padded = stack.hidden(torch.nn.functional.pad(ids, (0, 4)))[:, :6]
    torch.testing.assert_close(alone, padded, rtol=1e-5, atol=1e-5)


def test_a_wrong_size_is_refused(backbone: Backbone) -> None:
    spec = SPECS["prefix"]
    with pytest.raises(ShapeError, match="flat prompt: expected"):
        PeftPromptStack(backbone, spec).load(
            0, np.zeros(flat_size(backbone.ref, spec) + 1, dtype=np.float32)
        )
