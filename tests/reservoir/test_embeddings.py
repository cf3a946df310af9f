import pytest
import torch

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.reservoir import (
    Reservoir,
    ReservoirSpec,
    energy_share,
    random_projection,
    rms_normalised,
    token_series,
)


def embeddings(*shape: int, scale: float = 0.02) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_every_token_has_a_root_mean_square_of_1_whatever_its_scale() -> None:
    found = rms_normalised(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5e-4, 0.0]]))
    root = 2**0.5
    wanted = [[3 * root / 5, 4 * root / 5], [0, 0], [-root, 0]]
    torch.testing.assert_close(found, torch.tensor(wanted))
    one, other = embeddings(5, 8), embeddings(5, 8, scale=7.0)
    torch.testing.assert_close(rms_normalised(one), rms_normalised(other))
    assert rms_normalised(one.bfloat16()).dtype == torch.float32


def test_the_projection_is_shared_by_seed_and_keeps_the_mean_square() -> None:
    projection = random_projection(576, 64, seed=3)
    assert torch.equal(projection, random_projection(576, 64, seed=3))
    assert not torch.equal(projection, random_projection(576, 64, seed=4))
    series = token_series(embeddings(10, 50, 576), projection)
    assert series.shape == (10, 50, 64)
    # 32,000 values that depend on each other only through 64 columns: 2 % is 4 standard errors of those.
    assert series.square().mean().item() == pytest.approx(1, abs=0.03)
    alone = token_series(embeddings(10, 50, 576)[4], projection)
    torch.testing.assert_close(series[4], alone)


def test_normalised_embeddings_reach_the_state_and_small_ones_do_not() -> None:
    """The share of the state's energy that varies with the text, for embeddings of a usual standard deviation."""
    reservoir = Reservoir(ReservoirSpec(size=200, input_size=64, leak=0.4))
    raw, projection = embeddings(40, 25, 576, scale=0.015), random_projection(576, 64, seed=0)
    blind = energy_share(reservoir.harvest(raw @ projection))
    seeing = energy_share(reservoir.harvest(token_series(raw, projection)))
    assert blind < 0.01
    assert seeing > 0.5


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(ShapeError, match="expected width 8, got 9"):
        token_series(torch.ones(2, 9), random_projection(8, 3, seed=0))
    with pytest.raises(ConfigError, match="expected sizes >= 1, got 0 and 3"):
        random_projection(0, 3, seed=0)
