"""Federated soft prompts: the shared prompt, and one of each cluster of clients, are averaged; personal ones stay away.

Downlink of a round: the shared prompt and the prompts of the clusters that a message's clients belong to. Uplink: the
same, trained. A shared prompt of ℓ tokens of width d is 4·ℓ·d bytes each way. Every part starts from one common value,
since averaging prompts position by position has a meaning only among prompts that began as the same.

Axes: ℓ soft tokens, d width of the model's embeddings.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord

from fedllm_flwr.averaging import RunningMean, State
from fedllm_flwr.averaging.checks import check_values
from fedllm_flwr.codecs import Shapes, encode_difference
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.fairness import GroupSums, QFairMean
from fedllm_flwr.models.prompt_start import embedding_table
from fedllm_flwr.settings.first_prompts import first_prompts, part_shape
from fedllm_flwr.settings.methods import FedPromptConfig
from strategies.exchange import ClientReply
from strategies.fedlora import server_optimizer
from strategies.figures import training_figures
from strategies.observer import Checkpointed
from strategies.received import Part, Start, counted_values, received_values
from strategies.rounds import RoundStrategy

CLUSTER = "cluster/"
START = "cluster-start"
NAME_LENGTH = 64
"""Characters that the name of a cluster may have."""


def first_parts(config: RunConfig) -> dict[str, np.ndarray]:
    """The common start values of the shared prompt and of a cluster's, from the run's seed.

    Raises:
        AssetError: The model's embedding is absent.
        ConfigError: The start does not fit the model.
    """
    method = config.method
    assert isinstance(method, FedPromptConfig)  # noqa: S101  # the table of strategies says so
    ref = config.model.ref(config.runtime.model_path)
    return first_prompts(method, ref, embedding_table(ref, config.runtime.dtype), config.seed)


class FedPrompt(RoundStrategy):
    """Weighted mean of soft prompts (see :class:`RoundStrategy` for the arguments).

    Source:
        Zhao et al. 2022 (FedPrompt, arXiv 2208.12268) and Guo et al. 2022 (PromptFL, arXiv 2208.11625) for the mean;
        the seed's personal prompts for [personal | shared | text]. Clusters differ from both.
    """

    def set_up(self) -> None:
        """Build the global model's first state and what checks replies against it."""
        super().set_up()
        config = self.config
        assert isinstance(config.method, FedPromptConfig)  # noqa: S101  # the table of strategies says so
        self.method = config.method
        self._first = first_parts(config)
        self._cluster_start = self._first.get("cluster")
        self.parts: dict[str, np.ndarray] = {"shared": self._first["shared"]}
        self.clusters: dict[int, str] = {}
        self.trained_ids: set[int] = set()
        self._optimizer = server_optimizer(config.strategy)
        self._moments: State | None = None
        self._sums: dict[str, RunningMean] = {}
        self._fair: QFairMean | None = None
        self._starts: dict[str, Start] = {}

    # What RoundStrategy asks for ---------------------------------------------------------------------------------

    def broadcast(
        self, server_round: int, *, train: bool
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The shared prompt, every cluster's, the clusters' common start, and this round's learning rate.

        Evaluation messages never leave anything out: what is measured is the prompt that the run exports.
        """
        parts = dict(self.parts)
        if self._cluster_start is not None:
            parts[START] = self._cluster_start
        if not train:
            return {}, parts
        if self.config.wire.sends_differences:
            codec = self.config.wire.codec("downlink")
            parts = {n: encode_difference(codec, v, *self._known(n)) for n, v in parts.items()}
        return {"learning-rate": self.learning_rate(server_round)}, parts

    def parts_for(
        self, partition_ids: Sequence[int], parts: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Clients whose cluster is known get its prompt; for others, all clusters' and the common start."""
        if self._cluster_start is None or not all(p in self.clusters for p in partition_ids):
            return parts
        wanted = {CLUSTER + self.clusters[p] for p in partition_ids}
        needed = {n: v for n, v in parts.items() if n in wanted or not n.startswith(CLUSTER)}
        if wanted <= set(needed):
            needed.pop(START, None)
        return needed

    def begin_sum(self, server_round: int) -> None:
        """Start a new sum for each part."""
        self._sums, self._starts = {}, {}
        fairness = self.config.fairness
        self._fair = None
        if fairness.name == "q_ffl":
            rate = self.learning_rate(server_round)
            size = self.parts["shared"].size
            self._fair = QFairMean(size, q=fairness.q, learning_rate=rate)

    def start_of(self, key: str) -> Start:
        """Where clients began the round with the shared prompt or that of a cluster."""
        if key not in self._starts:
            own, (known, shapes) = self._value(key), self._known(key)
            self._starts[key] = Start(own, received_values(self.config.wire, own, known, shapes))
        return self._starts[key]

    def start_values(self, server_round: int) -> dict[str, np.ndarray]:
        """What the values of replies are counted from, by part, where there are no clusters."""
        return {"shared": self.start_of("shared").counted_from(self.config.wire)}

    def reply_values(self, reply: ClientReply, server_round: int) -> dict[str, np.ndarray]:
        """The values that a reply counts as, by part.

        Raises:
            WireError, ShapeError: Names, codec or sizes are not what was asked for, or a value is not finite.
        """
        client, cluster = f"client {reply.partition_id}", self._cluster_of(reply)
        expected = ["shared"] if self._cluster_start is None else ["cluster", "shared"]
        if sorted(reply.parts) != expected:
            raise WireError(f"{client}: expected the parts {expected}, got {sorted(reply.parts)}")
        values = {}
        for name in reply.parts:
            key = self._key(name, cluster)
            part = Part(
                f"{client}, part {name}",
                self._known(key)[1],
                lambda k=key: self.start_of(k),  # type: ignore[misc]
            )
            values[name] = counted_values(self.config.wire, reply, name, part)
            check_values(values[name], part.who)
        return values

    def add_reply(self, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check names, sizes, values and counts, then add the prompts to their sums."""
        name = self._cluster_of(reply)
        parts = self.reply_values(reply, server_round)
        figures = training_figures(
            f"client {reply.partition_id}",
            reply.info,
            may_withhold=self.config.privacy.name == "sample",
        )
        weight = self.weight_of(reply, figures["num_examples"])
        if self._fair is not None:
            sums = sum(self.balance.checked(reply).values(), GroupSums())
            update = parts["shared"] - self.parts["shared"]
            self._fair.add(update, sums.mean_loss, weight=weight, client=reply.partition_id)
        else:
            for part, values in parts.items():
                key = self._key(part, name)
                total = self._sums.setdefault(key, RunningMean(values.size))
                total.add(values, weight, client=reply.partition_id)
        record = {"kind": "client", "round": server_round, "partition_id": reply.partition_id}
        self._note_loss(reply, server_round)
        if name:
            self.clusters[reply.partition_id] = name
            record["cluster"] = name
        return {**record, **figures}

    def finish_sum(self, server_round: int) -> None:
        """The means become the next prompts, through the server optimizer; clusters without a client stay."""
        if self._fair is not None:
            self.parts = {"shared": self.parts["shared"] + self._fair.result()}
            return
        before = {key: self._value(key) for key in self._sums}
        means = {key: total.result() for key, total in self._sums.items()}
        fresh = self._optimizer.init(before)
        held = self._moments or State(0, {})
        moments = {m: {**new, **{n: v for n, v in held.moments.get(m, {}).items() if n in new}}
                   for m, new in fresh.moments.items()}  # fmt: skip
        state, after = self._optimizer.apply(
            State(held.server_round, moments), before, means, server_round
        )
        self._moments = State(
            server_round,
            {m: {**held.moments.get(m, {}), **new} for m, new in state.moments.items()},
        )
        self.parts = {**self.parts, **after}

    def heard(self, reply: ClientReply) -> None:
        """Learn where a client belongs."""
        if self._cluster_start is not None:
            self.clusters[reply.partition_id] = self._cluster_of(reply)

    def checkpoint(self, server_round: int) -> Checkpointed:
        """Every part, the server optimizer, and which cluster a client is in."""
        arrays = dict(self.parts)
        if self._moments is not None:
            arrays |= {f"optimizer/{n}": values for n, values in self._moments.arrays().items()}
        clusters = {str(client): name for client, name in sorted(self.clusters.items())}
        state = {"clusters": clusters, "trained": sorted(self.trained_ids)}
        return Checkpointed(server_round, arrays, state)

    def restore(self, saved: Checkpointed) -> None:
        """Go on from a checkpoint.

        Raises:
            ShapeError: The checkpoint holds another prompt.
        """
        found, wanted = saved.arrays["shared"].size, self.parts["shared"].size
        if found != wanted:
            raise ShapeError(
                f"checkpoint of round {saved.server_round}: expected a prompt of {wanted} values, got {found}"
            )
        moments = {
            name.removeprefix("optimizer/"): values
            for name, values in saved.arrays.items()
            if name.startswith("optimizer/")
        }
        self._moments = State.from_arrays(moments) if moments else None
        self.parts = {n: v for n, v in saved.arrays.items() if not n.startswith("optimizer/")}
        self.trained_ids = set(saved.state["trained"])
        self.clusters = {int(client): name for client, name in saved.state["clusters"].items()}

    def arrays(self) -> ArrayRecord:
        """Every part, one flat array each."""
        return ArrayRecord({name: torch.from_numpy(values) for name, values in self.parts.items()})  # type: ignore[arg-type]

    def _value(self, part: str) -> np.ndarray:
        """A part's value; a cluster that has none yet is at the common start."""
        found = self.parts.get(part, self._cluster_start)
        assert found is not None  # noqa: S101  # only clustered runs have parts that do not exist yet
        return found

    @staticmethod
    def _key(part: str, cluster: str) -> str:
        return part if part == "shared" else CLUSTER + cluster

    def _known(self, key: str) -> tuple[np.ndarray, Shapes]:
        """What clients know of a part before a message, and its shapes."""
        part = "shared" if key == "shared" else "cluster"
        first = self._first[part]
        return first, (part_shape(self.method, part, first.size),)

    def _note_loss(self, reply: ClientReply, server_round: int) -> None:
        """Say so when a client that has trained before comes without its personal prompt."""
        if reply.info.get("personal") == "new" and reply.partition_id in self.trained_ids:
            self.observer.evaluated(
                {
                    "kind": "event",
                    "round": server_round,
                    "text": f"client {reply.partition_id} has lost its personal prompt and begins a new one; name a "
                    "folder in its node's state-path",
                }
            )
        self.trained_ids.add(reply.partition_id)

    def _cluster_of(self, reply: ClientReply) -> str:
        """The cluster that a client says it belongs to; empty where there are none.

        Raises:
            WireError: It names none, or no name.
        """
        if self._cluster_start is None:
            return ""
        name: Any = reply.info.get("cluster")
        if not isinstance(name, str) or not 0 < len(name) <= NAME_LENGTH:
            raise WireError(
                f"client {reply.partition_id}: expected the name of its cluster, got {name!r:.80}"
            )
        return name
