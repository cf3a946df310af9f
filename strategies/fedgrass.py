"""Federated full-weight training: clients change a few rows of each matrix, the server averages them row by row.

The global model is the backbone and every row that a round has changed so far. Clients are stateless, so all of these
rows go down with each training and evaluation message: 4·Σ k·n bytes, k growing from r towards all rows of a matrix as
rounds pick new ones. Up go 4·Σ r·n bytes, and nothing else of size.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedllm_flwr import records
from fedllm_flwr.averaging import RunningMean
from fedllm_flwr.codecs import count_values
from fedllm_flwr.errors import ShapeError, WireError
from fedllm_flwr.grass.averaging import RowMean
from fedllm_flwr.grass.base import BaseRule
from fedllm_flwr.grass.packing import bitmap, indices_of, pack, scales_text, unpack
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.grass.selection import Rows, check_rank, choose_rows
from fedllm_flwr.models.shapes import LayerShape, layer_shapes
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.settings.grass import FedGrassConfig
from strategies.chain import checked_part
from strategies.exchange import (
    COUNTED,
    ClientReply,
    by_client,
    checked_number,
    messages_for,
    stream,
)
from strategies.figures import training_figures
from strategies.grass_state import restored, saved_arrays, saved_counts
from strategies.observer import Checkpointed
from strategies.rounds import RoundStrategy

STATE, ROWS, NORMS = "state", "rows", "norms"
"""Parts of messages: rows changed so far, a client's changes, and its norms."""


