"""Federated LoRA: one strategy, the averaging rule is a setting.

Downlink of a round: the global adapter (or, with one side shared, the side that changes) and the carried delta, if
the rule has one. Uplink: each client's trained factors. Nothing else crosses the wire.
"""

import dataclasses
from collections.abc import Mapping
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
    rescale,
    resize,
)
from fedllm_flwr.codecs import Shapes, encode_difference
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.models.adapters import (
    AdapterLayout,
    LoraSpec,
    Side,
    initial_factors,
    layer_shapes,
)
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.federation import StrategyConfig
from fedllm_flwr.settings.methods import FedLoraConfig
from strategies.exchange import ClientReply
from strategies.figures import training_figures
from strategies.observer import Checkpointed
from strategies.received import Part, Start, counted_values, received_values
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

    def set_up(self) -> None:
        """Build the global model's first state and what checks replies against it."""
        super().set_up()
        config = self.config
        method = config.method
        assert isinstance(method, FedLoraConfig)  # noqa: S101  # the table of strategies says so
        self.method = method
        self.spec = method.server_spec()
        self.shapes = layer_shapes(
            config.model.ref(config.runtime.model_path), method.target_modules
        )
        self.layout = AdapterLayout(self.shapes, self.spec.rank)
        held: Side = "b" if method.sharing == "b_only" else "both"
        self._held = AdapterLayout(self.shapes, self.spec.rank, held)
        seed = derive_seed(config.seed, "lora_a", 0)
        self._first = initial_factors(self.shapes, self.spec, seed)
        self.model = GlobalModel(self._first)
        self._optimizer = server_optimizer(config.strategy)
        self._rule: Rule = self._new_rule()
        self._starts: dict[LoraSpec, Start] = {}

    # What RoundStrategy asks for ---------------------------------------------------------------------------------

    def broadcast(
        self, server_round: int, *, train: bool
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The adapter side that clients lack, the carried delta, and this round's learning rate.

        Evaluation messages never leave anything out: what is measured is the model that the run exports.
        """
        parts: dict[str, np.ndarray] = {}
        if self._rule.sends_adapter:
            parts["adapter"] = self._held.pack(self.model.factors)
        flat, ranks = records.pack_delta(self.model.delta)
        if flat.size:
            parts["delta"] = flat
        body: dict[str, Any] = {"side-held": self._held.side, "delta-ranks": ranks}
        if train:
            if self.config.wire.sends_differences:
                parts = {name: self._encoded(name, values) for name, values in parts.items()}
            body["side"] = trained_side(self.method.sharing, server_round)
            body["learning-rate"] = self.learning_rate(server_round)
        return body, parts

    def begin_sum(self, server_round: int) -> None:
        """Start a new sum under the rule."""
        self._rule = self._new_rule()
        self._starts = {}

    def start_of(self, partition_id: int, server_round: int) -> Start:
        """Where a client began the round, on the side that the round trains, at its own rank and scaling."""
        spec = self.method.spec(partition_id)
        if spec not in self._starts:
            self._starts[spec] = self._start(spec, server_round)
        return self._starts[spec]

    def start_values(self, server_round: int) -> dict[str, np.ndarray]:
        """What the values of replies are counted from, by part, where all clients have one rank and scaling."""
        start = self.start_of(0, server_round)
        return {"adapter": start.counted_from(self.config.wire)}

    def reply_values(self, reply: ClientReply, server_round: int) -> dict[str, np.ndarray]:
        """The values that a reply counts as, by part.

        Raises:
            WireError, ShapeError: Names, codec or sizes are not what was asked for, or a value is not finite.
        """
        client = f"client {reply.partition_id}"
        layout = self._layout_of(reply.partition_id, server_round)
        if set(reply.parts) != {"adapter"}:
            raise WireError(f"{client}: expected one part 'adapter', got {sorted(reply.parts)}")
        part = Part(
            who=client,
            shapes=layout.shapes,
            start=lambda: self.start_of(reply.partition_id, server_round),
            why=f" (rank {layout.rank}, side {layout.side})",
        )
        flat = counted_values(self.config.wire, reply, "adapter", part)
        self._check_finite(client, layout, flat)
        return {"adapter": flat}

    def add_reply(self, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check names, sizes, values and counts, then add the factors to the sum."""
        flat = self.reply_values(reply, server_round)["adapter"]
        figures = training_figures(
            f"client {reply.partition_id}",
            reply.info,
            may_withhold=self.config.privacy.name == "sample",
        )
        weight = self.weight_of(reply, figures["num_examples"])
        spec = self.method.spec(reply.partition_id)
        layout = self._layout_of(reply.partition_id, server_round)
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

    def _layout_of(self, partition_id: int, server_round: int) -> AdapterLayout:
        """Of what a client trains and sends in a round."""
        rank = self.method.spec(partition_id).rank
        return AdapterLayout(self.shapes, rank, trained_side(self.method.sharing, server_round))

    def _known(self, name: str, values: np.ndarray) -> tuple[np.ndarray, Shapes]:
        """What clients know of a part before a message, and its shapes: the first adapter, of a delta nothing."""
        if name == "adapter":
            return self._held.pack(self._first), self._held.shapes
        return np.zeros_like(values), ((values.size,),)

    def _encoded(self, name: str, values: np.ndarray) -> np.ndarray:
        codec = self.config.wire.codec("downlink")
        return encode_difference(codec, values, *self._known(name, values))

    def _start(self, spec: LoraSpec, server_round: int) -> Start:
        side = trained_side(self.method.sharing, server_round)
        layout = AdapterLayout(self.shapes, spec.rank, side)
        if not self._rule.sends_adapter:
            seed = derive_seed(self.config.seed, "lora_a", server_round)
            fresh = layout.pack(initial_factors(self.shapes, spec, seed))
            return Start(fresh, fresh)
        values = self._held.pack(self.model.factors)
        decoded = received_values(self.config.wire, values, *self._known("adapter", values))
        received = self._held.unpack(decoded, self.spec.scaling, self._first)

        def fitted(adapter: Mapping[str, LoraFactors]) -> np.ndarray:
            return layout.pack(
                {n: rescale(resize(f, spec.rank), spec.scaling) for n, f in adapter.items()}
            )

        return Start(fitted(self.model.factors), fitted(received))

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
