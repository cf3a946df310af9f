"""Malformed configurations, records and replies: always a typed error, never a crash, never a silent accept."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm_flwr import records
from fedllm_flwr.client_app import app
from fedllm_flwr.compose import compose_run
from fedllm_flwr.config import RunConfig, run_config
from fedllm_flwr.errors import ConfigError, FedLLMError, WireError
from fedllm_flwr.loopback import LoopbackGrid
from strategies.exchange import ClientReply, by_client
from strategies.figures import training_figures
from strategies.tally import checked_groups, checked_splits

Fixture = Callable[..., Any]
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 0, 1, "none", "fedlora", "../up", "/etc/passwd", "NaN", ""])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
TREES = [
    json.loads(compose_run(["experiment=smoke", *more]).config.to_json())
    for more in (
        (),
        ("strategy.weighting=uniform", "privacy=central", "method.sharing=b_only"),
        ("method=fedprompt", "strategy=prompt_mean", "wire=top_k", "fairness=group_dro", "fairness.groups=label"),
        ("method=fedresprompt", "strategy=controller_mean", "baselines=none"),
    )
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def inside_a_run() -> None:
    """Messages can be made inside a run only; a grid begins one."""
    LoopbackGrid(app, 1)


def places(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a nested mapping."""
    if not isinstance(tree, dict):
        return []
    return [p for key, inner in tree.items() for p in ((*path, key), *places(inner, (*path, key)))]


def outcome(call: Callable[[], Any], kind: type[FedLLMError]) -> tuple[Any, str]:
    """What a call returns, and an empty text; or None, and the line of the error of the kind that it raised."""
    try:
        return call(), ""
    except kind as error:
        text = str(error)
    assert text, "an error says what was wrong"
    assert "\n" not in text
    return None, text


# Configurations ------------------------------------------------------------------------------------------------------


@MANY
@given(data=st.data(), value=VALUES)
def test_a_changed_configuration_is_refused_in_one_line_or_means_what_it_says(
    data: st.DataObject, value: Any
) -> None:
    tree = copy.deepcopy(data.draw(st.sampled_from(TREES)))
    *folder, key = data.draw(st.sampled_from(places(tree)))
    inner = tree
    for name in folder:
        inner = inner[name]
    how = data.draw(st.sampled_from(["change", "remove", "add"]))
    if how == "remove":
        del inner[key]
    else:
        inner[key if how == "change" else f"{key}x"] = value
    config, error = outcome(lambda: run_config(tree), ConfigError)
    if error:
        return
    assert isinstance(config, RunConfig)
    assert how != "add", "an unknown key was accepted"
    again = json.loads(config.to_json())
    for name in folder:
        again = again[name]
    if how == "change" and not folder:
        assert again[key] == value or isinstance(value, dict)
    assert run_config(json.loads(config.to_json())) == config


# Records -------------------------------------------------------------------------------------------------------------

RECORD_VALUES = (
    st.text(max_size=20) | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.binary(max_size=8) | st.booleans()
    | VALUES.map(json.dumps)
    | st.sampled_from(["[" * 100_000, '{"a":' * 50_000, "[[1, 2]]", '[["a"]]', '[["a", -1]]', '[["a", 1e999]]',
                       '[["a", "4"]]', "{}", "null", "[null]", "float32", "int8", "top_k"])
)  # fmt: skip
ARRAYS = st.sampled_from(
    [
        np.zeros(4, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.int64), np.zeros(0, np.float32),
        np.array(1.0, np.float32), np.zeros(4, np.uint8), np.full(4, np.nan, np.float32), np.zeros(3, np.float16),
    ]
)  # fmt: skip


def message() -> Message:
    parts = {"0/adapter": np.arange(4, dtype=np.float32)}
    content = records.answer({"clients": [{"partition-id": 0}]}, parts, "float32", 1)
    return Message(content, dst_node_id=1, message_type=records.TRAIN)


