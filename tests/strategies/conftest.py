"""What several strategies' tests share."""

from typing import Any

import pytest

from strategies.baselines import Recorder


class Paper(Recorder):
    """An observer that keeps a ledger's records, as a run directory does."""

    def __init__(self) -> None:
        super().__init__(print)
        self.written: list[dict[str, Any]] = []

    def evaluated(self, record: dict[str, Any]) -> None:
        self.written.append(record)

    def kept(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.written if record["kind"] == kind]


@pytest.fixture
def paper() -> Paper:
    """What a ledger is written on."""
    return Paper()
