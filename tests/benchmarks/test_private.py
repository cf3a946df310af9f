import pytest
import torch

from benchmarks import private
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load(ModelRef("tiny"), dtype="float32", device="cpu")


def test_the_sides_differ_in_passes_alone(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = private.job_of(backbone)
    assert [len(row.input_ids) for row in job.rows] == [private.LENGTH] * private.ROWS
    private.step(backbone, job, private.PLAIN)  # tries the decoder out
    passes: list[int] = []
    whole = torch.nn.functional.embedding

    def counted(ids: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        passes.append(len(ids))
        return whole(ids, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "embedding", counted)
    found = {
        name: private.step(backbone, job, settings) for name, settings in private.SIDES.items()
    }
    assert passes == [8, 8, *[1] * 8]
    plain, ours, loop = found.values()
    assert (plain.steps, ours.steps, loop.steps) == (1, 1, 1)
    assert plain.releases is None
    assert ours.releases == loop.releases
    assert ours.releases is not None
    assert ours.releases.sampling_rate == 1.0


def test_the_figures_are_ratios_to_the_named_baselines(
    backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = private.figures_of(backbone, backbone, repeats=2)
    assert set(figures) == set(private.GATES)
    assert figures["dp_difference"] < 1e-5
    assert figures["dp_step_ratio"] > 0
    assert figures["dp_vs_loop_ratio"] > 0
    private.report({"dp_step_ratio": 1.6, "dp_vs_loop_ratio": 2.0, "dp_difference": 1e-6})
    slow, *fast = capsys.readouterr().out.splitlines()[-3:]
    assert slow.endswith("not met")
    assert all(line.endswith("  met") for line in fast)
