"""Settings of full-weight training through few rows of each matrix."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.grass.averaging import RowAverage
from fedllm_flwr.grass.galore import GaloreSettings
from fedllm_flwr.grass.optimizer import GrassSettings
from fedllm_flwr.grass.selection import RowRule
from fedllm_flwr.settings.tree import require


@dataclass(frozen=True, kw_only=True)
class FedGrassConfig:
    """Whole matrices trained under GRASS, and as controls under GaLore or by the dense optimizer.

    ``rank`` is the rows of each matrix that are trained at a time; a row is the weights of one output. With
    ``sharing=shared`` the server picks them every ``refresh_rounds`` rounds, with ``local`` each client its own every
    ``refresh_steps`` steps. ``row_average`` says what a row's sum is divided by where clients have their own rows.
    ``eight_bit`` holds AdamW's moments in 8 bits, through bitsandbytes.
    """

    name: Literal["fedgrass"]
    trainer: Literal["grass", "galore", "dense"] = "grass"
    sharing: Literal["shared", "local"] = "shared"
    rank: int = 8
    rule: RowRule = "norm_nr"
    refresh_rounds: int = 1
    refresh_steps: int = 200
    scale: float = 1.0
    row_average: RowAverage = "clients"
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    checkpointing: bool = False
    eight_bit: bool = False

    def __post_init__(self) -> None:
        """Check ranges, and that no setting is without effect."""
        require(
            bool(self.target_modules),
            "method.target_modules: expected at least one layer name, got none",
        )
        for name in ("rank", "refresh_rounds", "refresh_steps"):
            require(
                getattr(self, name) >= 1, f"method.{name}: expected >= 1, got {getattr(self, name)}"
            )
        self.projection()
        unread = {
            "sharing": self.trainer != "grass",
            "rank": self.trainer == "dense",
            "scale": self.trainer == "dense",
            "rule": self.trainer != "grass",
            "refresh_rounds": not self.picks_at_server,
            "refresh_steps": self.trainer == "dense" or self.picks_at_server,
            "row_average": not self.picks_at_clients,
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                not unread.get(field.name) or value == field.default,
                f"method.{field.name}={value}, method.trainer={self.trainer} and method.sharing={self.sharing}: "
                f"nothing reads it, leave it at {field.default}",
            )

    @property
    def picks_at_server(self) -> bool:
        """Whether all clients train the rows that the server picks."""
        return self.trainer == "grass" and self.sharing == "shared"

    @property
    def picks_at_clients(self) -> bool:
        """Whether each client trains rows of its own."""
        return self.trainer == "grass" and self.sharing == "local"

    @property
    def reads_norms(self) -> bool:
        """Whether the rule needs to know gradients."""
        return not self.rule.startswith("uniform")

    def projection(self) -> GrassSettings | GaloreSettings | None:
        """What a client does with every matrix; None is the optimizer itself. The server's rows are never refreshed.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.trainer == "dense":
            return None
        if self.trainer == "galore":
            return GaloreSettings(
                rank=self.rank, refresh_interval=self.refresh_steps, scale=self.scale
            )
        return GrassSettings(
            rank=self.rank,
            rule=self.rule,
            refresh_interval=self.refresh_steps,
            scale=self.scale,
        )
