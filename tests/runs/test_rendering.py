import re
import xml.etree.ElementTree as ET

from fedllm_flwr.runs.figures import Line, line_figure
from fedllm_flwr.runs.rendering import INK, inline_svg, save

NAME = 'publisher <a> & "b" $x_ 日本 -->'


def drawn():
    return line_figure([Line(NAME, [(0, 0.25), (1, 0.5)])], "accuracy")


def test_an_inline_figure_is_xml_with_its_text_and_a_title() -> None:
    root = ET.fromstring(inline_svg(drawn(), "accuracy", "Accuracy <by> round"))  # noqa: S314
    assert root.tag.endswith("svg")
    assert root[0].tag.endswith("title")
    assert root[0].text == "Accuracy <by> round"
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == root[0].get("id")
    assert NAME in [element.text for element in root.iter() if element.tag.endswith("text")]


def test_colours_are_the_pages_variables_so_that_it_can_be_read_in_the_dark() -> None:
    svg = inline_svg(drawn(), "accuracy", "Accuracy")
    assert "var(--accent)" in svg
    assert not [color for color in INK.values() if color in svg]
    # matplotlib's own default black would be lost on a dark page.
    assert not re.search(r"(fill|stroke): ?#000", svg)


def test_two_figures_on_a_page_share_no_id_and_refer_to_their_own() -> None:
    used: list[set[str]] = []
    for name in ("one", "two"):
        svg = inline_svg(drawn(), name, "Title")
        ids = set(re.findall(r' id="([^"]+)"', svg))
        refers = set(re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', svg))
        assert {a or b for a, b in refers} <= ids
        used.append(ids)
    assert not used[0] & used[1]


def test_nothing_is_fetched_and_nothing_runs() -> None:
    svg = inline_svg(drawn(), "accuracy", "Accuracy")
    for banned in ("<script", "<style", "<image", "<metadata", "<?xml", "<!DOCTYPE", 'href="http'):
        assert banned not in svg


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert inline_svg(drawn(), "a", "A") == inline_svg(drawn(), "a", "A")
    assert save(drawn(), "plot") == save(drawn(), "plot")


def test_saved_files_are_an_svg_and_a_png() -> None:
    files = save(drawn(), "plot")
    assert sorted(files) == ["plot.png", "plot.svg"]
    assert files["plot.png"].startswith(b"\x89PNG")
    assert ET.fromstring(files["plot.svg"]).tag.endswith("svg")  # noqa: S314
