"""Texts and what is kept of them; that a half computes the same from them is in test_server_half."""

import torch

from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.training.server_half import ServerHalf
from fedllm_flwr.training.server_texts import TextKeys, keys_of, padded

TEXTS = ((12, 250, 3, 77), (9,), (40, 41, 42, 43, 44, 45, 46))


def test_texts_are_padded_on_the_right_and_masked() -> None:
    found = padded(TEXTS, torch.device("cpu"))
    assert found.ids.tolist()[1] == [9, 0, 0, 0, 0, 0, 0]
    assert found.mask().sum(1).tolist() == found.lengths.tolist() == [4, 1, 7]
    some = found.of(slice(1, 3), 2)
    assert some.lengths.tolist() == [1, 7]
    one = padded(TEXTS[:1], torch.device("cpu")).of(slice(0, 3), 3)
    assert one.ids.tolist() == [list(TEXTS[0])] * 3


def test_keys_are_those_of_the_text_alone_to_the_bit(served: Backbone) -> None:
    """So neither the company that a text comes in nor what is kept changes a result."""
    keys = TextKeys(served)
    together = keys.kept(TEXTS)
    for row, text in enumerate(TEXTS):
        alone = TextKeys(served, 0).kept([text])
        for (wide, _), (own, _) in zip(together.layers, alone.layers, strict=True):
            assert torch.equal(wide[row, :, : len(text)], own[0])
            assert not wide[row, :, len(text) :].any()
    again = keys.kept(TEXTS[::-1])
    assert torch.equal(again.layers[0][0], together.layers[0][0].flip(0))


def test_what_is_kept_is_bounded_and_makes_room(served: Backbone) -> None:
    size = sum(
        part[0].nbytes for layer in TextKeys(served).kept(TEXTS[:1]).layers for part in layer
    )
    narrow = TextKeys(served, size)
    narrow.kept(TEXTS[2:])
    assert len(narrow) == 0, "larger than all room"
    narrow.kept(TEXTS[:1])
    kept = narrow._kept[TEXTS[0]]
    assert narrow._layers(TEXTS[0]) is kept
    narrow.kept(TEXTS[1:2])
    assert list(narrow._kept) == [TEXTS[1]]
    assert narrow._held_bytes == size // len(TEXTS[0])


def test_one_process_keeps_a_models_texts_for_all_who_use_it(served: Backbone) -> None:
    assert keys_of(served) is keys_of(served)


def test_a_half_with_kept_texts_computes_the_same(served: Backbone) -> None:
    keys = TextKeys(served)
    keys.kept(TEXTS[:2])
    prompts = 0.3 * torch.randn(
        3, 5, served.hidden_size, generator=torch.Generator().manual_seed(3)
    )
    targets = torch.tensor([0, 2, 1])
    settings = {"token_ids": (7, 3, 11), "text_ids": TEXTS, "placement": "after_text"}
    plain = ServerHalf(served, **settings).loss_and_gradient(prompts, targets)
    found = ServerHalf(served, **settings, with_keys=keys.kept)
    again = found.loss_and_gradient(prompts, targets)
    assert torch.equal(again[0], plain[0])
    assert torch.equal(again[1], plain[1])
    assert len(keys) == 3
