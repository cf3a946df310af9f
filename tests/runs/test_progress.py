import io
import os
import re
import threading

import pytest

from fedllm_flwr.runs.progress import Progress

ROUND = {"kind": "round", "rounds": 3, "loss": 0.5, "accuracy": 0.75, "uplink_bytes": 2_000_000,
         "downlink_bytes": 3_000_000, "seconds": 30.0}  # fmt: skip


def play(progress: Progress, rounds: int = 3) -> None:
    with progress:
        progress.round_started(0, rounds, 4)
        progress.round_done(
            {"kind": "round", "round": 0, "rounds": rounds, "accuracy": 0.25, "seconds": 5.0}
        )
        for number in range(1, rounds + 1):
            progress.round_started(number, rounds, 4)
            for count in range(1, 5):
                progress.clients_done(count)
            sent = {
                f"{way}_so_far": number * ROUND[way] for way in ("uplink_bytes", "downlink_bytes")
            }
            progress.round_done(ROUND | sent | {"round": number, "dropped_replies": number - 1})
        progress.note("client 3: reply [dropped]")
        progress.finished({"accuracy": 0.75, "loss": 0.5, "seconds": 95.0, "method": "fedlora"})


class Flushed(io.StringIO):
    """Counts flushes."""

    def __init__(self) -> None:
        super().__init__()
        self.flushes = 0

    def flush(self) -> None:
        self.flushes += 1


def test_plain_output_is_one_flushed_line_per_round_and_phase() -> None:
    stream = Flushed()
    play(Progress(stream))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "round 0 of 3: 4 clients asked",
        "round 0 of 3: accuracy 0.250  up 0 B down 0 B  took 5 s",
        "round 1 of 3: 4 clients asked",
        "round 1 of 3: 4 of 4 clients answered",
        "round 1 of 3: test loss 0.500  accuracy 0.750  up 2.00 MB down 3.00 MB  took 30 s  about 1 min 00 s left",
        "round 2 of 3: 4 clients asked",
        "round 2 of 3: 4 of 4 clients answered",
        "round 2 of 3: test loss 0.500  accuracy 0.750  up 4.00 MB down 6.00 MB  dropped replies 1  took 30 s  "
        "about 30 s left",
        "round 3 of 3: 4 clients asked",
        "round 3 of 3: 4 of 4 clients answered",
        "round 3 of 3: test loss 0.500  accuracy 0.750  up 6.00 MB down 9.00 MB  dropped replies 2  took 30 s",
        "client 3: reply [dropped]",
        "finished: accuracy 0.750  loss 0.500  in 1 min 35 s",
    ]
    assert stream.flushes >= len(lines)


def test_the_time_left_is_that_of_the_rounds_seen_by_this_process() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    with progress:
        for number, seconds in ((7, 10.0), (8, 20.0)):
            progress.round_started(number, 12, 4)
            progress.round_done({"round": number, "rounds": 12, "seconds": seconds})
    assert (
        stream.getvalue().splitlines()[-1].endswith("about 1 min 00 s left")
    )  # four rounds of 15 seconds


def on_terminal(monkeypatch: pytest.MonkeyPatch, term: str) -> str:
    """What a real terminal of a kind receives."""
    monkeypatch.setenv("TERM", term)
    master, slave = os.openpty()
    received = []

    def drain() -> None:
        while True:
            try:
                content = os.read(master, 4096)
            except OSError:  # the other end is closed
                return
            received.append(content)

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(slave, "w") as stream:
        play(Progress(stream))
    reader.join(timeout=10)
    os.close(master)
    return b"".join(received).decode()


def test_a_terminal_gets_a_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    output = on_terminal(monkeypatch, "xterm-256color")
    assert "\x1b[?25l" in output  # hides the cursor while it draws
    assert output.index("\x1b[?25l") < output.rindex("\x1b[?25h")  # and gives it back
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    for expected in ("rounds", "clients", "3/3", "4/4", "about 30 s left", "accuracy 0.750", "up 6.00 MB down 9.00 MB",
                     "client 3: reply [dropped]", "finished: accuracy 0.750"):  # fmt: skip
        assert expected in text
    assert "clients asked" not in text


def test_a_terminal_without_cursor_control_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = on_terminal(monkeypatch, "dumb")
    assert "\x1b" not in output
    assert "round 1 of 3: 4 clients asked" in output


def test_an_error_gives_the_terminal_back_and_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyboardInterrupt), Progress(stream):
        raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_logs_go_to_standard_error_only(capsys: pytest.CaptureFixture[str]) -> None:
    play(Progress())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "finished: accuracy 0.750" in captured.err


def test_finished_without_figures() -> None:
    stream = io.StringIO()
    Progress(stream).finished({"method": "fedlora"})
    assert stream.getvalue() == "finished\n"
