"""Settings of the verification of a removal: what is asked, of how many models, and what counts as no difference."""

from dataclasses import dataclass

from fedllm_flwr.settings.tree import require
from fedllm_flwr.unlearning.attacks import LEAST_SHADOWS
from fedllm_flwr.unlearning.budget import DEFAULT_BUDGET, MARGIN
from fedllm_flwr.unlearning.verdict import LEAST_RETRAINS


@dataclass(frozen=True, kw_only=True)
class VerificationConfig:
    """How ``action=verify``, and ``action=unlearn verify=adversarial``, attack a model."""

    budget: int = DEFAULT_BUDGET
    retrains: int = 8
    shadows: int = LEAST_SHADOWS
    margin: float = MARGIN
    share: float = 1 / 3
    relearn_steps: tuple[int, ...] = (1, 5, 10, 20)
    resamples: int = 1000

    def __post_init__(self) -> None:
        """Check ranges; that a budget gives the stated power is checked where it is spent."""
        require(self.budget >= 1, f"verification.budget: expected >= 1, got {self.budget}")
        require(
            self.retrains >= LEAST_RETRAINS,
            f"verification.retrains: expected >= {LEAST_RETRAINS}, got {self.retrains}",
        )
        require(
            self.shadows == 0 or (self.shadows >= LEAST_SHADOWS and self.shadows % 2 == 0),
            f"verification.shadows: expected 0 (no likelihood ratio) or an even number from {LEAST_SHADOWS} on, since "
            f"each two train on complementary halves, got {self.shadows}",
        )
        require(
            0 < self.margin < 0.2, f"verification.margin: expected in (0, 0.2), got {self.margin}"
        )
        require(0 <= self.share <= 0.5, f"verification.share: expected 0 to 0.5, got {self.share}")
        steps = self.relearn_steps
        require(
            bool(steps) and list(steps) == sorted(set(steps)) and steps[0] >= 1,
            f"verification.relearn_steps: expected rising numbers of steps from 1 on, got {list(steps)}",
        )
        require(self.resamples >= 1, f"verification.resamples: expected >= 1, got {self.resamples}")
