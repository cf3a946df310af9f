import errno
import os
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.runs.writer import only_writer


def test_a_second_writer_is_refused_and_the_next_one_is_not(make_run: Any) -> None:
    run = make_run()
    refused = pytest.raises(ConfigError, match="another process is running")
    with only_writer(run), refused, only_writer(run):
        raise AssertionError("two writers")
    with only_writer(run):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_takes_no_more_is_a_typed_error(number: int, make_run: Any) -> None:
    stopped = pytest.raises(RunStoppedError, match=f"got: {os.strerror(number)}; free space")
    with stopped, only_writer(make_run()):
        raise OSError(number, os.strerror(number))


def test_other_errors_of_the_system_are_what_they_were(make_run: Any) -> None:
    with pytest.raises(FileNotFoundError), only_writer(make_run()):
        Path("/nowhere/at all").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_record_that_does_not_fit_stops_the_run(make_run: Any) -> None:
    run = make_run()
    (run.path / "metrics.jsonl").unlink()
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunStoppedError, match="No space left on device"), only_writer(run):
        run.append({"kind": "event", "text": "it goes on"})
