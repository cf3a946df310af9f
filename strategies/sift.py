"""One merge of clients that trained alone under fixed signs, from which any of them can be taken out to the byte.

What crosses the wire is what the method sends anyway. The server counts each client's task vector τ, what it ended with
less where all began, in whole numbers; the method's own sum is replaced by one reply that holds start + Σ τ / T. Each
client is served its own mask of it, start + (m · Σ τ) / T; what a run exports has no mask.

Axes: d values of all parts together, T clients.

Source:
    Kuo et al. 2025 (arXiv 2504.04626), SIFT-Masks. Differs in that the server derives the masks from the updates that
    it is sent and keeps them, d / 8 bytes a client, and in that sums are of whole numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import WireError
from fedllm_flwr.settings.unlearning import SERVED, run_signs
from fedllm_flwr.unlearning.exact_merge import ExactSum
from fedllm_flwr.unlearning.signs import mask_of, pack_mask, served, unpack_mask
from strategies.exchange import ClientReply
from strategies.method import FederatedMethod
from strategies.private import NO_FIGURES, Unprotected

MASK = "mask/"
START = "start"


def joined(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Parts as one flat array, in the order of their names."""
    return np.concatenate([parts[name] for name in sorted(parts)])


def parted(flat: np.ndarray, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undo :func:`joined`, into parts of these names and sizes."""
    parts, begin = {}, 0
    for name in sorted(like):
        parts[name] = flat[begin : begin + like[name].size]
        begin += like[name].size
    return parts


def set_model(method: FederatedMethod, parts: Mapping[str, np.ndarray], server_round: int) -> None:
    """Make these values the next global model, as if one client had sent them and no other."""
    method.begin_sum(server_round)
    method.add_reply(ClientReply(records.POOLED, NO_FIGURES, dict(parts)), server_round)
    method.finish_sum(server_round)


class SiftMerge(Unprotected):
    """Counts task vectors in whole numbers, and serves each client its mask.

    Args:
        config: The run, whose strategy is ``sift_merge``.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._start: dict[str, np.ndarray] = {}
        self._signs = np.zeros(0, np.int8)
        self._sum: ExactSum | None = None
        self._masks: dict[int, np.ndarray] = {}

    @property
    def clients(self) -> tuple[int, ...]:
        """Who is in the sum, rising."""
        return self._sum.clients if self._sum else ()

    def begin(self, method: FederatedMethod, server_round: int) -> None:
        """Start the sum, from what every client begins with."""
        super().begin(method, server_round)
        self._start = {n: values.copy() for n, values in method.start_values(server_round).items()}
        size = joined(self._start).size
        self._sum, self._masks = ExactSum(size), {}
        self._signs = run_signs(self._config.seed, size)

    def add(self, method: FederatedMethod, reply: ClientReply, server_round: int) -> dict[str, Any]:
        """Check a reply as the method does, and its signs, and count it once.

        Raises:
            WireError, ShapeError: The reply is not valid; nothing has been added.
        """
        client = reply.partition_id
        if client in self._counted.clients:
            raise WireError(f"client {client}: expected one update, got another")
        record = method.add_reply(reply, server_round)  # which checks it; that sum is thrown away
        tau = joined(method.reply_values(reply, server_round)) - joined(self._start)
        wrong = int((tau * self._signs < 0).sum())
        if wrong:
            raise WireError(
                f"client {client}: expected an update that moves the way of the run's signs, got {wrong} of "
                f"{tau.size} values against theirs"
            )
        self._counted.add(client, tau)
        self._masks[client] = pack_mask(mask_of(tau))
        return record

    def finish(self, method: FederatedMethod, server_round: int) -> None:
        """Close the sum into the global model, start + Σ τ / T."""
        set_model(method, parted(self._unmasked(), self._start), server_round)

    def remove(self, client: int, tau: np.ndarray) -> None:
        """Take a client out, with its task vector [d]; its mask and its digest go with it.

        Raises:
            ConfigError: The client is not in.
            VerificationError: It is another task vector than was added; nothing is changed.
        """
        self._counted.remove(client, tau)
        del self._masks[client]

    def arrays(self) -> dict[str, np.ndarray]:
        """The sum, who is in it, where all began, and the masks."""
        if self._sum is None:
            return {}
        masks = {f"{MASK}{client}": bits for client, bits in sorted(self._masks.items())}
        starts = {f"{START}/{name}": values for name, values in self._start.items()}
        return {**self._sum.arrays(), **masks, **starts}

    def restore_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Undo :meth:`arrays`; before the merge there is nothing."""
        if "sum" not in arrays:
            return
        self._sum = ExactSum.from_arrays(arrays)
        self._masks = {
            int(name.removeprefix(MASK)): bits
            for name, bits in arrays.items()
            if name.startswith(MASK)
        }
        prefix = f"{START}/"
        self._start = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
        self._signs = run_signs(self._config.seed, joined(self._start).size)

    def own_parts(self, partition_ids: Sequence[int]) -> dict[str, np.ndarray]:
        """Each of these clients' own masked model; who is not in the sum is served the unmasked one, as everybody."""
        if self._sum is None:
            return {}
        start, total, count = joined(self._start), self._sum.total(), self._sum.total_weight
        return {
            f"{SERVED}{client}": served(
                start, total, count, unpack_mask(self._masks[client], start.size)
            )
            for client in partition_ids
            if client in self._masks
        }

    @property
    def _counted(self) -> ExactSum:
        assert self._sum is not None  # noqa: S101  # begin comes first
        return self._sum

    def _unmasked(self) -> np.ndarray:
        return served(joined(self._start), self._counted.total(), self._counted.total_weight)
