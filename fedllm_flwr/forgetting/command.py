"""``fedllm action=unlearn`` and ``action=verify``, step by step; each can be killed, and the same command goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm_flwr.core import resumed_config
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.forgetting.certify import CERTIFICATE, Attempt, certify, default_folder
from fedllm_flwr.forgetting.examiner import Examiner
from fedllm_flwr.forgetting.prepare import PLACE, UNLEARNED, prepare
from fedllm_flwr.forgetting.request import Request, read_request
from fedllm_flwr.forgetting.rivals import Carry
from fedllm_flwr.forgetting.verify import Verified, check_verifiable, hand_over, verify
from fedllm_flwr.preflight import check_out_dir
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.writer import only_writer
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.settings.verification import VerificationConfig

FALLBACK = "retrain"


@dataclass(frozen=True)
class Verification:
    """That a result is to be attacked.

    Attributes:
        settings: How.
        examiner: Who asks.
        falls_back: Whether a result that does not pass is followed by training anew.
    """

    settings: VerificationConfig
    examiner: Examiner
    falls_back: bool = False


def wanted(
    request: Request,
    settings: VerificationConfig,
    overrides: Sequence[str] = (),
    *,
    falls_back: bool = False,
) -> Verification:
    """Check that a removal can be verified; nothing is written.

    Args:
        request: The removal.
        settings: Of the verification.
        overrides: Of the runtime.
        falls_back: Whether a result that does not pass is followed by training anew.

    Raises:
        ConfigError: See :func:`fedllm_flwr.forgetting.verify.check_verifiable`.
    """
    return Verification(settings, check_verifiable(request, settings, overrides), falls_back)


def unlearn(
    request: Request,
    out_dir: Path | None,
    overrides: Sequence[str],
    carry: Carry,
    verification: Verification | None = None,
) -> Path:
    """Take a client out of a run.

    Args:
        request: Checked.
        out_dir: The new run directory; None = beside the run, named after it.
        overrides: Of the runtime, for the process that goes on with the new run.
        carry: Goes on with it.
        verification: Whether, and how, the result is attacked.

    Returns:
        The new run directory, with its certificate. After a fallback it is another one, named after the first.

    Raises:
        ConfigError: The folder cannot be used.
        VerificationError: The client's update is not the one that was merged.
        RunStoppedError: Training stopped; the same command goes on.
    """
    folder = out_dir or default_folder(request)
    check_out_dir(folder)
    run = _made(request, folder, overrides, carry)
    if verification is None:
        certify(request, run)
        return folder
    verified = _verified(request, run, overrides, carry, verification)
    passed = verified.verdict.decision == "pass"
    if passed or not verification.falls_back or request.method == FALLBACK:
        return folder
    again = _again(request)
    second = folder.with_name(f"{folder.name}_{FALLBACK}")
    check_out_dir(second)
    anew = _made(again, second, overrides, carry)
    hand_over(run, anew)
    before = Attempt(request.method, f"{verified.verdict.decision}, {verified.verdict.reason}")
    _verified(again, anew, overrides, carry, verification, before)
    return second


def verify_run(
    run: RunDirectory, runtime: RuntimeConfig, settings: VerificationConfig,
    overrides: Sequence[str], carry: Carry,
) -> Path:  # fmt: skip
    """Attack the model of a run that a client was taken out of, and add the verdict to its certificate.

    Args:
        run: The run.
        runtime: Where to compute.
        settings: Of the verification.
        overrides: Of the runtime, for the processes that train the models that it is held against.
        carry: Carries those.

    Returns:
        The run's folder.

    Raises:
        ConfigError: Nobody was taken out of it, it is not finished, the run that it was made of is gone, or it cannot
            be verified.
    """
    told = run.manifest.get(UNLEARNED)
    if told is None or not run.is_finished:
        raise ConfigError(
            f"action=verify: expected a finished run that action=unlearn has made, got {run.path}"
        )
    source = _source(run)
    request = read_request(source, str(told["client"]), str(told["method"]), runtime)
    _verified(request, run, overrides, carry, wanted(request, settings, overrides))
    return run.path


def told(folder: Path) -> str:
    """The certificate, for people."""
    return (folder / f"{CERTIFICATE}.md").read_text(encoding="utf-8")


def _made(request: Request, folder: Path, overrides: Sequence[str], carry: Carry) -> RunDirectory:
    run = prepare(request, folder)
    config = resumed_config(run, request.config.runtime)
    carry(config, ["action=resume", f"run={folder.resolve()}", *overrides], str(folder))
    return run


def _verified(
    request: Request,
    run: RunDirectory,
    overrides: Sequence[str],
    carry: Carry,
    verification: Verification,
    before: Attempt | None = None,
) -> Verified:
    """The verdict, and the certificate with it."""
    settings = verification.settings
    with only_writer(run):
        found = verify(
            request, run, settings, examiner=verification.examiner, carry=carry, overrides=overrides
        )
        certify(request, run, found, budget=settings.budget, before=before)
        text = f"verification: {found.verdict.decision}, {found.verdict.reason}"
        run.append({"kind": "event", "text": text})
    return found


def _again(request: Request) -> Request:
    """The same removal by training anew."""
    runtime = request.config.runtime
    return read_request(request.source, str(request.client), FALLBACK, runtime)


def _source(run: RunDirectory) -> RunDirectory:
    """The run that a client was taken out of: where it was, or beside the new one."""
    told = run.manifest[UNLEARNED]
    places = [run.path / str(told.get(PLACE, "")), run.path.parent / str(told["run"])]
    for place in places:
        if (place / "manifest.json").exists():
            found = RunDirectory.open(place.resolve())
            if found.manifest["fingerprint"] == told["from"]:
                return found
    raise ConfigError(
        f"action=verify: expected the run {told['run']}, which {run.path} was made of, at {places[0]} or beside it, "
        "found none"
    )
