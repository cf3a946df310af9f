import numpy as np
import pytest

from benchmarks import frozen
from fedllm_flwr.models.backbone import load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.shapes import layer_shapes


def test_all_sides_end_with_the_same_adapter() -> None:
    backbone = load(ModelRef("tiny"), dtype="float32", device="cpu")
    job = frozen.job_of(backbone, ("*.layers.1.self_attn.[qkvo]_proj",))
    assert all(len(row.input_ids) == frozen.LENGTH for row in job.rows)
    ended = [call() for call in frozen.sides(backbone, job).values()]
    step = np.linalg.norm(ended[0] - job.adapter)
    assert step > 1e-3
    assert np.array_equal(ended[1], ended[2])
    assert np.linalg.norm(ended[1] - ended[0]) < 1e-4 * step
    assert frozen.difference(backbone, job) < 1e-4
    assert set(frozen.measure(backbone, job, 1)) == set(frozen.sides(backbone, job))


@pytest.mark.assets
def test_the_pattern_is_the_last_third_of_the_default_model() -> None:
    names = {
        s.name.split(".")[2] for s in layer_shapes(ModelRef("smollm2_135m"), frozen.UPPER_THIRD)
    }
    assert names == {str(block) for block in range(20, 30)}
