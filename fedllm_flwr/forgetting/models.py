"""Models without a client that need no training round: the merge from a ledger, and the exact merge.

Both give the checkpoint of a run that has gone through its rounds and has still to be evaluated.
"""

import dataclasses
from typing import Any

import numpy as np
from flwr.app import ConfigRecord

from fedllm_flwr.client_app import app
from fedllm_flwr.comparison import task_kind
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.forgetting.request import Request
from fedllm_flwr.loopback import LoopbackGrid
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.unlearning.removal import merge
from strategies import Hosting, RoundStrategy, build_strategy
from strategies.baselines import Recorder
from strategies.exchange import by_client, stream
from strategies.fedunlearning import Unlearnable
from strategies.observer import MERGING, UNMEASURED, Checkpointed
from strategies.sift import SiftMerge, joined, parted, set_model


def scrubbed(state: Any, client: int) -> dict[str, Any]:
    """A checkpoint's state without what it says of one client."""
    clean = dict(state)
    if "trained" in clean:
        clean["trained"] = [p for p in clean["trained"] if p != client]
    if "clusters" in clean:
        clean["clusters"] = {p: name for p, name in clean["clusters"].items() if p != str(client)}
    if "balance" in clean:
        counts = {p: rows for p, rows in clean["balance"]["counts"].items() if p != str(client)}
        clean["balance"] = {**clean["balance"], "counts": counts}
    return clean


def merged(request: Request) -> Checkpointed:
    """The last model less the client's part of every round's mean: the seed's formula, from the ledger."""
    saved, ledger = _last(request), request.ledger
    assert ledger is not None  # noqa: S101  # the request was checked
    whole = _strategy(request.config)
    whole.resume(saved)
    whole.begin_sum(saved.server_round)
    parts = whole.start_values(saved.server_round)
    rounds = (ledger.read(server_round) for server_round in ledger.rounds())
    values = merge(joined(parts), rounds, request.client).astype(np.float32)
    without = _strategy(request.new_config())
    set_model(without, parted(values, parts), saved.server_round)
    return _unmeasured(without, saved, request.client)


def exactly_merged(request: Request) -> tuple[Checkpointed, int]:
    """The merge of sign-fixed clients without one of them, to the byte as if it had never been in.

    Returns:
        The checkpoint, and the tokens that the client was trained on again: none where its update was kept.

    Raises:
        VerificationError: The client's update, trained anew, is not the one that was added.
        ConfigError: It would have to be trained anew, and its rows are on a node.
    """
    saved = _last(request)
    tau, tokens = _kept_update(request), 0
    if tau is None:
        tau, tokens = trained_again(request)
    without = _strategy(request.new_config())
    protection = without.privacy
    assert isinstance(protection, Unlearnable)  # noqa: S101  # somebody is removed
    merging = protection.inner
    assert isinstance(merging, SiftMerge)  # noqa: S101  # the request was checked
    merging.restore_arrays(
        {n.removeprefix(MERGING): v for n, v in saved.arrays.items() if n.startswith(MERGING)}
    )
    merging.remove(request.client, tau)
    merging.finish(without, saved.server_round)
    return _unmeasured(without, saved, request.client), tokens


def trained_again(request: Request) -> tuple[np.ndarray, int]:
    """The client's task vector [d], from its rows, the run's seed and nothing else, in this process; and its tokens.

    Raises:
        ConfigError: The client's rows are not on this machine.
        RunStoppedError: Its training failed.
    """
    config, runtime = request.config, request.config.runtime
    if runtime.name == "deployment":
        raise ConfigError(
            "action=unlearn method=exact_merge and runtime=deployment: the client's rows are on its node, so its "
            "update must be in the ledger; expected a run with unlearning=ledger"
        )
    alone = _strategy(config, partition_ids=[request.client])
    alone.hosting.refresh()
    grid = alone.hosting.grid
    messages = alone.configure_train(1, alone.arrays(), ConfigRecord(), grid)
    replies = stream(grid, messages, config.strategy.round_timeout_seconds, alone.observer.count)
    [reply] = by_client(messages, replies)
    if reply.error:
        raise RunStoppedError(f"client {request.client}: training again failed: {reply.error}")
    tau: np.ndarray = joined(alone.reply_values(reply, 1)) - joined(alone.start_values(1))
    return tau, int(reply.info["tokens"])


def _kept_update(request: Request) -> np.ndarray | None:
    if request.ledger is None or 1 not in request.ledger.rounds():
        return None
    contributions = request.ledger.read(1).contributions
    return next((c.update for c in contributions if c.client == request.client), None)


def _last(request: Request) -> Checkpointed:
    saved = checkpoints.at(request.source.checkpoints, request.config.num_rounds)
    if saved is None:
        raise ConfigError(
            f"{request.source.path}: expected a whole checkpoint of round {request.config.num_rounds}, got none"
        )
    return Checkpointed(saved.server_round, saved.arrays, saved.state)


def _strategy(config: RunConfig, partition_ids: list[int] | None = None) -> RoundStrategy:
    """The strategy of a run, over a node of this process that hosts every client."""
    facts = {"data-path": config.runtime.data_path, "model-path": config.runtime.model_path}
    recorder = Recorder(lambda text: None)
    grid = LoopbackGrid(app, 1, facts)  # type: ignore[arg-type]
    hosting = Hosting(grid, config.runtime.node_wait_seconds, lambda text: None, recorder.count)
    return build_strategy(
        config, hosting, recorder, task_kind=task_kind(config), partition_ids=partition_ids
    )


def _unmeasured(strategy: RoundStrategy, source: Checkpointed, client: int) -> Checkpointed:
    made = strategy.snapshot(source.server_round)
    state = {**scrubbed(source.state, client), "privacy": made.state["privacy"], UNMEASURED: True}
    return dataclasses.replace(made, state=state)
