import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.peft_prompts import (
    PREFIX_RMS,
    PeftPromptSpec,
    attach_prompt,
    flat_order,
    flat_size,
    module_output,
    start_module,
    start_prefix,
    wrap,
)
from fedllm_flwr.models.prompt_start import (
    StartKind,
    embedding_table,
    embeddings_of,
    start_prompt,
    start_tokens,
)

TINY = ModelRef("tiny")
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
SPECS = {
    "prompt": PeftPromptSpec("prompt_tuning", 4),
    "p-tuning": PeftPromptSpec("p_tuning", 4, 9),
    "p-tuning of default width": PeftPromptSpec("p_tuning", 3),
    "prefix": PeftPromptSpec("prefix_tuning", 4),
    "projected prefix": PeftPromptSpec("prefix_tuning", 4, 9),
}
EACH = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def flat_values(spec: PeftPromptSpec) -> np.ndarray:
    draws = np.random.default_rng(7)
    return (0.3 * draws.standard_normal(flat_size(TINY, spec))).astype(np.float32)


def peft_model(tiny: Backbone, spec: PeftPromptSpec, flat: np.ndarray) -> Any:
    """PEFT's model as anyone builds it, with the values of a flat array in the stated order."""
    config = wrap(tiny.model, spec).peft_config["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(tiny.model, config).eval()
    values = dict(model.prompt_encoder["default"].named_parameters())
    start = 0
    for name, shape in flat_order(TINY, spec):
        piece = flat[start : start + int(np.prod(shape))]
        values[name].data = torch.from_numpy(piece.reshape(shape).copy())
        start += piece.size
    assert start == flat.size
    return model


def peft_states(model: Any, spec: PeftPromptSpec) -> Tensor:
    mask = (IDS != 0).long()
    output = model(input_ids=IDS, attention_mask=mask, output_hidden_states=True)
    states = output.hidden_states[-1]
    return states if spec.kind == "prefix_tuning" else states[:, spec.length :]


@EACH
def test_states_and_gradients_are_those_of_pefts_own_model(
    tiny: Backbone, spec: PeftPromptSpec
) -> None:
    flat, real = flat_values(spec), IDS != 0
    attached = attach_prompt(tiny, spec)
    attached.values.load(flat)
    model = peft_model(tiny, spec, flat)
    wanted, found = peft_states(model, spec), attached.hidden(IDS)
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-5, atol=1e-5)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)) * real[..., None]
    found.backward(slope)
    wanted.backward(slope)
    encoder = model.prompt_encoder["default"]
    for own, reference in zip(attached.values.parameters(), encoder.parameters(), strict=True):
        assert own.grad is not None
        assert reference.grad.norm() > 0
        torch.testing.assert_close(own.grad, reference.grad, rtol=1e-4, atol=1e-5)
        own.grad = None
    with torch.no_grad():
        assert (found - tiny.hidden(IDS))[real].abs().max() > 0.01


@EACH
def test_what_is_loaded_is_read_back(tiny: Backbone, spec: PeftPromptSpec) -> None:
    values, flat = attach_prompt(tiny, spec).values, flat_values(spec)
    values.load(flat)
    assert np.array_equal(values.read(), flat)
    joined = torch.cat([parameter.flatten() for parameter in values.parameters()])
    assert np.array_equal(joined.detach().numpy(), flat)
    assert attach_prompt(tiny, spec).values is values
    with pytest.raises(ShapeError, match=rf"expected \({flat.size},\), got \({flat.size + 1},\)"):
        values.load(np.append(flat, np.float32(0)))


@EACH
def test_the_backbone_stays_plain(tiny: Backbone, spec: PeftPromptSpec) -> None:
    state = torch.random.get_rng_state()
    config, attributes = tiny.model.config.to_dict(), set(vars(tiny.model))
    modules = dict(tiny.model.named_modules())
    hooks = [len(module._forward_hooks) for module in modules.values()]
    tiny.attached.pop(spec, None)
    attached = attach_prompt(tiny, spec)
    attached.values.load(flat_values(spec))
    attached.hidden(IDS)
    assert tiny.model.config.to_dict() == config
    assert set(vars(tiny.model)) == attributes
    assert all(modules[name] is module for name, module in tiny.model.named_modules())
    assert [len(module._forward_hooks) for module in modules.values()] == hooks
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_order_and_size_by_hand() -> None:
    assert flat_order(TINY, SPECS["prompt"]) == (("embedding.weight", (4, 64)),)
    keys_and_values = 2 * 2 * 2 * 16  # layers x (key, value) x heads of keys x width of a head
    assert flat_order(TINY, SPECS["prefix"]) == (("embedding.weight", (4, keys_and_values)),)
    assert flat_order(TINY, SPECS["p-tuning"]) == (
        ("embedding.weight", (4, 64)),
        ("mlp_head.0.weight", (9, 64)),
        ("mlp_head.0.bias", (9,)),
        ("mlp_head.2.weight", (9, 9)),
        ("mlp_head.2.bias", (9,)),
        ("mlp_head.4.weight", (64, 9)),
        ("mlp_head.4.bias", (64,)),
    )
    assert flat_size(TINY, SPECS["p-tuning"]) == 256 + 9 * 64 + 9 + 81 + 9 + 9 * 64 + 64
    assert dict(flat_order(TINY, SPECS["p-tuning of default width"]))["mlp_head.2.bias"] == (64,)


