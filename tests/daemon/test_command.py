import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from clients import handlers
from fedllm_flwr import records
from fedllm_flwr.daemon import command, protocol
from fedllm_flwr.daemon.asking import ALONE, SOCKET
from fedllm_flwr.errors import ConfigError

Fixture = Callable[..., Any]


@dataclass
class Running:
    """A daemon's process, its socket, and what it says."""

    process: subprocess.Popen[str]
    path: Path
    log: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A daemon as an operator starts it."""
    folder = tmp_path_factory.mktemp("d")
    path, log = folder / "socket", folder / "log"
    typed = [sys.executable, "-m", "fedllm_flwr", "daemon", "--socket", str(path)]
    with (
        log.open("w") as output,
        subprocess.Popen(typed, stderr=output, stdout=output, text=True) as process,
    ):
        deadline = time.monotonic() + 240
        while command.READY not in log.read_text() and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield Running(process, path, log)
        process.kill()


METHODS = {
    "fedlora": (),
    "fedprompt": ("method.personal_length=1",),
    "fedresprompt": ("baselines=none",),
    "fedgrass": (),
}
"""Each method, and what makes it keep something at the node."""


@pytest.mark.parametrize("method", METHODS)
def test_rounds_through_a_daemon_end_with_the_same_bits(
    method: str, running: Running, micro: Fixture, play: Fixture, edge_grid: Fixture, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = micro(f"method={method}", "num_rounds=2", *METHODS[method])
    here = play(config, folder=tmp_path / "here", splits=("test",))
    facts = {SOCKET: str(running.path), "state-path": str(tmp_path / "state")}
    grid = edge_grid(config.runtime.num_nodes, node_config=facts)
    there = play(config, folder=tmp_path / "there", grid=grid, splits=("test",))
    assert ALONE not in caplog.text, "the daemon did the work"
    assert there.run.records("failure") == []
    assert there.sha == here.sha
    measured = [[r.get("accuracy"), r.get("loss")] for r in there.run.records("round")]
    assert measured == [[r.get("accuracy"), r.get("loss")] for r in here.run.records("round")]


CLIENT = """
import sys
from flwr.app import Context, RecordDict
from fedllm_flwr.client_app import app
from fedllm_flwr.daemon import protocol

asked, context, reply = sys.argv[1:]
context = protocol.read_context(open(context, "rb").read())
answered = app(protocol.read_message(open(asked, "rb").read()), context)
open(reply, "wb").write(protocol.message_bytes(answered))
print(*sorted({"torch", "transformers", "peft", "hydra"} & set(sys.modules)))
"""


def as_flower_does(asked: Message, context: Any, folder: Path) -> tuple[Message, str]:
    """A new process that handles one message: its reply, and what it imported of what is heavy."""
    files = [folder / name for name in ("message", "context", "reply")]
    files[0].write_bytes(protocol.message_bytes(asked))
    files[1].write_bytes(protocol.context_bytes(context))
    typed = [sys.executable, "-c", CLIENT, *map(str, files)]
    done = subprocess.run(typed, capture_output=True, text=True, check=True)
    return protocol.read_message(files[2].read_bytes()), done.stdout.strip()


def without_times(message: Message) -> tuple[Any, dict[str, Any]]:
    body, parts = records.read(message, records.ANSWER)
    for info in body.get("clients", []):
        info.pop("cpu-seconds", None)
    return body, parts


def test_a_client_process_with_a_daemon_loads_no_torch_and_answers_the_same(
    running: Running, micro: Fixture, play: Fixture, tmp_path: Path
) -> None:
    grid = play(micro("num_rounds=1")).grid
    context = grid.contexts[1000]
    context.node_config[SOCKET] = str(running.path)
    for asked in grid.sent:
        if asked.metadata.dst_node_id != 1000:
            continue
        reply, heavy = as_flower_does(asked, context, tmp_path)
        assert heavy == ""
        if asked.metadata.message_type != records.DESCRIBE:
            body, parts = without_times(reply)
            wanted, values = without_times(handlers.handle(asked, context))
            assert body == wanted
            assert parts.keys() == values.keys()
            assert all(np.array_equal(parts[name], values[name]) for name in values)


def test_it_stops_cleanly_on_sigterm_in_the_middle_of_a_conversation(running: Running) -> None:
    """The last test of the module: it ends the daemon."""
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(running.path))
        threading.Event().wait(0.2)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
    assert not running.path.exists()
    said = running.log.read_text()
    assert said.endswith("fedllm daemon: stopped\n")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "0"], "--models >= 1"),
        (["--max-message-mb", "nan"], "--max-message-mb > 0"),
        (["--preload", "x"], "unrecognized arguments: --preload"),
        (["--models", "x"], "invalid int value"),
    ],
)
def test_a_wrong_option_is_an_error_before_anything_listens(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        command.daemon(words)


def test_a_wrong_place_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="only this user can write to"):
        command.daemon(["--socket", str(tmp_path / "s")])
