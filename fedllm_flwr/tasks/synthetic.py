"""Generated texts in four topics, for tests: they need no file and say nothing about quality.

Each text is a dozen words, about half of them from its topic's own ten, so a bag of words sorts them well
and a tiny model can learn them. The group is drawn without regard to the topic.
"""

from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.base import SPLITS, Row, Split, Task, TaskOptions, Template

TOPIC_WORDS = {
    "animal": ("cat", "dog", "horse", "cow", "sheep", "bird", "fish", "goat", "duck", "hen"),
    "food": ("bread", "cheese", "apple", "soup", "rice", "egg", "milk", "cake", "salt", "tea"),
    "music": ("song", "drum", "flute", "piano", "choir", "band", "note", "tune", "horn", "bell"),
    "weather": ("rain", "snow", "wind", "storm", "cloud", "sun", "fog", "ice", "heat", "hail"),
}
COMMON_WORDS = (
    "the",
    "a",
    "some",
    "near",
    "with",
    "there",
    "was",
    "and",
    "of",
    "one",
    "new",
    "old",
)
SPLIT_ROWS: dict[Split, int] = {"train": 480, "validation": 80, "test": 160}
GROUPS = ("east", "west")
TEXT_WORDS = 12


def load(options: TaskOptions, seed: int) -> Task:
    """Generated rows, the same number for each topic.

    Args:
        options: Row counts above ``SPLIT_ROWS`` are met with further rows; the first rows stay the same.
        seed: Decides every word.
    """
    asked = {
        "train": options.train_rows,
        "validation": options.validation_rows,
        "test": options.test_rows,
    }
    return Task(
        name=options.name,
        kind="classification",
        splits={
            split: _rows(split, max(SPLIT_ROWS[split], asked[split]), seed) for split in SPLITS
        },
        label_names=tuple(TOPIC_WORDS),
        label_words=tuple(TOPIC_WORDS),
        templates=(
            Template("topic", "{text}\nTopic:"),
            Template("about", "{text} is about"),
            Template("read", "Read the words and name their topic.\n{text}\nTopic:"),
        ),
    )


def _rows(split: Split, count: int, seed: int) -> tuple[Row, ...]:
    random = numpy_generator(seed, "synthetic", split)
    topics = list(TOPIC_WORDS.items())
    rows = []
    for number in range(count):
        label = number % len(topics)
        topic, own = topics[label]
        words = [
            str(random.choice(own if random.random() < 0.5 else COMMON_WORDS))
            for _ in range(TEXT_WORDS)
        ]
        group = str(random.choice(GROUPS))
        rows.append(Row(f"{split}-{number:04d}", " ".join(words), topic, label, group, group))
    return tuple(rows)
