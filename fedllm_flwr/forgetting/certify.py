"""The certificate of a removal, and its entry in the deletion log, in the new run directory."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm_flwr.config import RunConfig
from fedllm_flwr.costs import model_shape
from fedllm_flwr.forgetting.prepare import KEPT, UNLEARNED
from fedllm_flwr.forgetting.remembers import memories
from fedllm_flwr.forgetting.request import Request
from fedllm_flwr.forgetting.verify import Verified
from fedllm_flwr.models.shapes import model_config
from fedllm_flwr.runs.atomic import write_bytes, write_json, write_text
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.unlearning.certificate import (
    Certificate,
    Cost,
    Retained,
    as_dict,
    to_markdown,
)
from fedllm_flwr.unlearning.deletion_log import KEY_VARIABLE, Head, append, read_private_key
from fedllm_flwr.unlearning.removal import shard_of

CERTIFICATE = "certificate"
DELETIONS = "deletions.jsonl"
NO_LEDGER = "no updates were kept"
SAID = Retained(
    "in verification/, losses of the client's rows under the models that were compared; no row",
    "the verdict can be computed again from them; whoever runs the federation deletes them",
)
MADE = "the shadow models and controls of the verification, which held the client"


@dataclass(frozen=True)
class Attempt:
    """A removal by another method that did not pass before this one was made."""

    method: str
    reason: str


def certify(
    request: Request,
    run: RunDirectory,
    verified: Verified | None = None,
    *,
    budget: int = 0,
    before: Attempt | None = None,
) -> None:
    """Write ``certificate.json`` and ``certificate.md``, which may be handed out and are not written a second time.

    Only one without a signed entry is written anew, once there is a key to sign with; and a verification adds to one.

    Args:
        request: What was done.
        run: The finished new run.
        verified: What a verification found.
        budget: The queries that it was allowed.
        before: The attempt that did not pass before.
    """
    path = run.path / f"{CERTIFICATE}.json"
    old = json.loads(path.read_bytes()) if path.exists() else {}
    is_logged = "log_head" in old
    if old and verified is None and (is_logged or not os.environ.get(KEY_VARIABLE)):
        return
    config = request.new_config()
    remembered = memories(request, config, int(run.manifest[UNLEARNED][KEPT]))
    retained, purged = remembered.retained, remembered.purged
    if verified is not None:
        retained, purged = (*retained, SAID), (*purged, MADE)
    now = str(old.get("time", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())))
    certificate = Certificate(
        run=request.source.path.name,
        client=request.client,
        time=now,
        method=request.method,
        exactness=request.exactness,
        verdict=verified.verdict if verified else None,
        queries=verified.queries if verified else {},
        budget=budget,
        removal=removal_cost(request, run),
        retraining=_measured(request, *verified.retraining)
        if verified
        else retraining_cost(request),
        model_sha256=str(run.summary()["adapter_sha256"]),
        purged=purged,
        retained=retained,
        retention=config.unlearning.retention or NO_LEDGER,
        log_head=Head(**old["log_head"]) if is_logged else _log(request, run, now),
        fallen_back_from=before.method if before else str(old.get("fallen_back_from", "")),
        fallen_back_because=before.reason if before else str(old.get("fallen_back_because", "")),
        rows=verified.rows if verified else None,
        attacks=verified.attacks if verified else (),
        left_out=verified.left_out if verified else {},
        verification=_measured(request, *verified.training) if verified else None,
    )
    write_text(run.path / f"{CERTIFICATE}.md", to_markdown(certificate) + "\n")
    write_json(path, as_dict(certificate))
    decision = {"verdict": verified.verdict.decision} if verified else {}
    run.write_summary({**run.summary(), **decision, "retrain_cpu_ratio": certificate.cpu_ratio})


def _measured(request: Request, cpu_seconds: float, tokens: float) -> Cost:
    return _cost(request.config, [{"cpu_seconds": cpu_seconds, "tokens": tokens}])


def removal_cost(request: Request, run: RunDirectory) -> Cost:
    """What was computed for the removal: preparing it, and the rounds that were run again."""
    prepared = run.manifest[UNLEARNED]
    work = [r for r in run.records("client") if _was_repeated(request, r, int(prepared[KEPT]))]
    work.append(
        {"cpu_seconds": prepared["prepare_cpu_seconds"], "tokens": prepared["prepare_tokens"]}
    )
    return _cost(request.config, work)


def retraining_cost(request: Request) -> Cost:
    """What the other clients' training took in the run itself: the same work as training without the client anew."""
    work = [r for r in request.source.records("client") if r["partition_id"] != request.client]
    return _cost(request.config, work)


def _was_repeated(request: Request, record: Mapping[str, Any], kept: int) -> bool:
    """Whether a client's training in the new run was done for the removal, or taken over from the old one."""
    if request.method == "shards":
        shards, seed = request.config.unlearning.shards, request.config.seed
        own = shard_of(request.client, shards, seed)
        return shard_of(int(record["partition_id"]), shards, seed) == own
    return int(record["round"]) > kept


def _cost(config: RunConfig, work: list[dict[str, Any]]) -> Cost:
    """CPU seconds as clients told them, and 4 P operations a token: forward, and backward to the activations."""
    ref = config.model.ref(config.runtime.model_path)
    shape = model_shape(model_config(ref).get_text_config(decoder=True), ref.label)
    tokens = sum(int(record["tokens"]) for record in work)
    return Cost(sum(float(r["cpu_seconds"]) for r in work), 4.0 * shape.block_parameters * tokens)


def _log(request: Request, run: RunDirectory, now: str) -> Head | None:
    """Add the removal to the chain of the run's earlier ones, if there is a key to sign it with."""
    path = run.path / DELETIONS
    if not os.environ.get(KEY_VARIABLE):
        return None
    earlier = request.source.path / DELETIONS
    if earlier.exists():
        write_bytes(path, earlier.read_bytes())
    else:
        path.unlink(missing_ok=True)
    body = {
        "client": request.client,
        "run": request.source.path.name,
        "method": request.method,
        "exactness": request.exactness,
        "model_sha256": run.summary()["adapter_sha256"],
    }
    key = read_private_key(None, os.environ)
    return append(path, body, time=now, key=key, write=write_bytes)


def default_folder(request: Request) -> Path:
    """Beside the run, named after it, the method and the client."""
    source = request.source.path
    return source.parent / f"unlearn_{source.name}_{request.method}_client{request.client}"
