"""The ways to divide a table of rows among clients, with the partitioners of ``flwr-datasets``.

Those partitioners cut a table into contiguous pieces: of the whole table, or of each label's rows. Here the
table is laid out so that every piece holds its share of each split, to within one row: the r-th of the n rows
of a split (and label), in seeded random order, stands at (r + 1/2) / n of the table.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.seeding import derive_seed, numpy_generator
from fedllm_flwr.tasks.base import SPLITS, Task
from fedllm_flwr.tasks.sampling import shuffled

if TYPE_CHECKING:  # the library takes seconds to import, so only a process that deals imports it
    from datasets import Dataset

ATTEMPTS = 10
"""Random divisions that are tried until every client has enough training rows."""


class Dealing(Protocol):
    """The options that dividing reads; see ``PartitionOptions``."""

    @property
    def name(self) -> str:
        """The scheme."""

    @property
    def alpha(self) -> float:
        """Concentration."""

    @property
    def shards_per_client(self) -> int:
        """Stretches that a client holds."""

    @property
    def min_train_rows(self) -> int:
        """Fewest training rows of a client."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to divide.

    Attributes:
        divide: Table, options, number of clients and seed to each client's positions.
        by: What the division looks at: nothing, the label, or the natural client.
        random: Whether another seed gives another division of the same table.
        remedy: What to change when a client gets too few training rows.
    """

    divide: "Callable[[Dataset, Dealing, int, int], Iterable[list[int]]]"
    by: Literal["nothing", "label", "client"]
    random: bool
    remedy: str = "lower num_clients or min_train_rows"


def deal(task: Task, options: Dealing, num_clients: int, seed: int) -> list[list[int]]:
    """Divide all rows of a task.

    Args:
        task: Its rows are numbered through training, validation and test rows, in this order.
        options: The scheme and its settings.
        num_clients: How many parts, >= 1.
        seed: The experiment's seed.

    Returns:
        The row numbers of each client. Every number is in exactly one part; under ``site``, in all of them.

    Raises:
        ConfigError: No division that was tried gives every client ``min_train_rows`` training rows.
    """
    scheme = SCHEMES[options.name]
    num_train = len(task.splits["train"])
    with _quiet():
        table = _table(task, scheme, seed)
        for attempt in range(ATTEMPTS if scheme.random else 1):
            draw = derive_seed(seed, "partition", options.name, attempt)
            parts: list[list[int]] = []
            for part in scheme.divide(table, options, num_clients, draw):
                found = sum(position < num_train for position in part)
                if found < options.min_train_rows:
                    break
                parts.append(part)
            else:
                return parts
    raise ConfigError(
        f"partition={options.name}: expected at least {options.min_train_rows} training rows for "
        f"each of {num_clients} clients of task {task.name}, client {len(parts)} got {found}; "
        f"{scheme.remedy}"
    )


def _table(task: Task, scheme: Scheme, seed: int) -> "Dataset":
    """Number, whether for training, label and client of all rows, laid out as the module says."""
    from datasets import Dataset

    rows = [row for split in SPLITS for row in task.splits[split]]
    position_of = {row.row_id: position for position, row in enumerate(rows)}
    places: list[tuple[float, int]] = []
    for split in SPLITS:
        runs: dict[int | None, list[int]] = {}
        for row in shuffled(task.splits[split], seed, "partition"):
            run = runs.setdefault(row.label if scheme.by == "label" else None, [])
            run.append(position_of[row.row_id])
        for run in runs.values():
            places.extend(((rank + 0.5) / len(run), position) for rank, position in enumerate(run))
    order = [position for _, position in sorted(places)]
    return Dataset.from_dict(
        {
            "position": order,
            "is_train": [position < len(task.splits["train"]) for position in order],
            "label": [-1 if (label := rows[p].label) is None else label for p in order],
            "client": [rows[position].client or "" for position in order],
        }
    )


def _parts(partitioner: Any, table: "Dataset", num_clients: int) -> Iterator[list[int]]:
    """The positions that a ``flwr-datasets`` partitioner gives to each client, one by one."""
    partitioner.dataset = table
    for client in range(num_clients):
        part = partitioner.load_partition(client)
        yield [int(position) for position in part["position"][:]]


def _iid(table: "Dataset", options: Dealing, num_clients: int, seed: int) -> Iterable[list[int]]:
    from flwr_datasets.partitioner import IidPartitioner

    return _parts(IidPartitioner(num_clients), table, num_clients)


def _dirichlet(
    table: "Dataset", options: Dealing, num_clients: int, seed: int
) -> Iterable[list[int]]:
    """Each label's rows in shares drawn from a symmetric Dirichlet distribution.

    Source:
        Yurochkin et al. 2019 (Bayesian Nonparametric Federated Learning), section 5.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    # Its own minimum counts rows of all splits and warns at each attempt: we check and repeat.
    partitioner = DirichletPartitioner(
        num_clients, "label", float(options.alpha), min_partition_size=0, shuffle=False, seed=seed
    )
    return _parts(partitioner, table, num_clients)


