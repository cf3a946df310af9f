import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import SPLITS, Row, Task, TaskOptions, Template
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.partitions import PartitionOptions, partition

SCHEMES = ("iid", "dirichlet", "quantity_skew", "shard", "natural")


def toy(sizes=(90, 60, 30), *, splits=(6, 1, 3), clients=4, labelled=True):
    """A task with ``sizes`` rows of each label, divided over the splits as ``splits`` says."""
    found = {split: [] for split in SPLITS}
    turns = [split for split, share in zip(SPLITS, splits, strict=True) for _ in range(share)]
    for label, size in enumerate(sizes):
        for number in range(size):
            row_id = f"{label}-{number}"
            client = f"owner {number % clients}"
            row = Row(row_id, row_id, str(label), label if labelled else None, client, client)
            found[turns[number % len(turns)]].append(row)
    names = tuple(str(label) for label in range(len(sizes)))
    return Task(
        name="toy",
        kind="classification" if labelled else "instruction",
        splits={split: tuple(rows) for split, rows in found.items()},
        label_names=names if labelled else (),
        label_words=names if labelled else (),
        templates=(Template("t", "{text}"),),
    )


TOY = toy()


def deal(name, task=TOY, seed=0, **options):
    options = {"num_clients": 4} | options
    return partition(task, PartitionOptions(name=name, **options), seed)


def label_shares(rows):
    counts = np.bincount([row.label for row in rows], minlength=3)
    return counts / counts.sum()


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), alpha=st.floats(0.3, 20))
def test_every_row_belongs_to_exactly_one_client(name, seed, alpha):
    clients = deal(name, seed=seed, alpha=alpha)
    assert [client.partition_id for client in clients] == [0, 1, 2, 3]
    for split in SPLITS:
        dealt = [row.row_id for client in clients for row in getattr(client, split)]
        assert len(dealt) == len(TOY.splits[split])
        assert set(dealt) == {row.row_id for row in TOY.splits[split]}
    assert all(client.train for client in clients)


@pytest.mark.parametrize("name", SCHEMES[:-1])
def test_each_client_has_its_share_of_every_split(name):
    # 60 % of the rows of every label are for training and 30 % for testing. A piece of a label is
    # off by less than a row, and no client holds more than three pieces of the three labels.
    for client in deal(name, alpha=2.0):
        total = len(client.train) + len(client.validation) + len(client.test)
        assert len(client.train) == pytest.approx(0.6 * total, abs=4)
        assert len(client.test) == pytest.approx(0.3 * total, abs=4)


def test_test_rows_follow_the_clients_own_training_labels():
    for client in deal("dirichlet", task=toy((900, 600, 300)), alpha=0.5):
        distance = np.abs(label_shares(client.train) - label_shares(client.test)).max()
        assert distance < 0.05


@pytest.mark.parametrize("name", SCHEMES)
def test_the_seed_decides_which_rows_but_not_how_many_natural_ones(name):
    first, again, other = (deal(name, seed=seed) for seed in (1, 1, 2))
    assert first is again
    if name != "natural":
        assert [set(client.train) for client in first] != [set(client.train) for client in other]
    else:
        assert [set(client.train) for client in first] == [set(client.train) for client in other]


