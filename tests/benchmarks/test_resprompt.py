import json
import sys

import pytest
import torch

pytest.importorskip("esnfed", reason="the benchmark's baseline is esnfed 1.7.1")

from benchmarks import resprompt


def test_both_sides_take_the_same_steps() -> None:
    assert resprompt.difference(12) < 1e-9


def test_the_sizes_are_those_that_are_claimed() -> None:
    rows = resprompt.examples(40)
    assert rows.contexts.shape == (40, 30, 1)
    assert sorted(set(rows.targets.tolist())) == [0, 1, 2, 3]
    ours = resprompt.Ours("float32")
    assert ours.reservoir.weights.shape == (200, 200)
    assert ours.controller.lift.shape == (5760, 16)
    assert ours.controller.flat.dtype == torch.float32


def test_cached_states_change_nothing_and_training_learns() -> None:
    rows = resprompt.examples(64)
    fresh, cached = resprompt.Ours("float32"), resprompt.Ours("float32")
    z = cached.reservoir.harvest(rows.contexts)
    first = fresh.train(rows, 16)
    assert torch.equal(first, cached.train_cached(z, rows.targets, 16))
    assert first.shape == (64,)
    for _ in range(60):
        last = fresh.train(rows, 16)
    assert last.mean() < 0.9 * first.mean()


@pytest.mark.slow
@pytest.mark.assets
def test_the_last_line_has_the_named_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resprompt, "QUICK_REPEATS", 1)
    monkeypatch.setattr(resprompt, "EXAMPLES", 32)
    monkeypatch.setattr(resprompt, "BASELINE_EXAMPLES", 16)
    monkeypatch.setattr(resprompt, "LM_EXAMPLES", 4)
    monkeypatch.setattr(resprompt, "LM_BASELINE_EXAMPLES", 2)
    monkeypatch.setattr(sys, "argv", ["resprompt.py", "--quick"])
    resprompt.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) >= set(resprompt.GATES)
    ours, baseline = (
        figures["surrogate_examples_per_second"],
        figures["surrogate_baseline_examples_per_second"],
    )
    assert figures["surrogate_ratio"] == pytest.approx(ours / baseline, rel=0.01)
    assert figures["surrogate_difference"] < 1e-9
    ours, baseline = (
        figures["real_lm_examples_per_second"],
        figures["real_lm_baseline_examples_per_second"],
    )
    assert figures["real_lm_ratio"] == pytest.approx(ours / baseline, rel=0.01)
    assert figures["real_lm_median_difference"] < 1e-4
    assert figures["real_lm_largest_difference"] >= figures["real_lm_median_difference"]


def test_a_gate_says_whether_it_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    met = {"real_lm_ratio": 5.0, "real_lm_median_difference": 1e-4}
    least = {"surrogate_difference": 1.1e-9, "real_lm_largest_difference": 0.5}
    resprompt.report({"surrogate_ratio": 9.9, **least, **met})
    slow, apart, fast, median, largest = capsys.readouterr().out.splitlines()
    assert slow.endswith("not met")
    assert apart.endswith("not met")
    assert fast.endswith("  met")
    assert median.startswith("real_lm_median_difference")
    assert median.endswith("  met")
    assert largest.startswith("real_lm_largest_difference")
    assert largest.endswith("no gate"), "the largest is shown, and nobody takes it for held"
