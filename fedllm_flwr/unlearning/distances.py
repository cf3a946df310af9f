"""How far an unlearned model is from a retrained one, in losses, in relearning and in bytes.

Axes: n examples, s points of a curve.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fedllm_flwr.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """A two-sample test of the same distribution.

    Attributes:
        distance: D, largest gap between the two distribution functions, in [0, 1].
        p_value: Probability of such a gap or a larger one between samples of one distribution. A low one says that
            the models differ, not that one remembers: a model that forgot *too much* has it as well.
    """

    distance: float
    p_value: float


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> KolmogorovSmirnov:
    """Compare the losses of examples under two models.

    Args:
        first: Per example, finite; at least 2. [n]
        second: Likewise; the number may differ. Use 300 and more for a test with power. [n']

    Raises:
        ShapeError: An array is not flat, too short or not finite.

    Source:
        Smirnov 1948; as forget quality in Maini et al. 2024, TOFU (arXiv 2401.06121), section 2.2.2.
    """
    for name, values in (("first", first), ("second", second)):
        if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
            raise ShapeError(
                f"KS test: expected at least 2 finite {name} values [n], got shape {list(values.shape)}"
            )
    found = stats.ks_2samp(first, second)
    return KolmogorovSmirnov(float(found.statistic), float(found.pvalue))


def mean_ks_distance(losses: np.ndarray, references: Sequence[np.ndarray]) -> float:
    """Mean of D between one model's losses and those of each reference.

    Raises:
        ConfigError: There are no references.
        ShapeError: As of :func:`kolmogorov_smirnov`.
    """
    if not references:
        raise ConfigError("KS distance: expected at least one reference, got none")
    return float(np.mean([kolmogorov_smirnov(losses, each).distance for each in references]))


def null_ks_distances(references: Sequence[np.ndarray]) -> tuple[float, ...]:
    """What :func:`mean_ks_distance` is of a model that has nothing to hide: each retrained one against the others.

    Raises:
        ConfigError: There are less than two references.
        ShapeError: As of :func:`kolmogorov_smirnov`.
    """
    if len(references) < 2:
        raise ConfigError(f"KS distance: expected at least 2 references, got {len(references)}")
    return tuple(
        mean_ks_distance(losses, [*references[:index], *references[index + 1 :]])
        for index, losses in enumerate(references)
    )


def relearning_area(steps: Sequence[int], quality: Sequence[float]) -> float:
    """Mean height of a relearning curve: the trapezoid area under it over the width of its steps.

    A model that only hides what it knew relearns it sooner than one that never knew it, so its curve is higher (with
    accuracy as quality) or lower (with loss). Compare it with the areas of retrained models.

    Args:
        steps: Rising counts of fine-tuning steps, at least 2, for example 0, 1, 5, 10, 20, 50. [s]
        quality: Accuracy or loss on the half of the forget set that is not fine-tuned on. [s]

    Returns:
        The mean height, in the unit of the quality.

    Raises:
        ShapeError: The lengths differ, there are too few points, steps do not rise, or a value is not finite.

    Source:
        The attack is that of Hu, Fu, Wu, Smith 2025, Unlearning or obfuscating? (arXiv 2406.13356).
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or x.size < 2 or not np.isfinite(y).all():
        raise ShapeError(
            f"relearning: expected at least 2 steps and as many finite values, got {x.size} and {y.size}"
        )
    if not (np.diff(x) > 0).all():
        raise ShapeError(f"relearning: expected rising steps, got {list(steps)}")
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def different_arrays(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> tuple[str, ...]:
    """Names of the arrays that are not the same to the byte, dtype and shape included; sorted.

    A name that only one side has counts as different; 0 and -0 differ. An exact method leaves none.
    """
    return tuple(
        name
        for name in sorted({*first, *second})
        if name not in first or name not in second or not _same_bytes(first[name], second[name])
    )


@dataclass(frozen=True)
class UtilityChange:
    """What the removal did to the clients that stayed.

    Attributes:
        mean: Mean over clients of quality after less before.
        worst: The lowest quality of a client after, less the lowest before; it need not be of the same client.
        largest_loss: The lowest of the clients' own changes.
        hardest_hit: The client of that change.
    """

    mean: float
    worst: float
    largest_loss: float
    hardest_hit: int


def utility_change(before: Mapping[int, float], after: Mapping[int, float]) -> UtilityChange:
    """Compare each staying client's quality under two models, higher being better.

    Args:
        before: By client; of the model that the removed client was in, or of a retrained one.
        after: By client; of the unlearned model.

    Raises:
        ConfigError: The clients differ or there are none.
    """
    if not before or before.keys() != after.keys():
        raise ConfigError(
            f"utility: expected the same clients before and after, got {len(before)} and {len(after)}"
        )
    changes = {client: after[client] - before[client] for client in sorted(before)}
    hit = min(changes, key=lambda client: changes[client])
    worst = min(after.values()) - min(before.values())
    return UtilityChange(sum(changes.values()) / len(changes), worst, changes[hit], hit)


def _same_bytes(first: np.ndarray, second: np.ndarray) -> bool:
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and first.tobytes() == second.tobytes()
