from typing import Any

import numpy as np
import pytest

from fedllm_flwr.codecs import CODECS, FLOAT_CODECS
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.settings.wire import WireConfig
from strategies.exchange import ClientReply
from strategies.received import Part, Start, counted_values, received_values

SHAPES = ((4, 20),)
GENERATOR = np.random.default_rng(0)
KNOWN, OWN, TRAINED = (GENERATOR.standard_normal(80, dtype=np.float32) for _ in range(3))
LOSSY = [name for name in CODECS if name not in FLOAT_CODECS]


def wire(uplink: Any = "float32", downlink: Any = "float32") -> WireConfig:
    low_rank = {"low_rank": 1} if "low_rank" in (uplink, downlink) else {}
    return WireConfig(name="own", uplink=uplink, downlink=downlink, **low_rank)


def untouched() -> Start:
    raise AssertionError("values that came whole are counted without a start")


def part(start: Start | None = None) -> Part:
    return Part("client 1", SHAPES, untouched if start is None else lambda: start, " (why)")


def reply(values: np.ndarray, codec: str) -> ClientReply:
    return ClientReply(1, {}, {"x": values}, codec=codec)


@pytest.mark.parametrize("codec", CODECS)
def test_the_server_knows_what_a_client_decodes(codec: Any) -> None:
    used = wire(downlink=codec)
    found = received_values(used, OWN, KNOWN, SHAPES)
    if codec in FLOAT_CODECS:
        known = used.codec("downlink")
        np.testing.assert_array_equal(found, known.decode(known.encode(OWN, SHAPES), SHAPES))
    else:
        known = used.codec("downlink")
        sent = known.encode(OWN - KNOWN, SHAPES)
        np.testing.assert_array_equal(found, KNOWN + known.decode(sent, SHAPES))
    if codec != "float32":
        assert (found != OWN).any()
    np.testing.assert_array_equal(
        received_values(wire(downlink=codec), KNOWN * 0, KNOWN * 0, SHAPES), 0
    )


@pytest.mark.parametrize("down", ["float32", "float16", "bfloat16"])
def test_values_under_values_are_the_very_array(down: Any) -> None:
    sent = reply(TRAINED, "bfloat16")
    assert counted_values(wire("bfloat16", down), sent, "x", part()) is TRAINED


@pytest.mark.parametrize("down", LOSSY)
def test_values_count_from_what_the_server_has(down: Any) -> None:
    start = Start(OWN, received_values(wire(downlink=down), OWN, KNOWN, SHAPES))
    changed = start.received + np.float32(0.5)
    found = counted_values(wire(downlink=down), reply(changed, "float32"), "x", part(start))
    np.testing.assert_allclose(found, OWN + 0.5, rtol=0, atol=2e-6)


@pytest.mark.parametrize("up", LOSSY)
@pytest.mark.parametrize("down", ["float32", "bfloat16", "int8", "top_k"])
def test_an_update_is_added_to_where_it_counts_from(up: Any, down: Any) -> None:
    used = wire(up, down)
    start = Start(OWN, received_values(used, OWN, KNOWN, SHAPES))
    codec = used.codec("uplink")
    sent = codec.encode(TRAINED, SHAPES)
    base = start.own if down in LOSSY else start.received
    found = counted_values(used, reply(sent, up), "x", part(start))
    np.testing.assert_array_equal(found, base + codec.decode(sent, SHAPES))


@pytest.mark.parametrize("used", [wire(), wire("int8", "int8")], ids=["values", "updates"])
def test_a_reply_that_no_message_brought_counts_as_it_is_if_it_fits(used: WireConfig) -> None:
    made = ClientReply(-1, {}, {"x": TRAINED})
    assert counted_values(used, made, "x", part()) is TRAINED
    with pytest.raises(ShapeError, match=r"client 1: expected 80 values \(why\), got 79"):
        counted_values(used, ClientReply(-1, {}, {"x": TRAINED[1:]}), "x", part())


@pytest.mark.parametrize(
    ("used", "sent", "match"),
    [
        (wire(), reply(TRAINED, "float16"), "client 1: expected the codec float32, got float16"),
        (wire("int8"), reply(TRAINED, "float32"), "client 1: expected the codec int8, got float32"),
        (wire("int8"), reply(np.zeros(3, np.uint8), "int8"), r"client 1: codec int8: expected 84 bytes .* \(why\)"),
        (wire("int8"), reply(TRAINED, "int8"), "client 1: codec int8: .* got float32"),
    ],
)  # fmt: skip
def test_what_was_not_asked_for_is_refused(used: WireConfig, sent: ClientReply, match: str) -> None:
    with pytest.raises(WireError, match=match):
        counted_values(used, sent, "x", part())
