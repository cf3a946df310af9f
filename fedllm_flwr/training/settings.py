"""What one client does with its rows in one round, and how the learning rate moves over rounds.

Units: rows are examples, a micro-batch is one forward and backward pass, a step is one optimizer
update and takes ``gradient_accumulation`` micro-batches. Rates are per step.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fedllm_flwr.errors import ConfigError

Optimizer = Literal["adamw", "sgd"]
Side = Literal["both", "a", "b"]
Schedule = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class SamplePrivacy:
    """Differential privacy of single rows: how much of a row may count, and the noise that hides it.

    Attributes:
        clip_norm: Largest L2 norm C of one row's gradient, all trained values of the adapter taken together, > 0;
            infinite for no clipping, and then without noise.
        noise_multiplier: Standard deviation σ of the noise on the sum of a step, in units of C, >= 0. 0 = no noise,
            and then no privacy.

    Raises:
        ConfigError: A value is outside its range; names the field, the range and the value.
    """

    clip_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        """Check every range."""
        clip, noise = self.clip_norm, self.noise_multiplier
        _check("sample_privacy.clip_norm", clip, "> 0", clip > 0)
        holds = math.isfinite(noise) and noise >= 0
        _check("sample_privacy.noise_multiplier", noise, "finite and >= 0", holds)
        wanted = f"finite, as the unit of sample_privacy.noise_multiplier={noise}"
        _check("sample_privacy.clip_norm", clip, wanted, not noise or math.isfinite(clip))


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """How every client of a cohort trains in one round.

    Attributes:
        batch_size: Rows of one micro-batch, >= 1.
        local_epochs: Passes over the client's rows when ``local_steps`` is 0, >= 1.
        local_steps: Optimizer steps; epochs repeat until they are done. 0 = use ``local_epochs``.
        learning_rate: The rate of this round, already scheduled, >= 0.
        optimizer: ``adamw`` (decoupled weight decay) or ``sgd``; its state starts empty each round.
        weight_decay: Decay of the trained factors, >= 0.
        momentum: Momentum of ``sgd``, in [0, 1).
        beta1: Decay of AdamW's first moment, in [0, 1).
        beta2: Decay of AdamW's second moment, in [0, 1).
        gradient_accumulation: Micro-batches in one step, >= 1. The gradient of a step is the mean
            over the label tokens of all its micro-batches, so (8 rows x 1) and (2 rows x 4) are
            the same step.
        clip_norm: Largest L2 norm of one client's gradient, the proximal term included. 0 = off.
        proximal_mu: FedProx's μ, >= 0: adds μ/2 · ‖θ - θ₀‖² over the trained factors.
        cohort_tokens: Token budget (clients x rows x padded length) of one batched pass; 0 = one
            client at a time, and with ``sample_privacy`` one row at a time.
        ascend: Step up the loss and not down: a control of unlearning, which unlearns by damage.
        side: The LoRA factors that are trained; the other side stays bit-equal.
        sample_privacy: Steps from clipped gradients of single rows and noise; None = plain steps. A
            step then takes each row with the same probability, and ``batch_size`` x
            ``gradient_accumulation`` rows on average.
        checkpointing: Keep activations only at the borders of the model's blocks and compute them again on the way
            back: less memory, the same gradients, about one more forward pass.

    Raises:
        ConfigError: A value is outside its range; names the field, the range and the value.

    Source:
        Li et al. 2020 (FedProx), Eq. 2, for ``proximal_mu``; Loshchilov and Hutter 2019 for AdamW.
    """

    batch_size: int = 8
    local_epochs: int = 1
    local_steps: int = 0
    learning_rate: float = 1e-3
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    gradient_accumulation: int = 1
    clip_norm: float = 0.0
    proximal_mu: float = 0.0
    cohort_tokens: int = 512
    ascend: bool = False
    side: Side = "both"
    sample_privacy: SamplePrivacy | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check every range."""
        for name in ("batch_size", "local_epochs", "gradient_accumulation"):
            _check(name, getattr(self, name), ">= 1", getattr(self, name) >= 1)
        for name in ("local_steps", "cohort_tokens"):
            _check(name, getattr(self, name), ">= 0", getattr(self, name) >= 0)
        for name in ("learning_rate", "weight_decay", "clip_norm", "proximal_mu"):
            value = getattr(self, name)
            _check(name, value, "finite and >= 0", math.isfinite(value) and value >= 0)
        for name in ("momentum", "beta1", "beta2"):
            _check(name, getattr(self, name), "in [0, 1)", 0 <= getattr(self, name) < 1)
        _check("optimizer", self.optimizer, "adamw or sgd", self.optimizer in get_args(Optimizer))
        _check("side", self.side, "both, a or b", self.side in get_args(Side))
        # harmless to privacy, but noise is so long that such a clip would turn a step into next to nothing
        wanted = "0 with sample_privacy, which clips each row instead"
        _check("clip_norm", self.clip_norm, wanted, not (self.sample_privacy and self.clip_norm))

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step consumes when enough are left in the epoch."""
        return self.batch_size * self.gradient_accumulation


def scheduled_rate(
    base: float,
    schedule: Schedule,
    *,
    server_round: int,
    num_rounds: int,
    warmup_rounds: int = 0,
    minimum_fraction: float = 0.0,
) -> float:
    """Learning rate of a round.

    With p = (server_round - 1 - warmup_rounds) / max(1, num_rounds - warmup_rounds - 1), the
    progress from the first round after warm-up (0) to the last round (1), the factor is
    1 (constant), 1 - p (linear) or (1 + cos πp) / 2 (cosine), rescaled from [0, 1] to
    [``minimum_fraction``, 1]. Warm-up round w uses the factor w / (warmup_rounds + 1).

    Args:
        base: Peak rate, >= 0.
        schedule: Shape after the warm-up.
        server_round: The round, 1 to ``num_rounds``; later rounds keep the last value.
        num_rounds: Rounds of the whole run.
        warmup_rounds: Rounds of linear rise before the peak.
        minimum_fraction: Fraction of ``base`` that the last round has, in [0, 1].

    Returns:
        The rate of this round, in [0, base].

    Raises:
        ConfigError: The schedule is unknown, a round is below 1, or the fraction is outside [0, 1].

    Source:
        Loshchilov and Hutter 2017 (SGDR), Eq. 5 without restarts, over rounds instead of batches.
    """
    _check("schedule", schedule, "constant, cosine or linear", schedule in get_args(Schedule))
    _check("server_round", server_round, ">= 1", server_round >= 1)
    _check("minimum_fraction", minimum_fraction, "in [0, 1]", 0 <= minimum_fraction <= 1)
    if server_round <= warmup_rounds:
        return base * server_round / (warmup_rounds + 1)
    done = server_round - 1 - warmup_rounds
    progress = min(1.0, done / max(1, num_rounds - warmup_rounds - 1))
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule]
    return base * (1.0 - (1.0 - minimum_fraction) * (1.0 - factor))


def _check(name: str, value: object, expected: str, holds: bool) -> None:
    """Raise a one-line error unless ``holds``."""
    if not holds:
        raise ConfigError(f"local training: {name} must be {expected}, got {value!r}")
