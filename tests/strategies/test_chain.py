"""The parts of a chain; whole chains are run in test_fedresprompt."""

import numpy as np
import pytest
import torch

from fedllm_flwr.errors import ShapeError, WireError
from strategies.chain import check_reservoir, checked_part, flat, in_order
from strategies.exchange import ClientReply


def reply(client: int = 2, **parts: np.ndarray) -> ClientReply:
    return ClientReply(client, {"reservoir": "abc"}, parts)


def test_replies_are_ordered_and_odd_ones_set_apart() -> None:
    odd: list[ClientReply] = []
    strange = ClientReply(1, {}, {}, "nobody asked", stray=True)
    found = in_order([reply(3), strange, reply(0)], odd)
    assert [one.partition_id for one in found] == [0, 3]
    assert odd == [strange]


def test_another_reservoir_is_refused() -> None:
    check_reservoir(reply(), "abc")
    with pytest.raises(WireError, match=r"^client 2: expected reservoir xyz, got 'abc'$"):
        check_reservoir(reply(), "xyz")


def test_a_part_is_alone_finite_and_of_its_size() -> None:
    values = np.ones(3, np.float32)
    assert checked_part(reply(slope=values), "slope", 3) is values
    with pytest.raises(WireError, match=r"client 2: expected the parts \['slope'\], got \['b'\]"):
        checked_part(reply(b=values), "slope", 3)
    with pytest.raises(ShapeError, match="client 2, part slope: expected 4 values, got 3"):
        checked_part(reply(slope=values), "slope", 4)
    with pytest.raises(WireError, match="client 2, part slope: expected finite values"):
        checked_part(reply(slope=values * np.nan), "slope", 3)
    with pytest.raises(WireError, match="gone"):
        checked_part(ClientReply(2, {}, {}, "gone"), "slope", 3)


def test_a_tensor_crosses_as_flat_float32() -> None:
    found = flat(torch.ones(2, 3, dtype=torch.float64))
    assert (found.shape, found.dtype) == ((6,), np.float32)
