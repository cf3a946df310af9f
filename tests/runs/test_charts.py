from fedllm_flwr.runs import breakdown
from fedllm_flwr.runs.charts import LEVEL_COLORS, clients_chart, round_figures, time_figure
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.results import BASELINES, result_rows
from fedllm_flwr.runs.snapshot import Snapshot


def test_a_run_has_accuracy_loss_and_bytes_with_the_baselines_in_the_accuracy(make_run) -> None:
    snapshot = Snapshot.read(make_run())
    accuracy, loss, traffic = round_figures(snapshot, result_rows(snapshot))
    for name in (
        "test",
        "validation",
        "worst client",
        "bag of words",
        "majority class",
        "zero-shot base model",
    ):
        assert f">{name}</text>" in accuracy
    assert ">training</text>" in loss
    assert ">uplink</text>" in traffic
    assert ">30 MB</text>" in traffic


def test_what_was_not_measured_has_no_figure(tmp_path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    assert round_figures(Snapshot.read(run), []) == []
    assert time_figure(Snapshot.read(run)) == ""
    run.append(
        {
            "kind": "round",
            "round": 1,
            "loss": 2.0,
            "validation_loss": 2.1,
            "bits_per_character": 1.0,
        }
    )
    run.append({"kind": "baseline", "name": "zero_shot", "bits_per_character": 1.5})
    snapshot = Snapshot.read(run)
    bits, loss = round_figures(snapshot, result_rows(snapshot))
    assert "Bits per character by round" in bits
    assert ">zero-shot base model</text>" in bits
    assert "Loss by round" in loss
    assert ">validation</text>" in loss


def test_clients_are_named_with_their_ids(make_run) -> None:
    rows = breakdown.client_rows(Snapshot.read(make_run()))
    found = breakdown.spread(rows, "accuracy")
    assert found is not None
    chart = clients_chart(rows, found, "accuracy")
    assert ">publisher &lt;0&gt; (0)</text>" in chart
    assert "Test accuracy by client" in chart


def test_every_baseline_has_a_color() -> None:
    assert set(LEVEL_COLORS) == set(BASELINES)
