import networkx as nx
import numpy as np
import pytest

from fedllm_flwr.reservoir import TOPOLOGIES
from fedllm_flwr.reservoir.topology import REWIRED, erdos_renyi, ring, scale_free, small_world


def draw(name: str, nodes: int = 60, density: float = 0.1, seed: int = 0) -> np.ndarray:
    return TOPOLOGIES[name](nodes, density, np.random.default_rng(seed))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_no_node_feeds_itself_and_the_generator_alone_decides(name: str) -> None:
    weights = draw(name)
    assert weights.shape == (60, 60)
    assert not np.diag(weights).any()
    assert np.abs(weights).max() <= 1
    np.testing.assert_array_equal(weights, draw(name))
    assert (weights != draw(name, seed=1)).any()


@pytest.mark.parametrize("name", ["erdos_renyi", "small_world", "scale_free"])
@pytest.mark.parametrize("nodes", [2, 3, 7])
@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_small_and_full_graphs_can_be_drawn(name: str, nodes: int, density: float) -> None:
    weights = draw(name, nodes, density)
    assert weights.shape == (nodes, nodes)
    assert not np.diag(weights).any()


@pytest.mark.parametrize("name", ["erdos_renyi", "small_world", "scale_free"])
def test_the_density_is_about_what_was_asked_for(name: str) -> None:
    """Erdős-Rényi has 39,800 draws: 5 standard deviations are 0.0075. Scale-free graphs lack some first edges."""
    weights = draw(name, nodes=200)
    share = np.count_nonzero(weights) / (200 * 199)
    assert share == pytest.approx(0.1, abs=0.0075)


def test_weights_are_uniform() -> None:
    weights = erdos_renyi(300, 0.5, np.random.default_rng(0))
    drawn = weights[weights != 0]
    # Standard errors with 45,000 draws: 0.0027 of the mean and 0.0014 of the variance.
    assert drawn.mean() == pytest.approx(0, abs=0.014)
    assert drawn.var() == pytest.approx(1 / 3, abs=0.007)


@pytest.mark.parametrize("draw_one", [small_world, scale_free])
def test_edges_go_both_ways_with_weights_of_their_own(draw_one) -> None:
    weights = draw_one(60, 0.1, np.random.default_rng(0))
    np.testing.assert_array_equal(weights != 0, weights.T != 0)
    assert (weights != weights.T).sum() == np.count_nonzero(weights)


def test_a_small_world_keeps_its_edges_and_is_more_clustered_than_chance() -> None:
    edges = small_world(200, 0.1, np.random.default_rng(0)) != 0
    assert edges.sum() == 200 * 20
    gap = np.abs(np.subtract.outer(np.arange(200), np.arange(200)))
    moved = 1 - edges[np.minimum(gap, 200 - gap) <= 10].sum() / edges.sum()
    assert 0.5 * REWIRED < moved < 1.5 * REWIRED
    random = erdos_renyi(200, 0.1, np.random.default_rng(0)) != 0
    clustered = nx.average_clustering(nx.from_numpy_array(edges))
    assert clustered > 2 * nx.average_clustering(nx.from_numpy_array(random | random.T))


def test_a_scale_free_graph_has_hubs_and_is_connected() -> None:
    edges = scale_free(300, 0.02, np.random.default_rng(0)) != 0
    degrees = edges.sum(1)
    assert degrees.min() >= 1
    assert degrees.max() > 5 * np.median(degrees)
    assert nx.is_connected(nx.from_numpy_array(edges))


def test_a_ring_feeds_the_next_node() -> None:
    weights = ring(5, 0.1, np.random.default_rng(0))
    np.testing.assert_array_equal(np.abs(weights), np.roll(np.eye(5), 1, axis=0))
    assert set(np.unique(ring(50, 0.1, np.random.default_rng(0)))) == {-1.0, 0.0, 1.0}