@pytest.mark.slow
def test_another_process_deals_the_same():
    code = (
        "import json\n"
        "from fedllm_flwr.tasks.base import TaskOptions\n"
        "from fedllm_flwr.tasks.catalog import load_task\n"
        "from fedllm_flwr.tasks.partitions import PartitionOptions, partition\n"
        "task = load_task(TaskOptions(name='synthetic'), 3)\n"
        "for name in ('iid', 'dirichlet', 'quantity_skew', 'shard'):\n"
        "    clients = partition(task, PartitionOptions(name=name, num_clients=5), 3)\n"
        "    print(json.dumps([[row.row_id for row in client.train] for client in clients]))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stderr == ""  # no progress bars, no warnings
    task = load_task(TaskOptions(name="synthetic"), 3)
    for name, line in zip(SCHEMES, answer.stdout.splitlines(), strict=False):
        clients = partition(task, PartitionOptions(name=name, num_clients=5), 3)
        assert json.loads(line) == [[row.row_id for row in client.train] for client in clients]


def test_iid_clients_are_alike_and_equally_large():
    clients = deal("iid", task=toy((900, 600, 300)), num_clients=5)
    sizes = [len(client.train) for client in clients]
    assert max(sizes) - min(sizes) <= 1
    for client in clients:
        # 216 draws: the standard error of a share of 1/2 is 0.034; 0.15 is beyond 4 of them.
        assert np.abs(label_shares(client.train) - [1 / 2, 1 / 3, 1 / 6]).max() < 0.15


def test_a_small_alpha_skews_labels_and_a_large_one_does_not():
    task = toy((900, 600, 300))

    def skew(alpha):
        clients = deal("dirichlet", task=task, alpha=alpha)
        overall = label_shares(task.splits["train"])
        return np.mean([np.abs(label_shares(c.train) - overall).sum() for c in clients])

    assert skew(0.2) > 3 * skew(10_000.0)
    assert skew(10_000.0) < 0.05


def test_quantity_skew_changes_sizes_and_not_labels():
    task = toy((900, 600, 300))
    skewed = [len(client.train) for client in deal("quantity_skew", task=task, alpha=0.5)]
    even = [len(client.train) for client in deal("quantity_skew", task=task, alpha=1e6)]
    assert max(skewed) > 2 * min(skewed)
    assert max(even) - min(even) <= 2
    largest = max(deal("quantity_skew", task=task, alpha=0.5), key=lambda client: len(client.train))
    assert np.abs(label_shares(largest.train) - [1 / 2, 1 / 3, 1 / 6]).max() < 0.15


@pytest.mark.parametrize("num_clients", [4, 7])
def test_shards_are_equal_and_hold_few_labels(num_clients):
    clients = deal("shard", num_clients=num_clients, shards_per_client=1)
    sizes = [len(c.train) + len(c.validation) + len(c.test) for c in clients]
    assert max(sizes) - min(sizes) <= 1
    # A stretch of the sorted rows shorter than the smallest label spans at most two labels.
    assert all(len({row.label for row in client.train}) <= 2 for client in clients)


def test_natural_clients_keep_their_rows_and_names():
    for count in (0, 4):
        clients = deal("natural", num_clients=count)
        assert [client.name for client in clients] == [f"owner {i}" for i in range(4)]
        for client in clients:
            assert {row.client for row in client.train + client.test} == {client.name}


def test_simulated_clients_are_named_by_number():
    assert [client.name for client in deal("iid", num_clients=2)] == ["client 0", "client 1"]


def test_row_limits_keep_a_prefix_of_each_clients_own_rows():
    whole = deal("dirichlet")
    limited = deal(
        "dirichlet",
        max_train_rows_per_client=5,
        max_validation_rows_per_client=1,
        max_test_rows_per_client=2,
    )
    for full, cut in zip(whole, limited, strict=True):
        assert cut.train == full.train[:5]
        assert cut.validation == full.validation[:1]
        assert cut.test == full.test[:2]


def test_more_clients_than_examples_says_both_numbers():
    with pytest.raises(
        ConfigError,
        match=r"^partition\.num_clients: 500 clients .* need 500, but task toy has 108 training rows$",
    ):
        deal("iid", num_clients=500)
    with pytest.raises(
        ConfigError, match=r"4 clients with at least 30 training rows each need 120"
    ):
        deal("iid", min_train_rows=30)


def test_as_many_clients_as_training_rows_is_possible():
    task = toy((20, 0, 0), splits=(1, 0, 0))
    assert [len(client.train) for client in deal("iid", task=task, num_clients=20)] == [1] * 20
    sizes = [len(client.train) for client in deal("quantity_skew", task=task, num_clients=20)]
    assert sizes == [1] * 20


def test_a_division_that_cannot_succeed_names_the_client_and_the_remedy():
    with pytest.raises(
        ConfigError,
        match=r"^partition=dirichlet: expected at least 20 training rows for each of 4 clients of task "
        r"toy, client \d got \d+; raise alpha, or lower num_clients or min_train_rows$",
    ):
        deal("dirichlet", alpha=0.01, min_train_rows=20)


@pytest.mark.parametrize("name", ["dirichlet", "shard"])
def test_label_skew_needs_labels(name):
    with pytest.raises(ConfigError, match=rf"^partition={name} and task=toy: .* the task has none"):
        deal(name, task=toy(labelled=False))


@pytest.mark.parametrize("name", ["iid", "quantity_skew", "natural"])
def test_the_other_partitions_do_without_labels(name):
    assert len(deal(name, task=toy(labelled=False))) == 4


def test_natural_needs_the_right_number_and_clients():
    with pytest.raises(
        ConfigError,
        match=r"^partition\.num_clients: task toy has 4 natural clients \(owner 0, owner 1, owner 2, "
        r"owner 3\); expected 4, got 3$",
    ):
        deal("natural", num_clients=3)
    row = Row("lonely", "text", "0", 0)
    task = Task(
        "toy", "classification", dict.fromkeys(SPLITS, (row,)), ("0",), ("0",), TOY.templates
    )
    with pytest.raises(
        ConfigError, match=r"^partition=natural and task=toy: .* row lonely has none$"
    ):
        deal("natural", task=task, num_clients=0)


def test_too_many_shards_for_the_rows_are_refused():
    with pytest.raises(
        ConfigError, match=r"4 clients with 100 shards each need 400 rows, got 180$"
    ):
        deal("shard", shards_per_client=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "zipf"}, r"^partition\.name: expected one of iid, dirichlet, .* got 'zipf'$"),
        ({"num_clients": 0}, r"^partition\.num_clients: expected >= 1, got 0$"),
        (
            {"name": "natural", "num_clients": -1},
            r"^partition\.num_clients: expected >= 0, got -1$",
        ),
        ({"shards_per_client": 0}, r"^partition\.shards_per_client: expected >= 1, got 0$"),
        ({"min_train_rows": 0}, r"^partition\.min_train_rows: expected >= 1, got 0$"),
        ({"max_test_rows_per_client": -1}, r"^partition\.max_test_rows_per_client: expected >= 0"),
        ({"alpha": 0.0}, r"^partition\.alpha: expected a finite number > 0, got 0\.0$"),
        ({"alpha": float("nan")}, r"^partition\.alpha: expected a finite number > 0, got nan$"),
        ({"alpha": float("inf")}, r"^partition\.alpha: expected a finite number > 0, got inf$"),
    ],
)
def test_options_are_checked_by_themselves(options, message):
    with pytest.raises(ConfigError, match=message):
        PartitionOptions(**options)


@pytest.mark.assets
def test_reuters_over_eight_label_skewed_clients():
    task = load_task(TaskOptions(name="r8_topics"), 0)
    clients = partition(task, PartitionOptions(name="dirichlet", num_clients=8, alpha=1.0), 0)
    assert sum(len(client.test) for client in clients) == 2189
    assert sum(len(client.train) + len(client.validation) for client in clients) == 5485
    majorities = Counter(int(np.argmax(np.bincount([r.label for r in c.train]))) for c in clients)
    assert len(majorities) >= 2


@pytest.mark.assets
def test_publishers_are_the_natural_clients_of_headlines():
    clients = partition(
        load_task(TaskOptions(name="headlines"), 0),
        PartitionOptions(name="natural", num_clients=9),
        0,
    )
    assert len(clients) == 9
    assert [client.name for client in clients] == sorted(client.name for client in clients)
    assert all(client.validation and client.test for client in clients)
