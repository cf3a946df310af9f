import pytest

from benchmarks import unlearning


@pytest.mark.slow
def test_the_figures_are_ratios_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unlearning, "REPEATS", 1)
    monkeypatch.setattr(unlearning, "own_seconds", lambda request: 4.0)
    monkeypatch.setattr(unlearning, "removal_seconds", lambda request: 2.0)
    monkeypatch.setattr(unlearning, "retrain_seconds", lambda request: 30.0)
    found = unlearning.figures_of((5, 10), "tiny")
    assert found == {"retrain_vs_removal_5": 15.0, "retrain_vs_removal_10": 15.0}


def test_every_gate_is_a_figure_of_the_quick_sizes() -> None:
    names = {"removal_vs_client_50", *(f"retrain_vs_removal_{n}" for n in unlearning.QUICK_CLIENTS)}
    assert set(unlearning.GATES) <= names
    assert {*unlearning.QUICK_CLIENTS} <= {*unlearning.CLIENTS}
