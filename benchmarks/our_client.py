"""A client message of this project: a loaded backbone, adapter in, local training, adapter out.

As a program it is a worker process for the memory measurement of `second_worker.py`.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear
from workload import (
    ALPHA,
    CLIP_NORM,
    LEARNING_RATE,
    RANK,
    TARGET_MODULES,
    WORKER_SHAPE,
    Shape,
    serve_as_worker,
)

from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, initial_factors, layer_shapes
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import Share, collate
from fedllm_flwr.training.local import ClientJob, LocalResult, train
from fedllm_flwr.training.loop import forward_backward, make_optimizer
from fedllm_flwr.training.settings import LocalSettings
from fedllm_flwr.training.stacks import make_stack

MODEL = ModelRef(name="smollm2_135m")
SPEC = LoraSpec(rank=RANK, alpha=ALPHA, target_modules=TARGET_MODULES)
SETTINGS = LocalSettings(learning_rate=LEARNING_RATE, clip_norm=CLIP_NORM)


class OurClient:
    """What our client keeps between messages.

    Attributes:
        backbone: The loaded model.
        factors: The adapter that each message brings.
    """

    def __init__(self) -> None:
        self.backbone: Backbone = load(MODEL, threads=1)
        shapes = layer_shapes(MODEL, SPEC.target_modules)
        self.factors = initial_factors(shapes, SPEC, seed=0)
        self._layout = AdapterLayout(shapes, SPEC.rank)

    def message(self, shape: Shape, clients: int = 1) -> Callable[[], list[LocalResult]]:
        """A call that trains clients, as often as it is made."""
        adapter = self._layout.pack(self.factors)
        jobs = [
            ClientJob(client, _rows(shape, client), adapter, SPEC, seed=client)
            for client in range(clients)
        ]
        settings = replace(SETTINGS, batch_size=shape.batch)
        return lambda: train(self.backbone, jobs, settings)

    def bare_steps(self, shape: Shape) -> Callable[[], None]:
        """Only the passes and updates of a message; everything else is done beforehand."""
        rows = _rows(shape, 0)
        stack = make_stack(self.backbone, SPEC, 1, "both")
        stack.load(0, self._layout.pack(self.factors))
        parameters = stack.parameters(0)
        optimizer = make_optimizer(parameters, SETTINGS)
        weight = 1 / (shape.batch * shape.targets)
        batches = [
            collate([Share(rows[start : start + shape.batch], weight)], self.backbone.device)
            for start in range(0, shape.rows, shape.batch)
        ]

        def steps() -> None:
            with stack.active():
                stack.bind([0], [0])
                for batch in batches:
                    forward_backward(self.backbone, stack, batch, None)
                    nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
                    optimizer.step()
                    optimizer.zero_grad()

        return steps

    def frozen_products(self, shape: Shape) -> Callable[[], None]:
        """Only the products with frozen weights that an exact gradient of these rows needs.

        No client that computes the same gradient with these kernels can cost less.
        """
        backbone = self.backbone
        weights = [layer.weight for layer in backbone.linear_layers.values()]
        positions = shape.batch * shape.length
        states = {
            width: torch.ones(positions, width, dtype=backbone.dtype)
            for weight in weights
            for width in weight.shape
        }
        head = backbone.head_weight()
        chosen = torch.ones(shape.batch * shape.targets, head.shape[1], dtype=backbone.dtype)

        def products() -> None:
            with torch.no_grad():
                for _ in range(shape.rows // shape.batch):
                    for weight in weights:
                        linear(states[weight.shape[1]], weight)
                        states[weight.shape[0]] @ weight
                    (chosen @ head.t()) @ head

        return products


def _rows(shape: Shape, client: int) -> list[Encoded]:
    """Rows that feed exactly the tokens, and have exactly the targets, of the usual client's."""
    positions = np.arange(shape.length - 1 - shape.targets, shape.length - 1)
    return [
        Encoded(
            row_id=str(index),
            input_ids=ids.astype(np.int32),
            predict_from=positions.astype(np.int32),
            targets=ids[positions + 1].astype(np.int32),
            label=-1,
            characters=1,
        )
        for index, ids in enumerate(shape.tokens(client))
    ]


if __name__ == "__main__":
    serve_as_worker(OurClient().message(WORKER_SHAPE))
