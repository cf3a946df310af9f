from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.models.prompt_start import embedding_table, prompt_width
from fedllm_flwr.settings.first_prompts import first_prompts, part_shape

Fixture = Callable[..., Any]


def made(config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    ref = config.model.ref("")
    return first_prompts(config.method, ref, embedding_table(ref, config.runtime.dtype), seed)


def test_the_parts_that_are_shared_have_a_start_and_the_personal_one_has_none(
    micro: Fixture,
) -> None:
    config = micro("method=fedprompt", "method.cluster_length=2", "method.personal_length=4")
    found, width = made(config), prompt_width(config.model.ref(""))
    assert {name: values.size for name, values in found.items()} == {
        "shared": 3 * width,
        "cluster": 2 * width,
    }
    assert part_shape(config.method, "cluster", 2 * width) == (2, width)
    assert part_shape(config.method, "shared", 3 * width) == (3, width)


@pytest.mark.parametrize("kind", ["soft", "prompt_tuning", "prefix_tuning", "p_tuning"])
def test_everybody_who_asks_alike_gets_the_same(kind: str, micro: Fixture) -> None:
    config = micro(
        "method=fedprompt", f"method.kind={kind}", "method.placement=before", "method.start=random"
    )
    one, two, other = made(config), made(config), made(config, seed=1)
    np.testing.assert_array_equal(one["shared"], two["shared"])
    assert (one["shared"] != other["shared"]).any()
    size = one["shared"].size
    shape = part_shape(config.method, "shared", size)
    assert shape == ((size,) if kind in ("prefix_tuning", "p_tuning") else (3, size // 3))
