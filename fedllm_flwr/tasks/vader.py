"""Sentiment of single sentences from four domains, rated by people.

Twenty people rated each sentence from -4 to 4 (VADER's ground truth). A sentence whose mean rating is
nearer to 0 than 1 is left out; the rest is positive or negative by the sign. Movie reviews give 9,173 rows
(4,598 positive), Amazon reviews 2,455, tweets 2,667 and New York Times editorials 1,554. The domain is both the
natural client and the group. The source has no split of its own: 70 % of the documents are for
training, 10 % for validation and 20 % for testing, and sentences of one review or editorial stay together.

Source:
    Hutto and Gilbert 2014, VADER, ICWSM.
"""

import io
import tarfile
from functools import lru_cache

from fedllm_flwr.assets import shared_asset
from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.tasks.base import Row, Task, TaskOptions, Template
from fedllm_flwr.tasks.sampling import hold_out

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}
LABELS = ("negative", "positive")
QUESTION = "Is the sentiment of this text positive or negative? Answer with one word.\n\n{text}"
TEMPLATES = (
    Template("sentence", "Sentence: {text}\nThe sentiment of this sentence is"),
    Template("review", "Review: {text}\nSentiment:"),
    Template("chat", QUESTION, chat=True),
    Template("expert", QUESTION, chat=True, system="You are an expert in judging sentiment."),
)
LEAST_RATING = 1.0
TEST_FRACTION = 0.2
VALIDATION_FRACTION = 0.125  # of what the test rows leave: a tenth of the whole


def read_domain(domain: str) -> tuple[Row, ...]:
    """The rows of one domain with a clear rating, in file order.

    Args:
        domain: A key of :data:`DOMAINS`.

    Raises:
        AssetError: The archive is absent or damaged.
        DataError: A line has no rating; names file, line and column.
    """
    rows = []
    file_name = f"{DOMAINS[domain]}_GroundTruth.txt"
    for number, line in enumerate(_member(file_name).splitlines(), start=1):
        try:
            key, rating_text, text = line.split("\t")
            rating = float(rating_text)
        except ValueError:
            raise DataError(
                f"{file_name}, line {number}, column 2: expected id, mean rating and text, "
                f"got {line[:60]!r}"
            ) from None
        if abs(rating) >= LEAST_RATING:
            label = int(rating > 0)
            row_id = f"{domain}-{key}"
            rows.append(Row(row_id, text.strip(), LABELS[label], label, domain, domain))
    return tuple(rows)


@lru_cache(maxsize=1)
def _inner_archive() -> bytes:
    with tarfile.open(shared_asset(ARCHIVE)) as outer:
        return _extract(outer, INNER)


def _member(file_name: str) -> str:
    with tarfile.open(fileobj=io.BytesIO(_inner_archive())) as inner:
        return _extract(inner, f"hutto_ICWSM_2014/{file_name}").decode("utf-8")


def _extract(archive: tarfile.TarFile, member: str) -> bytes:
    stream = archive.extractfile(member)
    if stream is None:
        raise DataError(f"{ARCHIVE}: expected a file {member}, got a folder")
    return stream.read()


def document(row: Row) -> str:
    """The review, editorial or tweet that a sentence comes from: its id without the sentence number."""
    return row.row_id.split("_")[0]


def load(options: TaskOptions, seed: int) -> Task:
    """The rows of the chosen domains.

    Args:
        options: ``domains`` is read: which domains, all of them when empty.
        seed: Decides the division into splits.

    Raises:
        ConfigError: A domain is unknown.
        AssetError: The archive is absent or damaged.
    """
    domains = options.domains or tuple(DOMAINS)
    for domain in domains:
        if domain not in DOMAINS:
            raise ConfigError(
                f"task.domains: expected some of {', '.join(DOMAINS)}, got {domain!r}"
            )
    rows = [row for domain in DOMAINS if domain in domains for row in read_domain(domain)]
    rest, test = hold_out(rows, TEST_FRACTION, seed, "test", unit=document)
    train, validation = hold_out(rest, VALIDATION_FRACTION, seed, "validation", unit=document)
    return Task(
        name=options.name,
        kind="classification",
        splits={"train": train, "validation": validation, "test": test},
        label_names=LABELS,
        label_words=LABELS,
        templates=TEMPLATES,
    )
