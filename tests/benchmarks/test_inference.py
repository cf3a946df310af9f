from itertools import pairwise

import pytest

from benchmarks import inference
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation import common_length


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load(ModelRef("tiny"), dtype="float32", device="cpu")


def test_the_prompts_share_the_beginning_that_is_claimed(backbone: Backbone) -> None:
    prompts = inference.prompts_of(backbone)
    assert len(set(prompts)) == inference.PROMPTS
    assert common_length(prompts) >= inference.SHARED_TOKENS
    assert all(
        a[: inference.SHARED_TOKENS] == b[: inference.SHARED_TOKENS] for a, b in pairwise(prompts)
    )


def test_all_sides_give_the_same_answers_and_the_kernels_are_put_back(backbone: Backbone) -> None:
    own = backbone.model.config._attn_implementation
    figures = inference.figures_of(backbone, answered=4, parts=2)
    assert figures["equal_answers"] == figures["compared_answers"] == 3 * 4 + 2 * 32 + 2 * 5
    assert set(inference.GATES) < set(figures)
    assert all(value > 0 for value in figures.values())
    assert backbone.model.config._attn_implementation == own


def test_a_gate_that_is_missed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"batch32_ratio": 2.9, "shared_prefix_ratio": 6.0, "samples5_ratio": 2.5,
               "equal_answers": 9, "compared_answers": 10}  # fmt: skip
    inference.report(figures)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("not met") for line in lines] == [True, False, False, True]
