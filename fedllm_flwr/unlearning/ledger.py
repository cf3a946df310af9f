"""The ledger of a run: each round's and client's update, kept so that a client can be taken out later.

    ledger/ledger.json                          size of an update, retention policy
           round-0003/client-00007.safetensors  the update, float32 [d]
           round-0003.json                      who took part: weight, seed address, digest, bytes

A round counts once its index is written, which is after its updates. What a killed process leaves is not listed and
is cleared by :meth:`Ledger.cut`. A ledger holds what each client sent, so it is a secret of the same rank as the
clients' data; the retention policy says for how long.

Axes: d values of an update.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as pack_arrays

from fedllm_flwr.errors import ConfigError, DataError, WireError
from fedllm_flwr.unlearning.checks import check_update

FORMAT = 1
INDEX = re.compile(r"round-(\d{4,})\.json")
FOLDER = re.compile(r"round-(\d{4,})")

Write = Callable[[Path, bytes], None]
"""Replaces a file in one step, as :func:`fedllm_flwr.runs.atomic.write_bytes` does."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one client gave in one round.

    Attributes:
        client: The client.
        weight: Its weight in the mean, > 0.
        update: What it ended with less what it started from, in that round. float32 [d]
        seed: Address of its draws, as :func:`fedllm_flwr.seeding.derive_seed` takes it: with it and the data, the
            client can train the update anew.
    """

    client: int
    weight: float
    update: np.ndarray
    seed: tuple[str | int, ...] = ()


@dataclass(frozen=True, eq=False)
class Round:
    """A round of the ledger.

    Attributes:
        server_round: Its number, from 1.
        contributions: One per client, by rising client.
    """

    server_round: int
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class Listed:
    """A contribution as the index has it, without the update.

    Attributes:
        weight: Its weight.
        seed: Address of its draws.
        sha256: Of the update's bytes.
        stored_bytes: Size of its file.
    """

    weight: float
    seed: tuple[str | int, ...]
    sha256: str
    stored_bytes: int


class Ledger:
    """A ledger on the disk, written round by round."""

    def __init__(self, folder: Path, write: Write) -> None:
        """Open a ledger.

        Args:
            folder: Where it lies.
            write: How its files are replaced.

        Raises:
            ConfigError: There is none.
            DataError: It is damaged; names the file.
        """
        self.folder = folder
        self._write = write
        if not (folder / "ledger.json").is_file():
            raise ConfigError(
                f"ledger: expected one in {folder}, got none: the run was not told to keep it"
            )
        head = _read_json(folder / "ledger.json")
        if head.get("format") != FORMAT:
            raise DataError(
                f"{folder / 'ledger.json'}: expected format {FORMAT}, got {head.get('format')}"
            )
        try:
            self.size, self.retention = int(head["size"]), str(head["retention"])
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{folder / 'ledger.json'}: expected a size and a retention policy, got others"
            ) from None
        self._open: dict[int, dict[int, Listed]] = {}

    @classmethod
    def create(cls, folder: Path, *, size: int, retention: str, write: Write) -> "Ledger":
        """Start a ledger.

        Args:
            folder: Made when absent; may not hold a ledger.
            size: Values of an update (d), > 0.
            retention: How long updates are kept and who removes them, in words; it is quoted in certificates.
            write: How its files are replaced.

        Raises:
            ConfigError: There is a ledger already, the size is not positive, or the policy says nothing.
        """
        if (folder / "ledger.json").exists():
            raise ConfigError(f"ledger: expected none in {folder}, got one")
        if size < 1 or not retention.strip():
            raise ConfigError(
                f"ledger: expected a size > 0 and a retention policy, got {size} and {retention!r}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        head = {"format": FORMAT, "size": size, "retention": retention}
        write(folder / "ledger.json", _json(head))
        return cls(folder, write)

    def record(self, server_round: int, contribution: Contribution) -> None:
        """Write a client's update; it counts when the round is closed. A second one of a client replaces the first.

        Args:
            server_round: From 1.
            contribution: The client's.

        Raises:
            ConfigError: The round is closed already.
            ShapeError: The update is not [d]; names the client.
            WireError: The dtype, a value or the weight is refused; names the client.
        """
        who = f"client {contribution.client}"
        if self._index(server_round).exists():
            raise ConfigError(f"ledger: expected a round that is open, got {server_round}")
        with np.errstate(over="ignore"):  # a float64 beyond float32 is found as an infinity
            update = np.ascontiguousarray(contribution.update, dtype=np.float32)
        check_update(update, self.size, who)
        weight = float(contribution.weight)
        if not 0 < weight < math.inf:
            raise WireError(f"{who}: weight: expected a finite number > 0, got {weight}")
        content = pack_arrays({"update": update})
        path = self._file(server_round, contribution.client)
        path.parent.mkdir(exist_ok=True)
        self._write(path, content)
        listed = Listed(weight, contribution.seed, _digest(update), len(content))
        self._open.setdefault(server_round, {})[contribution.client] = listed

    def close(self, server_round: int) -> None:
        """Let a round count, with all that was recorded of it; a round without clients may be closed too.

        Raises:
            ConfigError: It is closed already.
        """
        if self._index(server_round).exists():
            raise ConfigError(f"ledger: expected a round that is open, got {server_round}")
        self._save(server_round, self._open.pop(server_round, {}))

    def cut(self, server_round: int) -> None:
        """Forget every round after one, and what a killed process left: for a run that resumes from that round."""
        self._open.clear()
        for later in [r for r in self.rounds() if r > server_round]:
            self._index(later).unlink()
        kept = set(self.rounds())
        for path in self.folder.iterdir():
            found = FOLDER.fullmatch(path.name)
            if found and int(found[1]) not in kept:
                shutil.rmtree(path)

    def rounds(self) -> tuple[int, ...]:
        """The rounds that count, in order."""
        found = (INDEX.fullmatch(path.name) for path in self.folder.iterdir())
        return tuple(sorted(int(match[1]) for match in found if match))

    def listed(self, server_round: int) -> dict[int, Listed]:
        """Who took part in a round, by rising client; updates are not read.

        Raises:
            DataError: The index is missing or damaged; names the file.
        """
        path = self._index(server_round)
        try:
            clients = {
                int(client): Listed(
                    float(entry["weight"]),
                    tuple(entry["seed"]),
                    str(entry["sha256"]),
                    int(entry["bytes"]),
                )
                for client, entry in _read_json(path)["clients"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path}: expected the index of a round, got something else") from None
        return dict(sorted(clients.items()))

    def read(self, server_round: int) -> Round:
        """A round with its updates, every one of which is checked.

        Raises:
            DataError: A file is missing or damaged; names it.
        """
        contributions = []
        for client, listed in self.listed(server_round).items():
            path = self._file(server_round, client)
            try:
                update = parse_arrays(path.read_bytes())["update"]
            except (OSError, SafetensorError, KeyError) as error:
                raise DataError(f"{path}: expected an update, got {error}") from None
            if update.shape != (self.size,) or _digest(update) != listed.sha256:
                raise DataError(
                    f"{path}: expected {self.size} values with SHA-256 {listed.sha256[:12]}…, "
                    f"got {update.size} with {_digest(update)[:12]}…"
                )
            contributions.append(Contribution(client, listed.weight, update, listed.seed))
        return Round(server_round, tuple(contributions))

    def participation(self) -> dict[int, tuple[int, ...]]:
        """The rounds of each client that ever took part, by rising client.

        Raises:
            DataError: An index is damaged; names the file.
        """
        found: dict[int, list[int]] = {}
        for server_round in self.rounds():
            for client in self.listed(server_round):
                found.setdefault(client, []).append(server_round)
        return {client: tuple(rounds) for client, rounds in sorted(found.items())}

    def forget(self, client: int) -> int:
        """Delete all that is kept of a client, after its removal; a second call finds nothing.

        Each index is written before the file goes, so that a process killed meanwhile leaves no index that lists a
        file which is not there; calling again finishes.

        Returns:
            Bytes of the updates that were deleted.
        """
        freed = 0
        for server_round in self.rounds():
            listed = self.listed(server_round)
            if listed.pop(client, None):
                self._save(server_round, listed)
            path = self._file(server_round, client)
            if path.exists():
                freed += path.stat().st_size
                path.unlink()
        return freed

    def _save(self, server_round: int, clients: Mapping[int, Listed]) -> None:
        entries = {
            str(client): {
                "weight": listed.weight,
                "seed": list(listed.seed),
                "sha256": listed.sha256,
                "bytes": listed.stored_bytes,
            }
            for client, listed in sorted(clients.items())
        }
        self._write(
            self._index(server_round), _json({"server_round": server_round, "clients": entries})
        )

    def _index(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:04d}.json"

    def _file(self, server_round: int, client: int) -> Path:
        return self.folder / f"round-{server_round:04d}" / f"client-{client:05d}.safetensors"


def weighted_mean(contributions: tuple[Contribution, ...]) -> np.ndarray | None:
    """Σ w u / Σ w in float64 [d], in the order given; None of nobody."""
    if not contributions:
        return None
    total = math.fsum(each.weight for each in contributions)
    mean = np.zeros(contributions[0].update.shape)
    for each in contributions:
        mean += each.update.astype(np.float64) * each.weight
    return mean / total


def _digest(update: np.ndarray) -> str:
    return hashlib.sha256(update.tobytes()).hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value