@MANY
@given(data=st.data(), value=RECORD_VALUES)
def test_a_changed_record_is_a_wire_error_or_what_was_sent(data: st.DataObject, value: Any) -> None:
    changed = message()
    record = changed.content[records.ANSWER]
    key = data.draw(st.sampled_from([*record, "more"]))
    if data.draw(st.booleans()):
        record[key] = value
    else:
        record.pop(key, None)
    if data.draw(st.booleans()):
        changed.content[records.ARRAYS] = ArrayRecord({records.FLAT: Array(data.draw(ARRAYS))})
    found, _ = outcome(lambda: records.read(changed, records.ANSWER), WireError)
    parts = found[1] if found else {}
    assert all(isinstance(name, str) and values.ndim == 1 for name, values in parts.items())


@pytest.mark.parametrize(
    "record",
    [
        ConfigRecord(), MetricRecord(), ArrayRecord(),
        ArrayRecord({"flat": Array("float32", (4,), "numpy.ndarray", b"no array")}),
        ArrayRecord({"flat": Array("float32", (4,), "pickle", b"\x80\x04N.")}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", [records.ANSWER, records.ARRAYS])
def test_a_record_of_another_kind_is_a_wire_error(key: str, record: Any) -> None:
    changed = message()
    changed.content[key] = record
    _, error = outcome(lambda: records.read(changed, records.ANSWER), WireError)
    assert error


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, '[["a", 1e999]]', '[["a", NaN]]']
)
@pytest.mark.parametrize("field", ["body", "parts"])
def test_a_text_that_does_not_end_well_is_a_wire_error(field: str, text: str) -> None:
    changed = message()
    changed.content[records.ANSWER][field] = text
    _, error = outcome(lambda: records.read(changed, records.ANSWER), WireError)
    assert error or field == "body"


@MANY
@given(body=VALUES)
def test_a_reply_with_any_body_is_an_answer_or_a_reason(body: Any) -> None:
    asked = message()
    asked.content = records.instruction({"partition-ids": [0, 1], "server-round": 1}, {}, "float32")
    asked.metadata.__dict__["_message_id"] = "asked"
    reply = Message(records.answer({}, {}, "float32", 1), reply_to=asked)
    reply.content[records.ANSWER]["body"] = json.dumps(body)
    found = list(by_client([asked], [reply]))
    assert {r.partition_id for r in found if not r.stray} == {0, 1}
    assert all(r.error and "\n" not in r.error for r in found)


# What clients say ----------------------------------------------------------------------------------------------------

GOOD = {"num-examples": 3, "steps": 2, "tokens": 40, "loss": 0.5, "cpu-seconds": 0.1}
SUMS = {"correct": 1, "total": 2, "loss_sum": 0.5, "label_tokens": 2, "characters": 9}


@MANY
@given(name=st.sampled_from(sorted(GOOD)), value=VALUES)
def test_figures_are_finite_numbers_or_refused(name: str, value: Any) -> None:
    found, error = outcome(lambda: training_figures("client 0", {**GOOD, name: value}), WireError)
    if error:
        assert error.startswith("client 0: ")
    else:
        assert math.isfinite(found[name.replace("-", "_")])


@MANY
@given(data=st.data(), value=VALUES)
def test_sums_of_an_evaluation_are_possible_numbers_or_refused(
    data: st.DataObject, value: Any
) -> None:
    info: dict[str, Any] = {"splits": {"test": dict(SUMS)}, "groups": {"test": {"a": dict(SUMS)}}}
    *folder, key = data.draw(st.sampled_from(places(info)))
    inner = info
    for name in folder:
        inner = inner[name]
    inner[key] = value
    reply = ClientReply(0, info, {})
    check = lambda: (checked_splits(reply, ("test",)), checked_groups(reply, ("test",)))  # noqa: E731
    found, error = outcome(check, WireError)
    if error:
        return
    splits, groups = found
    for sums in (splits["test"], *groups["test"].values()):
        assert all(math.isfinite(number) for number in sums.values())
        assert 0 <= sums["correct"] <= sums["total"]
        assert min(sums.values()) >= 0
