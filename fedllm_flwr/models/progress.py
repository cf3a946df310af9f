"""Tell a waiting user, on stderr, what a slow preparation is doing."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class StepReport:
    """A titled list of steps: live lines on a terminal, plain ones elsewhere. Use as a context manager.

    Args:
        title: What is being prepared, in one line.
        total: How many steps will be announced.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._stream = sys.stderr  # kept, so that a library's own bars can be diverted meanwhile
        self._task: TaskID | None = None
        self._live: Progress | None = None

    def __enter__(self) -> "StepReport":
        if self._stream.isatty():
            console = Console(file=self._stream)
            console.print(self._title, highlight=False)
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._live = Progress(*columns, console=console)
            self._live.start()
        else:
            self._line(self._title)
        return self

    def step(self, text: str) -> None:
        """Announce the next step; the one before it is done."""
        self._done += 1
        text = f"{self._done}/{self._total} {text}"
        if self._live is None:
            self._line(f"  {text}")
            return
        self._finish_task()
        self._task = self._live.add_task(text, total=1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._finish_task()
            self._live.stop()
        elif error is None:
            self._line(f"  done in {time.monotonic() - self._started:.0f} s")

    def _finish_task(self) -> None:
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=1)

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
