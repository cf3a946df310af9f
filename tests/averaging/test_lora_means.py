import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.averaging import (
    FactorMean,
    LoraFactors,
    ProductMean,
    add_low_rank,
    beside_shared,
    dense,
    product_of,
    residual,
    resize,
)
from fedllm_flwr.errors import ShapeError, WireError

LAYERS = {
    "wide": (8, 24),
    "tall": (24, 8),
    "square": (16, 16),
    "as_wide_as_the_rank": (8, 8),  # where a rule that guesses the axis from the shape goes wrong
    "narrower_than_the_rank": (4, 30),
}
EQUAL = [(8, 16.0)] * 3
MIXED = [(8, 16.0), (4, 4.0), (1, 32.0)]
MANY = [(8, 16.0), (4, 4.0), (1, 32.0), (8, 8.0), (2, 1.0)]
WEIGHTS = (10.0, 1.0, 4.0, 2.5, 7.0)

means = pytest.mark.parametrize("make", [lambda: FactorMean(rank=8, scaling=2.0), ProductMean])


def fill(mean, adapters, weights=WEIGHTS):
    for adapter, weight in zip(adapters, weights, strict=False):
        mean.add(adapter, weight)
    return mean


def layer(a, b, scaling=1.0):
    return {"q": LoraFactors(np.array(a, np.float32), np.array(b, np.float32), scaling)}


def test_factor_mean_of_three_clients_by_hand():
    mean = FactorMean(rank=1, scaling=2.0)
    mean.add(layer([[4, 0]], [[1], [0]], scaling=2.0), 1)
    mean.add(layer([[0, 8]], [[0], [1]], scaling=4.0), 1)  # its B counts twice at scaling 2
    mean.add(layer([[2, 2]], [[3], [3]], scaling=2.0), 2)
    q = mean.result()["q"]
    np.testing.assert_array_equal(q.lora_a, [[2, 3]])
    np.testing.assert_array_equal(q.lora_b, [[1.75], [2]])
    assert q.scaling == 2.0


def test_product_mean_of_three_clients_by_hand():
    mean = ProductMean()
    mean.add(layer([[4, 0]], [[1], [0]], scaling=2.0), 1)  # [[8, 0], [0, 0]]
    mean.add(layer([[0, 8]], [[0], [1]], scaling=4.0), 1)  # [[0, 0], [0, 32]]
    mean.add(layer([[2, 2]], [[3], [3]], scaling=1.0), 2)  # [[6, 6], [6, 6]]
    np.testing.assert_array_equal(dense(mean.result()["q"]), [[5, 3], [3, 11]])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "cohort", [EQUAL, MIXED, MANY, [(8, 16.0)]], ids=["equal", "mixed", "many", "one"]
)
def test_stacking_is_the_dense_mean_of_scaled_products(
    name, cohort, random_cohort, true_mean, relative_error
):
    adapters = random_cohort(LAYERS, cohort)
    update = fill(ProductMean(), adapters).result()[name]
    assert update.shape == LAYERS[name]
    assert update.left.dtype == update.right.dtype == np.float32
    assert relative_error(dense(update), true_mean(adapters, WEIGHTS[: len(adapters)], name)) < 1e-6


@given(data=st.data())
@settings(deadline=None)  # first examples pay for BLAS start-up
def test_stacking_is_exact_for_any_cohort_in_any_order(
    data, random_cohort, true_mean, relative_error
):
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    client = st.tuples(st.integers(1, 6), st.sampled_from([1.0, 8.0, 32.0]))
    cohort = data.draw(st.lists(client, min_size=1, max_size=7))
    adapters = random_cohort({"q": shape}, cohort, seed=data.draw(st.integers(0, 99)))
    weights = data.draw(st.lists(st.floats(0.1, 100), min_size=len(cohort), max_size=len(cohort)))
    truth = true_mean(adapters, weights, "q")
    # Measured against the terms, since a sum of few random numbers may cancel to nearly nothing.
    terms = [true_mean([adapter], [1], "q") for adapter in adapters]
    scale = max(np.linalg.norm(term) for term in terms)
    order = data.draw(st.permutations(range(len(cohort))))
    for places in (range(len(cohort)), order):
        mean = fill(ProductMean(), [adapters[p] for p in places], [weights[p] for p in places])
        update = mean.result()["q"]
        assert update.rank <= min(shape)
        assert np.linalg.norm(dense(update) - truth) < 1e-6 * scale


def test_the_stack_stays_low_rank_while_that_is_smaller(random_cohort):
    mean = ProductMean()
    ranks = []
    for adapter in random_cohort({"q": (40, 30)}, [(8, 16.0)] * 6):
        mean.add(adapter, 1)
        ranks.append(mean.result()["q"].rank)
    assert ranks == [8, 16, 24, 30, 30, 30]


