"""Floating-point operations of one example on the edge, of one LoRA step, and of what the server does instead.

A multiplication with its addition counts as two. Elementwise work, such as tanh and the leak, is left out: it is
linear where these terms are products.

Axes: as in `shapes`.
"""

from dataclasses import dataclass, fields

from fedllm_flwr.costs.shapes import ModelShape, SplitSizes


@dataclass(frozen=True)
class EdgeFlops:
    """Operations of a FedResPrompt client for one example.

    Attributes:
        reservoir: W steps of the recurrent product, over the weights that are not 0 if sparse.
        input: W steps of W_in [1; u].
        code: b = W_out z.
        prompt: p = P b.
        prompt_matrix_gradient: g b^T.
        code_gradient: P^T g.
        code_matrix_gradient: (P^T g) z^T.
        update: Scaled subtraction of both gradients.
    """

    reservoir: int
    input: int
    code: int
    prompt: int
    prompt_matrix_gradient: int
    code_gradient: int
    code_matrix_gradient: int
    update: int

    @property
    def total(self) -> int:
        """All terms."""
        return sum(int(getattr(self, field.name)) for field in fields(self))


def edge_flops(shape: ModelShape, sizes: SplitSizes, *, sparse: bool = False) -> EdgeFlops:
    """Operations of one example on the edge, forward and back.

    Args:
        shape: The server's model.
        sizes: Of the split.
        sparse: Whether the recurrent product skips weights that are 0.
    """
    steps, states = sizes.context_steps, sizes.reservoir_size
    density = sizes.reservoir_density if sparse else 1.0
    code_matrix = sizes.code_size * sizes.state_size
    prompt_matrix = sizes.prompt_tokens * shape.width * sizes.code_size
    return EdgeFlops(
        reservoir=round(2 * steps * states**2 * density),
        input=2 * steps * states * (1 + sizes.input_size),
        code=2 * code_matrix,
        prompt=2 * prompt_matrix,
        prompt_matrix_gradient=2 * prompt_matrix,
        code_gradient=2 * prompt_matrix,
        code_matrix_gradient=2 * code_matrix,
        update=2 * (prompt_matrix + code_matrix),
    )


def lora_step_flops(shape: ModelShape, sizes: SplitSizes, *, frozen_base: bool = True) -> int:
    """Operations of one LoRA step over T tokens.

    Args:
        shape: The client's model.
        sizes: Of the step.
        frozen_base: Count 4 P T: forward, and backward to the activations. False counts 6 P T, with the gradients
            of frozen weights that LoRA never computes.

    Source:
        Kaplan et al. 2020, Scaling laws for neural language models, section 2.1, for 2 P a token and pass.
    """
    return (4 if frozen_base else 6) * shape.block_parameters * sizes.lora_tokens


def server_flops(shape: ModelShape, sizes: SplitSizes) -> int:
    """Operations of the server for one exchange, 4 P m: they are moved there, not saved.

    Args:
        shape: The server's model; the prompt is its whole input.
        sizes: Of the split.
    """
    return 4 * shape.block_parameters * sizes.prompt_tokens
