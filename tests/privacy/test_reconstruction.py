import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.privacy import reconstruction_r2, recovered_codes

SHADOW = np.arange(300) < 200


@pytest.fixture
def draws() -> np.random.Generator:
    return np.random.default_rng(7)


def test_linear_levels_are_read_exactly_and_unrelated_ones_not_at_all(draws):
    levels = draws.random((300, 2))
    codes = levels @ draws.standard_normal((2, 5)) + 3.0
    unrelated = draws.standard_normal((300, 1))
    found = reconstruction_r2(codes, np.hstack([levels, unrelated]), SHADOW)
    np.testing.assert_allclose(found[:2], 1.0, atol=1e-9)
    assert abs(found[2]) < 0.1


def test_noise_leaves_the_share_that_theory_says(draws):
    """With code = target + noise of the same variance, the best linear decoder explains half."""
    shadow = np.arange(6000) < 3000
    target = draws.standard_normal((6000, 1))
    codes = target + draws.standard_normal((6000, 1))
    found = reconstruction_r2(codes, target, shadow)
    assert found[0] == pytest.approx(0.5, abs=0.04)


def test_more_values_than_examples_are_no_hindrance(draws):
    """A flat prompt has more values than the shadow set has examples, but only the rank of P."""
    codes = draws.standard_normal((300, 4))
    prompts = codes @ draws.standard_normal((4, 900))
    np.testing.assert_allclose(reconstruction_r2(prompts, codes[:, :2], SHADOW), 1.0, atol=1e-9)


def test_the_penalty_helps_where_codes_are_many_and_noisy(draws):
    target = draws.standard_normal((300, 1))
    codes = target * draws.standard_normal(180) + 3 * draws.standard_normal((300, 180))
    plain = reconstruction_r2(codes, target, SHADOW, ridges=[0.0])
    chosen = reconstruction_r2(codes, target, SHADOW)
    assert chosen[0] > plain[0] + 0.05


def test_the_scale_and_place_of_codes_do_not_matter(draws):
    target = draws.standard_normal((300, 2))
    codes = target @ draws.standard_normal((2, 6)) + 0.5 * draws.standard_normal((300, 6))
    found = reconstruction_r2(codes, target, SHADOW)
    np.testing.assert_allclose(
        reconstruction_r2(1e4 * codes - 50, target, SHADOW), found, atol=1e-6
    )


def test_one_penalty_is_ridge_regression_and_leave_one_out_is_what_it_says(draws):
    """Against the normal equations, and against fits that really leave one out."""
    target = draws.standard_normal((24, 1))
    codes = target * draws.standard_normal(9) + draws.standard_normal((24, 9))
    shadow = np.arange(24) < 16

    def fitted(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        centred = x - x.mean(0)
        weights = np.linalg.solve(
            centred.T @ centred + penalty * np.eye(9), centred.T @ (y - y.mean(0))
        )
        return weights, y.mean(0) - x.mean(0) @ weights

    def r2(ridge: float) -> float:
        weights, constant = fitted(codes[shadow], target[shadow], ridge * largest)
        held = target[~shadow]
        missed = ((held - codes[~shadow] @ weights - constant) ** 2).sum()
        return float(1 - missed / ((held - held.mean()) ** 2).sum())

    def left_out(ridge: float) -> float:
        total = 0.0
        for i in range(16):
            rest = np.delete(np.arange(16), i)
            weights, constant = fitted(codes[rest], target[rest], ridge * largest)
            total += ((target[i] - codes[i] @ weights - constant) ** 2).item()
        return total

    seen = codes[shadow]
    largest = np.linalg.norm(seen - seen.mean(0), 2) ** 2
    ridges = [1e-6, 0.03, 1.0]
    for ridge in ridges:
        assert reconstruction_r2(codes, target, shadow, ridges=[ridge])[0] == pytest.approx(
            r2(ridge), abs=1e-8
        )
    best = min(ridges, key=left_out)
    assert reconstruction_r2(codes, target, shadow, ridges=ridges)[0] == pytest.approx(r2(best))


def test_constant_targets_have_no_share_and_constant_codes_tell_nothing(draws):
    contexts = np.hstack([np.ones((300, 1)), draws.standard_normal((300, 1))])
    found = reconstruction_r2(np.ones((300, 3)), contexts, SHADOW)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(0.0, abs=0.1)
    assert found[1] <= 0


def test_codes_are_recovered_from_prompts(draws):
    matrix, codes = draws.standard_normal((60, 8)), draws.standard_normal((5, 8))
    np.testing.assert_allclose(recovered_codes(matrix, codes @ matrix.T), codes, atol=1e-12)


def test_bad_input_is_refused():
    codes, contexts = np.ones((300, 2)), np.ones((300, 1))
    with pytest.raises(ShapeError, match="got 299, 300 and 300"):
        reconstruction_r2(codes[1:], contexts, SHADOW)
    with pytest.raises(ShapeError, match="expected finite codes and contexts"):
        reconstruction_r2(codes * np.nan, contexts, SHADOW)
    with pytest.raises(ShapeError, match="booleans"):
        reconstruction_r2(codes, contexts, SHADOW.astype(int))
    with pytest.raises(ConfigError, match="at least 3 shadow and 2 test examples, got 300 and 0"):
        reconstruction_r2(codes, contexts, np.ones(300, dtype=bool))
    with pytest.raises(ConfigError, match=r"expected penalties >= 0, got \[-1\]"):
        reconstruction_r2(codes, contexts, SHADOW, ridges=[-1])
    with pytest.raises(ShapeError, match=r"got shapes \[4, 2\] and \[3, 5\]"):
        recovered_codes(np.ones((4, 2)), np.ones((3, 5)))