def peak_bytes_of_a_product_mean(cohort, make):
    mean, rng = ProductMean(), np.random.default_rng(0)
    tracemalloc.start()
    for _ in range(cohort):
        mean.add({"q": make(rng, out_features=96, in_features=64, rank=8)}, 1)
    mean.result()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_bounded_by_the_layers_and_not_by_the_cohort(random_factors):
    few, many = (peak_bytes_of_a_product_mean(cohort, random_factors) for cohort in (16, 160))
    assert (
        many < 1.2 * few
    )  # the interpreter's own small objects; kept factors would make it ten times


def test_a_result_may_be_taken_between_clients(random_cohort, true_mean, relative_error):
    adapters = random_cohort({"q": (12, 10)}, [(4, 16.0)] * 7)
    mean = ProductMean()
    for count, adapter in enumerate(adapters, start=1):
        mean.add(adapter, count)
        truth = true_mean(adapters[:count], range(1, count + 1), "q")
        assert relative_error(dense(mean.result()["q"]), truth) < 1e-6


@pytest.mark.parametrize("side", ["lora_a", "lora_b"])
def test_a_kept_factor_is_a_copy(side, random_cohort, true_mean, relative_error):
    adapters = random_cohort({"q": (40, 30)}, EQUAL)
    truth = true_mean(adapters, WEIGHTS[:3], "q")
    mean = fill(ProductMean(), adapters)
    for adapter in adapters:
        getattr(adapter["q"], side)[:] = 0
    assert relative_error(dense(mean.result()["q"]), truth) < 1e-6


