from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models import generation_sampling
from fedllm_flwr.models.generation_sampling import Chooser, Sampling, choose, draw, nucleus

FIVE = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.09, 0), (0.11, 1), (0.49, 1), (0.52, 2), (0.79, 3), (0.999, 4)]
)  # fmt: skip
def test_a_draw_is_the_inverse_of_the_distribution_function(uniform: float, token: int) -> None:
    assert draw(FIVE, 1.0, uniform) == token


@pytest.mark.parametrize(
    ("top_p", "tokens"), [(0.3, [1]), (0.41, [1, 3]), (0.7, [1, 3, 4]), (0.96, [0, 1, 2, 3, 4])]
)
def test_a_nucleus_is_the_fewest_tokens_that_reach_its_probability(
    top_p: float, tokens: list[int]
) -> None:
    assert nucleus(FIVE, top_p).tolist() == tokens


def test_inside_a_nucleus_probabilities_keep_their_ratio() -> None:
    # 0.4 and 0.25 of 0.65: the border is at 0.615
    assert [draw(FIVE, 0.41, u) for u in (0.0, 0.61, 0.62, 0.99)] == [1, 1, 3, 3]


@given(st.integers(0, 2**32), st.floats(0.05, 0.999))
def test_few_candidates_and_the_whole_vocabulary_give_the_same_nucleus(
    seed: int, top_p: float
) -> None:
    values = np.random.default_rng(seed).dirichlet(np.full(400, 0.05)).astype(np.float32)
    probabilities = torch.from_numpy(values)
    order = np.argsort(-values, kind="stable")
    before = np.cumsum(values[order], dtype=np.float64) - values[order]
    wanted = sorted(order[before < top_p].tolist())
    found = nucleus(probabilities, top_p).tolist()
    assert sorted(values[found].tolist()) == sorted(
        values[wanted].tolist()
    )  # ties are of equal worth
    assert generation_sampling.CANDIDATES < 400


def test_draws_follow_the_distribution() -> None:
    logits = FIVE.log() * 0.5  # temperature 0.5 gives the probabilities back
    chooser = Chooser(Sampling(temperature=0.5, seeds=(3,)), 3)
    counts = Counter(chooser.choose(logits) for _ in range(4000))
    found = np.array([counts[k] for k in range(5)]) / 4000
    assert found == pytest.approx(FIVE.numpy(), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_temperature_near_zero_takes_the_best_token(temperature: float, top_p: float) -> None:
    logits = torch.tensor([-1e4, 12.0, 90.0, 3.0])
    chooser = Chooser(Sampling(temperature=temperature, top_p=top_p), 0)
    assert [chooser.choose(logits) for _ in range(5)] == [2] * 5


def test_draws_depend_on_the_seed_alone() -> None:
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    warm = Sampling(temperature=1.0, seeds=(7, 8))

    def tokens(seed: int) -> list[int]:
        chooser = Chooser(warm, seed)
        return [chooser.choose(row) for row in logits]

    assert tokens(7) == tokens(7) != tokens(8)


def test_rows_are_chosen_each_in_its_own_way() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [9.0, 0.0, 0.0]])
    cold, sharp = Sampling(), Sampling(temperature=1.0, top_p=0.5)
    assert choose([Chooser(cold, 0), Chooser(sharp, 1)], logits) == [1, 0]
    assert [Chooser(cold, 0).takes_best, Chooser(sharp, 0).takes_best] == [True, False]


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("inf")), ("top_p", 0.0), ("top_p", 1.1),
     ("seeds", ()), ("stop", ("",))],
)  # fmt: skip
def test_values_out_of_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"sampling {option}: expected"):
        Sampling(**{option: value})  # type: ignore[arg-type]