class FedGrass(RoundStrategy):
    """Weighted mean of the changes of rows (see :class:`RoundStrategy` for the arguments).

    Attributes:
        changed: By layer what all changed rows differ by from the backbone, float32.
        chosen: By layer the rows that clients train, where the server picks them.

    Source:
        Muhamed et al. 2024 (GRASS), section 3, for the rows; that clients share them, so that their changes have one
        sum, is ours. The norms that pick them are weighted means over clients of the squared norms of each client's own
        gradient, which are never below those of the mean gradient and equal them where clients agree.
    """

    def set_up(self) -> None:
        """Build the global model's first state and what checks replies against it."""
        super().set_up()
        config = self.config
        method = config.method
        assert isinstance(method, FedGrassConfig)  # noqa: S101  # the table of strategies says so
        self.method = method
        shapes = layer_shapes(config.model.ref(config.runtime.model_path), method.target_modules)
        check_start(method, shapes)
        self.heights = {shape.name: shape.out_features for shape in shapes}
        self.columns = {shape.name: shape.in_features for shape in shapes}
        self.changed: dict[str, RowUpdate] = {}
        self.chosen: dict[str, Rows] = {}
        self._chosen_in = 0
        self._mean = RowMean(method.row_average)
        self._deadline = 0.0

    # What RoundStrategy asks for ---------------------------------------------------------------------------------

    def broadcast(
        self, server_round: int, *, train: bool
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """All changed rows, what clients are to do, and this round's learning rate.

        Under a codec that leaves something out, training messages carry what it makes of the changes. Clients answer
        with changes of their own, which are added here to the rows as they are, so nothing is lost on the way down.
        """
        parts = {STATE: pack(self.changed)} if self.changed else {}
        if train and parts and self.config.wire.sends_differences:
            shapes = [update.values.shape for _, update in sorted(self.changed.items())]
            parts[STATE] = self.config.wire.codec("downlink").encode(parts[STATE], shapes)
        body: dict[str, Any] = {
            "changed": {n: bitmap(u.indices, self.heights[n]) for n, u in self.changed.items()}
        }
        if train:
            self._choose_blindly(server_round)
            body["learning-rate"] = self.learning_rate(server_round)
            body["stage"] = NORMS if self._is_due(server_round) else "train"
            body["rows"] = {n: bitmap(r.indices, self.heights[n]) for n, r in self.chosen.items()}
            body["scales"] = {
                n: scales_text(r.scales) for n, r in self.chosen.items() if (r.scales != 1).any()
            }
        return body, parts

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages that begin the round; both of its exchanges share its deadline."""
        self._deadline = time.monotonic() + self.config.strategy.round_timeout_seconds
        return super().configure_train(server_round, arrays, config, grid)

    def trained(self, server_round: int, replies: Iterator[ClientReply]) -> Iterator[ClientReply]:
        """Where the server is to pick rows by norms: pick them, and only then let clients train."""
        if not self._is_due(server_round):
            yield from replies
            return
        asked = list(self._left_to_train)
        mean, good = RunningMean(sum(self.heights.values())), []
        for reply in replies:
            if reply.stray or reply.error:
                yield reply
                continue
            try:
                self._add_norms(mean, reply)
            except (WireError, ShapeError) as error:
                yield ClientReply(reply.partition_id, {}, {}, str(error))
                continue
            good.append(reply.partition_id)
        if not self._enough(len(good)):
            why = f"its norms were not used, since {len(good)} of {len(asked)} clients sent any"
            yield from (ClientReply(p, {}, {}, f"client {p}: {why}") for p in good)
            return
        self._choose(self._by_layer(mean.result()), server_round)
        yield from self._ask_to_train(server_round, good)

    def begin_sum(self, server_round: int) -> None:
        """Start a new sum."""
        self._mean = RowMean(self.method.row_average)

    def start_values(self, server_round: int) -> dict[str, np.ndarray]:
        """Nothing has changed yet, in the rows of the round; where clients have rows of their own there is no one set.

        Raises:
            ConfigError: They do, or the rows are picked by their norms.
        """
        self._check_one_set()
        self._choose_blindly(server_round)
        size = sum(len(r) * self.columns[name] for name, r in self._known_rows().items())
        return {ROWS: np.zeros(size, np.float32)}

    def reply_values(self, reply: ClientReply, server_round: int) -> dict[str, np.ndarray]:
        """A client's changes.

        Raises:
            WireError, ShapeError: As of :meth:`add_reply`.
            ConfigError: As of :meth:`start_values`.
        """
        self._check_one_set()
        return {ROWS: self._values(reply, self._indices(f"client {reply.partition_id}", reply))}

    def add_reply(self, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check figures, which rows they are, sizes and values, then add the changes."""
        client = f"client {reply.partition_id}"
        figures = training_figures(client, reply.info)
        weight = self.weight_of(reply, figures["num_examples"])
        indices = self._indices(client, reply)
        updates = unpack(self._values(reply, indices), indices, self.columns)
        self._mean.add(updates, weight)
        record = {"kind": "client", "round": server_round, "partition_id": reply.partition_id}
        return {**record, **figures, "rows": sum(len(u.indices) for u in updates.values())}

    def finish_sum(self, server_round: int) -> None:
        """Add the mean to the changed rows."""
        for name, update in self._mean.result().items():
            before = self.changed.get(name)
            self.changed[name] = update if before is None else before.plus(update)

    def checkpoint(self, server_round: int) -> Checkpointed:
        """The changed rows, and those that clients train."""
        state = saved_counts(self.changed, self.chosen) | {"chosen_in": self._chosen_in}
        return Checkpointed(server_round, saved_arrays(self.changed, self.chosen), state)

    def restore(self, saved: Checkpointed) -> None:
        """Go on from a checkpoint.

        Raises:
            ShapeError: The checkpoint holds rows of other matrices.
        """
        shapes = {name: (rows, self.columns[name]) for name, rows in self.heights.items()}
        self.changed, self.chosen = restored(saved, shapes)
        self._chosen_in = int(saved.state["chosen_in"])

    def arrays(self) -> ArrayRecord:
        """The changed rows as one flat array."""
        return ArrayRecord({ROWS: torch.from_numpy(pack(self.changed))})  # type: ignore[arg-type]

    # Details -----------------------------------------------------------------------------------------------------

    def _is_due(self, server_round: int) -> bool:
        """Whether rows are to be picked before clients can train; a retry keeps those that the round has."""
        if not self.method.picks_at_server or (self.chosen and self._chosen_in == server_round):
            return False
        return not self.chosen or (server_round - 1) % self.method.refresh_rounds == 0

    def _choose_blindly(self, server_round: int) -> None:
        """Pick rows where it is time to and nobody's gradient is asked for."""
        if self._is_due(server_round) and not self.method.reads_norms:
            equal = {name: np.ones(rows) for name, rows in self.heights.items()}
            self._choose(equal, server_round)

    def _choose(self, norms: dict[str, np.ndarray], server_round: int) -> None:
        method, seed = self.method, self.config.seed
        self.chosen = {
            name: choose_rows(
                values, method.rank, method.rule, numpy_generator(seed, "rows", server_round, name)
            )
            for name, values in norms.items()
        }
        self._chosen_in = server_round

    def _enough(self, clients: int) -> bool:
        cohort = len(self._round_figures["cohort"])
        return clients > 0 and clients >= self.config.strategy.min_fraction * cohort

    def _add_norms(self, mean: RunningMean, reply: ClientReply) -> None:
        """Add a client's norms.

        Raises:
            WireError, ShapeError: They are not what was asked for.
        """
        client = f"client {reply.partition_id}"
        values = checked_part(reply, NORMS, sum(self.heights.values()))
        if (values < 0).any():
            raise WireError(f"{client}: expected squared norms >= 0, got {values.min()}")
        count = checked_number(client, reply.info, "num-examples", whole=True)
        mean.add(values, self.weight_of(reply, count), client=reply.partition_id)

    def _by_layer(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        stops = np.cumsum([self.heights[name] for name in sorted(self.heights)])
        return dict(zip(sorted(self.heights), np.split(flat, stops[:-1]), strict=True))

    def _ask_to_train(
        self, server_round: int, partition_ids: Sequence[int]
    ) -> Iterator[ClientReply]:
        """The second exchange of a round."""
        body, parts = self.broadcast(server_round, train=True)
        messages = messages_for(
            self.hosting,
            self.contents(parts),
            {**self._common(server_round), **body, **self.balance.instruction()},
            message_type=records.EXCHANGE,
            partition_ids=partition_ids,
            clients_per_wave=self.config.runtime.clients_per_wave,
            server_round=server_round,
        )
        left = self._deadline - time.monotonic()
        replies = stream(self.hosting.grid, messages, left, self.observer.count)
        yield from by_client(messages, replies)

    def _values(self, reply: ClientReply, indices: Mapping[str, np.ndarray]) -> np.ndarray:
        """What a client has changed, one row after the other, float32 or wider [n].

        Raises:
            WireError, ShapeError: Codec or sizes are not what was asked for, or a value is not finite.
        """
        client, wire = f"client {reply.partition_id}", self.config.wire
        shapes = [(len(indices[name]), self.columns[name]) for name in sorted(indices)]
        if reply.parts and reply.codec not in (COUNTED, wire.uplink):
            raise WireError(f"{client}: expected the codec {wire.uplink}, got {reply.codec}")
        if wire.sends_updates and reply.codec != COUNTED and ROWS in reply.parts:
            try:
                decoded = wire.codec("uplink").decode(reply.parts[ROWS], shapes)
            except WireError as error:
                raise WireError(f"{client}, part {ROWS}: {error}") from error
            reply = replace(reply, parts={**reply.parts, ROWS: decoded})
        return checked_part(reply, ROWS, count_values(shapes))

    def _check_one_set(self) -> None:
        """Refuse to see one set of values where rows are picked by their norms, or by each client."""
        method = self.method
        if method.picks_at_clients or (method.picks_at_server and method.reads_norms):
            raise self._without_values()

    def _known_rows(self) -> dict[str, np.ndarray]:
        """The rows that all clients train."""
        if self.method.picks_at_server:
            return {name: rows.indices for name, rows in self.chosen.items()}
        return {name: np.arange(rows) for name, rows in self.heights.items()}

    def _indices(self, client: str, reply: ClientReply) -> dict[str, np.ndarray]:
        """Which rows a client's changes are of: known here, but where it has picked them."""
        if not self.method.picks_at_clients:
            return self._known_rows()
        told = reply.info.get("rows")
        if not isinstance(told, dict) or set(told) != set(self.heights):
            raise WireError(
                f"{client}, rows: expected those of {len(self.heights)} layers, got {told!r:.40}"
            )
        found = {
            name: indices_of(told[name], rows, f"{client}, layer {name}")
            for name, rows in self.heights.items()
        }
        steps = self.config.client.local_steps or reply.info["steps"]
        most = self.method.rank * -(-steps // self.method.refresh_steps)
        for name, rows in found.items():
            if len(rows) > most:
                raise WireError(
                    f"{client}, layer {name}: expected at most {most} rows of {steps} steps, got {len(rows)}"
                )
        return found


def check_start(method: FedGrassConfig, shapes: Sequence[LayerShape]) -> None:
    """Refuse, before anyone is asked, what every client would fail at.

    Raises:
        ConfigError: The rank is above a matrix's rows, or bitsandbytes is needed and not installed.
    """
    if method.eight_bit:
        BaseRule(name="adam8bit")
    for shape in shapes:
        if method.trainer != "dense":
            rows = shape.width if method.trainer == "galore" else shape.out_features
            check_rank(method.rank, rows, f"method.rank, layer {shape.name}")
