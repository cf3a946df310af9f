import csv
import io
from collections import Counter

from fedllm_flwr.deploying import templates


def test_example_rows_are_different_and_balanced_over_labels_and_clients() -> None:
    rows = templates.example_rows()
    assert len({row["text"] for row in rows}) == len(rows) == 60
    assert Counter(row["client"] for row in rows) == dict.fromkeys(templates.SITES, 30)
    assert Counter((row["client"], row["label"]) for row in rows) == {
        (site, label): 10 for site in templates.SITES for label in templates.SUBJECTS
    }


def test_rows_are_written_as_they_are_read() -> None:
    rows = [{"text": 'two "words",\nand a line', "label": "a"}, {"text": "ü", "label": "b"}]
    assert list(csv.DictReader(io.StringIO(templates.csv_text(rows), newline=""))) == rows


def test_an_operators_page_fits_an_editor() -> None:
    texts = (templates.README.template, templates.NODE.template, templates.PYPROJECT.template)
    assert max(len(line) for text in texts for line in text.splitlines()) <= 130