def _quantity_skew(
    table: "Dataset", options: Dealing, num_clients: int, seed: int
) -> Iterable[list[int]]:
    """Client sizes in shares drawn from a symmetric Dirichlet distribution.

    Departure: every client first gets the few rows among which its least training rows are, and only
    the others are shared out, so that many clients do not make every draw invalid.

    Source:
        Li et al. 2022 (Federated Learning on Non-IID Data Silos), section 4.3, quantity skew.
    """
    from flwr_datasets.partitioner import SizePartitioner

    random = numpy_generator(seed, "sizes")
    shares = random.dirichlet(np.full(num_clients, options.alpha))
    num_train = sum(table["is_train"][:])
    least = math.ceil(options.min_train_rows * len(table) / num_train) + 1
    least = min(least, len(table) // num_clients)
    spare = len(table) - least * num_clients
    edges = np.rint(np.cumsum(shares) * spare).astype(int)
    edges[-1] = spare
    sizes = [int(size) + least for size in np.diff(edges, prepend=0)]
    return _parts(SizePartitioner(sizes), table, num_clients)


def _shard(table: "Dataset", options: Dealing, num_clients: int, seed: int) -> Iterable[list[int]]:
    """Equal stretches of the rows sorted by label, some to each client.

    The partitioner leaves over the rows that do not fill a shard. They are picked evenly from the sorted
    rows, and each goes to the client that holds the row before it.

    Source:
        McMahan et al. 2017 (Communication-Efficient Learning), section 3.
    """
    from flwr_datasets.partitioner import ShardPartitioner

    ordered = table.sort("label")
    total, shards = len(ordered), num_clients * options.shards_per_client
    if total < shards:
        raise ConfigError(
            f"partition.shards_per_client: {num_clients} clients with {options.shards_per_client} "
            f"shards each need {shards} rows, got {total}"
        )
    extra = total % shards
    left_over = [(index + 1) * total // extra - 1 for index in range(extra)]
    kept = sorted(set(range(total)) - set(left_over))
    partitioner = ShardPartitioner(
        num_clients, "label", options.shards_per_client, shuffle=False, seed=seed
    )
    parts = list(_parts(partitioner, ordered.select(kept), num_clients))
    positions = [int(position) for position in ordered["position"][:]]
    owner = {position: client for client, part in enumerate(parts) for position in part}
    for place in left_over:
        owner[positions[place]] = owner[positions[place - 1]]
        parts[owner[positions[place]]].append(positions[place])
    return parts


def _natural(
    table: "Dataset", options: Dealing, num_clients: int, seed: int
) -> Iterable[list[int]]:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    return _parts(NaturalIdPartitioner("client"), table, num_clients)


def _site(table: "Dataset", options: Dealing, num_clients: int, seed: int) -> Iterable[list[int]]:
    """All rows to every client: each node reads a file of its own and asks for one client only."""
    return [[int(position) for position in table["position"][:]] for _ in range(num_clients)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no deprecation notes of the libraries below."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


LESS_SKEW = "raise alpha, or lower num_clients or min_train_rows"
SCHEMES: dict[str, Scheme] = {
    "iid": Scheme(_iid, "nothing", random=False),
    "dirichlet": Scheme(_dirichlet, "label", random=True, remedy=LESS_SKEW),
    "quantity_skew": Scheme(_quantity_skew, "nothing", random=True, remedy=LESS_SKEW),
    "shard": Scheme(_shard, "label", random=True),
    "natural": Scheme(_natural, "client", random=False, remedy="give that client more rows"),
    "site": Scheme(_site, "nothing", random=False, remedy="give that node more rows"),
}
