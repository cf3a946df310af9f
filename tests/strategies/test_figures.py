import math

import pytest

from fedllm_flwr.errors import WireError
from strategies.figures import training_figures

GOOD = {"num-examples": 3, "steps": 2, "tokens": 9, "loss": 0.5, "cpu-seconds": 0.25, "else": "x"}


def test_figures_have_underscores_and_nothing_else_is_taken() -> None:
    found = training_figures("client 0", GOOD)
    assert found == {"num_examples": 3, "steps": 2, "tokens": 9, "loss": 0.5, "cpu_seconds": 0.25}


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 1.5), ("loss", math.nan), ("tokens", True), ("loss", "0.5")]
)
def test_a_figure_that_is_no_number_is_named(name: str, value: object) -> None:
    with pytest.raises(WireError, match=f"client 0: {name}: expected"):
        training_figures("client 0", GOOD | {name: value})


def test_what_is_withheld_is_absent_and_not_zero() -> None:
    info = {"num-examples": 3, "steps": 2, "withheld": True}
    assert training_figures("client 0", info, may_withhold=True) == {"num_examples": 3, "steps": 2}
    with pytest.raises(WireError, match="client 0: tokens: expected"):
        training_figures("client 0", info)
    with pytest.raises(WireError, match="client 0: tokens: expected"):
        training_figures("client 0", info | {"withheld": 1}, may_withhold=True)
    with pytest.raises(WireError, match="client 0: steps: expected"):
        training_figures("client 0", {"num-examples": 3, "withheld": True}, may_withhold=True)
