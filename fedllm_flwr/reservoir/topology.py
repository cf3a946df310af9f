"""Graphs of a reservoir's recurrent weights; NumPy only.

Axes: N nodes. ``W[i, j]`` is the weight of the edge from node j to node i; no node feeds itself.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

Topology = Literal["erdos_renyi", "small_world", "scale_free", "ring"]

REWIRED = 0.1
"""Share of a small world's edges that leave the ring lattice: clustered as a lattice, yet of short paths."""

Draw = Callable[[int, float, np.random.Generator], np.ndarray]


def erdos_renyi(nodes: int, density: float, random: np.random.Generator) -> np.ndarray:
    """Every directed edge is there with the same probability and weighs U(-1, 1).

    Args:
        nodes: N.
        density: The probability, in (0, 1].
        random: Draws edges, then weights.

    Returns:
        float64 [N, N].

    Source:
        Erdős and Rényi 1959; Jaeger 2001, The "echo state" approach, for its use.
    """
    edges = random.random((nodes, nodes)) < density
    np.fill_diagonal(edges, False)
    return _weighted(edges, random)


def small_world(nodes: int, density: float, random: np.random.Generator) -> np.ndarray:
    """A ring lattice with some edges rewired; both directions of an edge have their own weight U(-1, 1).

    Args:
        nodes: N.
        density: Share of the N (N - 1) directed edges, in (0, 1]; rounded to an even number of neighbours, at least 2.
        random: Draws the rewiring, then weights.

    Returns:
        float64 [N, N].

    Source:
        Watts and Strogatz 1998, Collective dynamics of small-world networks.
    """
    half = max(1, round(density * (nodes - 1) / 2))
    edges = np.zeros((nodes, nodes), dtype=bool)
    here = np.arange(nodes)
    for step in range(1, half + 1):
        there = (here + step) % nodes
        edges[here, there] = edges[there, here] = True
    np.fill_diagonal(edges, False)
    for step in range(1, half + 1):
        for node in here:
            old = (node + step) % nodes
            free = np.flatnonzero(~edges[node])
            free = free[free != node]
            if random.random() < REWIRED and edges[node, old] and free.size:
                new = random.choice(free)
                edges[node, old] = edges[old, node] = False
                edges[node, new] = edges[new, node] = True
    return _weighted(edges, random)


def scale_free(nodes: int, density: float, random: np.random.Generator) -> np.ndarray:
    """Nodes join one by one and prefer well connected ones; both directions have their own weight U(-1, 1).

    Args:
        nodes: N.
        density: Share of the N (N - 1) directed edges that a sparse graph has, in (0, 1]: each node joins with
            density (N - 1) / 2 edges, rounded, at least 1.
        random: Draws the graph, then weights.

    Returns:
        float64 [N, N].

    Source:
        Barabási and Albert 1999, Emergence of scaling in random networks; begins with a star.
    """
    joins = max(1, round(density * (nodes - 1) / 2))
    edges = np.zeros((nodes, nodes), dtype=bool)
    edges[0, 1 : joins + 1] = edges[1 : joins + 1, 0] = True
    for node in range(joins + 1, nodes):
        degrees = edges[:node].sum(axis=1)
        chosen = random.choice(node, size=joins, replace=False, p=degrees / degrees.sum())
        edges[node, chosen] = edges[chosen, node] = True
    return _weighted(edges, random)


def ring(nodes: int, density: float, random: np.random.Generator) -> np.ndarray:
    """Each node feeds the next with weight +1 or -1.

    Args:
        nodes: N.
        density: Ignored: a ring has N edges.
        random: Draws the signs.

    Returns:
        float64 [N, N].

    Source:
        Rodan and Tiňo 2011, Minimum complexity echo state network (SCR). Differs in the random signs, which the
        paper gives to the input weights only.
    """
    weights = np.zeros((nodes, nodes))
    here = np.arange(nodes)
    weights[(here + 1) % nodes, here] = random.choice([-1.0, 1.0], size=nodes)
    return weights


TOPOLOGIES: dict[str, Draw] = {
    "erdos_renyi": erdos_renyi,
    "small_world": small_world,
    "scale_free": scale_free,
    "ring": ring,
}


def _weighted(edges: np.ndarray, random: np.random.Generator) -> np.ndarray:
    weights = np.zeros(edges.shape)
    weights[edges] = random.uniform(-1.0, 1.0, size=int(edges.sum()))
    return weights
