"""Where a run's quality, bytes and seconds went: per client, per group, per message kind, per phase."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import accumulate

from fedllm_flwr.runs.results import Interval, wilson_interval
from fedllm_flwr.runs.snapshot import Snapshot

PHASES = ("train", "evaluate", "aggregate")


@dataclass(frozen=True)
class ClientRow:
    """One client over the whole run; a figure that was not measured is None.

    Attributes:
        partition_id: The client.
        name: Its name, if it has one.
        rank: The rank of its adapter.
        rounds: In how many rounds its reply counted.
        num_examples: Its training examples.
        steps: Optimizer steps, summed over rounds.
        tokens: Training tokens, summed over rounds.
        cpu_seconds: CPU time of training, summed over rounds.
        train_loss: Mean training loss in its last round.
        test_rows: Its test rows.
        accuracy: On its own test rows, in the round that is reported.
        interval: 95 % interval of the accuracy.
        loss: Mean loss on its own test rows.
    """

    partition_id: int
    name: str = ""
    rank: int | None = None
    rounds: int = 0
    num_examples: int | None = None
    steps: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    train_loss: float | None = None
    test_rows: int = 0
    accuracy: float | None = None
    interval: Interval | None = None
    loss: float | None = None

    @property
    def label(self) -> str:
        """``client 3``, or ``name (3)`` with at most 24 characters of a name."""
        short = self.name if len(self.name) <= 24 else f"{self.name[:23]}…"
        return f"{short} ({self.partition_id})" if self.name else f"client {self.partition_id}"


@dataclass(frozen=True)
class Spread:
    """How a figure varies over clients, each counted once.

    Attributes:
        mean: Mean over clients.
        deviation: Standard deviation over clients (of these clients, not of a population).
        worst: The worst client's figure, and ``worst_client`` its partition id.
        worst_decile: Mean over the worst tenth of the clients, at least one.
        best: The best client's figure.
        clients: How many clients have the figure.
    """

    mean: float
    deviation: float
    worst: float
    worst_client: int
    worst_decile: float
    best: float
    clients: int


@dataclass(frozen=True)
class GroupRow:
    """The test rows of one group, in the round that is reported, and the multiplier that training ended with."""

    group: str
    test_rows: int
    accuracy: float | None
    interval: Interval | None
    loss: float | None
    multiplier: float | None = None


@dataclass(frozen=True)
class ByteRow:
    """Bytes of serialized messages of one direction and kind over the whole run."""

    direction: str
    message: str
    bytes: int
    messages: int


def client_rows(snapshot: Snapshot) -> list[ClientRow]:
    """One row per client that trained or was evaluated, by partition id."""
    trained = defaultdict(list)
    for record in snapshot.of("client"):
        trained[record["partition_id"]].append(record)
    tested = _test_sums(snapshot, "partition_id")
    # A negative id stands for the pooled rows of all clients, which is no client.
    clients = sorted(c for c in trained.keys() | tested.keys() if c >= 0)
    return [_client(c, trained[c], tested.get(c, _Sums())) for c in clients]


def spread(rows: list[ClientRow], figure: str) -> Spread | None:
    """The spread of ``accuracy`` or ``loss`` over clients; None when no client has it.

    Args:
        rows: See :func:`client_rows`.
        figure: ``accuracy`` (more is better) or ``loss`` (less is better).
    """
    found = [
        (getattr(row, figure), row.partition_id) for row in rows if getattr(row, figure) is not None
    ]
    if not found:
        return None
    worst_first = sorted(found, reverse=figure == "loss")
    values = [value for value, _ in worst_first]
    mean = math.fsum(values) / len(values)
    decile = values[: math.ceil(len(values) / 10)]
    return Spread(
        mean=mean,
        deviation=math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)),
        worst=values[0],
        worst_client=worst_first[0][1],
        worst_decile=math.fsum(decile) / len(decile),
        best=values[-1],
        clients=len(values),
    )


def group_rows(snapshot: Snapshot) -> list[GroupRow]:
    """One row per group, by name; empty when rows carry no groups."""
    sums = _test_sums(snapshot, "group")
    multipliers = {r["group"]: r["multiplier"] for r in snapshot.of("multiplier")}
    return [
        GroupRow(str(group), s.total, s.accuracy, s.interval, s.loss, multipliers.get(group))
        for group, s in sorted(sums.items(), key=lambda item: str(item[0]))
    ]


def byte_rows(snapshot: Snapshot) -> list[ByteRow]:
    """The byte ledger: one row per direction and message kind."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for record in snapshot.of("bytes"):
        entry = sums[record["direction"], record["message"]]
        entry[0] += record["bytes"]
        entry[1] += record.get("messages", 0)
    return [ByteRow(*key, *sums[key]) for key in sorted(sums)]


