"""What a client is asked when it trains whole matrices of its own copy of the model, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.base import BaseRule
from fedllm_flwr.grass.galore import GaloreSettings
from fedllm_flwr.grass.optimizer import GrassSettings, Side
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.grass.selection import Rows
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.settings import LocalSettings


@dataclass(frozen=True, kw_only=True)
class FullSettings:
    """How a client trains whole matrices.

    Attributes:
        local: Rows, steps, rate and base optimizer. ``clip_norm`` and ``proximal_mu`` must be 0: a layer's gradient is
            used and gone before that of the layer below is known. ``side`` must be ``both``: there are no factors.
            ``sample_privacy`` must be None: steps here have no noise.
            ``cohort_tokens`` has no effect: a client with weights of its own shares no pass.
        projection: GRASS or GaLore; None trains by the base optimizer itself.
        eight_bit: Hold AdamW's moments in 8 bits; needs bitsandbytes.
        checkpointing: Keep the activations of layers only at their borders and compute them again on the way back:
            less memory, about one more forward pass.

    Raises:
        ConfigError: A value does not suit; names it.
    """

    local: LocalSettings
    projection: GrassSettings | GaloreSettings | None
    eight_bit: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("clip_norm", "proximal_mu"):
            if getattr(self.local, name):
                raise ConfigError(
                    f"full-weight training: expected {name} 0, since no two layers' gradients are held at a time, "
                    f"got {getattr(self.local, name)}"
                )
        if self.local.side != "both":
            raise ConfigError(f"full-weight training: expected side both, got {self.local.side}")
        if self.local.sample_privacy is not None:
            raise ConfigError(
                "full-weight training: expected no sample_privacy, since its steps have no noise"
            )
        if self.eight_bit and self.local.optimizer != "adamw":
            raise ConfigError(f"eight_bit: expected optimizer adamw, got {self.local.optimizer}")
        _ = self.base  # its ranges, and whether bitsandbytes is there

    @property
    def base(self) -> BaseRule:
        """The base optimizer."""
        return BaseRule(
            name="adam8bit" if self.eight_bit else self.local.optimizer,
            learning_rate=self.local.learning_rate,
            momentum=self.local.momentum if self.local.optimizer == "sgd" else 0.0,
            beta1=self.local.beta1,
            beta2=self.local.beta2,
            weight_decay=self.local.weight_decay,
        )

    @property
    def side(self) -> Side:
        """What a row of all row updates is: as GRASS has it, else the weights of one output."""
        return self.projection.side if isinstance(self.projection, GrassSettings) else "out"


@dataclass(frozen=True, eq=False)
class FullJob:
    """What one client trains on in one round.

    Attributes:
        partition_id: The client.
        rows: Its encoded training rows.
        target_modules: The matrices that are trained, as in
            :meth:`fedllm_flwr.models.backbone.Backbone.target_layers`.
        seed: Address of the row order and of drawn rows, of this client and round.
        start: What the start values differ by from the backbone, by full layer name; rows as
            :attr:`FullSettings.side` has them.
        shared_rows: Rows to train of every matrix, by full layer name (GRASS with rows from the server); None lets the
            client pick its own.
    """

    partition_id: int
    rows: Sequence[Encoded]
    target_modules: tuple[str, ...]
    seed: int
    start: Mapping[str, RowUpdate] = field(default_factory=dict)
    shared_rows: Mapping[str, Rows] | None = None


@dataclass(frozen=True, eq=False)
class FullResult:
    """What one client did.

    Attributes:
        partition_id: The client.
        updates: Per trained matrix the rows that may have changed, new minus start values in float32; empty if there
            was an error. A row of :class:`FullSettings`' side.
        first_loss: Loss of the first step, before any update, in nats per label token.
        loss: Mean loss of the steps; like ``first_loss`` not a number if there was none.
        num_examples: Rows trained on: the client's weight.
        steps: Optimizer steps done.
        tokens: Input tokens read in all steps, padding not counted.
        cpu_seconds: CPU time.
        error: Why the client has no result, or empty.
    """

    partition_id: int
    updates: dict[str, RowUpdate]
    first_loss: float
    loss: float
    num_examples: int
    steps: int
    tokens: int
    cpu_seconds: float
    error: str = ""