def test_output_of_a_perceptron_by_hand() -> None:
    spec, flat = SPECS["p-tuning"], flat_values(SPECS["p-tuning"])
    sizes = np.cumsum([np.prod(shape) for _, shape in flat_order(TINY, spec)])[:-1]
    rows, w1, b1, w2, b2, w3, b3 = np.split(flat, sizes)
    first = np.maximum(rows.reshape(4, 64) @ w1.reshape(9, 64).T + b1, 0)
    second = np.maximum(first @ w2.reshape(9, 9).T + b2, 0)
    wanted = second @ w3.reshape(64, 9).T + b3
    np.testing.assert_allclose(module_output(TINY, spec, flat), wanted, rtol=1e-5, atol=1e-5)
    assert np.array_equal(
        module_output(TINY, SPECS["prompt"], flat[:256]), flat[:256].reshape(4, 64)
    )


@EACH
def test_start_values_repeat_and_have_their_size(spec: PeftPromptSpec) -> None:
    table = embedding_table(TINY, "float32")
    state = torch.random.get_rng_state()
    one = start_module(TINY, spec, table, 5)
    assert one.dtype == np.float32
    assert one.shape == (flat_size(TINY, spec),)
    assert np.array_equal(one, start_module(TINY, spec, table, 5))
    assert not np.array_equal(one, start_module(TINY, spec, table, 6))
    rms = np.sqrt((module_output(TINY, spec, one).astype(np.float64) ** 2).mean(axis=1)).mean()
    wanted = PREFIX_RMS if spec.kind == "prefix_tuning" else table.mean_rms
    assert rms == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_only_prompt_tuning_starts_from_words() -> None:
    table = embedding_table(TINY, "float32")
    words = start_module(TINY, SPECS["prompt"], table, 5, kind="text", text="a topic")
    assert np.array_equal(words, start_prompt(table, 4, "text", 0, "a topic"))
    with pytest.raises(ConfigError, match="p_tuning start: expected kind random and no text"):
        start_module(TINY, SPECS["p-tuning"], table, 5, kind="vocabulary")


@pytest.mark.parametrize(("kind", "text"), [("vocabulary", ""), ("text", "a topic")])
def test_a_prefix_of_tokens_is_these_tokens_before_the_row(
    tiny: Backbone, kind: StartKind, text: str
) -> None:
    tokens = start_tokens(embeddings_of(tiny), 4, kind, 5, text)
    attached = attach_prompt(tiny, SPECS["prefix"])
    attached.values.load(start_prefix(tiny, SPECS["prefix"], kind, 5, text))
    row = IDS[:1]
    with torch.no_grad():
        wanted = tiny.hidden(torch.cat([torch.from_numpy(tokens)[None], row], dim=1))[:, 4:]
        torch.testing.assert_close(attached.hidden(row), wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - tiny.hidden(row)).abs().max() > 0.01


def test_other_methods_have_no_prefix_of_tokens(tiny: Backbone) -> None:
    with pytest.raises(ConfigError, match="with encoder_hidden_size 0, got prefix_tuning with 9"):
        start_prefix(tiny, SPECS["projected prefix"], "vocabulary", 5)
    with pytest.raises(ConfigError, match="prompt start random: expected vocabulary or text"):
        start_prefix(tiny, SPECS["prefix"], "random", 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("lora", 4), "one of prompt_tuning, prefix_tuning, p_tuning, got 'lora'"),
        (("p_tuning", 0), "length: expected at least 1, got 0"),
        (("prompt_tuning", 4, 8), "prompt_tuning encoder_hidden_size: expected 0, got 8"),
        (("prefix_tuning", 4, -1), "prefix_tuning encoder_hidden_size: expected at least 0, got"),
    ],
)
def test_bad_settings_are_named(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PeftPromptSpec(*values)
