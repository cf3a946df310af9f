"""Against the model's own code, over the whole text at once."""

from dataclasses import replace

import pytest
import torch

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.generation_batch import CachedRows, next_logits
from fedllm_flwr.models.loss import LogitTransform


def test_states_are_those_of_the_whole_text(tiny: Backbone) -> None:
    texts = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 30, 31, 32]])
    with torch.no_grad():
        wanted = tiny.hidden(texts)
        rows = CachedRows(tiny)
        rows.read(texts[:1, :2])
        rows.repeat(2)
        found = rows.forward(texts[:, 2:4], torch.ones(2, 2, dtype=torch.long))
        torch.testing.assert_close(found, wanted[:, 2:4])
        rows.select([1, 0])
        torch.testing.assert_close(
            rows.step(texts[[1, 0], 4:]), wanted[[1, 0], 4] @ tiny.head_weight().T
        )


@pytest.mark.parametrize("scale_and_cap", [(1.0, 0.0), (0.5, 0.0), (1.0, 3.0), None])
def test_logits_are_those_of_the_model(
    scale_and_cap: tuple[float, float] | None, tiny: Backbone
) -> None:
    states = torch.randn(3, tiny.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = states @ tiny.head_weight().T
    transform = None if scale_and_cap is None else LogitTransform(*scale_and_cap)
    scale, cap = scale_and_cap or (1.0, 0.0)
    wanted = cap * torch.tanh(plain * scale / cap) if cap else plain * scale
    with torch.no_grad():
        found = next_logits(replace(tiny, logit_transform=transform, _places={}), states)
    torch.testing.assert_close(found, wanted)
