"""Numbers as people read them: bytes, durations, figures."""

from collections.abc import Sequence
from typing import Any

STEPS = ("kB", "MB", "GB", "TB", "PB")


def human_bytes(count: float) -> str:
    """Bytes in decimal units with three significant figures: ``950 B``, ``1.25 MB``, ``12.5 GB``."""
    if abs(count) < 999.5:
        return f"{count:.0f} B"
    power = 1
    while abs(count) / 1000**power >= 999.5 and power < len(STEPS):
        power += 1
    value = count / 1000**power
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {STEPS[power - 1]}"


def human_seconds(seconds: float) -> str:
    """A duration in at most two units: ``0.34 s``, ``12 s``, ``4 min 05 s``, ``2 h 10 min``, ``3 d 04 h``."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def human_figure(value: Any, digits: int = 3) -> str:
    """A table cell: numbers with a fixed number of decimals, whole numbers with separators, a dash for an absent one.

    Args:
        value: A number, text, a sequence of them, or None.
        digits: Decimals of a number that is not whole by type.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(human_figure(entry, digits) for entry in value)
    return str(value)
