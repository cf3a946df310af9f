import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.runs.units import human_bytes, human_figure, human_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (1_250_000, "1.25 MB"),
        (12_500_000_000, "12.5 GB"),
        (3e18, "3000 PB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@settings(deadline=None)
@given(st.integers(1000, 10**17))
def test_bytes_are_right_to_three_figures(count: int) -> None:
    number, unit = human_bytes(count).split(" ")
    value = float(number) * 1000 ** (1 + ("kB", "MB", "GB", "TB", "PB").index(unit))
    assert value == pytest.approx(count, rel=0.0051)
    assert len(number.replace(".", "")) == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.034, "0.034 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (86_399, "1 d 00 h"),
        (273_600, "3 d 04 h"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@settings(deadline=None)
@given(st.floats(60, 1e7))
def test_seconds_are_right_to_the_smaller_unit(seconds: float) -> None:
    sizes = {"d": 86_400, "h": 3_600, "min": 60, "s": 1}
    parts = re.findall(r"(\d+) (\w+)", human_seconds(seconds))
    total = sum(int(number) * sizes[unit] for number, unit in parts)
    assert abs(total - seconds) <= sizes[parts[-1][1]] / 2 + 1e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.90625, "0.906"),
        ("text", "text"),
        ([1, 0.5, None], "1, 0.500, –"),
    ],
)
def test_figures(value: object, text: str) -> None:
    assert human_figure(value) == text
