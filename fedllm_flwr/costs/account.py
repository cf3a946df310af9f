"""Two tables of what FedResPrompt costs beside federated LoRA: the published one, and one with everything in it.

The published table divides LoRA's bytes of a whole round by the bytes of a single example, leaves out the averaging of
the controller and the labels, and counts a multiplication with its addition once on one side and twice on the other.
It is reproduced to the digit; the full account puts each of these right.
"""

from dataclasses import dataclass

from fedllm_flwr.costs.compute import edge_flops, lora_step_flops, server_flops
from fedllm_flwr.costs.shapes import ModelShape, SplitSizes
from fedllm_flwr.costs.wire import (
    FLOAT_BYTES,
    SEED_BYTES,
    controller_parameters,
    exchange_bytes,
    lora_bytes,
    prompt_bytes,
)


@dataclass(frozen=True)
class PublishedRow:
    """A model's row of the published table.

    Attributes:
        model: Its name.
        width: d.
        layers: L.
        resprompt_bytes: Prompt up and gradient down for one example, 2·4 m d.
        lora_bytes: Both factors up and down, once a round, 2·4 L A 2 r d.
        byte_ratio: LoRA over FedResPrompt: 3.2 L with the default sizes, whatever d.
        edge_flops: W N² + k (1 + n_in + N), a multiplication with its addition counted once.
        lora_flops: 6 P T.
        flop_ratio: LoRA over FedResPrompt.
    """

    model: str
    width: int
    layers: int
    resprompt_bytes: int
    lora_bytes: int
    byte_ratio: float
    edge_flops: int
    lora_flops: int
    flop_ratio: float


def published_row(shape: ModelShape, sizes: SplitSizes | None = None) -> PublishedRow:
    """One row of the published table, by its own formulas.

    Args:
        shape: The model.
        sizes: By default those of the source.

    Source:
        esnfed 1.7.1, the cost table of its language model orchestration.
    """
    sizes = sizes or SplitSizes()
    split = 2 * prompt_bytes(sizes.prompt_tokens, shape.width)
    lora = 2 * lora_bytes(shape, sizes)
    edge = sizes.context_steps * sizes.reservoir_size**2 + sizes.code_size * sizes.state_size
    step = lora_step_flops(shape, sizes, frozen_base=False)
    return PublishedRow(
        model=shape.name,
        width=shape.width,
        layers=shape.layers,
        resprompt_bytes=split,
        lora_bytes=lora,
        byte_ratio=lora / split,
        edge_flops=edge,
        lora_flops=step,
        flop_ratio=step / edge,
    )


@dataclass(frozen=True)
class FullRow:
    """What the published table leaves out, for one model.

    Bytes are both ways for one client unless they say where they go. Ratios are LoRA over FedResPrompt.

    Attributes:
        model: Its name.
        seed_once_bytes: The reservoir, sent once.
        exchange_prompt_up_bytes: Soft prompt of one example.
        exchange_gradient_down_bytes: Its gradient.
        exchange_target_up_bytes: The target id: it crosses too.
        exchange_loss_down_bytes: The loss.
        exchange_bytes: All of these for one example.
        label_private_exchange_bytes: The same with logits down and their slope up in place of the target.
        controller_round_bytes: Averaging W_out and P, once a round.
        prompt_tuning_round_bytes: A plain soft prompt of as many tokens, once a round for any number of examples.
        lora_round_bytes: LoRA's factors, once a round.
        break_even_exchanges: Exchanges of prompt and gradient in a round above which LoRA sends less.
        break_even_exchanges_with_averaging: The same with all bytes of an exchange and the controller's averaging;
            negative if averaging alone costs more than LoRA.
        controller_byte_ratio: LoRA's bytes of a round over the controller's.
        edge_reservoir_flops: Recurrent products of one example, dense.
        edge_input_flops: Products with W_in.
        edge_forward_flops: Both products of the controller.
        edge_backward_flops: Both outer products and P^T g.
        edge_update_flops: Of W_out and P.
        edge_flops: All of these.
        edge_sparse_flops: All of them with a sparse reservoir.
        lora_step_flops: 4 P T of one LoRA step; the base is frozen.
        flop_ratio_6pt: LoRA as published, 6 P T, over all edge terms.
        flop_ratio: 4 P T over all edge terms.
        sparse_flop_ratio: 4 P T over all edge terms with a sparse reservoir.
        server_exchange_flops: What one exchange costs the server, 4 P m.
        total_flop_ratio: 4 P T over edge and server together.
    """

    model: str
    seed_once_bytes: int
    exchange_prompt_up_bytes: int
    exchange_gradient_down_bytes: int
    exchange_target_up_bytes: int
    exchange_loss_down_bytes: int
    exchange_bytes: int
    label_private_exchange_bytes: int
    controller_round_bytes: int
    prompt_tuning_round_bytes: int
    lora_round_bytes: int
    break_even_exchanges: float
    break_even_exchanges_with_averaging: float
    controller_byte_ratio: float
    edge_reservoir_flops: int
    edge_input_flops: int
    edge_forward_flops: int
    edge_backward_flops: int
    edge_update_flops: int
    edge_flops: int
    edge_sparse_flops: int
    lora_step_flops: int
    flop_ratio_6pt: float
    flop_ratio: float
    sparse_flop_ratio: float
    server_exchange_flops: int
    total_flop_ratio: float


def full_row(shape: ModelShape, sizes: SplitSizes | None = None) -> FullRow:
    """One row of the full account.

    Args:
        shape: The model.
        sizes: By default those of the source.
    """
    sizes = sizes or SplitSizes()
    exchange = exchange_bytes(shape, sizes)
    prompt = prompt_bytes(sizes.prompt_tokens, shape.width)
    controller = 2 * FLOAT_BYTES * controller_parameters(shape, sizes)
    lora = 2 * lora_bytes(shape, sizes)
    edge = edge_flops(shape, sizes)
    sparse = edge_flops(shape, sizes, sparse=True).total
    step = lora_step_flops(shape, sizes)
    server = server_flops(shape, sizes)
    return FullRow(
        model=shape.name,
        seed_once_bytes=SEED_BYTES,
        exchange_prompt_up_bytes=exchange.prompt_up,
        exchange_gradient_down_bytes=exchange.gradient_down,
        exchange_target_up_bytes=exchange.target_up,
        exchange_loss_down_bytes=exchange.loss_down,
        exchange_bytes=exchange.total,
        label_private_exchange_bytes=exchange_bytes(shape, sizes, label_private=True).total,
        controller_round_bytes=controller,
        prompt_tuning_round_bytes=2 * prompt,
        lora_round_bytes=lora,
        break_even_exchanges=lora / (2 * prompt),
        break_even_exchanges_with_averaging=(lora - controller) / exchange.total,
        controller_byte_ratio=lora / controller,
        edge_reservoir_flops=edge.reservoir,
        edge_input_flops=edge.input,
        edge_forward_flops=edge.code + edge.prompt,
        edge_backward_flops=edge.prompt_matrix_gradient
        + edge.code_gradient
        + edge.code_matrix_gradient,
        edge_update_flops=edge.update,
        edge_flops=edge.total,
        edge_sparse_flops=sparse,
        lora_step_flops=step,
        flop_ratio_6pt=lora_step_flops(shape, sizes, frozen_base=False) / edge.total,
        flop_ratio=step / edge.total,
        sparse_flop_ratio=step / sparse,
        server_exchange_flops=server,
        total_flop_ratio=step / (edge.total + server),
    )
