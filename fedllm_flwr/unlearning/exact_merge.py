"""Sums of clients' updates from which one can be taken out without a trace.

Float sums cannot do that: (a + b) - b is not a, and the order of clients shows. Here every value is first rounded to
a multiple of 2⁻⁴⁰ and then counted in integers, whose sums are the same in any order. Taking a client out leaves,
to the bit, what there would be had it never come.

Axes: d values of an update, T clients.

Source:
    Whole numbers in place of floats, as secure aggregation sums them (Bonawitz et al. 2017). They make the merge
    of Kuo et al. 2025 (arXiv 2504.04626) exact in bytes, where its float sums are exact to rounding.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError, VerificationError, WireError
from fedllm_flwr.unlearning.checks import check_update

FRACTION_BITS = 40
UNIT = 2.0**-FRACTION_BITS
"""Spacing of the values that are counted. Rounding moves a value by UNIT / 2 = 4.5e-13 at most; a float32 of
magnitude 2⁻¹⁷ and above is such a multiple already and is not moved at all."""

LIMIT = 2**63 - 1
"""Largest integer of a sum, in units: 8.4 million."""

DIGEST_BYTES = 32


@dataclass(frozen=True)
class _Member:
    """What is kept of a client that is in: enough to know its update again, not enough to make it."""

    weight: int
    largest: int
    digest: bytes


class ExactSum:
    """Σ wₖ xₖ over clients in int64 fixed point, and who is in it.

    Two sums over the same clients with the same updates are bit-equal in all that :meth:`arrays` returns, whatever
    the order in which clients came and whoever else came and went.

    Weights are whole numbers, such as counts of rows, and 1 by default. Others are not offered: a product with a
    fraction would have to be rounded, and dividing weights out at the end makes fractions superfluous.

    A client leaves with the same update with which it came, sent or trained anew; its SHA-256 is kept to know it by,
    and goes with it.
    """

    def __init__(self, size: int) -> None:
        """Start an empty sum.

        Args:
            size: Values of an update (d), > 0.

        Raises:
            ConfigError: The size is not positive.
        """
        if size < 1:
            raise ConfigError(f"exact sum: size: expected > 0, got {size}")
        self._sum = np.zeros(size, np.int64)
        self._members: dict[int, _Member] = {}

    @property
    def clients(self) -> tuple[int, ...]:
        """Who is in, in rising order."""
        return tuple(sorted(self._members))

    @property
    def total_weight(self) -> int:
        """Σ w over who is in: with weights of 1 their number T."""
        return sum(member.weight for member in self._members.values())

    def add(self, client: int, values: np.ndarray, weight: int = 1) -> None:
        """Let a client in; an update that is refused leaves the sum as it was.

        Args:
            client: Its number, >= 0.
            values: Its update, float16, float32 or float64. [d]
            weight: Its weight, a whole number > 0.

        Raises:
            ConfigError: The client is in already.
            ShapeError: The shape is not [d]; names the client.
            WireError: A value or the weight is refused, or the sum could overflow; names the client and the limit.
        """
        if client in self._members:
            raise ConfigError(
                f"client {client}: expected one that is not in the exact sum, got one that is"
            )
        units, member = self._counted(client, values, weight)
        bound = member.largest * weight + sum(
            other.largest * other.weight for other in self._members.values()
        )
        if bound > LIMIT:
            raise WireError(
                f"client {client}: expected a sum of largest magnitudes up to {LIMIT * UNIT:.0f}, "
                f"got {bound * UNIT:.6g}"
            )
        self._sum += units * weight
        self._members[client] = member

    def remove(self, client: int, values: np.ndarray) -> None:
        """Take a client out, with the update with which it came in.

        Args:
            client: Its number.
            values: The same update, of the same float values; the dtype may differ. [d]

        Raises:
            ConfigError: The client is not in.
            ShapeError: The shape is not [d]; names the client.
            WireError: A value is refused; names the client.
            VerificationError: The update is another one than was added, as after a training that does not repeat
                itself; nothing is changed.
        """
        if client not in self._members:
            raise ConfigError(
                f"client {client}: expected one of the exact sum, got one that is not in it"
            )
        member = self._members[client]
        units, again = self._counted(client, values, member.weight)
        if again.digest != member.digest:
            raise VerificationError(
                f"client {client}: expected the update that was added, {member.digest.hex()[:12]}…, "
                f"got {again.digest.hex()[:12]}…"
            )
        self._sum -= units * member.weight
        del self._members[client]

    def total(self) -> np.ndarray:
        """Σ w x, float64 [d]: each integer rounded to 53 bits once."""
        return self._sum * UNIT

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, for a checkpoint.

        Returns:
            ``sum`` int64 [d], in units of 2⁻⁴⁰; ``clients``, ``weights`` and ``largest`` int64 [T] and ``digests``
            uint8 [T, 32], in the order of clients.
        """
        members = [self._members[client] for client in self.clients]
        digests = b"".join(member.digest for member in members)
        return {
            "sum": self._sum.copy(),
            "clients": np.array(self.clients, np.int64),
            "weights": np.array([member.weight for member in members], np.int64),
            "largest": np.array([member.largest for member in members], np.int64),
            "digests": np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES).copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ExactSum":
        """The sum that :meth:`arrays` was taken of.

        Raises:
            ShapeError: An array is missing, or has another dtype or shape than the others ask for.
        """
        names = ("sum", "clients", "weights", "largest", "digests")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ShapeError(f"exact sum: expected arrays {', '.join(names)}, got no {missing[0]}")
        count = len(arrays["clients"])
        expected: dict[str, tuple[np.dtype, tuple[int, ...]]]
        expected = {name: (np.dtype(np.int64), (count,)) for name in names[1:4]}
        expected["sum"] = (np.dtype(np.int64), (max(1, arrays["sum"].size),))
        expected["digests"] = (np.dtype(np.uint8), (count, DIGEST_BYTES))
        for name, wanted in expected.items():
            got = (arrays[name].dtype, arrays[name].shape)
            if got != wanted:
                raise ShapeError(f"exact sum: {name}: expected {wanted}, got {got}")
        restored = cls(arrays["sum"].size)
        restored._sum[:] = arrays["sum"]
        for index, client in enumerate(arrays["clients"].tolist()):
            restored._members[client] = _Member(
                int(arrays["weights"][index]),
                int(arrays["largest"][index]),
                arrays["digests"][index].tobytes(),
            )
        return restored

    def _counted(self, client: int, values: np.ndarray, weight: int) -> tuple[np.ndarray, _Member]:
        """The update in units, and what is kept of it."""
        who = f"client {client}"
        if client < 0 or weight != int(weight) or not 0 < weight <= LIMIT:
            raise WireError(
                f"{who}: expected a client >= 0 and a weight that is a whole number > 0, got {weight}"
            )
        check_update(values, self._sum.size, who)
        scaled = np.rint(values.astype(np.float64) * 2.0**FRACTION_BITS)
        largest = int(np.abs(scaled).max())
        if largest > LIMIT:
            raise WireError(
                f"{who}: expected magnitudes up to {LIMIT * UNIT:.0f}, got {largest * UNIT:.6g}"
            )
        units = scaled.astype(np.int64)
        digest = hashlib.sha256(int(weight).to_bytes(8, "little") + units.tobytes()).digest()
        return units, _Member(int(weight), largest, digest)
