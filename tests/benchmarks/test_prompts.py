from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks import prompts
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.training.find_decoder import find_decoder


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load(ModelRef("tiny"), dtype="float32", device="cpu")


def test_every_side_computes_the_same_gradients(backbone: Backbone) -> None:
    first, second = prompts.texts(backbone, 2)
    ours = prompts.together(backbone)
    found = ours(first)
    assert len(found) == prompts.CLIENTS
    for decoder in (find_decoder(backbone), None):
        wanted = prompts.one_by_one(backbone, decoder)(first)
        assert max(prompts.differences(found, wanted)) < 1e-4
    assert max(prompts.differences(ours(first), found)) == 0
    assert min(prompts.differences(ours(second), found)) > 0.1  # the text counts
    assert all(prompts.differences([a], [b])[0] > 0.1 for a, b in pairwise(np.stack(found)))


def test_the_rows_are_of_the_size_that_is_claimed(backbone: Backbone) -> None:
    [text] = prompts.texts(backbone, 1)
    jobs = prompts.jobs_of(backbone, text)
    assert (len(jobs), len(text), jobs[0].spec.length) == (8, 48, 8)
    for job in jobs:
        assert [len(row.input_ids) for row in job.rows] == [56, 56]
        assert all(tuple(row.input_ids[:48]) == text for row in job.rows)


def test_the_figures_are_ratios_to_the_named_baseline(
    backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = prompts.figures_of(backbone, backbone, repeats=2)
    assert set(figures) >= set(prompts.GATES)
    assert figures["gradient_difference"] < 1e-5
    assert prompts.in_float64(backbone).head_weight().dtype == torch.float64
    assert backbone.head_weight().dtype == torch.float32
    assert all(value > 0 for value in figures.values())
    prompts.report({"cohort8_ratio": 2.4, "gradient_difference": 1e-6})
    slow, exact = capsys.readouterr().out.splitlines()[-2:]
    assert slow.endswith("not met")
    assert exact.endswith("  met")
