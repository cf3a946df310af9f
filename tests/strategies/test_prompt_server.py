from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedllm_flwr.errors import WireError
from fedllm_flwr.reservoir import cross_entropy
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.training.server_texts import keys_of
from strategies.exchange import ClientReply
from strategies.prompt_server import Prompts, PromptServer

Fixture = Callable[..., Any]
METHOD = "method=fedresprompt"
LM = "method.server_model=lm"


@pytest.fixture
def server(micro: Fixture) -> Callable[..., PromptServer]:
    def made(*overrides: str) -> PromptServer:
        config = micro(METHOD, *overrides)
        return PromptServer(config, load_task(config.task.options(""), config.seed), (2, 64))

    return made


def batch(*sizes: int, texts: bool = False) -> list[Prompts]:
    random = torch.Generator().manual_seed(0)
    found = []
    for client, rows in enumerate(sizes):
        read = tuple(tuple(range(5, 8 + i % 3)) for i in range(rows)) if texts else None
        values = 0.1 * torch.randn(rows, 2, 64, generator=random)
        found.append(Prompts(client, values, torch.arange(rows) % 4, read))
    return found


CASES = {
    "surrogate": (), "lm": (LM,), "before": (LM, "method.server_text=prompt_before"),
    "after": (LM, "method.server_text=prompt_after"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_clients_together_get_what_each_gets_alone(case: str, server: Fixture) -> None:
    made = server(*CASES[case])
    together = batch(3, 1, 70, texts=case in ("before", "after"))
    found = made.losses_and_gradients(together)
    logits = made.logits(together)
    for own, (losses, gradients), own_logits in zip(together, found, logits, strict=True):
        [(alone, gradient)] = made.losses_and_gradients([own])
        torch.testing.assert_close(losses, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradients, gradient, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            cross_entropy(own_logits, own.targets)[0], losses, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("case", CASES)
def test_slopes_of_private_labels_give_the_same_gradients(case: str, server: Fixture) -> None:
    made = server(*CASES[case])
    together = batch(3, 2, texts=case in ("before", "after"))
    slopes = [
        cross_entropy(logits, own.targets)[1]
        for logits, own in zip(made.logits(together), together, strict=True)
    ]
    known = made.losses_and_gradients(together)
    for (_, wanted), found in zip(known, made.gradients(together, slopes), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_texts_are_computed_once_for_training_and_evaluation(server: Fixture) -> None:
    made, together = server(*CASES["after"]), batch(3, 1, texts=True)
    backbone, _ = made._model
    keys = keys_of(backbone)
    made.logits(together)
    assert len(keys) >= len({text for own in together for text in own.texts or ()})
    known = len(keys)
    first = made.losses_and_gradients(together)
    for (losses, gradients), again in zip(first, made.losses_and_gradients(together), strict=True):
        assert torch.equal(losses, again[0])
        assert torch.equal(gradients, again[1])
    assert len(keys_of(backbone)) == known


def test_no_rows_have_no_logits(server: Fixture) -> None:
    [logits] = server().logits(batch(0))
    assert logits.shape == (0, 4)


GOOD = {"rows": 2, "targets": [0, 3], "texts": [[1, 2], [3]]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows": -1}, "client 5, part prompts: expected prompts of 2 tokens of width 64"),
    ({"rows": 3}, "client 5, part prompts: expected prompts of 2 tokens of width 64"),
    ({"rows": True}, "client 5: rows: expected a whole number"),
    ({"targets": [0]}, "client 5: expected 2 targets"),
    ({"targets": [0, 4]}, r"client 5: expected targets in \[0, 4\), got 4"),
    ({"targets": [0, -1]}, r"client 5: expected targets in \[0, 4\), got -1"),
    ({"targets": [0, True]}, r"client 5: expected targets in \[0, 4\), got True"),
    ({"texts": None}, "client 5: expected 2 texts"),
    ({"texts": [[1], []]}, "client 5: expected texts of 1 to 48 tokens"),
    ({"texts": [[1], [1] * 49]}, "client 5: expected texts of 1 to 48 tokens"),
    ({"texts": [[1], [10**6]]}, "client 5: expected tokens below"),
]


def test_a_good_reply_becomes_tensors(server: Fixture) -> None:
    values = np.arange(256, dtype=np.float32)
    made = server(LM, "method.server_text=prompt_before")
    found = made.checked(ClientReply(5, GOOD, {"prompts": values}), "prompts", GOOD)
    assert found.values.shape == (2, 2, 64)
    assert found.targets is not None
    assert (found.targets.tolist(), found.texts) == ([0, 3], ((1, 2), (3,)))


@pytest.mark.parametrize(("change", "match"), BAD)
def test_what_is_not_right_is_named(change: dict[str, Any], match: str, server: Fixture) -> None:
    made = server(LM, "method.server_text=prompt_before")
    facts = GOOD | change
    reply = ClientReply(5, facts, {"prompts": np.zeros(256, np.float32)})
    with pytest.raises(WireError, match=match):
        made.checked(reply, "prompts", facts)


def test_a_reply_without_its_part_or_rows_is_refused(server: Fixture) -> None:
    made = server()
    with pytest.raises(WireError, match=r"client 5: expected prompts 'prompts', got \[\]"):
        made.checked(ClientReply(5, GOOD, {}), "prompts", GOOD)
    none = {"rows": 0, "targets": []}
    reply = ClientReply(5, none, {"prompts": np.zeros(0, np.float32)})
    assert len(made.checked(reply, "prompts", none).values) == 0
    with pytest.raises(WireError, match="for at least 1 rows"):
        made.checked(reply, "prompts", none, least=1)
