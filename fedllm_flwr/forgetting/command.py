"""``fedllm action=unlearn``, step by step; each can be killed, and the same command goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import resumed_config
from fedllm_flwr.forgetting.certify import CERTIFICATE, certify, default_folder
from fedllm_flwr.forgetting.prepare import prepare
from fedllm_flwr.forgetting.request import Request
from fedllm_flwr.preflight import check_out_dir

Carry = Callable[[RunConfig, Sequence[str], str], Any]
"""Carries a prepared run to its end: its configuration, the overrides that find it again, and its directory."""


def unlearn(request: Request, out_dir: Path | None, overrides: Sequence[str], carry: Carry) -> Path:
    """Take a client out of a run.

    Args:
        request: Checked.
        out_dir: The new run directory; None = beside the run, named after it.
        overrides: Of the runtime, for the process that goes on with the new run.
        carry: Goes on with it.

    Returns:
        The new run directory, with its certificate.

    Raises:
        ConfigError: The folder cannot be used.
        VerificationError: The client's update is not the one that was merged.
        RunStoppedError: Training stopped; the same command goes on.
    """
    folder = out_dir or default_folder(request)
    check_out_dir(folder)
    run = prepare(request, folder)
    config = resumed_config(run, request.config.runtime)
    carry(config, ["action=resume", f"run={folder.resolve()}", *overrides], str(folder))
    certify(request, run)
    return folder


def told(folder: Path) -> str:
    """The certificate, for people."""
    return (folder / f"{CERTIFICATE}.md").read_text(encoding="utf-8")