@pytest.mark.parametrize("cohort", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_factor_mean_is_the_float64_mean_of_padded_factors(cohort, random_cohort, relative_error):
    adapters = random_cohort(LAYERS, cohort)
    result = fill(FactorMean(rank=8, scaling=2.0), adapters).result()
    for name in LAYERS:
        padded = [resize(adapter[name], 8) for adapter in adapters]
        a = np.average([f.lora_a.astype(float) for f in padded], axis=0, weights=WEIGHTS[:3])
        b = np.average(
            [f.lora_b.astype(float) * f.scaling / 2 for f in padded], axis=0, weights=WEIGHTS[:3]
        )
        assert relative_error(result[name].lora_a, a) < 1e-6
        assert relative_error(result[name].lora_b, b) < 1e-6
        assert (result[name].rank, result[name].scaling) == (8, 2.0)


def test_a_rank_1_client_in_a_rank_8_cohort_counts_in_one_rank_only():
    rank_8 = {"q": LoraFactors(np.ones((8, 3), np.float32), np.ones((2, 8), np.float32), 1.0)}
    rank_1 = {"q": LoraFactors(np.full((1, 3), 5, np.float32), np.full((2, 1), 5, np.float32), 1.0)}
    mean = fill(FactorMean(rank=8, scaling=1.0), [rank_8, rank_1], [1, 1]).result()["q"]
    np.testing.assert_array_equal(mean.lora_a[:, 0], [3] + [0.5] * 7)
    np.testing.assert_array_equal(mean.lora_b[0], [3] + [0.5] * 7)
    exact = fill(ProductMean(), [rank_8, rank_1], [1, 1]).result()["q"]
    np.testing.assert_array_equal(dense(exact), np.full((2, 3), (8 + 25) / 2))


def test_a_rank_above_the_target_is_refused_and_leaves_the_mean_as_it_was(random_cohort):
    small, large = random_cohort({"k": (6, 5), "q": (6, 5)}, [(2, 2.0), (4, 2.0)])
    mean = FactorMean(rank=2, scaling=1.0)
    mean.add(small, 1)
    mixed = {"k": small["k"], "q": large["q"]}
    with pytest.raises(ShapeError, match="client 1, layer q: expected a rank of at most 2, got 4"):
        mean.add(mixed, 1)
    np.testing.assert_array_equal(mean.result()["k"].lora_a, small["k"].lora_a)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("cohort", [EQUAL, MANY], ids=["equal", "mixed"])
def test_factor_mean_is_exact_when_one_side_is_shared(
    side, cohort, random_cohort, true_mean, relative_error
):
    server = random_cohort(LAYERS, [(8, 16.0)], seed=9)[0]
    trained = random_cohort(LAYERS, cohort)
    factors, products, clients = FactorMean(rank=8, scaling=2.0), ProductMean(), []
    for own, weight in zip(trained, WEIGHTS, strict=False):
        client, filled = {}, {}
        for name, shared in server.items():
            start = resize(shared, own[name].rank)  # what this client was sent
            sent = own[name].lora_a if side == "a" else own[name].lora_b
            a, b = (sent, start.lora_b) if side == "a" else (start.lora_a, sent)
            client[name] = LoraFactors(a, b, own[name].scaling)
            filled[name] = beside_shared(sent, shared, side=side, scaling=own[name].scaling)
        clients.append(client)
        factors.add(filled, weight)
        products.add(client, weight)
    for name, mean in factors.result().items():
        truth = true_mean(clients, WEIGHTS[: len(clients)], name)
        assert relative_error(dense(product_of(mean)), truth) < 1e-6
        assert relative_error(dense(products.result()[name]), truth) < 1e-6


def test_factor_mean_is_not_exact_when_nothing_is_shared(random_cohort, true_mean, relative_error):
    adapters = random_cohort({"q": (64, 64)}, EQUAL)
    mean = fill(FactorMean(rank=8, scaling=2.0), adapters).result()["q"]
    assert relative_error(dense(product_of(mean)), true_mean(adapters, WEIGHTS[:3], "q")) > 0.1


@pytest.mark.parametrize("cohort", [EQUAL, MIXED, MANY], ids=["equal", "mixed", "many"])
def test_residual_and_factor_mean_make_the_exact_mean(
    cohort, random_cohort, true_mean, relative_error
):
    adapters = random_cohort(LAYERS | {"large": (64, 96)}, cohort)
    factors = fill(FactorMean(rank=8, scaling=2.0), adapters).result()
    missed = residual(fill(ProductMean(), adapters).result(), factors)
    for name, update in missed.items():
        whole = dense(add_low_rank(update, product_of(factors[name])))
        assert relative_error(whole, true_mean(adapters, WEIGHTS[: len(adapters)], name)) < 1e-6
        assert update.rank <= min(update.shape)


def test_residual_refuses_means_that_do_not_belong_together(random_cohort):
    adapter = random_cohort({"k": (6, 5), "q": (6, 5)}, [(2, 2.0)])[0]
    exact = fill(ProductMean(), [adapter]).result()
    with pytest.raises(
        ShapeError, match="layer q: expected in both means, got it in the mean update only"
    ):
        residual(exact, {"k": adapter["k"]})
    with pytest.raises(
        ShapeError, match="layer v: expected in both means, got it in the mean factors only"
    ):
        residual(exact, adapter | {"v": adapter["k"]})
    other = random_cohort({"q": (5, 6)}, [(2, 2.0)])[0]
    with pytest.raises(ShapeError, match=r"layer q: expected \(o, i\) = \(6, 5\), got \(5, 6\)"):
        residual(exact, adapter | other)


@means
def test_half_precision_factors_are_summed_wide(make, random_cohort, relative_error):
    halves = [
        {"q": LoraFactors(f["q"].lora_a.astype(np.float16), f["q"].lora_b.astype(np.float16), 2.0)}
        for f in random_cohort({"q": (64, 96)}, [(8, 16.0)] * 50)
    ]
    singles = [
        {"q": LoraFactors(h["q"].lora_a.astype(np.float32), h["q"].lora_b.astype(np.float32), 2.0)}
        for h in halves
    ]
    results = [fill(make(), cohort, [3.0] * 50).result()["q"] for cohort in (halves, singles)]
    got, want = (dense(r) if isinstance(make(), ProductMean) else r.lora_b for r in results)
    np.testing.assert_array_equal(got, want)


@means
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"k": a["k"]}, "client 40, layer q: expected factors, got none"),
        (lambda a: a | {"v": a["q"]}, "client 40, layer v: expected no such layer, got factors"),
        (lambda a: {}, "client 40: expected factors of at least one layer, got none"),
        (
            lambda a: a | {"q": LoraFactors(a["q"].lora_b.T, a["q"].lora_a.T, 1.0)},
            r"client 40, layer q: expected \(o, i\) = \(6, 5\), got \(5, 6\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_names_client_and_layer(make, change, message, random_cohort):
    first, second = random_cohort({"k": (6, 5), "q": (6, 5)}, [(2, 2.0)] * 2)
    mean = make()
    mean.add(first, 1)
    with pytest.raises(ShapeError, match=message):
        mean.add(change(second), 1, client=40)


@means
@pytest.mark.parametrize("where", ["lora_a", "lora_b"])
def test_a_value_that_is_not_finite_is_located_and_leaves_the_mean_as_it_was(
    make, where, random_cohort
):
    layers = {"k": (6, 5), "q": (6, 5)}
    good, bad, last = random_cohort(layers, [(2, 2.0)] * 3)
    getattr(bad["q"], where)[1, 1] = np.nan
    mean, clean = make(), make()
    mean.add(good, 1)
    with pytest.raises(WireError, match=f"client 1, layer q.{where}: expected finite values"):
        mean.add(bad, 1)
    mean.add(last, 3)
    fill(clean, [good, last], [1, 3])
    for name in layers:
        got, want = mean.result()[name], clean.result()[name]
        fields = ("left", "right") if isinstance(mean, ProductMean) else ("lora_a", "lora_b")
        for field in fields:
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))


@means
@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_bad_weights_and_empty_cohorts_are_refused(make, weight, random_cohort):
    mean = make()
    with pytest.raises(WireError, match="client 0: weight"):
        mean.add(random_cohort({"q": (6, 5)}, [(2, 2.0)])[0], weight)
    with pytest.raises(WireError, match="expected at least one client, got none"):
        mean.result()


@pytest.mark.parametrize(("rank", "scaling"), [(0, 1.0), (4, 0.0)])
def test_factor_mean_refuses_bad_options(rank, scaling):
    with pytest.raises(ValueError, match="expected rank > 0 and scaling > 0"):
        FactorMean(rank=rank, scaling=scaling)
