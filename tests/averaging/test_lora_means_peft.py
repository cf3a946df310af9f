"""The exact mean against PEFT's own merge of adapters, on a module that PEFT wrapped."""

import numpy as np
import peft
import pytest
import torch

from fedllm_flwr.averaging import LoraFactors, ProductMean, best_rank, dense, product_of

WEIGHTS = (64.0, 16.0, 30.0)
LAYERS = ("wide", "square", "as_wide_as_the_rank")


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(24, 16, bias=False)
        self.square = torch.nn.Linear(16, 16, bias=False)
        self.as_wide_as_the_rank = torch.nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.as_wide_as_the_rank(self.square(self.wide(x)))


def wrapped(ranks, alphas):
    """A PEFT model with one randomly filled adapter per client."""
    generator = torch.Generator().manual_seed(0)
    configs = [
        peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LAYERS))
        for rank, alpha in zip(ranks, alphas, strict=True)
    ]
    model = peft.get_peft_model(Tiny(), configs[0], adapter_name="client0")
    for index, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"client{index}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def read(model, adapter):
    """The adapter as our factors, with PEFT's own scaling."""
    layers = {name: getattr(model.base_model.model, name) for name in LAYERS}
    return {
        name: LoraFactors(
            layer.lora_A[adapter].weight.detach().numpy(),
            layer.lora_B[adapter].weight.detach().numpy(),
            layer.scaling[adapter],
        )
        for name, layer in layers.items()
    }


@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [((8, 8, 8), (16, 16, 16)), ((8, 4, 2), (16, 4, 32))],
    ids=["equal", "mixed"],
)
def test_stacking_is_pefts_cat(ranks, alphas, relative_error):
    model = wrapped(ranks, alphas)
    names = [f"client{index}" for index in range(len(ranks))]
    mean = ProductMean()
    for name, weight in zip(names, WEIGHTS, strict=True):
        mean.add(read(model, name), weight)
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    model.add_weighted_adapter(names, shares, "merged", combination_type="cat")
    for name in LAYERS:
        layer = getattr(model.base_model.model, name)
        oracle = layer.get_delta_weight("merged").detach().numpy()
        assert relative_error(dense(mean.result()[name]), oracle) < 1e-6


def test_best_rank_is_pefts_svd(relative_error):
    model = wrapped((8, 4, 2), (16, 4, 32))
    names = ["client0", "client1", "client2"]
    mean = ProductMean()
    for name, weight in zip(names, WEIGHTS, strict=True):
        mean.add(read(model, name), weight / sum(WEIGHTS))
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    model.add_weighted_adapter(names, shares, "merged", combination_type="svd", svd_rank=4)
    for name in LAYERS:
        oracle = getattr(model.base_model.model, name).get_delta_weight("merged").detach().numpy()
        ours = dense(product_of(best_rank(mean.result()[name], 4, scaling=2.0)))
        assert relative_error(ours, oracle) < 1e-5


def test_loading_the_result_into_peft_gives_the_mean_update(relative_error):
    model = wrapped((8, 4, 2), (16, 4, 32))
    exact = ProductMean()
    for index, weight in enumerate(WEIGHTS):
        exact.add(read(model, f"client{index}"), weight)
    factors = {name: best_rank(update, 8, scaling=0.5) for name, update in exact.result().items()}
    model.add_adapter("mean", peft.LoraConfig(r=8, lora_alpha=4, target_modules=list(LAYERS)))
    for name in LAYERS:
        layer = getattr(model.base_model.model, name)
        with torch.no_grad():
            layer.lora_A["mean"].weight.copy_(torch.from_numpy(factors[name].lora_a))
            layer.lora_B["mean"].weight.copy_(torch.from_numpy(factors[name].lora_b))
        update = layer.get_delta_weight("mean").detach().numpy()
        assert relative_error(update, dense(product_of(factors[name])).astype(np.float64)) < 1e-6
