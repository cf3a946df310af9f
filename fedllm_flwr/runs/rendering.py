"""Figures as SVG for a page that is read in the light and in the dark, and as files.

Colours are those of the light theme; :func:`inline_svg` replaces each by the page's CSS variable of the same meaning.
Text stays text, so a figure can be searched, selected and read aloud.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = {
    "ink": "#1b2231",
    "muted": "#667084",
    "grid": "#e2e6ee",
    "accent": "#2461c2",
    "warm": "#c14a0d",
    "green": "#14805b",
    "violet": "#7b4fc4",
    "sand": "#a88b4a",
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.parse_math": False,
    "text.color": INK["ink"],
    "axes.edgecolor": INK["muted"],
    "axes.labelcolor": INK["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": INK["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": INK["muted"],
    "ytick.color": INK["muted"],
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedllm",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """This project's look, for drawing and for saving alike.

    Names in scripts that matplotlib's font lacks are drawn by the reader's own font, so no warning is due.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as an ``<svg>`` element to put into a page.

    Args:
        figure: Drawn under :func:`style`.
        name: Unique on the page, letters and dashes only: it begins every id inside.
        title: What a screen reader says.
    """
    with style():
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<!--.*?-->",
        "",
        svg,
        flags=re.S,
    )
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for meaning, color in INK.items():
        svg = svg.replace(color, f"var(--{meaning})")
    label = (
        f'role="img" aria-labelledby="{name}-title"><title id="{name}-title">{_text(title)}</title>'
    )
    return svg.replace(">", f" {label}", 1).strip()


def save(figure: Figure, stem: str) -> dict[str, bytes]:
    """A figure as standalone files on white.

    Args:
        figure: Drawn under :func:`style`.
        stem: Name without its ending.

    Returns:
        Content by file name: ``<stem>.svg`` and ``<stem>.png`` (160 dots per inch).
    """
    files = {}
    with style():
        for ending in ("svg", "png"):
            stream = io.BytesIO()
            figure.savefig(
                stream, format=ending, dpi=160, facecolor="white", metadata=_undated(ending)
            )
            files[f"{stem}.{ending}"] = stream.getvalue()
    return files


def _undated(ending: str) -> dict[str, str | None]:
    """Metadata without the time of drawing, so that the same figures give the same file."""
    return {"Date": None} if ending == "svg" else {}


def _text(value: str) -> str:
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
