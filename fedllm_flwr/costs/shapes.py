"""The sizes that bytes and operations depend on; nothing else of a model or a method is looked at."""

from dataclasses import dataclass, fields
from typing import Any

from fedllm_flwr.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """A decoder of equal blocks.

    Attributes:
        width: Of the input embeddings and hidden states, d.
        layers: Blocks, L.
        name: Of the model, for the tables.

    Raises:
        ConfigError: A size is below 1.
    """

    width: int
    layers: int
    name: str

    def __post_init__(self) -> None:
        for size in ("width", "layers"):
            if getattr(self, size) < 1:
                raise ConfigError(
                    f"model {self.name}: expected {size} >= 1, got {getattr(self, size)}"
                )

    @property
    def block_parameters(self) -> int:
        """Estimate 12 L d²: four square attention layers and an MLP of width 4 d a block, no embeddings."""
        return 12 * self.layers * self.width**2


def model_shape(config: Any, name: str) -> ModelShape:
    """The shape that a model's configuration states.

    Args:
        config: Any object with ``hidden_size`` and ``num_hidden_layers``, such as a text configuration of transformers.
        name: Of the model, for the tables.

    Raises:
        ConfigError: One of the two is missing, or below 1.
    """
    width, layers = (getattr(config, key, None) for key in ("hidden_size", "num_hidden_layers"))
    if not isinstance(width, int) or not isinstance(layers, int):
        raise ConfigError(
            f"model {name}: expected a configuration with hidden_size and num_hidden_layers, got {width} and {layers}"
        )
    return ModelShape(width, layers, name)


@dataclass(frozen=True)
class SplitSizes:
    """Sizes of FedResPrompt and of the LoRA that it is compared with; the defaults are those of the source's table.

    Attributes:
        prompt_tokens: Soft tokens of a prompt, m.
        code_size: Width of the code b between both matrices of the controller, k.
        reservoir_size: States, N.
        input_size: Width of one step of the context, n_in.
        context_steps: Steps of a context, W.
        reservoir_density: Share of the reservoir's weights that are not 0, in (0, 1].
        classes: Tokens of a restricted head, K.
        lora_rank: r.
        lora_layers: Adapted layers in each block, A.
        lora_tokens: Tokens of one LoRA step on the edge, T.

    Raises:
        ConfigError: A size is below 1 or the density is out of range.

    Source:
        esnfed 1.7.1, the cost table of its language model orchestration.
    """

    prompt_tokens: int = 10
    code_size: int = 16
    reservoir_size: int = 200
    input_size: int = 1
    context_steps: int = 30
    reservoir_density: float = 0.1
    classes: int = 4
    lora_rank: int = 8
    lora_layers: int = 2
    lora_tokens: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float:
                if not 0 < value <= 1:
                    raise ConfigError(f"costs: expected {field.name} in (0, 1], got {value}")
            elif value < 1:
                raise ConfigError(f"costs: expected {field.name} >= 1, got {value}")

    @property
    def state_size(self) -> int:
        """Width of z = [1; last input; last state], 1 + n_in + N."""
        return 1 + self.input_size + self.reservoir_size


PUBLISHED_SHAPES = (
    ModelShape(768, 12, "GPT-2"),
    ModelShape(1280, 36, "GPT-2 L"),
    ModelShape(2048, 24, "1.3B"),
    ModelShape(4096, 32, "7B"),
    ModelShape(5120, 40, "13B"),
)
"""The models of the source's table."""
