"""Who writes a run directory: one process at a time, and what it says when the disk does not take any more."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.runs.directory import RunDirectory

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""A full disk or quota, a file as large as it may be, a broken disk, one that turned read-only."""


@contextmanager
def only_writer(directory: RunDirectory) -> Iterator[None]:
    """Hold the run directory; the system lets go of it when this process ends, however it ends.

    Raises:
        ConfigError: Another process is writing to it.
        RunStoppedError: The disk is full or broken; checkpoints before are whole, and the run can be resumed.
    """
    try:
        with FileLock(directory.path / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"{directory.path}: another process is running this experiment; wait or stop it"
        ) from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise RunStoppedError(
            f"{directory.path}: expected to write a file, got: {error.strerror}; free space, then resume the run"
        ) from error
