"""Federated LoRA: one strategy, the averaging rule is a setting.

Downlink of a round: the global adapter (or, with one side shared, the side that changes) and the carried delta, if
the rule has one. Uplink: each client's trained factors. Nothing else crosses the wire.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord

from fedllm_flwr import records
from fedllm_flwr.averaging import (
    SERVER_OPTIMIZERS,
    LoraFactors,
    ServerOptimizer,
    State,
    beside_shared,
)
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.models.adapters import AdapterLayout, Side, initial_factors, layer_shapes
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.federation import StrategyConfig
from fedllm_flwr.settings.methods import FedLoraConfig
from strategies.exchange import ClientReply
from strategies.figures import training_figures
from strategies.hosting import Hosting
from strategies.observer import Checkpointed, Observer
from strategies.rounds import RoundStrategy
from strategies.rules import GlobalModel, Rule, make_rule


def trained_side(sharing: str, server_round: int) -> Side:
    """Which factors a round trains: both, B only (A stays the seeded draw), or B in odd and A in even rounds.

    Source:
        Sun et al. 2024 (FFA-LoRA) for ``b_only``; Chen et al. 2024 (RoLoRA), Algorithm 1 for ``alternating``.
    """
    if sharing == "both":
        return "both"
    return "b" if sharing == "b_only" or server_round % 2 == 1 else "a"


def server_optimizer(strategy: StrategyConfig) -> ServerOptimizer:
    """The server optimizer with the settings that the configuration overrides.

    Raises:
        ConfigError: A setting is outside the optimizer's range.
        ShapeError: Never.
    """
    optimizer = SERVER_OPTIMIZERS[strategy.server_optimizer]()
    names = {f.name for f in dataclasses.fields(optimizer)}  # type: ignore[arg-type]
    changes: dict[str, float] = {}
    if strategy.server_learning_rate > 0:
        changes["learning_rate"] = strategy.server_learning_rate
    if strategy.server_momentum >= 0:
        changes["momentum" if "momentum" in names else "beta_1"] = strategy.server_momentum
    return dataclasses.replace(optimizer, **changes)  # type: ignore[type-var]


class FedLora(RoundStrategy):
    """Federated LoRA under a rule of :mod:`strategies.rules` (see :class:`RoundStrategy` for the arguments)."""

    def __init__(
        self,
        config: RunConfig,
        hosting: Hosting,
        observer: Observer,
        *,
        partition_ids: Sequence[int] | None = None,
        task_kind: str = "classification",
    ) -> None:
        super().__init__(
            config, hosting, observer, partition_ids=partition_ids, task_kind=task_kind
        )
        method = config.method
        assert isinstance(method, FedLoraConfig)  # noqa: S101  # the table of strategies says so
        self.method = method
        self.spec = method.server_spec()
        self.shapes = layer_shapes(
            config.model.ref(config.runtime.model_path), method.target_modules
        )
        self.layout = AdapterLayout(self.shapes, self.spec.rank)
        seed = derive_seed(config.seed, "lora_a", 0)
        self._first = initial_factors(self.shapes, self.spec, seed)
        self.model = GlobalModel(self._first)
        self._optimizer = server_optimizer(config.strategy)
        self._rule: Rule = self._new_rule()

    # What RoundStrategy asks for ---------------------------------------------------------------------------------

    def broadcast(
        self, server_round: int, *, train: bool
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The adapter side that clients lack, the carried delta, and this round's learning rate."""
        parts: dict[str, np.ndarray] = {}
        held: Side = "b" if self.method.sharing == "b_only" else "both"
        if self._rule.sends_adapter:
            parts["adapter"] = AdapterLayout(self.shapes, self.spec.rank, held).pack(
                self.model.factors
            )
        flat, ranks = records.pack_delta(self.model.delta)
        if flat.size:
            parts["delta"] = flat
        body: dict[str, Any] = {"side-held": held, "delta-ranks": ranks}
        if train:
            body["side"] = trained_side(self.method.sharing, server_round)
            body["learning-rate"] = self.learning_rate(server_round)
        return body, parts

    def begin_sum(self, server_round: int) -> None:
        """Start a new sum under the rule."""
        self._rule = self._new_rule()

    def add_reply(self, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check names, sizes, values and counts, then add the factors to the sum."""
        client = f"client {reply.partition_id}"
        spec = self.method.spec(max(reply.partition_id, 0))
        side = trained_side(self.method.sharing, server_round)
        layout = AdapterLayout(self.shapes, spec.rank, side)
        if set(reply.parts) != {"adapter"}:
            raise WireError(f"{client}: expected one part 'adapter', got {sorted(reply.parts)}")
        flat = reply.parts["adapter"]
        if flat.size != layout.size:
            raise ShapeError(
                f"{client}: expected {layout.size} values (rank {spec.rank}, side {side}), got {flat.size}"
            )
        self._check_finite(client, layout, flat)
        figures = training_figures(client, reply.info)
        weight = self.weight_of(reply, figures["num_examples"])
        self._rule.add(self._beside(flat, layout, spec.scaling), weight, reply.partition_id)
        record = {"kind": "client", "round": server_round, "partition_id": reply.partition_id}
        return {**record, **figures, "rank": spec.rank}

    def finish_sum(self, server_round: int) -> None:
        """Close the sum into the next global model."""
        self.model = self._rule.finish(self.model, server_round)

    def checkpoint(self, server_round: int) -> Checkpointed:
        """Adapter, carried delta and server optimizer."""
        flat, ranks = records.pack_delta(self.model.delta)
        arrays = {"adapter": self.layout.pack(self.model.factors), "delta": flat}
        if self.model.optimizer is not None:
            arrays |= {
                f"optimizer/{name}": values
                for name, values in self.model.optimizer.arrays().items()
            }
        return Checkpointed(server_round, arrays, {"delta_ranks": ranks})

    def restore(self, saved: Checkpointed) -> None:
        """Go on from a checkpoint.

        Raises:
            ShapeError: The checkpoint holds another adapter.
        """
        if saved.arrays["adapter"].size != self.layout.size:
            raise ShapeError(
                f"checkpoint of round {saved.server_round}: expected an adapter of {self.layout.size} values, got "
                f"{saved.arrays['adapter'].size}"
            )
        moments = {
            name.removeprefix("optimizer/"): values
            for name, values in saved.arrays.items()
            if name.startswith("optimizer/")
        }
        self.model = GlobalModel(
            self.layout.unpack(saved.arrays["adapter"], self.spec.scaling),
            records.unpack_delta(saved.arrays["delta"], saved.state["delta_ranks"], self.shapes),
            State.from_arrays(moments) if moments else None,
        )

    def arrays(self) -> ArrayRecord:
        """The adapter and the carried delta, one flat array each."""
        saved = self.checkpoint(0).arrays
        return ArrayRecord({name: torch.from_numpy(saved[name]) for name in ("adapter", "delta")})  # type: ignore[arg-type]

    # Details -----------------------------------------------------------------------------------------------------

    def _new_rule(self) -> Rule:
        return make_rule(
            self.config.strategy.name, self.layout, self.spec.scaling, self._optimizer, self._first
        )

    def _beside(
        self, flat: np.ndarray, layout: AdapterLayout, scaling: float
    ) -> dict[str, LoraFactors]:
        """A client's update as whole factors; the side that it did not train is the server's."""
        if layout.side == "both":
            return layout.unpack(flat, scaling)
        # A client that trains A holds B times (server scaling / own scaling), so its A counts at the server's scaling.
        counted = scaling if layout.side == "b" else self.spec.scaling
        whole: dict[str, LoraFactors] = {}
        offset = 0
        for shape in layout.layers:
            size = layout.rank * (shape.in_features if layout.side == "a" else shape.out_features)
            values = flat[offset : offset + size]
            trained = (
                values.reshape(layout.rank, -1)
                if layout.side == "a"
                else values.reshape(-1, layout.rank)
            )
            offset += size
            whole[shape.name] = beside_shared(
                trained, self.model.factors[shape.name], side=layout.side, scaling=counted
            )
        return whole

    def _check_finite(self, client: str, layout: AdapterLayout, flat: np.ndarray) -> None:
        if np.isfinite(flat).all():
            return
        first = int(np.flatnonzero(~np.isfinite(flat))[0])
        offset = 0
        for shape in layout.layers:
            offset += AdapterLayout((shape,), layout.rank, layout.side).size
            if first < offset:
                raise WireError(
                    f"{client}, layer {shape.name}: expected finite values, got {flat[first]}"
                )
