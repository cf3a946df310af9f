import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedllm_flwr.costs import ModelShape, SplitSizes, edge_flops, lora_step_flops, server_flops

SHAPE = ModelShape(24, 3, "x")
SIZES = SplitSizes(
    prompt_tokens=5, code_size=7, reservoir_size=40, input_size=2, context_steps=6, lora_tokens=11
)


def test_edge_products_are_those_that_torch_counts() -> None:
    """All of one example but the update, which is no product."""
    states = torch.zeros(40, 1)
    code_matrix, prompt_matrix = torch.zeros(7, 43), torch.zeros(5 * 24, 7)
    with FlopCounterMode(display=False) as counter:
        for _ in range(6):
            states = torch.zeros(40, 3) @ torch.zeros(3, 1) + torch.zeros(40, 40) @ states
        state = torch.cat([torch.zeros(3, 1), states])
        code = code_matrix @ state
        slope = prompt_matrix @ code
        _ = slope @ code.t()
        _ = (prompt_matrix.t() @ slope) @ state.t()
    found = edge_flops(SHAPE, SIZES)
    assert found.total - found.update == counter.get_total_flops()
    assert found.update == 2 * (code_matrix.numel() + prompt_matrix.numel())


def test_a_sparse_reservoir_saves_only_its_own_product() -> None:
    dense, sparse = (edge_flops(SHAPE, SIZES, sparse=s) for s in (False, True))
    assert sparse.reservoir * 10 == dense.reservoir
    assert dense.total - sparse.total == dense.reservoir - sparse.reservoir


@pytest.mark.parametrize(("frozen", "passes"), [(True, 2), (False, 3)])
def test_a_step_is_two_operations_a_parameter_token_and_pass(frozen: bool, passes: int) -> None:
    blocks = 12 * 3 * 24**2
    assert lora_step_flops(SHAPE, SIZES, frozen_base=frozen) == 2 * passes * blocks * 11
    assert server_flops(SHAPE, SIZES) == 4 * blocks * 5
