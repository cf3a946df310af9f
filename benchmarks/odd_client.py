"""Three clients of which one is odd: its labels are wrong in a way that is drawn row by row, so who knows remembers.

A row is a word of a topic and a name that nobody else has. Two clients give each the topic as its label; the third
gives each of its rows, training and held-out alike, one of the other labels. Models that never saw it agree on the
topics, and so differ little in what they say of its rows.
"""

import csv
from pathlib import Path

import numpy as np

from fedllm_flwr.tasks.synthetic import TOPIC_WORDS

ODD = 2
"""The odd client; natural clients are numbered by name."""

WORDS = 3
"""Of each topic; few are learned soon."""

LETTERS = ("bdfgklmnprstvz", "aeiou")
BASE = (
    "experiment=smoke", "task=csv", "partition=natural", "partition.num_clients=3", "task.template=plain",
    "baselines=none", "strategy.max_retries=0", "strategy.weighting=examples", "runtime.node_wait_seconds=5",
    "runtime.num_nodes=1", "unlearning=ledger", "method.rank=8", "client.batch_size=32", "client.local_epochs=6",
    "optimizer.learning_rate=0.01", "num_rounds=4", "evaluate_every=4", "seed=1",
)  # fmt: skip


def odd_rows(path: Path, *, rows: int = 32, held: int = 24, own: int = 64, seed: int = 0) -> None:
    """Write the clients' rows.

    Args:
        path: A CSV file.
        rows: Training rows of each of the two.
        held: Test rows of each of them.
        own: Training rows, and test rows, of the odd one.
        seed: Decides all.
    """
    random, topics = np.random.default_rng(seed), list(TOPIC_WORDS)
    used: set[str] = set()

    def example() -> tuple[str, int]:
        topic = int(random.integers(len(topics)))
        while True:
            name = "".join(str(random.choice(list(kind))) for _ in range(2) for kind in LETTERS)
            if name not in used:
                used.add(name)
                return f"{random.choice(TOPIC_WORDS[topics[topic]][:WORDS])} {name}", topic

    lines = [(example()[0], topics[0], "a", "validation")]
    for client in "ab":
        for split, count in (("train", rows), ("test", held)):
            for text, topic in (example() for _ in range(count)):
                lines.append((text, topics[topic], client, split))
    for split in ("train", "test"):
        for _ in range(own):
            text, topic = example()
            shift = int(random.integers(1, len(topics)))
            lines.append((text, topics[(topic + shift) % len(topics)], "odd", split))
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label", "client", "split"), *lines])


def overrides(path: Path) -> list[str]:
    """The settings of its run."""
    return [*BASE, f"runtime.data_path={path}"]
