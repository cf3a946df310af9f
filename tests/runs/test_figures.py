from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.runs.figures import (
    Line,
    Point,
    client_figure,
    comparison_figure,
    line_figure,
    phase_figure,
    spread_out,
)


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_each_line_with_points_is_drawn_and_named_at_its_end() -> None:
    lines = [
        Line("test", [(0, 0.25), (1, 0.5), (3, 0.75)]),
        Line("never measured", []),
        Line("majority class", [(0.0, 0.4)], "muted", is_level=True),
    ]
    figure = line_figure(lines, "accuracy")
    axes = figure.axes[0]
    assert texts(figure) == ["test", "majority class"]
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.25], [1, 0.5], [3, 0.75]]
    assert set(axes.lines[1].get_ydata()) == {0.4}
    assert (axes.get_xlim(), axes.get_ylabel()) == ((0.0, 3.0), "accuracy")


def test_one_point_and_no_point_are_drawn_too() -> None:
    assert line_figure([Line("test", [(2, 0.5)])], "accuracy").axes[0].get_xlim() == (2.0, 3.0)
    assert line_figure([], "accuracy").axes[0].lines[:] == []


def test_byte_axes_have_units() -> None:
    axes = line_figure([Line("uplink", [(0, 0), (4, 32e6)])], "bytes", counts_bytes=True).axes[0]
    assert axes.yaxis.get_major_formatter()(5e6, 0) == "5 MB"
    assert axes.get_ylim()[0] == 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.1))
def test_names_are_moved_apart_as_little_as_possible(heights: list[float], gap: float) -> None:
    moved = spread_out(heights, gap)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [moved[i] for i in order]
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(placed))
    assert sum(moved) == pytest.approx(sum(heights), abs=1e-9)
    again = spread_out(moved, gap)
    assert again == pytest.approx(moved, abs=1e-9)


def test_names_with_room_stay_where_they_are() -> None:
    assert spread_out([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert spread_out([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])


def test_few_clients_are_bars_and_many_are_counted() -> None:
    few = client_figure([("a", 0.25), ("b", 0.75)], 0.5, "test accuracy").axes[0]
    assert [bar.get_width() for bar in few.patches] == [0.25, 0.75]
    assert [label.get_text() for label in few.get_yticklabels()] == ["a", "b"]
    many = client_figure([(str(i), i / 100) for i in range(100)], 0.5, "test accuracy").axes[0]
    assert sum(bar.get_height() for bar in many.patches) == 100
    assert many.get_ylabel() == "clients"
    assert "mean 0.500" in [text.get_text() for text in many.texts]


def test_two_clients_of_one_name_keep_a_bar_each() -> None:
    axes = client_figure([("same", 0.25), ("same", 0.75)], 0.5, "test accuracy").axes[0]
    assert len({bar.get_y() for bar in axes.patches}) == 2
    assert [label.get_text() for label in axes.get_yticklabels()] == ["same", "same"]


def test_phases_are_stacked() -> None:
    axes = phase_figure([1, 2], {"train": [4.0, 5.0], "evaluate": [1.0, 2.0]}).axes[0]
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [
        (0, 4),
        (0, 5),
        (4, 1),
        (5, 2),
    ]


def test_a_comparison_numbers_its_points_as_the_table_does() -> None:
    points = [
        Point(1, "rank=4", (1e6, 0.5), (0.0, 0.01), 3),
        Point(3, "rank=64 $x_$", (1e8, 0.75), (2e5, 0.02), 3),
    ]
    figure = comparison_figure(points, "accuracy")
    assert texts(figure) == ["1", "3"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "1  rank=4  (n=3)",
        "3  rank=64 $x_$  (n=3)",
    ]
    assert figure.axes[0].get_xscale() == "log"
    near = comparison_figure([Point(1, "all runs", (1e6, 0.5), (0.0, 0.0), 1)], "accuracy")
    assert near.axes[0].get_xscale() == "linear"
    assert near.legends == []
