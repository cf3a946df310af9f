import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.serving.answering import Reply
from fedllm_flwr.serving.protocol import (
    UNSUPPORTED,
    ApiError,
    ChatRequest,
    CompletionRequest,
    asks_of,
    finish_reason,
    parse,
    usage,
)
from fedllm_flwr.serving.rendering import Turn
from fedllm_flwr.settings.serving import ServingConfig

LIMITS = ServingConfig(max_new_tokens=32, max_samples=4)


def chat(**options: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **options}
    return parse(json.dumps(body).encode(), ChatRequest)


def test_defaults_are_openais_within_the_servers_limits() -> None:
    [ask] = asks_of(chat(), LIMITS)
    assert ask.content == (Turn("user", "Hi"),)
    sampling = ask.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (32, 1.0, 1.0)
    assert (len(sampling.seeds), sampling.stop) == (1, ())


def test_seeds_of_answers_come_from_the_requests_seed() -> None:
    def seeds(**options: Any) -> tuple[int, ...]:
        return asks_of(chat(**options), LIMITS)[0].sampling.seeds

    assert seeds(seed=1, n=3) == seeds(seed=1, n=3)
    assert len(set(seeds(seed=1, n=4))) == 4
    assert seeds(seed=1, n=4)[:2] == seeds(seed=1, n=2)
    assert seeds(seed=-5) != seeds(seed=5)
    assert seeds() != seeds()


def test_messages_may_come_in_parts_and_from_a_developer() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    [ask] = asks_of(chat(messages=messages), LIMITS)
    assert ask.content == (Turn("system", "Be brief."), Turn("user", "ab"))
    with pytest.raises(ApiError, match=r"messages\.0\.content"):
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])


def test_several_prompts_are_several_asks() -> None:
    body = b'{"model": "m", "prompt": ["a", "b"], "stop": ";", "max_tokens": 3}'
    asks = asks_of(parse(body, CompletionRequest), LIMITS)
    assert [ask.content for ask in asks] == ["a", "b"]
    assert asks[0].sampling == asks[1].sampling
    assert asks[0].sampling.stop == (";",)
    many = json.dumps({"model": "m", "prompt": ["a"] * 17}).encode()
    with pytest.raises(ApiError, match="at most 16 prompts, got 17"):
        asks_of(parse(many, CompletionRequest), LIMITS)


def test_the_newer_name_of_the_limit_wins() -> None:
    [ask] = asks_of(chat(max_tokens=9, max_completion_tokens=5), LIMITS)
    assert ask.sampling.max_new_tokens == 5


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_an_option_that_is_not_here_is_taken_only_if_it_asks_for_nothing(name: str) -> None:
    for neutral in UNSUPPORTED[name]:
        chat(**{name: neutral})
    for wanted in (True, 0.5, {"some": "thing"}):
        if wanted not in UNSUPPORTED[name]:
            with pytest.raises(ApiError, match=f"{name}: this server does not have") as error:
                chat(**{name: wanted})
            assert error.value.status == 400


@given(st.binary(max_size=60))
def test_any_body_is_a_request_or_a_400(body: bytes) -> None:
    status = 200
    try:
        parse(body, ChatRequest)
    except ApiError as error:
        status = error.status
    assert status in (200, 400)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.sampled_from(["messages", "temperature", "n", "stop", "seed", "stream", "model"]), JSON)
def test_any_value_is_taken_or_a_400(name: str, value: Any) -> None:
    status = 200
    try:
        asks_of(chat(**{name: value}), LIMITS)
    except ApiError as error:
        status = error.status
    assert status in (200, 400)


def test_usage_counts_all_prompts_and_an_answer_that_was_given_up_is_cut() -> None:
    replies = [
        Reply(("a",), ("stop",), 3, 4, "t", None, 7.0),
        Reply(("b",), ("length",), 5, 6, "t", None, 11.0),
    ]
    assert usage(replies) == {"prompt_tokens": 8, "completion_tokens": 10, "total_tokens": 18}
    assert [finish_reason(f) for f in ("stop", "length", "cancelled")] == [
        "stop",
        "length",
        "length",
    ]
