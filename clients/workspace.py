"""What a worker process keeps between messages: the frozen backbone, the data and its tokens.

The caches live in this module and in ``fedllm_flwr.models.backbone``, which worker processes import; a cache in
``__main__`` would be shipped by value with every message and lost.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from transformers import PreTrainedTokenizerBase

from clients.shadow import shadowed
from fedllm_flwr import records
from fedllm_flwr.config import RunConfig, run_config
from fedllm_flwr.errors import AssetError, DataError, WireError
from fedllm_flwr.models import backbone as backbones
from fedllm_flwr.models.adapters import LayerShape, layer_shapes
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.tokenizers import load_tokenizer
from fedllm_flwr.settings.methods import FedLoraConfig, FedResPromptConfig
from fedllm_flwr.settings.runtime import DATA_PATH_VARIABLE, MODEL_PATH_VARIABLE, place_of
from fedllm_flwr.tasks.base import SPLITS, Task, TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.encode import Encoded, Encoder, Loss, build_encoder
from fedllm_flwr.tasks.partitions import ClientRows, partition
from fedllm_flwr.training.frozen_states import keep_at_most

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Workspace:
    """One configuration on one node.

    Attributes:
        config: The run, as the server sent it.
        task: The data set.
        clients: Every client's rows, by partition id.
    """

    config: RunConfig
    task: Task
    clients: tuple[ClientRows, ...]

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen model, shared by every client of this process; where the server holds it, nobody asks."""
        runtime = self.config.runtime
        return backbones.load(
            self.config.model.ref(runtime.model_path),
            dtype=runtime.dtype,
            device=runtime.device,
            threads=runtime.threads,
            max_tokens=self.config.task.max_tokens,
        )

    def set_switches(self) -> None:
        """Set what holds for the whole process as this run wants it: another run's message may have come between."""
        threads = self.config.runtime.threads
        keep_at_most(self.config.runtime.state_cache_mib)
        if self.is_split:
            torch.set_num_threads(threads)
        else:
            self.backbone.kernels.apply(threads)

    @cached_property
    def is_split(self) -> bool:
        """Whether the model is at the server and this node has none of its layers."""
        return isinstance(self.config.method, FedResPromptConfig)

    @cached_property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The layers that LoRA adapters attach to."""
        method = self.config.method
        assert isinstance(method, FedLoraConfig)  # noqa: S101  # only LoRA clients ask
        return layer_shapes(self.backbone.ref, method.target_modules)

    @cached_property
    def fingerprint(self) -> str:
        """The configuration's, computed once and not for every message."""
        return self.config.fingerprint()

    def rows(self, partition_id: int) -> ClientRows:
        """One client's rows; ``records.POOLED`` stands for all of them."""
        if partition_id != records.POOLED:
            return self.clients[partition_id]
        together = {
            split: tuple(r for c in self.clients for r in getattr(c, split)) for split in SPLITS
        }
        return ClientRows(records.POOLED, "all clients", **together)

    def encoder(self, template: str = "") -> Encoder:
        """Rows to tokens under a template; by default the configured one."""
        task, runtime = self.config.task, self.config.runtime
        ref = self.config.model.ref(runtime.model_path)
        return _encoder(
            task.options(runtime.data_path),
            self.config.rows_seed,
            load_tokenizer(ref, runtime.dtype) if self.is_split else self.backbone.tokenizer,
            template or task.template,
            task.loss,
            task.max_tokens,
        )

    def encoded(self, partition_id: int, split: str, template: str = "") -> Sequence[Encoded]:
        """One client's rows of one split as tokens."""
        return self.encoder(template).encode(getattr(self.rows(partition_id), split))


@dataclass(frozen=True)
class Asked:
    """A message, read."""

    work: Workspace
    body: dict[str, Any]
    parts: dict[str, np.ndarray]

    @property
    def partition_ids(self) -> list[int]:
        """The clients that the message is for."""
        return [int(p) for p in self.body["partition-ids"]]


def read(message: Message, context: Context) -> Asked:
    """Read a message and open the workspace that it needs.

    Args:
        message: A training or evaluation message.
        context: The node's context; its node config may set ``device``, ``data-path`` and ``model-path``.

    Raises:
        WireError: Versions or fingerprints differ, or the message asks for clients that this node does not host.
        ConfigError: The configuration is not valid here (say, the node has no such device).
        DataError: The node cannot use its data; the reason stays in the node's own log.
        AssetError: The node cannot read its model or a package; so does that reason.
    """
    body, parts = records.read(message, records.INSTRUCTION)
    facts = context.node_config
    tree = body["config"]
    tree["runtime"]["device"] = str(facts.get("device", tree["runtime"]["device"]))
    tree["runtime"]["data_path"] = str(
        facts.get("data-path", os.environ.get(DATA_PATH_VARIABLE, ""))
    )
    tree["runtime"]["model_path"] = str(
        facts.get("model-path", os.environ.get(MODEL_PATH_VARIABLE, ""))
    )
    try:
        work = open_workspace(json.dumps(tree, sort_keys=True))
    except DataError as error:
        LOG.error("%s", error)  # it may quote a row or a path, and an error travels to the server
        raise DataError("this node cannot use its data; its own log says why") from None
    except (AssetError, OSError) as error:
        LOG.error("%s", error)  # so may this: a node's folders are its own
        raise AssetError(
            "this node cannot read its model or a package; its own log says why"
        ) from None

    work.set_switches()
    if work.fingerprint != body["fingerprint"]:
        raise WireError(
            f"fingerprint: this node reads the configuration as {work.fingerprint}, the server as "
            f"{body['fingerprint']}; install the same version of fedllm-flwr on both"
        )
    place, total = place_of(context.node_config)
    if work.config.partition.name == "site" and total != len(work.clients):
        raise WireError(
            f"partition=site: expected one client for each of the {total} nodes, got {len(work.clients)} clients"
        )
    for partition_id in body["partition-ids"]:
        if partition_id != records.POOLED and not 0 <= partition_id < len(work.clients):
            raise WireError(
                f"there are {len(work.clients)} clients: asked for client {partition_id}"
            )
        if partition_id != records.POOLED and partition_id % total != place:
            raise WireError(
                f"node with partition-id {place} of {total}: asked for client {partition_id}, which it does not host"
            )
    return Asked(work, body, parts)


@lru_cache(maxsize=4)
def open_workspace(config_json: str) -> Workspace:
    """Load model, data and partition of a configuration, once per process."""
    config = run_config(json.loads(config_json))
    task = load_task(config.task.options(config.runtime.data_path), config.rows_seed)
    clients = shadowed(config, partition(task, config.partition, config.rows_seed))
    work = Workspace(config, task, clients)
    method = config.method
    if isinstance(method, FedResPromptConfig):
        if method.server_model != "surrogate":  # which has no tokens
            work.encoder()
    else:
        work.backbone  # noqa: B018  # a node without its model fails here, for all of its clients
    return work


@lru_cache(maxsize=16)
def _encoder(
    options: TaskOptions,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    loss: Loss,
    max_tokens: int,
) -> Encoder:
    """Kept apart from the workspace, so that runs that differ in a learning rate share their tokens."""
    return build_encoder(
        load_task(options, seed), tokenizer, template=template, loss=loss, max_tokens=max_tokens
    )
