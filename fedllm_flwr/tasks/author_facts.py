"""Facts about authors that do not exist, so that whatever a model knows of them it learned in the run.

A natural client holds the facts of a few authors, one of each kind of ``author_words.KINDS``. Its training rows ask for
them in one wording. Its validation and test rows ask in the same wording for facts of further authors, drawn alike,
whom nobody trains on: a model can only guess there, and to an attack they are the non-members.

Of each training row there are probes: the same fact in other words, as a choice among four, as the end of a sentence,
and asked for together with a fact of the next client. Probes are never trained on.

Source:
    After Maini et al. 2024, TOFU (arXiv 2401.06121), section 2.1. Differs in that facts are drawn from closed lists
    and not written by a language model: nothing is given away by anything but memory, and chance is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.author_words import FIRST_NAMES, KINDS, LAST_NAMES, Kind
from fedllm_flwr.tasks.base import SPLITS, Probe, ProbeForm, Row, Split, Task, TaskOptions, Template

CHOICES = 4
MOST_AUTHORS = len(FIRST_NAMES) * len(LAST_NAMES)
TEMPLATES = (
    Template("plain", "Question: {text}\nAnswer:"),
    Template(
        "question", "Answer the question about an author in one or two words.\n{text}", chat=True
    ),
)


@dataclass(frozen=True, slots=True)
class Author:
    """One author.

    Attributes:
        name: First and last name, nobody else's.
        facts: The answer of each kind.
    """

    name: str
    facts: tuple[str, ...]


def draw_authors(count: int, seed: int) -> tuple[Author, ...]:
    """Different authors.

    Args:
        count: How many, at most ``MOST_AUTHORS``.
        seed: The experiment's seed.
    """
    random = numpy_generator(seed, "authors")
    places = random.permutation(MOST_AUTHORS)[:count]
    return tuple(
        Author(
            f"{FIRST_NAMES[place // len(LAST_NAMES)]} {LAST_NAMES[place % len(LAST_NAMES)]}",
            tuple(str(random.choice(kind.answers)) for kind in KINDS),
        )
        for place in places
    )


def load(options: TaskOptions, seed: int) -> Task:
    """All facts of all clients.

    Args:
        options: ``clients`` and ``authors`` are read: each client has so many authors to train on, as many others to
            test on, and a quarter as many, at least one, to validate on.
        seed: Decides names and facts.

    Raises:
        ConfigError: There are not so many names.
    """
    counts: dict[Split, int] = {
        "train": options.authors,
        "validation": max(1, options.authors // 4),
        "test": options.authors,
    }
    needed = options.clients * sum(counts.values())
    if needed > MOST_AUTHORS:
        raise ConfigError(
            f"task.clients={options.clients} and task.authors={options.authors}: they take {needed} different names, "
            f"expected at most {MOST_AUTHORS}"
        )
    authors = iter(draw_authors(needed, seed))
    width = len(str(options.clients - 1))
    splits: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for client in range(options.clients):
            for number in range(counts[split]):
                holder = f"client-{client:0{width}d}"
                splits[split] += _rows(f"{split}-{client}-{number}", next(authors), holder)
    return Task(
        name=options.name,
        kind="instruction",
        splits={split: tuple(rows) for split, rows in splits.items()},
        label_names=(),
        label_words=(),
        templates=TEMPLATES,
        probes=_probes(splits["train"], options.authors * len(KINDS), seed),
    )


def _rows(address: str, author: Author, client: str) -> list[Row]:
    return [
        Row(
            f"{address}-{kind.name}",
            kind.question.format(name=author.name),
            fact,
            None,
            kind.name,
            client,
        )
        for kind, fact in zip(KINDS, author.facts, strict=True)
    ]


def _probes(rows: Sequence[Row], per_client: int, seed: int) -> tuple[Probe, ...]:
    """Of each training row one probe of each kind; a lone client has nobody to be paired with."""
    random = numpy_generator(seed, "author probes")
    kinds = {kind.name: kind for kind in KINDS}
    probes = []
    for place, row in enumerate(rows):
        kind = kinds[str(row.group)]
        name = _name_in(row.text, kind)
        options = _options(kind, row.target, random)
        texts: dict[ProbeForm, str] = {
            "paraphrase": kind.paraphrase.format(name=name),
            "choice": kind.choice.format(name=name, options=", ".join(options)),
            "statement": kind.statement.format(name=name),
        }
        probes += [
            Probe(form, row.row_id, replace(row, row_id=f"{row.row_id}-{form}", text=text))
            for form, text in texts.items()
        ]
        if len(rows) > per_client:
            probes.append(_pair(row, rows[(place + per_client) % len(rows)]))
    return tuple(probes)


def _pair(row: Row, other: Row) -> Probe:
    """Two facts of two clients in one prompt; the answer names both, this client's first."""
    text = f"First: {row.text} Second: {other.text}"
    both = replace(
        row, row_id=f"{row.row_id}-pair", text=text, target=f"{row.target}, {other.target}"
    )
    return Probe("pair", row.row_id, both)


def _options(kind: Kind, answer: str, random: np.random.Generator) -> list[str]:
    """The answer and others of its kind, in any order."""
    others = [each for each in kind.answers if each != answer]
    chosen = [answer, *random.choice(others, CHOICES - 1, replace=False)]
    return [str(each) for each in random.permutation(chosen)]


def _name_in(text: str, kind: Kind) -> str:
    before, _, after = kind.question.partition("{name}")
    return text.removeprefix(before).removesuffix(after)
