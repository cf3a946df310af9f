"""Memory that a second worker process adds, in proportional set size (PSS).

PSS counts a page that n processes map as 1/n of a page in each, so the sum over workers is what they take
together; resident size would count shared weights once for each. Fresh interpreters are used, as Ray starts
them, not forks.
"""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from workload import READY

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Added:
    """What the second of two equal workers adds to the first, in bytes.

    Attributes:
        peak: At most, while it starts, trains one message and ends it.
        resting: After the message.
        weights_private: Of its mapped weight files, bytes that no other process shares.
    """

    peak: int
    resting: int
    weights_private: int


def measure_second_worker(program: str, *arguments: str) -> Added:
    """Start two workers, the second after the first has trained a message, and compare.

    Args:
        program: A file beside this one that calls :func:`workload.serve_as_worker`.
        arguments: Its arguments.
    """
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    with _worker(command) as first:
        _wait(first)
        alone = pss(first.pid)
        with _worker(command) as second, _sampled(first.pid, second.pid) as samples:
            _wait(second)
            together = pss(first.pid) + pss(second.pid)
            private = private_weights(second.pid)
        peak = max([*samples, together])
    return Added(peak - alone, together - alone, private)


def pss(process: int) -> int:
    """Proportional set size of a process in bytes."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def private_weights(process: int) -> int:
    """Private bytes of the mapped ``.safetensors`` files of a process."""
    total, inside = 0, False
    for line in Path(f"/proc/{process}/smaps").read_text(encoding="utf-8").splitlines():
        key, _, rest = line.partition(":")
        if "-" in key.split(" ")[0]:  # an address range begins the next mapping
            inside = line.endswith(".safetensors")
        elif inside and key in ("Private_Clean", "Private_Dirty"):
            total += 1024 * int(rest.split()[0])
    return total


@contextmanager
def _worker(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _wait(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == READY:
            return
    raise RuntimeError(f"a worker ended early with exit code {process.wait()}")


@contextmanager
def _sampled(*processes: int) -> Iterator[list[int]]:
    """Sums of the processes' PSS, taken all the time."""
    samples: list[int] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            samples.append(sum(pss(process) for process in processes))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
