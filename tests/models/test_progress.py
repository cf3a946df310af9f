import io
import sys

import pytest

from fedllm_flwr.models.progress import StepReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with StepReport("doing things", 2) as report:
        report.step("one")
        report.step("two")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["doing things", "  1/2 one", "  2/2 two", "  done in 0 s"]


def test_live_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with StepReport("doing things", 2) as report:
        report.step("one")
        report.step("two")
    assert "doing things" in screen.getvalue()
    assert "2/2 two" in screen.getvalue()


def test_failure_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), StepReport("doing things", 1):
        raise ValueError("broken")
    assert "done" not in capsys.readouterr().err
