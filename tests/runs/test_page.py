import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.runs import page
from fedllm_flwr.runs.page import Cell
from fedllm_flwr.runs.rendering import INK

NASTY = "<script>alert('x')</script> & \"quoted\" \x00\x1b[31m"


def test_every_text_is_escaped(parse_page) -> None:
    source = page.page(
        NASTY,
        page.paragraph(NASTY),
        page.table(NASTY, [NASTY, "b"], [[NASTY, Cell(NASTY, NASTY)]]),
        page.facts([(NASTY, NASTY)]),
        page.figure(NASTY, "<svg></svg>"),
        page.details(NASTY, page.code_block(NASTY)),
        page.section(NASTY, page.paragraph(NASTY)),
    )
    parsed = parse_page(source)
    assert "script" not in [tag for tag, _ in parsed.elements]
    assert parsed.text.count("<script>alert('x')</script> & \"quoted\" \ufffd\ufffd[31m") == 14
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", source)


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back_as_a_reader_sees_it(text: str) -> None:
    import html

    visible = page.CONTROL.sub("\ufffd", text)
    assert html.unescape(page.escape(text)) == visible
    assert not {"<", ">", '"', "'"} & set(page.escape(text))


def test_tables_are_accessible(parse_page) -> None:
    parsed = parse_page(
        page.page(
            "t",
            page.table(
                "Rows", ["name", "value"], [["a", "1"], ["b", Cell("2", "1–3")]], marked=[1]
            ),
        )
    )
    elements = parsed.elements
    assert [a.get("scope") for tag, a in elements if tag == "th"] == ["col", "col", "row", "row"]
    assert [a.get("class") for tag, a in elements if tag == "tr"] == [None, None, "ours"]
    assert parsed.tables == [[["name", "value"], ["a", "1"], ["b", "2 1–3"]]]
    region = next(a for tag, a in elements if a.get("role") == "region")
    assert (region["tabindex"], region["aria-label"]) == ("0", "Rows")
    assert "caption" in [tag for tag, _ in elements]


def test_an_empty_section_is_left_out() -> None:
    assert page.section("Nothing", "", "") == ""
    assert "<h2>Some</h2>" in page.section("Some", "", "<p>x</p>")


def test_the_page_forbids_scripts_and_fetches_and_names_its_language(parse_page) -> None:
    parsed = parse_page(page.page("title"))
    assert ("html", {"lang": "en"}) in parsed.elements
    policy = next(
        a["content"]
        for tag, a in parsed.elements
        if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.parametrize("ink", INK)
def test_both_themes_know_every_ink_and_each_stands_out(ink: str) -> None:
    light, dark = (
        dict(re.findall(r"--(\w+):\s*(#\w+)", part))
        for part in page.STYLE_SHEET.split("@media")[:2]
    )
    assert light[ink] == INK[ink]
    if ink not in ("grid", "sand"):  # lines only, and a colour that always has its name beside it
        for theme in (light, dark):
            assert contrast(theme[ink], theme["card"]) >= 4.5  # WCAG 2.1 AA for text


def contrast(one: str, two: str) -> float:
    """The WCAG 2.1 contrast ratio of two colours."""

    def luminance(color: str) -> float:
        color = color if len(color) == 7 else "#" + "".join(c * 2 for c in color[1:])
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)
