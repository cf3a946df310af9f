from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from fedllm_flwr.averaging import LoraFactors
from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.adapters import LoraSpec, attach, initial_factors
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef

MakeAdapter = Callable[..., dict[str, LoraFactors]]
IDS = torch.tensor([[5, 6, 7, 8, 9], [30, 31, 32, 33, 34]])
SPEC = LoraSpec(4, 16.0, target_modules=("q_proj", "v_proj", "down_proj"))


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in backbone.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@torch.no_grad()
def plain_output(backbone: Backbone) -> torch.Tensor:
    return backbone.hidden(IDS)


def test_attached_once(tiny: Backbone) -> None:
    assert attach(tiny, SPEC) is attach(tiny, LoraSpec(4, 16.0, 0.0, SPEC.target_modules))
    assert attach(tiny, SPEC) is not attach(tiny, LoraSpec(4, 8.0, 0.0, SPEC.target_modules))


def test_layers_are_pefts_and_only_there_while_active(tiny: Backbone) -> None:
    attached = attach(tiny, SPEC)
    with attached.active(train=False):
        found = [name for name, layer in tiny.model.named_modules() if isinstance(layer, LoraLayer)]
    assert sorted(found) == [shape.name for shape in attached.shapes]
    assert not any(isinstance(layer, LoraLayer) for layer in tiny.model.modules())


