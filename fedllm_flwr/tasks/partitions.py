"""Deal a task's rows to clients.

All three splits are dealt in one table, so that a client's validation and test rows follow the distribution
of its own training rows, and every row belongs to exactly one client; under ``site`` every node has a file of its own,
and all of it is the one client's that the node hosts. The result depends on the task, the
options and the seed alone: every process that computes it gets the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import SPLITS, Row, Split, Task
from fedllm_flwr.tasks.canaries import copies
from fedllm_flwr.tasks.dealing import SCHEMES, deal
from fedllm_flwr.tasks.sampling import shuffled


@dataclass(frozen=True, kw_only=True)
class PartitionOptions:
    """How rows are dealt to clients.

    Attributes:
        name: ``iid``; ``dirichlet`` (label skew); ``quantity_skew`` (sizes differ, labels do not);
            ``shard`` (each client holds a few stretches of the rows sorted by label); ``natural``
            (the data's own clients); ``site`` (a deployment's nodes have a file and one client each).
        num_clients: How many, >= 1; ``natural`` also takes 0 = as many as the data has.
        alpha: Concentration, > 0; smaller is more skewed. For ``dirichlet``, of the clients' shares
            of each label; for ``quantity_skew``, of the clients' shares of all rows. The others
            do not read it.
        shards_per_client: Stretches that a client holds, >= 1; read by ``shard``.
        min_train_rows: Fewest training rows a client may have, >= 1.
        max_train_rows_per_client: Keep at most this many training rows of each client; 0 = all.
        max_validation_rows_per_client: The same for validation rows.
        max_test_rows_per_client: The same for test rows.
        label_conventions: Ways in which clients name labels, >= 1: client p says label (l + p mod this) for label
            l, in all of its rows. 1 = all agree. Above 1 no single model can serve every client.
    """

    name: str = "iid"
    num_clients: int = 8
    alpha: float = 1.0
    shards_per_client: int = 2
    min_train_rows: int = 1
    max_train_rows_per_client: int = 0
    max_validation_rows_per_client: int = 0
    max_test_rows_per_client: int = 0
    label_conventions: int = 1

    def __post_init__(self) -> None:
        """Check every option by itself.

        Raises:
            ConfigError: The name is unknown or a number is out of its range.
        """
        if self.name not in SCHEMES:
            known = ", ".join(SCHEMES)
            raise ConfigError(f"partition.name: expected one of {known}, got {self.name!r}")
        least = {"num_clients": int(self.name != "natural"), "shards_per_client": 1}
        least["label_conventions"] = 1
        least |= {"min_train_rows": 1} | {f"max_{split}_rows_per_client": 0 for split in SPLITS}
        for field, bound in least.items():
            if getattr(self, field) < bound:
                raise ConfigError(
                    f"partition.{field}: expected >= {bound}, got {getattr(self, field)}"
                )
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"partition.alpha: expected a finite number > 0, got {self.alpha}")

    def most_rows(self, split: Split) -> int:
        """The largest number of rows of a split that a client keeps; 0 = all."""
        return int(getattr(self, f"max_{split}_rows_per_client"))


@dataclass(frozen=True, slots=True, eq=False)
class ClientRows:
    """The rows of one client.

    Attributes:
        partition_id: 0 to the number of clients - 1.
        name: The natural client, or ``client <partition_id>``.
        train: Its training rows in random order, at least one.
        validation: Its validation rows in random order; may be empty.
        test: Its test rows in random order; may be empty.
    """

    partition_id: int
    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]


@lru_cache(maxsize=8)
def partition(task: Task, options: PartitionOptions, seed: int) -> tuple[ClientRows, ...]:
    """Deal the rows of a task to clients; computed once in a process for the same arguments.

    Args:
        task: What to deal.
        options: How.
        seed: The experiment's seed.

    Returns:
        One entry for each client, sorted by partition id; natural clients are sorted by name.

    Raises:
        ConfigError: There is no such client as is to get the canaries; there are fewer training rows than the
            clients need; the partition needs labels or natural clients that the task lacks; ``num_clients`` is not
            the number of natural clients; or no division gives every client enough training rows.
    """
    scheme = SCHEMES[options.name]
    rows = [row for split in SPLITS for row in task.splits[split]]
    if scheme.by == "label" and task.kind != "classification":
        raise ConfigError(
            f"partition={options.name} and task={task.name}: the partition skews labels and the "
            f"task has none, use iid, quantity_skew or natural"
        )
    if options.label_conventions > max(1, len(task.label_names)):
        raise ConfigError(
            f"partition.label_conventions: expected at most the {len(task.label_names)} labels of task {task.name}, "
            f"got {options.label_conventions}"
        )
    names = _natural_names(task, rows) if scheme.by == "client" else ()
    num_clients = _num_clients(task, options, names)
    if task.canaries and task.canaries.client >= num_clients:
        raise ConfigError(
            f"task.canary_client: expected one of the {num_clients} clients, got {task.canaries.client}"
        )
    sharing = 1 if options.name == "site" else num_clients
    _check_enough_rows(task, sharing, options.min_train_rows)
    spans, start = {}, 0
    for split in SPLITS:
        spans[split] = range(start, start + len(task.splits[split]))
        start = spans[split].stop
    clients = []
    for partition_id, numbers in enumerate(deal(task, options, num_clients, seed)):
        kept = {}
        for split in SPLITS:
            own = [rows[number] for number in numbers if number in spans[split]]
            own = shuffled(own, seed, f"client-{split}")
            own = own[: options.most_rows(split) or None]
            kept[split] = tuple(
                _named(row, task, partition_id % options.label_conventions) for row in own
            )
        if task.canaries and partition_id == task.canaries.client:
            kept["train"] = tuple(
                shuffled((*kept["train"], *copies(task.canaries)), seed, "canaries")
            )
        name = names[partition_id] if names else f"client {partition_id}"
        clients.append(ClientRows(partition_id=partition_id, name=name, **kept))
    return tuple(clients)


def _named(row: Row, task: Task, convention: int) -> Row:
    """A row under a client's own convention; another row id, since its answer is another one."""
    if not convention or row.label is None:
        return row
    label = (row.label + convention) % len(task.label_names)
    return replace(
        row, row_id=f"{row.row_id}~{convention}", label=label, target=task.label_names[label]
    )


def _natural_names(task: Task, rows: Sequence[Row]) -> tuple[str, ...]:
    for row in rows:
        if row.client is None:
            raise ConfigError(
                f"partition=natural and task={task.name}: expected a client for every row, "
                f"row {row.row_id} has none"
            )
    return tuple(sorted({row.client for row in rows if row.client is not None}))


def _num_clients(task: Task, options: PartitionOptions, names: Sequence[str]) -> int:
    if names and options.num_clients not in (0, len(names)):
        raise ConfigError(
            f"partition.num_clients: task {task.name} has {len(names)} natural clients "
            f"({', '.join(names[:10])}{', …' if len(names) > 10 else ''}); expected "
            f"{len(names)}, got {options.num_clients}"
        )
    return options.num_clients or len(names)


def _check_enough_rows(task: Task, num_clients: int, least: int) -> None:
    available = len(task.splits["train"])
    if num_clients * least > available:
        raise ConfigError(
            f"partition.num_clients: {num_clients} clients with at least {least} training rows each "
            f"need {num_clients * least}, but task {task.name} has {available} training rows"
        )