def cumulative_bytes(snapshot: Snapshot, direction: str) -> list[int]:
    """Bytes sent up to and including each round of ``snapshot.rounds``: of all messages where the ledger has them.

    Args:
        snapshot: The run.
        direction: ``uplink`` or ``downlink``.
    """
    of_round: Counter[int] = Counter()
    for record in snapshot.of("bytes"):
        if record["direction"] == direction:
            of_round[record.get("round", 0)] += record["bytes"]
    if not of_round:
        of_round.update({r["round"]: int(r.get(f"{direction}_bytes", 0)) for r in snapshot.rounds})
    return list(accumulate(of_round[record["round"]] for record in snapshot.rounds))


def method_bytes(snapshot: Snapshot, direction: str) -> int:
    """What the method itself sent: the summary's figure, else the sum of the rounds' own; see the ledger for the rest.

    Args:
        snapshot: The run.
        direction: ``uplink`` or ``downlink``.
    """
    key = f"{direction}_bytes"
    return int(snapshot.summary.get(key, sum(record.get(key, 0) for record in snapshot.rounds)))


def phase_seconds(snapshot: Snapshot) -> list[dict[str, float]]:
    """Wall seconds of each round of ``snapshot.rounds`` by phase; ``other`` is what no phase claims."""
    table = []
    for record in snapshot.rounds:
        phases = {phase: float(record.get(f"{phase}_seconds", 0.0)) for phase in PHASES}
        claimed = sum(phases.values())
        table.append(phases | {"other": max(0.0, float(record.get("seconds", claimed)) - claimed)})
    return table


@dataclass
class _Sums:
    """Test rows added up."""

    correct: int = 0
    counted: int = 0
    total: int = 0
    loss_sum: float = 0.0
    with_loss: int = 0

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.counted if self.counted else None

    @property
    def interval(self) -> Interval | None:
        return wilson_interval(self.correct, self.counted) if self.counted else None

    @property
    def loss(self) -> float | None:
        return self.loss_sum / self.with_loss if self.with_loss else None


def _test_sums(snapshot: Snapshot, key: str) -> dict[int, _Sums]:
    """Sums of the reported round's test evaluations that carry a key (a client, or a group), by its value."""
    sums: dict[int, _Sums] = defaultdict(_Sums)
    for record in snapshot.of("group" if key == "group" else "evaluation"):
        if (
            record.get("split") != "test"
            or record.get("round") != snapshot.reported_round
            or key not in record
        ):
            continue
        entry, total = sums[record[key]], int(record["total"])
        entry.total += total
        if "correct" in record:
            entry.correct += record["correct"]
            entry.counted += total
        if "loss_sum" in record:
            entry.loss_sum += record["loss_sum"]
            entry.with_loss += total
    return dict(sums)


def _client(partition_id: int, trained: list[dict], tested: _Sums) -> ClientRow:
    last = trained[-1] if trained else {}
    return ClientRow(
        partition_id=partition_id,
        name=str(last.get("name", "")),
        rank=last.get("rank"),
        rounds=len(trained),
        num_examples=last.get("num_examples"),
        steps=sum(record.get("steps", 0) for record in trained),
        tokens=sum(record.get("tokens", 0) for record in trained),
        cpu_seconds=math.fsum(record.get("cpu_seconds", 0.0) for record in trained),
        train_loss=last.get("loss"),
        test_rows=tested.total,
        accuracy=tested.accuracy,
        interval=tested.interval,
        loss=tested.loss,
    )