def test_start_values_leave_the_output_unchanged(tiny: Backbone) -> None:
    attached = attach(tiny, SPEC)
    attached.load(initial_factors(attached.shapes, SPEC, seed=0))
    with attached.active(train=False), torch.no_grad():
        assert torch.equal(tiny.hidden(IDS), plain_output(tiny))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_active_adapter_is_the_dense_update(
    tiny: Backbone, make_adapter: MakeAdapter, use_rslora: bool
) -> None:
    spec = LoraSpec(4, 16.0, target_modules=SPEC.target_modules, use_rslora=use_rslora)
    attached = attach(tiny, spec)
    adapter = make_adapter(attached.shapes, spec, seed=1)
    attached.load(adapter)
    before = plain_output(tiny)
    with attached.active(train=False), torch.no_grad():
        ours = tiny.hidden(IDS)
    originals = {}
    try:
        for name, factors in adapter.items():
            weight = tiny.linear_layers[name].weight
            originals[name] = weight.data
            update = factors.scaling * factors.lora_b @ factors.lora_a
            weight.data = weight.data + torch.from_numpy(update)
        merged = plain_output(tiny)
    finally:
        for name, value in originals.items():
            tiny.linear_layers[name].weight.data = value
    torch.testing.assert_close(ours, merged, rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().max() > 0.1
    assert torch.equal(plain_output(tiny), before)


def test_training_leaves_the_backbone_bit_equal(tiny: Backbone, make_adapter: MakeAdapter) -> None:
    before, output = weights(tiny), plain_output(tiny)
    attached = attach(tiny, SPEC)
    attached.load(make_adapter(attached.shapes, SPEC, seed=2))
    start = attached.read_flat()
    with attached.active(train=True):
        optimizer = torch.optim.AdamW(attached.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            hidden = tiny.hidden(IDS)[:, :-1].reshape(-1, tiny.hidden_size)
            tiny.row_losses(hidden, IDS[:, 1:].reshape(-1)).mean().backward()
            optimizer.step()
    assert not np.array_equal(attached.read_flat(), start)
    assert same(weights(tiny), before)
    assert torch.equal(plain_output(tiny), output)
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())


def test_several_ranks_live_side_by_side(tiny: Backbone, make_adapter: MakeAdapter) -> None:
    output = plain_output(tiny)
    outputs = []
    both = [attach(tiny, LoraSpec(rank, 8.0)) for rank in (1, 6)]
    for attached in both:
        attached.load(make_adapter(attached.shapes, attached.spec, seed=3))
    for attached in (*both, *both):
        with attached.active(train=False), torch.no_grad():
            outputs.append(tiny.hidden(IDS))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(plain_output(tiny), output)


def test_one_adapter_at_a_time(tiny: Backbone) -> None:
    first, second = attach(tiny, SPEC), attach(tiny, LoraSpec(2, 4.0))
    with first.active(train=False), pytest.raises(RuntimeError, match="another adapter is active"):
        second.active(train=False).__enter__()


def test_attach_inside_another_adapter_is_refused(tiny: Backbone) -> None:
    spec = LoraSpec(3, 5.0)
    with attach(tiny, SPEC).active(train=False), pytest.raises(RuntimeError, match="is active"):
        attach(tiny, spec)
    assert not any(isinstance(layer, LoraLayer) for layer in tiny.model.modules())
    assert len(attach(tiny, spec).shapes) == 4


def test_values_are_swapped_in_place(tiny: Backbone, make_adapter: MakeAdapter) -> None:
    attached = attach(tiny, SPEC)
    parameters = attached.parameters()
    places = [parameter.data_ptr() for parameter in parameters]
    adapter = make_adapter(attached.shapes, SPEC, seed=4)
    attached.load(adapter)
    assert [parameter.data_ptr() for parameter in attached.parameters()] == places
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    back = attached.read()
    for name, factors in adapter.items():
        assert np.array_equal(back[name].lora_a, factors.lora_a)
        assert np.array_equal(back[name].lora_b, factors.lora_b)
        assert back[name].scaling == SPEC.scaling
    assert np.array_equal(attached.read_flat(), attached.layout.pack(adapter))
    read = attached.read_flat()
    attached.load_flat(np.zeros_like(read))
    assert read.any()  # a copy, not a view
    attached.load_flat(read)
    assert np.array_equal(attached.read_flat(), read)


def test_adapters_are_float32_over_a_bfloat16_model(make_adapter: MakeAdapter) -> None:
    model = load(ModelRef("tiny"), dtype="bfloat16")
    attached = attach(model, SPEC)
    adapter = make_adapter(attached.shapes, SPEC, seed=5)
    attached.load(adapter)
    assert all(parameter.dtype == torch.float32 for parameter in attached.parameters())
    assert np.array_equal(attached.read_flat(), attached.layout.pack(adapter))
    with attached.active(train=True):
        assert model.hidden(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("side", ["both", "a", "b"])
def test_only_the_trained_side_gets_gradients(
    tiny: Backbone, make_adapter: MakeAdapter, side: str
) -> None:
    attached = attach(tiny, SPEC)
    attached.load(make_adapter(attached.shapes, SPEC, seed=6))
    for parameter in attached.parameters():
        parameter.grad = None
    with attached.active(train=True, side=side):  # type: ignore[arg-type]
        tiny.hidden(IDS).sum().backward()
    trained = attached.parameters(side)  # type: ignore[arg-type]
    assert len(trained) == len(attached.shapes) * (2 if side == "both" else 1)
    assert all(parameter.grad is not None for parameter in trained)
    rest = {id(parameter) for parameter in attached.parameters()} - {id(p) for p in trained}
    assert all(p.grad is None for p in attached.parameters() if id(p) in rest)


def test_parameters_come_in_layout_order(tiny: Backbone) -> None:
    attached = attach(tiny, SPEC)
    shapes = [shape for _, _, shape in attached.layout.factors]
    assert [tuple(parameter.shape) for parameter in attached.parameters()] == shapes


def test_dropout_acts_in_training_only_and_repeats(
    tiny: Backbone, make_adapter: MakeAdapter
) -> None:
    spec = LoraSpec(4, 16.0, dropout=0.5)
    attached = attach(tiny, spec)
    attached.load(make_adapter(attached.shapes, spec, seed=7))

    def output(seed: int, *, train: bool) -> torch.Tensor:
        attached.seed_dropout(seed)
        with attached.active(train=train), torch.no_grad():
            return tiny.hidden(IDS)

    assert torch.equal(output(1, train=True), output(1, train=True))
    assert not torch.equal(output(1, train=True), output(2, train=True))
    assert torch.equal(output(1, train=False), output(2, train=False))
    assert not torch.equal(output(1, train=True), output(1, train=False))


def test_bad_adapters_are_named(tiny: Backbone, make_adapter: MakeAdapter) -> None:
    attached = attach(tiny, SPEC)
    adapter = make_adapter(attached.shapes, SPEC, seed=8)
    missing = dict(adapter)
    del missing["model.layers.1.self_attn.v_proj"]
    with pytest.raises(ShapeError, match=r"these differ: model\.layers\.1\.self_attn\.v_proj"):
        attached.load(missing)
    thin = make_adapter(attached.shapes, LoraSpec(1, 4.0), seed=8)
    with pytest.raises(ShapeError, match=r"lora_a: expected \(4, 96\), got \(1, 96\)"):
        attached.load(thin)
    with pytest.raises(ShapeError, match="flat adapter: expected"):
        attached.load_flat(np.zeros(3, np.float32))


def test_rank_and_targets_are_checked(tiny: Backbone) -> None:
    with pytest.raises(
        ConfigError, match=r"rank 40 is larger than layer model\.layers\.0\.self_attn\.v"
    ):
        attach(tiny, LoraSpec(40, 8.0, target_modules=("v_proj",)))
    with pytest.raises(ConfigError, match="'c_attn' is no linear layer"):
        attach(tiny, LoraSpec(4, 8.0, target_modules=("c_attn",)))


def test_attach_leaves_the_global_generator_alone(tiny: Backbone) -> None:
    before = torch.get_rng_state()
    attach(tiny, LoraSpec(5, 7.0))
    assert torch.equal(torch.get_rng_state(), before)
