"""q-FFL: clients, not groups, weigh by their loss to the power q.

Axes: n = floats of one client's update. Sums are float64 whatever the dtype of the updates.
"""

import math

import numpy as np

from fedllm_flwr.averaging.checks import check_values, check_weight
from fedllm_flwr.errors import ConfigError, ShapeError, WireError

LEAST_LOSS = 1e-10
"""Added to every loss, as the authors' code does: 0 has no negative power."""


class QFairMean:
    """The step of q-FedAvg from updates that arrive one at a time, in memory that does not grow with the cohort.

    It descends on Σ p_k F_k^(q+1) / (q + 1). With L = 1 / learning rate and u_k = w_k - w the step is

        Σ p_k F_k^q u_k / Σ p_k (F_k^q + q F_k^(q-1) L ‖u_k‖²)

    q = 0 gives the mean of the updates: the plain one for equal weights, FedAvg's for weights n_k. A contribution that
    is refused leaves the sums as they were.

    Args:
        size: Floats in each update (n), > 0.
        q: How much losses count, >= 0.
        learning_rate: The clients' own, > 0; the method takes its inverse for the Lipschitz constant L.

    Raises:
        ConfigError: A setting is out of range.

    Source:
        Li et al. 2020, Fair resource allocation in federated learning, Algorithm 2; both sums are divided by L.
        Differs in the weights p_k, which the paper has in the sampling of clients.
    """

    def __init__(self, size: int, *, q: float, learning_rate: float) -> None:
        if size <= 0:
            raise ConfigError(f"q-FFL: expected a size > 0, got {size}")
        if not 0 <= q < math.inf:
            raise ConfigError(f"q-FFL: expected q >= 0, got {q}")
        if not 0 < learning_rate < math.inf:
            raise ConfigError(f"q-FFL: expected a learning rate > 0, got {learning_rate}")
        self.count = 0
        self._q = q
        self._lipschitz = 1 / learning_rate
        self._sum = np.zeros(size)
        self._scale = 0.0

    def add(
        self,
        update: np.ndarray,
        start_loss: float,
        *,
        weight: float = 1.0,
        client: int | str | None = None,
    ) -> None:
        """Add one client; its update is read once and not kept.

        Args:
            update: The client's parameters minus those it started from, [n], float16, float32 or float64.
            start_loss: F_k: mean loss of the client's rows at the parameters it started from, in nats, >= 0.
            weight: p_k, unnormalised, > 0.
            client: Who sent it, for messages; defaults to the number of clients before it.

        Raises:
            ShapeError: The shape is not [n]; names the client.
            WireError: The dtype, a value, the loss or the weight is refused; names the client.
        """
        who = f"client {self.count if client is None else client}"
        if update.shape != self._sum.shape:
            raise ShapeError(f"{who}: expected shape {self._sum.shape}, got {update.shape}")
        checked = check_weight(weight, who)
        check_values(update, who)
        factor, slope = self._powers(start_loss, who)
        wide = update.astype(np.float64)
        squared = float(wide @ wide)
        self._scale += checked * (factor + slope * self._lipschitz * squared)
        wide *= checked * factor
        self._sum += wide
        self.count += 1

    def result(self) -> np.ndarray:
        """The step to add to the parameters that clients started from, a new float32 array [n].

        Raises:
            WireError: Nothing was added.
        """
        if not self.count:
            raise WireError("q-FFL: expected at least one client, got none (the total weight is 0)")
        return (self._sum / self._scale).astype(np.float32)

    def _powers(self, loss: float, who: str) -> tuple[float, float]:
        """F^q, and q F^(q-1)."""
        if not (math.isfinite(loss) and loss >= 0):
            raise WireError(f"{who}: start loss: expected a finite number >= 0, got {loss}")
        base = np.float64(loss + LEAST_LOSS)
        with np.errstate(over="ignore"):
            factor, slope = float(base**self._q), float(self._q * base ** (self._q - 1))
        if not (0 < factor < math.inf and math.isfinite(slope)):
            raise WireError(
                f"{who}: start loss: expected one whose power q={self._q:g} is above 0 and finite, got {loss}"
            )
        return factor, slope
