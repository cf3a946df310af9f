import re

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.catalog import MODELS, ModelRef


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'gpt9' is unknown; expected one of tiny, smollm2_135m"):
        ModelRef("gpt9")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "tiny", "hub_id": "org/name"},
            "model tiny: hub_id='org/name' is only for model hub",
        ),
        ({"name": "hub", "hub_id": "org/name", "path": "x"}, "path='x' is only for model path"),
        (
            {"name": "path", "path": "x", "revision": "main"},
            "revision='main' is only for model hub",
        ),
        ({"name": "hub"}, "expected hub_id as organisation/name, got ''"),
        ({"name": "hub", "hub_id": "gpt2"}, "organisation/name, got 'gpt2'"),
        ({"name": "hub", "hub_id": "../../etc"}, "organisation/name"),
        ({"name": "path"}, "expected path to a checkpoint folder"),
    ],
)
def test_fields_that_do_not_belong_together(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ModelRef(**fields)


def test_equal_references_are_one_model() -> None:
    assert ModelRef("hub", hub_id="org/name") == ModelRef("hub", hub_id="org/name")
    assert hash(ModelRef("tiny")) == hash(ModelRef("tiny"))


def test_names_for_people_and_for_exports() -> None:
    assert ModelRef("hub", hub_id="org/name").label == "org/name"
    assert ModelRef("smollm2_135m").base_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert ModelRef("path", path="some/folder").base_name == "some/folder"


def test_packaged_models_state_licence_and_digest() -> None:
    packaged = [entry for entry in MODELS.values() if entry.source == "packaged"]
    assert len(packaged) == 2
    for entry in packaged:
        assert entry.licence
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
        assert entry.pieces
