"""What will the next word be? Beginnings of sentences in eight languages, as a keyboard sees them.

The sentences are those of the task ``intents``: requests to smart homes, drawn from templates that people who speak the
language have written, not logged typing. Each sentence is cut once, before a word that is not its first: what stands
before the cut is the text, the word after it the target. Sentences of one word are left out. Language is client and
group, as there.

Source:
    See :mod:`fedllm_flwr.tasks.intents`; its division of templates into training and test sentences is kept.
"""

from collections.abc import Iterator, Sequence

from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.tasks import intents
from fedllm_flwr.tasks.base import Row, Task, TaskOptions, Template

TEMPLATES = (
    Template("type", "{text}"),
    Template("home", "Requests to a smart home.\n{text}"),
)


def load(options: TaskOptions, seed: int) -> Task:
    """Cut sentences of the chosen languages.

    Args:
        options: ``languages`` is read: which languages, all eight when empty.
        seed: Decides the sentences, their splits, and where they are cut.

    Raises:
        ConfigError: A language is unknown.
        AssetError: The data package is absent.
    """
    whole = intents.load(options, seed)
    return Task(
        name=options.name,
        kind="instruction",
        splits={split: tuple(_cut(rows, seed)) for split, rows in whole.splits.items()},
        label_names=(),
        label_words=(),
        templates=TEMPLATES,
        one_word=True,
    )


def _cut(rows: Sequence[Row], seed: int) -> Iterator[Row]:
    for row in rows:
        words = row.text.split()
        if len(words) > 1:
            place = 1 + derive_seed(seed, "keyboard", row.row_id) % (len(words) - 1)
            text = " ".join(words[:place])
            yield Row(f"next-{row.row_id}", text, words[place], None, row.group, row.client)
