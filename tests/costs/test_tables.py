import csv
import io
import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from fedllm_flwr.costs import ModelShape, cost_tables, to_csv, to_json, to_markdown
from fedllm_flwr.errors import ConfigError

TABLES = cost_tables()


def test_json_is_every_row_of_both_tables() -> None:
    rows = json.loads(to_json(TABLES))
    assert rows == [
        {"table": name, **asdict(row)} for name, rows in TABLES.named.items() for row in rows
    ]
    assert len(rows) == 10


def test_csv_is_two_blocks_that_read_back() -> None:
    blocks = to_csv(TABLES).split("\n\n")
    for block, rows in zip(blocks, TABLES.named.values(), strict=True):
        read = list(csv.DictReader(io.StringIO(block)))
        assert read == [{key: str(value) for key, value in asdict(row).items()} for row in rows]


def test_markdown_has_models_as_rows_and_then_as_columns() -> None:
    lines = to_markdown(TABLES).splitlines()
    gpt2 = (
        "| GPT-2 | 768 | 12 | 61,440 | 2,359,296 | 38.40 | 1,203,232 | 32,614,907,904 | 27,106.08 |"
    )
    assert gpt2 in lines
    assert "| figure | GPT-2 | GPT-2 L | 1.3B | 7B | 13B |" in lines
    assert "| break_even_exchanges | 38.40 | 115.20 | 76.80 | 102.40 | 128.00 |" in lines
    widths = {len(line.split(" | ")) for line in lines if line.startswith("|")}
    assert widths == {9, 6}


def test_a_models_name_cannot_break_a_table() -> None:
    odd = cost_tables([ModelShape(8, 1, 'a|b, "c"')])
    assert 'a\\|b, "c" | 8 | 1 |' in to_markdown(odd)
    assert next(csv.DictReader(io.StringIO(to_csv(odd))))["model"] == 'a|b, "c"'


def test_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least one model, got none"):
        cost_tables([])


def test_costs_are_counted_without_torch() -> None:
    code = (
        "import sys, fedllm_flwr.costs; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
