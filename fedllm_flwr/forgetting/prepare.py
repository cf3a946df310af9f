"""The run directory of a removal: laid out beside its place, and moved there whole, so that a kill loses nothing.

Whatever the method, the directory is one that ``action=resume`` can go on with: `rewind` and `replay` begin at the last
checkpoint before the client's first round, `retrain` at the start, and `merge` and `exact_merge` at their end.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.forgetting.models import exactly_merged, merged
from fedllm_flwr.forgetting.request import Request
from fedllm_flwr.journal import LEDGER
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.atomic import write_bytes
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.environment import environment
from fedllm_flwr.sharding import members_of, shard_folder
from fedllm_flwr.unlearning.ledger import Ledger
from fedllm_flwr.unlearning.removal import rewind, shard_of
from strategies.replayed import KIND

UNLEARNED = "unlearned"
"""Key of the manifest: which client was taken out of which run, how, and what preparing took."""

PLACE = "place"
"""Key below it: where that run is, as seen from the new one."""

KEPT = "kept_rounds"
"""Key below it: the last round whose checkpoints and records were taken over; -1 where none were."""

DROPPED_KINDS = ("baseline", "tuning", "event", "failure", "started", KIND)
"""Records that are not taken over: they are of all clients, of the old process, or measured again."""


def prepare(request: Request, out_dir: Path) -> RunDirectory:
    """Lay out the new run directory, or find the one that an earlier process laid out.

    Args:
        request: Checked.
        out_dir: Where; nothing is written elsewhere.

    Raises:
        ConfigError: The folder holds another run, or cannot be written.
        VerificationError: The client's update is not the one that was merged; nothing is left.
    """
    config = request.new_config()
    if (out_dir / "manifest.json").exists():
        return _found(request, config, out_dir)
    temporary = out_dir.parent / f".{out_dir.name}.preparing"
    shutil.rmtree(temporary, ignore_errors=True)
    began = time.process_time()
    try:
        temporary.mkdir(parents=True)
        kept, tokens = _fill(request, temporary)
        spent = time.process_time() - began
        work = {KEPT: kept, "prepare_cpu_seconds": spent, "prepare_tokens": tokens}
        place = os.path.relpath(request.source.path, out_dir)
        RunDirectory.create(temporary, _manifest(request, config, {PLACE: place, **work}))
        _note(RunDirectory.open(temporary), request)
        os.rename(temporary, out_dir)
    except OSError as error:
        raise ConfigError(
            f"out_dir: expected a folder that can be written, got {out_dir} ({error.strerror})"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return RunDirectory.open(out_dir)


def _found(request: Request, config: RunConfig, out_dir: Path) -> RunDirectory:
    found = RunDirectory.open(out_dir)
    told = found.manifest.get(UNLEARNED, {})
    if found.manifest["fingerprint"] != config.fingerprint() or told.get("from") != _source(
        request
    ):
        raise ConfigError(f"{out_dir}: holds another run; name another out_dir")
    return found


def _fill(request: Request, folder: Path) -> tuple[int, int]:
    """Checkpoints, ledger and records that the client has not touched.

    Returns:
        The round up to which they are taken over, -1 for none, and the tokens that were trained on.
    """
    begin, tokens = -1, 0
    if request.method in ("rewind", "replay"):
        begin = _untouched(request)
        _copy_checkpoints(request, folder, begin)
        _copy_ledger(request, folder, begin)
    elif request.method in ("merge", "exact_merge"):
        made, tokens = (
            (merged(request), 0) if request.method == "merge" else exactly_merged(request)
        )
        begin = _untouched(request)
        _copy_checkpoints(request, folder, begin)
        checkpoints.save(
            folder / "checkpoints",
            made.server_round,
            made.arrays,
            made.state,
            keep=request.config.num_rounds + 1,
        )
        _copy_ledger(request, folder, made.server_round)
    elif request.method == "shards":
        _copy_shards(request, folder)
    _copy_records(request, folder, begin)
    return begin, tokens


def _untouched(request: Request) -> int:
    """The newest whole checkpoint before the first round that the client was drawn for.

    Its reply may have been dropped there, but in its presence others may have trained in another pass.
    """
    folder = request.source.checkpoints
    whole = [r for r in checkpoints.saved_rounds(folder) if checkpoints.at(folder, r) is not None]
    drawn = [
        int(record["round"])
        for record in request.source.records("round")
        if request.client in record.get("cohort", ())
    ]
    return rewind([*request.participation[request.client], *drawn], whole)


def _copy_checkpoints(request: Request, folder: Path, last: int) -> None:
    source = request.source.checkpoints
    for server_round in (r for r in checkpoints.saved_rounds(source) if r <= last):
        saved = checkpoints.at(source, server_round)
        if saved is not None:
            checkpoints.save(
                folder / "checkpoints",
                server_round,
                saved.arrays,
                saved.state,
                keep=request.config.num_rounds + 1,
            )


def _copy_shards(request: Request, folder: Path) -> None:
    """The shards that the client was not in, whole; its own is trained again when the run goes on."""
    config = request.config
    own = shard_of(request.client, config.unlearning.shards, config.seed)
    for shard in members_of(config):
        if shard != own:
            source = shard_folder(request.source.path, shard)
            shutil.copytree(source, shard_folder(folder, shard))


def _copy_ledger(request: Request, folder: Path, last: int) -> None:
    if request.ledger is None:
        return
    shutil.copytree(request.ledger.folder, folder / LEDGER)
    ledger = Ledger(folder / LEDGER, write_bytes)
    ledger.cut(last)
    ledger.forget(request.client)


def _copy_records(request: Request, folder: Path, last: int) -> None:
    """What was measured up to a round, without the client's own lines; then the old lengths, for a replay."""
    run = RunDirectory(folder, {})
    for record in request.source.records():
        server_round = record.get("round")
        own = record.get("partition_id") == request.client
        if server_round is None or server_round > last or own or record["kind"] in DROPPED_KINDS:
            continue
        if "cohort" in record:
            record = record | {"cohort": [p for p in record["cohort"] if p != request.client]}
        run.append(record)
    if request.method != "replay" or request.ledger is None:
        return
    for server_round in (r for r in request.ledger.rounds() if r > last):
        for each in request.ledger.read(server_round).contributions:
            if each.client != request.client:
                length = float(np.linalg.norm(each.update.astype(np.float64)))
                run.append({"kind": KIND, "of_round": server_round, "partition_id": each.client,
                            "weight": each.weight, "length": length})  # fmt: skip


def _source(request: Request) -> str:
    return str(request.source.manifest["fingerprint"])


def _manifest(request: Request, config: RunConfig, work: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "experiment": config.experiment,
        "fingerprint": config.fingerprint(),
        "seed": config.seed,
        "config": json.loads(config.to_json()),
        "environment": environment(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        UNLEARNED: {
            "from": _source(request),
            "run": request.source.path.name,
            "client": request.client,
            "method": request.method,
            "exactness": request.exactness,
            **work,
        },
    }


def _note(run: RunDirectory, request: Request) -> None:
    text = (
        f"client {request.client} is taken out of run {request.source.path.name} by {request.method}, which is "
        f"{request.exactness}"
    )
    run.append({"kind": "event", "text": text})
