import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm_flwr.fairness import project_capped, project_simplex

vectors = hnp.arrays(np.float64, st.integers(1, 8), elements=st.floats(-50, 50))
masses = st.floats(0, 20)


def test_projections_by_hand():
    np.testing.assert_allclose(project_simplex(np.array([0.6, 0.8])), [0.4, 0.6])
    np.testing.assert_allclose(project_simplex(np.array([2.0, 0.0, -1.0])), [1, 0, 0])
    np.testing.assert_allclose(project_simplex(np.array([5, 5]), 3.0), [1.5, 1.5])
    np.testing.assert_allclose(project_capped(np.array([0.2, -3.0]), 1.0), [0.2, 0.0])
    np.testing.assert_allclose(project_capped(np.array([2.0, 1.0]), 2.0), [1.5, 0.5])


@given(vectors, masses)
@settings(deadline=None)
def test_the_simplex_projection_is_feasible_idempotent_and_keeps_the_order(values, mass):
    found = project_simplex(values, mass)
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(mass, abs=1e-9)
    np.testing.assert_allclose(project_simplex(found, mass), found, atol=1e-9)
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= -1e-12).all()


@given(vectors, masses, st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_no_other_point_is_nearer(values, mass, seed):
    """A projection onto a convex set is the one point with (v - x)·(y - x) <= 0 for every y of the set."""
    rng = np.random.default_rng(seed)
    corners = np.vstack([np.eye(values.size), rng.dirichlet(np.ones(values.size), 5)]) * mass
    found = project_simplex(values, mass)
    assert ((corners - found) @ (values - found) <= 1e-6).all()
    capped = project_capped(values, mass)
    inside = np.vstack([corners, corners * rng.random((len(corners), 1)), np.zeros(values.size)])
    assert ((inside - capped) @ (values - capped) <= 1e-6).all()
    assert (capped >= 0).all()
    assert capped.sum() <= mass + 1e-9


@given(vectors, masses, st.floats(-1e6, 1e6))
@settings(deadline=None)
def test_adding_a_constant_changes_no_simplex_projection(values, mass, shift):
    found = project_simplex(values + shift, mass)
    np.testing.assert_allclose(found, project_simplex(values, mass), atol=1e-7)


def test_huge_values_do_not_swallow_the_mass():
    np.testing.assert_allclose(project_simplex(np.array([1e20, 1e20, 0.0])), [0.5, 0.5, 0.0])


@pytest.mark.parametrize("project", [project_simplex, project_capped])
def test_nothing_and_negative_masses_are_refused(project):
    with pytest.raises(ValueError, match="got 0 and 1"):
        project(np.array([]), 1.0)
    with pytest.raises(ValueError, match="expected values and mass >= 0, got 2 and -1"):
        project(np.array([1.0, 2.0]), -1.0)
