"""What a person sees while a run goes on: a live display on a terminal, plain lines anywhere else.

Everything goes to standard error, so that standard output holds results only.
"""

import os
import sys
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from fedllm_flwr.runs.units import human_bytes, human_figure, human_seconds

Record = dict[str, Any]


class Progress:
    """Shows a run; use as a context manager around it.

    Args:
        stream: Where to write; standard error when None. A terminal gets the live display; a pipe, a file or a
            terminal without cursor control (``TERM=dumb``) gets one plain line per event, flushed.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        is_live = self._stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "")
        self._display = _Display(self._stream) if is_live else None
        self._round = self._rounds = self._cohort_size = 0
        self._seconds: list[float] = []

    def __enter__(self) -> "Progress":
        """Start the display."""
        if self._display:
            self._display.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the terminal back, also after an error."""
        if self._display:
            self._display.live.stop()

    def round_started(self, server_round: int, rounds: int, cohort_size: int) -> None:
        """A round begins.

        Args:
            server_round: The round; 0 is the evaluation before the first.
            rounds: The last round of the run.
            cohort_size: How many clients are asked.
        """
        self._round, self._rounds, self._cohort_size = server_round, rounds, cohort_size
        if self._display:
            self._display.begin_round(server_round, rounds, cohort_size)
        else:
            self._line(f"{self._place()}: {cohort_size} clients asked")

    def clients_done(self, count: int) -> None:
        """So many clients of the cohort have answered in this round so far; plain output tells the last only."""
        if self._display:
            self._display.bars.update(self._display.clients, completed=count)
        elif count >= self._cohort_size:
            self._line(f"{self._place()}: {count} of {self._cohort_size} clients answered")

    def round_done(self, record: Record) -> None:
        """A round is complete.

        Args:
            record: The round's record of metrics.jsonl; figures that it lacks are not shown.
        """
        self._round, self._rounds = record["round"], record.get("rounds", self._rounds)
        if self._round and record.get("seconds"):
            self._seconds.append(record["seconds"])
        figures, left = f"{self._place()}: {'  '.join(self._figures(record))}", self._left()
        if self._display:
            self._display.end_round(self._round, figures, left)
        else:
            self._line(f"{figures}  {left}".rstrip())

    def note(self, text: str) -> None:
        """A line for the reader, such as a dropped reply; stays above the live display."""
        if self._display:
            self._display.live.console.print(Text(text))
        else:
            self._line(text)

    def finished(self, summary: Record) -> None:
        """The run is over; shows its final figures.

        Args:
            summary: See :meth:`fedllm_flwr.runs.directory.RunDirectory.write_summary`.
        """
        figures = [
            f"{name} {human_figure(summary[key])}"
            for key, name in (
                ("accuracy", "accuracy"),
                ("bits_per_character", "bits per character"),
                ("loss", "loss"),
            )
            if summary.get(key) is not None
        ]
        if summary.get("seconds") is not None:
            figures.append(f"in {human_seconds(summary['seconds'])}")
        self.note(f"finished: {'  '.join(figures)}" if figures else "finished")

    def _figures(self, record: Record) -> list[str]:
        names = {"train_loss": "training loss", "loss": "test loss", "bits_per_character": "bits per character",
                 "accuracy": "accuracy", "validation_accuracy": "validation"}  # fmt: skip
        figures = [
            f"{name} {record[key]:.3f}"
            for key, name in names.items()
            if record.get(key) is not None
        ]
        sent = (record.get("uplink_bytes_so_far") or 0, record.get("downlink_bytes_so_far") or 0)
        figures.append("up {} down {}".format(*map(human_bytes, sent)))
        if record.get("dropped_replies"):
            figures.append(f"dropped replies {record['dropped_replies']}")
        if record.get("seconds") is not None:
            figures.append(f"took {human_seconds(record['seconds'])}")
        return figures

    def _left(self) -> str:
        """Time left, from the mean of the rounds that this process has seen; empty when that says nothing."""
        remaining = self._rounds - self._round
        if not self._seconds or remaining <= 0:
            return ""
        return f"about {human_seconds(remaining * sum(self._seconds) / len(self._seconds))} left"

    def _place(self) -> str:
        return f"round {self._round} of {self._rounds}"

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _Display:
    """The live part, below a line per complete round: a bar of rounds, a bar of the cohort, and the time left."""

    def __init__(self, stream: TextIO) -> None:
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.rounds = self.bars.add_task("rounds ", total=None)
        self.clients = self.bars.add_task("clients", total=None)
        self.live = Live(
            self.bars, console=Console(file=stream, force_terminal=True), refresh_per_second=4
        )

    def begin_round(self, server_round: int, rounds: int, cohort_size: int) -> None:
        self.bars.update(self.rounds, total=rounds, completed=max(0, server_round - 1))
        self.bars.reset(self.clients, total=cohort_size)

    def end_round(self, server_round: int, figures: str, left: str) -> None:
        self.bars.update(self.rounds, completed=server_round)
        self.live.console.print(Text(figures))
        body = Group(self.bars, Text(f"  {left}", style="cyan")) if left else self.bars
        self.live.update(body, refresh=True)
