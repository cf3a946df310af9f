"""The server's half against automatic differentiation through the model's own logits, one example at a time."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.loss import LogitTransform
from fedllm_flwr.training.server_half import Placement, ServerHalf

LABELS = (7, 3, 11)
TEXTS = ((12, 250, 3, 77), (9,), (40, 41, 42, 43, 44, 45, 46), (8, 8))
CASES = [
    ("alone", None),
    ("before_text", TEXTS),
    ("before_text", TEXTS[:1]),
    ("after_text", TEXTS),
    ("after_text", TEXTS[:1]),
]
Reference = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def prompts(backbone: Backbone) -> Tensor:
    draws = torch.Generator().manual_seed(3)
    return 0.3 * torch.randn(4, 5, backbone.hidden_size, generator=draws)


@pytest.fixture
def reference(backbone: Backbone) -> Callable[[Tensor, Placement, object], tuple[Tensor, Tensor]]:
    """Logits [B, V] of the last token, whole rows one by one, and the prompts that they hang on."""

    def logits(prompts: Tensor, placement: Placement, texts: object) -> tuple[Tensor, Tensor]:
        prompts = prompts.clone().requires_grad_()
        rows = []
        for i, prompt in enumerate(prompts):
            parts = [prompt]
            if texts is not None:
                ids = torch.tensor(texts[i if len(texts) > 1 else 0])
                parts.insert(
                    0 if placement == "after_text" else 1,
                    backbone.model.get_input_embeddings()(ids),
                )
            output = backbone.model(inputs_embeds=torch.cat(parts)[None], use_cache=False)
            rows.append(output.logits[0, -1])
        return torch.stack(rows), prompts

    return logits


def same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize(("placement", "texts"), CASES)
@pytest.mark.parametrize("labels", [LABELS, None])
def test_loss_and_gradient_are_those_of_the_whole_graph(
    served: Backbone, prompts: Tensor, reference: Reference, placement: Placement, texts, labels
) -> None:
    half = ServerHalf(served, token_ids=labels, text_ids=texts, placement=placement)
    targets = torch.tensor([0, 2, 1, 2])
    logits, leaf = reference(prompts, placement, texts)
    logits = logits if labels is None else logits[:, list(labels)]
    wanted = cross_entropy(logits, targets, reduction="none")
    [wanted_gradient] = torch.autograd.grad(wanted.sum(), leaf)
    losses, gradient = half.loss_and_gradient(prompts, targets)
    same(losses, wanted)
    same(gradient, wanted_gradient)
    assert not gradient.requires_grad
    same(half.logits(prompts), logits)
    assert half.num_classes == logits.shape[1]


@pytest.mark.parametrize(("placement", "texts"), CASES)
def test_without_labels_the_gradient_is_the_same(
    served: Backbone, prompts: Tensor, placement: Placement, texts
) -> None:
    half = ServerHalf(served, token_ids=LABELS, text_ids=texts, placement=placement)
    targets = torch.tensor([1, 0, 2, 2])
    slope = half.logits(prompts).softmax(1) - one_hot(targets, 3)
    same(
        half.gradient_from_logit_slope(prompts, slope),
        half.loss_and_gradient(prompts, targets)[1],
    )


@pytest.mark.parametrize(("placement", "texts"), CASES)
def test_a_batch_is_its_examples_one_by_one(
    served: Backbone, prompts: Tensor, placement: Placement, texts
) -> None:
    half = ServerHalf(served, token_ids=LABELS, text_ids=texts, placement=placement)
    pieces = ServerHalf(
        served, token_ids=LABELS, text_ids=texts, placement=placement, batch_positions=11
    )
    targets = torch.tensor([1, 0, 2, 2])
    losses, gradient = half.loss_and_gradient(prompts, targets)
    split = pieces.loss_and_gradient(prompts, targets)
    same(split[0], losses)
    same(split[1], gradient)
    same(pieces.logits(prompts), half.logits(prompts))
    for i in range(len(prompts)):
        own = None if texts is None else [texts[i if len(texts) > 1 else 0]]
        single = ServerHalf(served, token_ids=LABELS, text_ids=own, placement=placement)
        loss, slope = single.loss_and_gradient(prompts[i : i + 1], targets[i : i + 1])
        same(loss, losses[i : i + 1])
        same(slope, gradient[i : i + 1])


def test_calls_leave_the_kept_texts_alone(served: Backbone, prompts: Tensor) -> None:
    half = ServerHalf(served, token_ids=LABELS, text_ids=TEXTS, placement="after_text")
    first = half.loss_and_gradient(prompts, torch.zeros(4, dtype=torch.int64))
    half.logits(2 * prompts)
    again = half.loss_and_gradient(prompts, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("transform", [LogitTransform(0.5, 2.0), None])
def test_what_a_model_does_to_its_logits_is_done(
    backbone: Backbone, prompts: Tensor, transform: LogitTransform | None
) -> None:
    """None stands for an unknown head, which goes through the model's own logits."""
    plain = ServerHalf(backbone, token_ids=LABELS).logits(prompts)
    half = ServerHalf(replace(backbone, logit_transform=transform), token_ids=LABELS)
    found = half.logits(prompts)
    same(found, plain if transform is None else 2 * torch.tanh(plain / 4))
    targets = torch.tensor([0, 2, 1, 2])
    losses, gradient = half.loss_and_gradient(prompts, targets)
    same(losses, cross_entropy(found, targets, reduction="none"))
    slope = found.softmax(1) - one_hot(targets, 3)
    same(half.gradient_from_logit_slope(prompts, slope), gradient)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "behind"}, "expected a placement of alone, before_text, after_text, got"),
        ({"placement": "after_text"}, "got after_text and no text"),
        ({"text_ids": TEXTS}, "got alone and 4 texts"),
        ({"text_ids": [[]], "placement": "before_text"}, "texts of at least one token"),
        ({"text_ids": [], "placement": "before_text"}, "texts of at least one token"),
        ({"text_ids": [[600]], "placement": "before_text"}, "tokens from 0 to 511, got 600"),
        ({"token_ids": (3, -1)}, "tokens from 0 to 511, got -1"),
        ({"token_ids": ()}, "at least one class token"),
        ({"batch_positions": 0}, "batch_positions >= 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(backbone: Backbone, settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerHalf(backbone, **settings)


def test_what_does_not_fit_is_refused(backbone: Backbone, prompts: Tensor) -> None:
    half = ServerHalf(backbone, token_ids=LABELS)
    right = torch.tensor([0, 1, 2, 0])
    for wrong in (prompts[..., 1:], prompts[0], prompts[:, :0], prompts[:0]):
        with pytest.raises(ShapeError, match=r"soft prompts: expected \[prompts, length, 64\]"):
            half.loss_and_gradient(wrong, right)
    with pytest.raises(ShapeError, match="expected classes from 0 to 2, got 3"):
        half.loss_and_gradient(prompts, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ShapeError, match=r"targets: expected whole numbers \[4\], got .*\[3\]"):
        half.loss_and_gradient(prompts, right[:3])
    with pytest.raises(ShapeError, match=r"logit slope: expected \[4, 3\], got \[4, 2\]"):
        half.gradient_from_logit_slope(prompts, torch.zeros(4, 2))
    behind = ServerHalf(backbone, text_ids=TEXTS, placement="before_text")
    with pytest.raises(ShapeError, match="one for each of 4 texts, got 3"):
        behind.logits(prompts[:3])
