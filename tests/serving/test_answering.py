import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.generation import Generator, Query, Sampling
from fedllm_flwr.serving.answering import Ask, SingleModel
from fedllm_flwr.serving.rendering import Turn, encode_chat


def go_on(query: int, sample: int, text: str) -> bool:
    return True


def test_chats_and_texts_of_one_batch_are_answered_in_order(
    single: SingleModel, generator: Generator
) -> None:
    warm = Sampling(6, temperature=1.0, seeds=(1, 2))
    turns = (Turn("user", "What is tin?"),)
    asks = [Ask("Once upon", Sampling(4)), Ask(turns, warm), Ask("a time", Sampling(5))]
    found = single.answer(asks, go_on)
    tokenizer = generator.backbone.tokenizer
    wanted = [
        tokenizer("Once upon")["input_ids"], encode_chat(turns, tokenizer), tokenizer("a time")["input_ids"],
    ]  # fmt: skip
    for ask, reply, ids in zip(asks, found, wanted, strict=True):
        [alone] = generator.generate([Query(tuple(ids), ask.sampling)])
        assert reply.texts == tuple(sample.text for sample in alone.samples)
        assert reply.input_tokens == len(ids)
        assert reply.output_tokens == alone.output_tokens
        assert reply.cost == len(ids) + alone.output_tokens
        assert (reply.tier, reply.agreement) == ("tiny-run", None)


def test_a_request_beyond_the_context_is_refused_beforehand(single: SingleModel) -> None:
    read = single.answer([Ask("tin", Sampling(1))], go_on)[0].input_tokens
    single.check(Ask("tin", Sampling(512 - read)))
    with pytest.raises(ConfigError, match="at most 512 tokens with its answer"):
        single.check(Ask("tin", Sampling(513 - read)))
    with pytest.raises(ConfigError, match="at least one token of its own"):
        single.check(Ask("", Sampling(5)))
    assert single.tiers == (single.name,)
