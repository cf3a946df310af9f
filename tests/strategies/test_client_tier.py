from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import WireError
from strategies.client_tier import whole_numbers
from strategies.exchange import ClientReply


def test_counts_are_read() -> None:
    found = whole_numbers(ClientReply(0, {"total": [1, 0, 7]}, {}), "total", 3)
    assert (found.dtype, found.tolist()) == (np.int64, [1, 0, 7])


@pytest.mark.parametrize("values", [None, [1], [1, 2, 3, 4], [1, 2, 3.0], [1, 2, -1], [1, 2, True], [1, 2, 2**53],
                                    ["1", 2, 3], "123"])  # fmt: skip
def test_what_are_no_counts_is_refused(values: Any) -> None:
    with pytest.raises(WireError, match="client 5: total: expected 3 counts"):
        whole_numbers(ClientReply(5, {"total": values}, {}), "total", 3)


def test_a_failure_stays_one() -> None:
    with pytest.raises(WireError, match="it was the disk"):
        whole_numbers(ClientReply(5, {"total": [1]}, {}, "it was the disk"), "total", 1)
