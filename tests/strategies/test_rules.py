"""Rules against dense matrices in float64; layers have different widths, and clients different ranks and scalings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.averaging import (
    SERVER_OPTIMIZERS,
    LoraFactors,
    dense,
    product_of,
    resize,
)
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.models.adapters import AdapterLayout, LayerShape
from strategies.rules import GlobalModel, Rule, make_rule

SHAPES = (LayerShape("a.k_proj", 6, 4), LayerShape("b.q_proj", 5, 9))
RANK, SCALING = 3, 2.0
LAYOUT = AdapterLayout(SHAPES, RANK)
RULES = ("factor_mean", "stack", "residual", "svd")
Cohort = list[tuple[dict[str, LoraFactors], float]]


def adapter(seed: int, rank: int = RANK, scaling: float = SCALING) -> dict[str, LoraFactors]:
    draws = np.random.default_rng(seed)
    return {
        s.name: LoraFactors(
            draws.standard_normal((rank, s.in_features), dtype=np.float32),
            draws.standard_normal((s.out_features, rank), dtype=np.float32),
            scaling,
        )
        for s in SHAPES
    }


FRESH = adapter(99)


def rule(name: str, optimizer: str = "fedavg", **changes: float) -> Rule:
    return make_rule(name, LAYOUT, SCALING, SERVER_OPTIMIZERS[optimizer](**changes), FRESH)


def finished(made: Rule, cohort: Cohort, model: GlobalModel, server_round: int = 1) -> GlobalModel:
    for client, (factors, weight) in enumerate(cohort):
        made.add(factors, weight, client)
    return made.finish(model, server_round)


def total(model: GlobalModel, layer: str) -> np.ndarray:
    carried = dense(model.delta[layer]) if layer in model.delta else 0.0
    return dense(product_of(model.factors[layer])) + carried


def mean_product(cohort: Cohort, layer: str) -> np.ndarray:
    products = [
        f[layer].scaling * f[layer].lora_b.astype(np.float64) @ f[layer].lora_a.astype(np.float64)
        for f, _ in cohort
    ]
    return np.average(products, axis=0, weights=[weight for _, weight in cohort])


COHORTS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, RANK), st.floats(0.25, 8.0), st.integers(1, 500)),
    min_size=1,
    max_size=6,
).map(lambda drawn: [(adapter(seed, rank, scaling), float(n)) for seed, rank, scaling, n in drawn])


@settings(deadline=None, max_examples=25)
@given(cohort=COHORTS, name=st.sampled_from(["stack", "residual"]))
def test_exact_rules_add_the_mean_product_to_what_was_carried(cohort: Cohort, name: str) -> None:
    start = {
        s.name: LoraFactors(FRESH[s.name].lora_a, 0 * FRESH[s.name].lora_b, SCALING) for s in SHAPES
    }
    one = finished(rule(name), cohort, GlobalModel(start))
    again = cohort[::-1]
    two = finished(rule(name), again, one, 2)
    for shape in SHAPES:
        mean = mean_product(cohort, shape.name)
        # float32 factors of the order of 10 and sums of up to 18 of their products
        np.testing.assert_allclose(total(one, shape.name), mean, rtol=1e-5, atol=1e-4)
        carried = dense(one.delta[shape.name]).astype(np.float64)
        np.testing.assert_allclose(total(two, shape.name), carried + mean, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(cohort=COHORTS)
def test_svd_is_the_best_approximation_of_the_mean_product(cohort: Cohort) -> None:
    model = finished(rule("svd"), cohort, GlobalModel(FRESH))
    for shape in SHAPES:
        singular = np.linalg.svd(mean_product(cohort, shape.name), compute_uv=False)
        lost = np.linalg.norm(total(model, shape.name) - mean_product(cohort, shape.name))
        assert lost == pytest.approx(np.linalg.norm(singular[RANK:]), rel=1e-4, abs=1e-3)
        assert model.factors[shape.name].rank == RANK
    assert model.delta == {}


def test_svd_gives_an_unused_rank_a_fresh_row_so_that_it_can_learn() -> None:
    model = finished(rule("svd"), [(adapter(1, rank=1), 1.0)], GlobalModel(FRESH))
    for shape in SHAPES:
        factors = model.factors[shape.name]
        np.testing.assert_array_equal(factors.lora_a[1:], FRESH[shape.name].lora_a[1:])
        assert np.abs(factors.lora_a[0] - FRESH[shape.name].lora_a[0]).max() > 1e-3
        assert not factors.lora_b[:, 1:].any(), "the fresh rows change nothing yet"


def test_the_factor_mean_is_the_mean_of_each_side() -> None:
    cohort = [(adapter(1), 1.0), (adapter(2), 3.0)]
    model = finished(rule("factor_mean"), cohort, GlobalModel(FRESH))
    for name, factors in model.factors.items():
        for side in ("lora_a", "lora_b"):
            expected = np.average(
                [getattr(f[name], side) for f, _ in cohort], axis=0, weights=[1, 3]
            )
            np.testing.assert_allclose(getattr(factors, side), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_one_client_of_the_servers_own_kind_is_taken_over(name: str) -> None:
    mine = adapter(5)
    model = finished(rule(name), [(mine, 7.0)], GlobalModel(FRESH))
    for layer, factors in mine.items():
        carried = dense(model.delta[layer]) if layer in model.delta else 0.0
        held = carried if name == "stack" else total(model, layer)
        np.testing.assert_allclose(held, dense(product_of(factors)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_client_of_rank_one_is_never_broadcast(name: str) -> None:
    cohort = [(adapter(1, rank=1), 1.0), (adapter(2), 1.0)]
    padded = [({n: resize(f, RANK) for n, f in cohort[0][0].items()}, 1.0), cohort[1]]
    small = finished(rule(name), cohort, GlobalModel(FRESH))
    same = finished(rule(name), padded, GlobalModel(FRESH))
    for shape in SHAPES:
        np.testing.assert_allclose(
            total(small, shape.name), total(same, shape.name), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "broken", ["a layer is missing", "a value is not finite", "a width differs"]
)
def test_a_refused_client_leaves_the_sum_as_it_was(name: str, broken: str) -> None:
    bad = dict(adapter(3))
    layer = SHAPES[1].name
    if broken == "a layer is missing":
        del bad[layer]
    elif broken == "a width differs":
        bad[layer] = LoraFactors(bad[layer].lora_a[:, :-1], bad[layer].lora_b, SCALING)
    else:
        bad[layer].lora_b[2, 1] = np.nan
    made = rule(name)
    made.add(adapter(1), 2.0, 0)
    with pytest.raises((ShapeError, WireError), match="client 1"):
        made.add(bad, 3.0, 1)
    made.add(adapter(2), 1.0, 2)
    found = made.finish(GlobalModel(FRESH), 1)
    expected = finished(rule(name), [(adapter(1), 2.0), (adapter(2), 1.0)], GlobalModel(FRESH))
    for shape in SHAPES:
        np.testing.assert_array_equal(total(found, shape.name), total(expected, shape.name))


def test_a_carried_delta_that_outgrows_its_layer_is_rewritten_exactly() -> None:
    model = GlobalModel(FRESH)
    expected = {s.name: np.zeros((s.out_features, s.in_features)) for s in SHAPES}
    for server_round in range(1, 5):
        cohort = [(adapter(10 * server_round + k), 1.0) for k in range(3)]
        model = finished(rule("stack"), cohort, model, server_round)
        for shape in SHAPES:
            expected[shape.name] += mean_product(cohort, shape.name)
            width = min(shape.in_features, shape.out_features)
            assert model.delta[shape.name].rank <= width
            np.testing.assert_allclose(
                dense(model.delta[shape.name]), expected[shape.name], rtol=0, atol=1e-4
            )


def test_the_server_optimizer_steps_on_the_flat_adapter() -> None:
    cohort = [(adapter(1), 1.0), (adapter(2), 3.0)]
    halving = rule("factor_mean", "fedavgm", learning_rate=0.5)
    half = finished(halving, cohort, GlobalModel(FRESH))
    whole = finished(rule("factor_mean"), cohort, GlobalModel(FRESH))
    for name in FRESH:
        for side in ("lora_a", "lora_b"):
            middle = (getattr(FRESH[name], side) + getattr(whole.factors[name], side)) / 2
            np.testing.assert_allclose(getattr(half.factors[name], side), middle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", [n for n in SERVER_OPTIMIZERS if n != "fedavg"])
def test_server_optimizers_keep_their_state_from_round_to_round(optimizer: str) -> None:
    cohort = [(adapter(1), 1.0)]
    one = finished(rule("factor_mean", optimizer), cohort, GlobalModel(FRESH))
    assert one.optimizer is not None
    assert one.optimizer.server_round == 1
    kept = finished(rule("factor_mean", optimizer), cohort, one, 2)
    forgotten = finished(
        rule("factor_mean", optimizer), cohort, GlobalModel(one.factors, one.delta), 2
    )
    gap = LAYOUT.pack(kept.factors) - LAYOUT.pack(forgotten.factors)
    assert np.abs(gap).max() > 1e-4


@pytest.mark.parametrize(
    ("name", "sends"), [("factor_mean", True), ("stack", False), ("residual", True), ("svd", True)]
)
def test_only_stacking_starts_every_adapter_anew(name: str, sends: bool) -> None:
    made = rule(name)
    assert made.sends_adapter is sends
    after: GlobalModel = finished(made, [(adapter(1), 1.0)], GlobalModel(FRESH))
    kept = [after.factors[name] is FRESH[name] for name in FRESH]
    assert all(kept) is not sends
