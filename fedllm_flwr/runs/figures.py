"""The figures of runs: lines over rounds, clients, phases, and runs against each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from fedllm_flwr.runs.rendering import INK, style
from fedllm_flwr.runs.units import human_bytes, human_seconds


@dataclass(frozen=True)
class Line:
    """One line of a figure over rounds.

    Attributes:
        label: Written at the line's right end, in its colour.
        points: Round and value of each measured point; one level for all rounds when ``is_level``.
        color: A key of ``INK``.
        dashes: Matplotlib's line style.
        is_level: A baseline: a thin level line across the figure.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: str = "accent"
    dashes: str = "-"
    is_level: bool = False


@dataclass(frozen=True)
class Point:
    """One group of runs in a comparison plot.

    Attributes:
        number: Its row in the comparison table.
        label: What sets it apart.
        mean: Uplink bytes and quality.
        deviation: Standard deviations of the two; 0 draws no bar.
        runs: How many runs it stands for.
    """

    number: int
    label: str
    mean: tuple[float, float]
    deviation: tuple[float, float]
    runs: int


def line_figure(lines: Sequence[Line], y_label: str, *, counts_bytes: bool = False) -> Figure:
    """Values over rounds, each line named at its right end; lines without points are left out.

    Args:
        lines: In drawing order.
        y_label: What the values are.
        counts_bytes: Whether values are bytes, and the axis shows them in units.
    """
    with style():
        figure = Figure(figsize=(5.6, 3.1), layout="constrained")
        axes = figure.add_subplot()
        drawn = [line for line in lines if line.points]
        rounds = [x for line in drawn if not line.is_level for x, _ in line.points] or [0.0, 1.0]
        for line in drawn:
            _draw_line(axes, line)
        axes.set_xlim(min(rounds), max(max(rounds), min(rounds) + 1))
        axes.set_xlabel("round")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if counts_bytes:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(_byte_tick))
        else:
            axes.margins(y=0.08)
        _name_ends(axes, drawn)
        return figure


def client_figure(values: Sequence[tuple[str, float]], mean: float, x_label: str) -> Figure:
    """One figure per client: bars by client up to 40, else how many clients lie where.

    Args:
        values: Client and figure, worst first.
        mean: Mean over clients, drawn as a line.
        x_label: What the values are.
    """
    few = len(values) <= 40
    with style():
        height = max(1.6, 0.22 * len(values) + 0.8) if few else 2.8
        figure = Figure(figsize=(5.6, height), layout="constrained")
        axes = figure.add_subplot()
        if few:
            # By position: clients may share a name.
            places = range(len(values))
            axes.barh(places, [value for _, value in values], color=INK["accent"], height=0.62)
            axes.set_yticks(places, [name for name, _ in values])
            axes.invert_yaxis()
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
        else:
            axes.hist([v for _, v in values], bins=20, color=INK["accent"], rwidth=0.92)
            axes.set_ylabel("clients")
        axes.axvline(mean, color=INK["warm"], linewidth=1.4, linestyle="--")
        axes.annotate(
            f"mean {mean:.3f}", (mean, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", color=INK["warm"], fontsize=8,
        )  # fmt: skip
        axes.set_xlabel(x_label)
        return figure


def phase_figure(rounds: Sequence[int], phases: dict[str, list[float]]) -> Figure:
    """Seconds of each round, stacked by phase.

    Args:
        rounds: The rounds.
        phases: Seconds per round, by phase, in stacking order.
    """
    with style():
        figure = Figure(figsize=(5.6, 2.8), layout="constrained")
        axes = figure.add_subplot()
        base = [0.0] * len(rounds)
        for (phase, seconds), color in zip(
            phases.items(), ("accent", "green", "warm", "muted"), strict=False
        ):
            axes.bar(rounds, seconds, bottom=base, color=INK[color], width=0.7, label=phase)
            base = [below + above for below, above in zip(base, seconds, strict=True)]
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human_seconds(value)))
        figure.legend(
            loc="outside upper right", ncols=4, frameon=False, fontsize=8, handlelength=1.0
        )
        return figure


def comparison_figure(points: Sequence[Point], y_label: str) -> Figure:
    """Quality against uplink bytes, one numbered point per group of runs, with bars of one standard deviation.

    Args:
        points: In the order of the comparison table.
        y_label: What the quality is.
    """
    markers, colors = "osD^vPX", ("accent", "warm", "green", "violet", "sand", "muted")
    with style():
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            color = INK[colors[(point.number - 1) % len(colors)]]
            axes.errorbar(
                *point.mean, xerr=point.deviation[0] or None, yerr=point.deviation[1] or None,
                fmt=markers[(point.number - 1) % len(markers)], color=color, capsize=3, elinewidth=1.2, markersize=6,
                label=f"{point.number}  {point.label}" + (f"  (n={point.runs})" if point.runs > 1 else ""),
            )  # fmt: skip
            axes.annotate(
                str(point.number),
                point.mean,
                xytext=(6, 5),
                textcoords="offset points",
                color=color,
                fontsize=8,
            )
        _byte_axis(axes, [point.mean[0] for point in points])
        axes.set_ylabel(y_label)
        axes.margins(0.08)
        if 1 < len(points) <= 16:
            figure.legend(
                loc="outside lower center",
                ncols=1 if len(points) <= 4 else 2,
                frameon=False,
                fontsize=8,
            )
        return figure


def _draw_line(axes: Axes, line: Line) -> None:
    color = INK[line.color]
    if line.is_level:
        axes.axhline(line.points[0][1], color=color, linewidth=1.0, linestyle=line.dashes)
        return
    xs, ys = zip(*line.points, strict=True)
    axes.plot(
        xs,
        ys,
        color=color,
        linestyle=line.dashes,
        marker="o" if len(xs) <= 40 else "",
        clip_on=False,
    )


def _name_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name at its right end, moved apart where they would overlap."""
    to_fraction: Callable = (axes.transData + axes.transAxes.inverted()).transform
    right = axes.get_xlim()[1]
    wanted = [float(to_fraction((right, line.points[-1][1]))[1]) for line in lines]
    for line, height in zip(lines, spread_out(wanted, 0.062), strict=True):
        axes.annotate(
            line.label, (1.0, height), xycoords="axes fraction", xytext=(7, 0), textcoords="offset points",
            va="center", color=INK[line.color], fontsize=8,
        )  # fmt: skip


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart until neighbours keep a gap, each as little as a group of neighbours allows.

    Args:
        heights: Wanted positions, in any order.
        gap: The least distance.

    Returns:
        Positions in the order given; their mean is that of the wanted ones.

    Source:
        Pool adjacent violators (Barlow et al. 1972) on ``height - rank * gap``: the least-squares solution.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        total, size = heights[index] - rank * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / size:
            previous, count = blocks.pop()
            total, size = total + previous, size + count
        blocks.append((total, size))
    levels = [total / size for total, size in blocks for _ in range(size)]
    moved = [0.0] * len(heights)
    for rank, index in enumerate(order):
        moved[index] = levels[rank] + rank * gap
    return moved


def _byte_axis(axes: Axes, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if positive and len(positive) == len(values) and max(positive) > 10 * min(positive):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(_byte_tick))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlabel("uplink bytes of the whole run")


def _byte_tick(value: float, _position: int | None) -> str:
    """Bytes without the zeros that say nothing on an axis: ``5 MB`` rather than ``5.00 MB``."""
    number, unit = human_bytes(value).split(" ")
    return f"{float(number):g} {unit}"
