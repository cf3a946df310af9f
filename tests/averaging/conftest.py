"""Random adapters, and the plain float64 mean that every exact rule is held against."""

import numpy as np
import pytest

from fedllm_flwr.averaging import LoraFactors


@pytest.fixture(scope="session")
def random_factors():
    """Make factors with independent normal entries: the hard case, where clients agree on nothing."""

    def make(rng, *, out_features, in_features, rank, alpha=16.0):
        return LoraFactors(
            rng.standard_normal((rank, in_features)).astype(np.float32),
            rng.standard_normal((out_features, rank)).astype(np.float32),
            alpha / rank,
        )

    return make


@pytest.fixture(scope="session")
def random_cohort(random_factors):
    """Make one adapter per (rank, alpha) over layers given as name -> (o, i)."""

    def make(layers, ranks_alphas, seed=0):
        rng = np.random.default_rng(seed)
        return [
            {
                name: random_factors(rng, out_features=o, in_features=i, rank=rank, alpha=alpha)
                for name, (o, i) in layers.items()
            }
            for rank, alpha in ranks_alphas
        ]

    return make


@pytest.fixture(scope="session")
def true_mean():
    """Weighted mean of the scaled dense products of one layer, in float64."""

    def mean(adapters, weights, layer):
        products = [
            weight
            * a[layer].scaling
            * (a[layer].lora_b.astype(float) @ a[layer].lora_a.astype(float))
            for a, weight in zip(adapters, weights, strict=True)
        ]
        return sum(products) / sum(weights)

    return mean


@pytest.fixture(scope="session")
def relative_error():
    """Frobenius norm of the difference over that of the truth."""

    def error(got, truth):
        return float(np.linalg.norm(np.asarray(got, float) - truth) / np.linalg.norm(truth))

    return error
