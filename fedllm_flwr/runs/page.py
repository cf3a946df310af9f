"""Pieces of a self-contained HTML page: nothing is fetched and nothing is executed, and every text is escaped."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE_SHEET = """
:root { color-scheme: light dark; --page:#fff; --card:#f6f8fb; --ink:#1b2231; --muted:#667084; --grid:#e2e6ee;
  --accent:#2461c2; --warm:#c14a0d; --green:#14805b; --violet:#7b4fc4; --sand:#a88b4a; --mark:#eaf1fc; }
@media (prefers-color-scheme: dark) { :root { --page:#12161f; --card:#1a202c; --ink:#e6eaf2; --muted:#9ba7ba;
  --grid:#2d3544; --accent:#82b1ff; --warm:#ff9e6b; --green:#62cfa3; --violet:#c0a1ff; --sand:#d8bd7e;
  --mark:#1d2b45; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
h1 { font-size: 1.15rem; font-weight: 600; color: var(--muted); margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .7rem; padding-top: .7rem; border-top: 1px solid var(--grid); }
.headline { font-size: 1.6rem; line-height: 1.3; font-weight: 650; margin: 0 0 .6rem; max-width: 48rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
.note { color: var(--muted); font-size: .92rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.4rem 0 0; padding: 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .55rem .9rem; min-width: 7.5rem; }
.facts dt { color: var(--muted); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
caption { text-align: left; color: var(--muted); font-size: .85rem; padding-bottom: .35rem; }
th, td { padding: .38rem .8rem .38rem 0; text-align: right; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
.text { text-align: left; overflow-wrap: anywhere; }
tr.ours { background: var(--mark); }
tr.ours th, tr.ours td { font-weight: 650; }
tr > :first-child { padding-left: .5rem; }
.range { color: var(--muted); font-weight: 400; font-size: .85em; white-space: nowrap; }
figure { margin: 0; background: var(--card); border-radius: .6rem; padding: .9rem 1rem .6rem; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3rem; }
figure svg { width: 100%; height: auto; display: block; overflow: visible; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure text { font-family: inherit !important; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(25rem, 100%), 1fr)); gap: 1rem;
  align-items: start; margin: .8rem 0 1rem; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; font-size: .88rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { details:not([open]) > :not(summary) { display: block; } body { max-width: none; } }
"""
# The policy forbids scripts and every fetch, so that even a mistake in escaping can do neither.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Cell:
    """A table cell with a fainter second part, such as an interval."""

    text: str
    range: str = ""


def escape(value: object) -> str:
    """Any value as HTML text, also safe in quoted attributes; control characters become a visible sign."""
    return html.escape(CONTROL.sub("\ufffd", str(value)), quote=True)


def paragraph(text: str, css_class: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(css_class)}>{escape(text)}</p>"


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str | Cell]],
    *,
    text_columns: Sequence[int] = (0,),
    marked: Sequence[int] = (),
) -> str:
    """An accessible table: a caption, column headers, and the first cell of a row as its header.

    Args:
        caption: What the table shows.
        header: Column names.
        rows: As many cells each.
        text_columns: Columns that are text and stand left; the others are figures and stand right.
        marked: Rows that are emphasised.
    """

    def cell(column: int, content: str | Cell) -> str:
        tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
        return f"<{tag}{scope}{_class('text' if column in text_columns else '')}>{_content(content)}</{tag}>"

    head = "".join(
        f'<th scope="col"{_class("text" if i in text_columns else "")}>{escape(name)}</th>'
        for i, name in enumerate(header)
    )
    body = "\n".join(
        f"<tr{_class('ours' if number in marked else '')}>{''.join(cell(i, c) for i, c in enumerate(row))}</tr>"
        for number, row in enumerate(rows)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n"
        "</tbody>\n</table>\n</div>"
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A row of single figures with their names."""
    entries = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in pairs)
    return f'<dl class="facts">{entries}</dl>'


def figure(title: str, svg: str) -> str:
    """A figure from :func:`fedllm_flwr.runs.rendering.inline_svg` with its title."""
    return f"<figure><figcaption>{escape(title)}</figcaption>\n{svg}\n</figure>"


def figure_row(figures: Sequence[str]) -> str:
    """Figures side by side where the window is wide enough."""
    return '<div class="figures">\n' + "\n".join(figures) + "\n</div>"


def details(summary: str, body: str) -> str:
    """A part that is folded until the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def code_block(text: str) -> str:
    """Text to copy, such as a command."""
    return f"<pre><code>{escape(text)}</code></pre>"


def section(title: str, *parts: str) -> str:
    """A part of the page; nothing at all when it has no content."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def page(title: str, *parts: str) -> str:
    """The whole document."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _content(content: str | Cell) -> str:
    if isinstance(content, str):
        return escape(content)
    faint = f' <span class="range">{escape(content.range)}</span>' if content.range else ""
    return escape(content.text) + faint


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
