import csv
import io
import json

from fedllm_flwr.cascade.tables import FORMATS, to_csv, to_json, to_markdown

TIERS = [
    {"tier": "a|b", "cost": 3, "reached": 2},
    {"tier": "c,d", "cost": 0.1 + 0.2, "reached": None},
]
ROWS = [
    {"table": "curve", "method": "cascade", "theta": 0.5, "cost": 1234567, "p50": None, "tiers": TIERS},
    {"table": "curve", "method": "oracle", "theta": None, "cost": 2 / 3, "p50": None, "tiers": TIERS},
    {"table": "signals", "tier": "a|b", "auroc": 0.5},
]  # fmt: skip


def test_json_is_the_rows() -> None:
    assert json.loads(to_json(ROWS)) == ROWS


def test_csv_is_two_blocks_that_read_back() -> None:
    curve, signals = to_csv(ROWS).split("\n\n")
    first, second = csv.DictReader(io.StringIO(curve))
    assert (first["method"], first["theta"], first["p50"]) == ("cascade", "0.5", "")
    assert (second["theta"], second["cost"]) == ("", repr(2 / 3))
    assert (first["a|b.cost"], first["c,d.cost"], first["c,d.reached"]) == (
        "3",
        repr(0.1 + 0.2),
        "",
    )
    assert "tiers" not in first
    assert next(csv.DictReader(io.StringIO(signals))) == {
        "table": "signals",
        "tier": "a|b",
        "auroc": "0.5",
    }


def test_markdown_is_for_reading() -> None:
    text = to_markdown(ROWS)
    assert "| method | theta | cost | a\\|b.cost | a\\|b.reached | c,d.cost |\n" in text
    assert "| cascade | 0.5 | 1234567 | 3 | 2 | 0.3 |\n" in text
    assert "| oracle | – | 0.6667 | 3 | 2 | 0.3 |\n" in text
    assert "| a\\|b | 0.5 |\n" in text


def test_every_format_ends_with_one_line_break() -> None:
    for render in FORMATS.values():
        assert render(ROWS).endswith("\n")
        assert not render(ROWS).endswith("\n\n")
