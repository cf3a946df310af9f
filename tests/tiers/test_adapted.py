import json

import numpy as np
import pytest

from fedllm_flwr.averaging import LowRank
from fedllm_flwr.errors import ConfigError, WireError
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.models.shapes import layer_shapes
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.tiers.adapted import pack_adaptation, unpack_adaptation

TINY = ModelRef("tiny")


def there(added: Adaptation) -> Adaptation:
    facts, values = pack_adaptation(added)
    parts = {} if values is None else {"model": values}
    return unpack_adaptation(json.loads(json.dumps(facts)), parts, "model", TINY)


def test_an_update_arrives_as_it_was() -> None:
    draws = np.random.default_rng(0)
    delta = {
        s.name: LowRank(
            draws.standard_normal((s.out_features, 2)).astype(np.float32),
            draws.standard_normal((2, s.in_features)).astype(np.float32),
        )
        for s in layer_shapes(TINY, ("q_proj",))
    }
    found = there(Adaptation(delta=delta, fixed_ids=(3, 4)))
    assert found.fixed_ids == (3, 4)
    assert found.adapter is None
    assert set(found.delta) == set(delta)  # type: ignore[arg-type]
    for name, update in delta.items():
        np.testing.assert_array_equal(found.delta[name].left, update.left)  # type: ignore[index]
        np.testing.assert_array_equal(found.delta[name].right, update.right)  # type: ignore[index]


@pytest.mark.parametrize(
    "spec",
    [
        PromptSpec((Segment("personal", 1), Segment("shared", 2)), "after"),
        PeftPromptSpec(kind="prompt_tuning", length=3),
    ],
)
def test_a_prompt_arrives_as_it_was(spec: PromptSpec | PeftPromptSpec) -> None:
    values = np.arange(6, dtype=np.float32)
    found = there(Adaptation(values, spec, fixed_ids=(9,)))
    assert (found.spec, found.fixed_ids, found.delta) == (spec, (9,), None)
    np.testing.assert_array_equal(found.adapter, values)


def test_nothing_added_sends_no_array() -> None:
    facts, values = pack_adaptation(Adaptation())
    assert values is None
    assert there(Adaptation()).delta is None
    assert facts == {"fixed_ids": [], "kind": "plain"}


def test_what_cannot_be_sent_and_what_did_not_come_are_named() -> None:
    values = np.zeros(3, np.float32)
    with pytest.raises(ConfigError, match="expected an update or a prompt, got LoraSpec"):
        pack_adaptation(Adaptation(values, LoraSpec(rank=1, alpha=1.0)))
    soft = PromptSpec((Segment("shared", 3),), "before")
    with pytest.raises(ConfigError, match="got PromptSpec over an update"):
        pack_adaptation(Adaptation(values, soft, delta={}))
    with pytest.raises(WireError, match=r"expected the values of model, got \['other'\]"):
        unpack_adaptation(
            pack_adaptation(Adaptation(values, soft))[0], {"other": values}, "model", TINY
        )
