"""Settings of the methods: what a client trains, and what of it is shared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedllm_flwr.models.layout import LoraSpec
from fedllm_flwr.models.peft_prompts import PeftPromptSpec
from fedllm_flwr.prompts.spec import PromptSpec, Segment
from fedllm_flwr.reservoir import ControllerSpec, ReservoirSpec, Topology
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.settings.grass import FedGrassConfig
from fedllm_flwr.settings.tree import require


@dataclass(frozen=True, kw_only=True)
class FedLoraConfig:
    """LoRA adapters on PEFT. ``client_ranks`` and ``client_alphas`` are cycled over partition ids when not empty."""

    name: Literal["fedlora"]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    use_rslora: bool = False
    sharing: Literal["both", "b_only", "alternating"] = "both"
    client_ranks: tuple[int, ...] = ()
    client_alphas: tuple[float, ...] = ()
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            bool(self.target_modules),
            "method.target_modules: expected at least one layer name, got none",
        )
        for rank in (self.rank, *self.client_ranks):
            require(rank >= 1, f"method.rank and client_ranks: expected >= 1, got {rank}")
        for alpha in (self.alpha, *self.client_alphas):
            require(alpha > 0, f"method.alpha and client_alphas: expected > 0, got {alpha}")
        require(0 <= self.dropout < 1, f"method.dropout: expected in [0, 1), got {self.dropout}")

    def spec(self, partition_id: int) -> LoraSpec:
        """The adapter that one client trains (rank and alpha may be its own).

        Below 0 stands nobody's own rows: all rows together, or a mean of all clients. They have the server's.
        """
        if partition_id < 0:
            return self.server_spec()
        rank = (
            self.client_ranks[partition_id % len(self.client_ranks)]
            if self.client_ranks
            else self.rank
        )
        alpha = (
            self.client_alphas[partition_id % len(self.client_alphas)]
            if self.client_alphas
            else self.alpha
        )
        return self._spec(rank, alpha)

    def server_spec(self) -> LoraSpec:
        """The adapter that the server keeps: the largest rank of the federation, the configured alpha."""
        return self._spec(
            max((self.rank, *self.client_ranks)) if self.client_ranks else self.rank, self.alpha
        )

    def _spec(self, rank: int, alpha: float) -> LoraSpec:
        return LoraSpec(
            rank=rank,
            alpha=alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
        )


@dataclass(frozen=True, kw_only=True)
class FedPromptConfig:
    """Soft prompts before a frozen model: a shared one, and if wanted one of each client and of each cluster.

    What a client reads is [personal | cluster | shared], placed before everything or after the fixed text.
    """

    name: Literal["fedprompt"]
    kind: Literal["soft", "prompt_tuning", "prefix_tuning", "p_tuning"] = "soft"
    length: int = 10
    personal_length: int = 0
    cluster_length: int = 0
    placement: Literal["before", "after"] = "after"
    start: Literal["random", "vocabulary", "text"] = "vocabulary"
    start_text: str = ""
    common_start: bool = True
    personal_start: Literal["mean", "zero"] = "mean"
    local_training: Literal["joint", "alternating"] = "joint"
    encoder_hidden_size: int = 0
    trainer: Literal["gradient", "black_box"] = "gradient"
    search_dimension: int = 64
    search_population: int = 8
    search_generations: int = 10
    search_sigma: float = 1.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check ranges, and the options that belong together."""
        require(
            self.search_dimension >= 2,
            f"method.search_dimension: expected >= 2, got {self.search_dimension}",
        )
        for name in ("length", "search_generations"):
            require(
                getattr(self, name) >= 1, f"method.{name}: expected >= 1, got {getattr(self, name)}"
            )
        for name in ("personal_length", "cluster_length", "encoder_hidden_size"):
            require(
                getattr(self, name) >= 0, f"method.{name}: expected >= 0, got {getattr(self, name)}"
            )
        require(
            self.search_population >= 4,
            f"method.search_population: expected >= 4, got {self.search_population}",
        )
        require(
            not self.checkpointing or (self.trainer == "gradient" and self.kind != "prefix_tuning"),
            f"method.checkpointing=true, method.kind={self.kind} and method.trainer={self.trainer}: a search keeps no "
            "activations, and a prefix's keys lie in a cache that a second pass would write again, use false",
        )
        require(
            self.search_sigma > 0, f"method.search_sigma: expected > 0, got {self.search_sigma}"
        )
        require(
            bool(self.start_text) == (self.start == "text"),
            f"method.start_text: belongs to method.start=text and is needed there, got start={self.start} "
            f"start_text={self.start_text!r}",
        )
        require(
            self.common_start or self.start != "text",
            "method.common_start=false and method.start=text: every client would begin at the same text, use random",
        )
        require(
            self.local_training == "joint" or self.personal_length > 0,
            "method.local_training=alternating and method.personal_length=0: there is nothing to alternate with",
        )
        self._check_kind()

    def _check_kind(self) -> None:
        """PEFT's kinds are for comparison and have one part, at the place that PEFT gives it."""
        require(
            self.encoder_hidden_size == 0 or self.kind in ("p_tuning", "prefix_tuning"),
            f"method.encoder_hidden_size={self.encoder_hidden_size} and method.kind={self.kind}: only p_tuning and "
            "prefix_tuning have an encoder",
        )
        if self.kind == "soft":
            return
        for name, plain in (
            ("personal_length", 0),
            ("cluster_length", 0),
            ("placement", "before"),
            ("common_start", True),
            ("trainer", "gradient"),
            *((("start", "random"),) if self.kind != "prompt_tuning" else ()),
        ):
            require(
                getattr(self, name) == plain,
                f"method.{name}={getattr(self, name)} and method.kind={self.kind}: PEFT's prompts take only "
                f"{name}={plain}, use kind=soft",
            )

    def spec(self) -> PromptSpec:
        """The parts of the prompt in reading order."""
        parts = (
            ("personal", self.personal_length),
            ("cluster", self.cluster_length),
            ("shared", self.length),
        )
        segments = tuple(Segment(name, length) for name, length in parts if length)
        return PromptSpec(segments, self.placement)

    def adapter_spec(self) -> PromptSpec | PeftPromptSpec:
        """What a client trains: a prompt with its segments, or one of PEFT's modules."""
        if self.kind == "soft":
            return self.spec()
        return PeftPromptSpec(self.kind, self.length, self.encoder_hidden_size)

    def join(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The flat values that a client trains, from its parts by name.

        Raises:
            ShapeError: A part is missing or has another size.
        """
        return self.spec().join(parts) if self.kind == "soft" else parts["shared"]

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of :meth:`join`."""
        return self.spec().split(flat) if self.kind == "soft" else {"shared": flat}


@dataclass(frozen=True, kw_only=True)
class FedResPromptConfig:
    """Soft prompts that a client's reservoir and controller make of each row, before a model that the server holds.

    ``server_text`` says what else the server reads: nothing, or each row's text, which then leaves its client.
    ``server_model=surrogate`` is a linear stand-in of the model's width. ``states`` other than ``reservoir`` are
    controls. ``clip_norm`` and ``noise_multiplier`` act on every prompt before it leaves; 0 = off.
    """

    name: Literal["fedresprompt"]
    mode: Literal["fedavg_controller", "sync_sgd", "label_private", "private_controller"] = (
        "fedavg_controller"
    )
    length: int = 8
    controller_size: int = 16
    reservoir_size: int = 200
    input_size: int = 64
    leak: float = 0.6
    spectral_radius: float = 0.9
    input_scaling: float = 1.0
    density: float = 0.1
    topology: Topology = "erdos_renyi"
    states: Literal["reservoir", "constant", "random"] = "reservoir"
    server_text: Literal["none", "prompt_before", "prompt_after"] = "none"
    server_model: Literal["lm", "surrogate"] = "lm"
    micro_steps: int = 1
    clip_norm: float = 0.0
    noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges, and the options that belong together; the reservoir's own ranges are its own."""
        for name in ("length", "controller_size", "micro_steps"):
            require(
                getattr(self, name) >= 1, f"method.{name}: expected >= 1, got {getattr(self, name)}"
            )
        for name in ("clip_norm", "noise_multiplier"):
            require(
                getattr(self, name) >= 0, f"method.{name}: expected >= 0, got {getattr(self, name)}"
            )
        require(
            self.noise_multiplier == 0 or self.clip_norm > 0,
            f"method.noise_multiplier={self.noise_multiplier:g} and method.clip_norm=0: the noise is a multiple of the "
            "clip norm, set it above 0",
        )
        require(
            self.micro_steps == 1 or self.mode != "sync_sgd",
            f"method.micro_steps={self.micro_steps} and method.mode=sync_sgd: the server makes the steps, use 1",
        )
        require(
            self.server_model == "lm" or self.server_text == "none",
            f"method.server_text={self.server_text} and method.server_model=surrogate: the surrogate reads no text",
        )
        self.reservoir(0, 0)

    def reservoir(self, run_seed: int, series_width: int) -> ReservoirSpec:
        """The reservoir that every client of a run has.

        Args:
            run_seed: The run's.
            series_width: Values of a step of the task's series; 0 = its rows are text, fed as projected embeddings.

        Raises:
            ConfigError: A setting is outside the reservoir's range.
        """
        return ReservoirSpec(
            size=self.reservoir_size,
            input_size=series_width or self.input_size,
            leak=self.leak,
            spectral_radius=self.spectral_radius,
            input_scaling=self.input_scaling,
            density=self.density,
            topology=self.topology,
            seed=derive_seed(run_seed, "reservoir"),
        )

    def controller(self, series_width: int, width: int) -> ControllerSpec:
        """The controller that a client trains, behind such a reservoir and before a model of this width."""
        readout_size = self.reservoir(0, series_width).readout_size
        return ControllerSpec(readout_size, self.controller_size, self.length, width)


MethodConfig = FedLoraConfig | FedPromptConfig | FedResPromptConfig | FedGrassConfig
METHODS = {
    "fedlora": FedLoraConfig,
    "fedprompt": FedPromptConfig,
    "fedresprompt": FedResPromptConfig,
    "fedgrass": FedGrassConfig,
}
