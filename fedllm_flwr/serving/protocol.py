"""Requests and responses in the form of OpenAI's API: what is taken, what is refused and why."""

import json
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.generation import Sampling
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.serving.answering import Ask, Reply
from fedllm_flwr.serving.rendering import Role, Turn
from fedllm_flwr.settings.serving import ServingConfig

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,), "best_of": (None, 1), "echo": (None, False), "frequency_penalty": (None, 0),
    "function_call": (None, "none"), "functions": (None, []), "logit_bias": (None, {}), "logprobs": (None, False, 0),
    "metadata": (None, {}), "modalities": (None, ["text"]), "parallel_tool_calls": (None, False),
    "prediction": (None,), "presence_penalty": (None, 0), "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}), "service_tier": (None,), "store": (None, False),
    "suffix": (None, ""), "tool_choice": (None, "none"), "tools": (None, []), "top_logprobs": (None, 0),
    "verbosity": (None,), "web_search_options": (None,),
}  # fmt: skip
"""Options of OpenAI's that are not here, with the values that ask for nothing."""
MAX_STOPS, MAX_PROMPTS = 4, 16


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP's.
        message: What the client reads.
        code: One word for programs.
    """

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def body(self) -> dict[str, Any]:
        """The response's body, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """Of a streamed response."""

    include_usage: bool = False


class Common(_Strict):
    """What both kinds of request have; ``user`` has no effect."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class TextPart(_Strict):
    """A part of a message; there are no others than text."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def turn(self) -> Turn:
        """The turn; a developer's is a system turn."""
        role: Role = "system" if self.role == "developer" else self.role
        parts = self.content
        return Turn(role, parts if isinstance(parts, str) else "".join(p.text for p in parts))


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(Common):
    """``POST /v1/completions``."""

    prompt: str | list[str]


Kind = TypeVar("Kind", bound=Common)


def parse(body: bytes, kind: type[Kind]) -> Kind:
    """Read a request.

    Raises:
        ApiError: 400, naming the option and what was expected.
    """
    try:
        tree = json.loads(body)
        json.dumps(tree, ensure_ascii=False, allow_nan=False).encode()  # half characters, NaN
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"body: expected one JSON object in UTF-8: {error}", "bad_json"
        ) from None
    if not isinstance(tree, dict):
        raise ApiError(400, "body: expected a JSON object", "bad_json")
    for name in sorted(UNSUPPORTED.keys() & tree.keys()):
        if not any(_same(tree[name], neutral) for neutral in UNSUPPORTED[name]):
            raise ApiError(400, f"{name}: this server does not have this option", "unsupported")
        del tree[name]
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in found["loc"]) or "body"
        raise ApiError(400, f"{where}: {found['msg']}", "bad_value") from None


def asks_of(request: ChatRequest | CompletionRequest, config: ServingConfig) -> list[Ask]:
    """What a request asks for: one entry for each prompt.

    Raises:
        ApiError: 400, an option is beyond the server's limits.
    """
    try:
        sampling = _sampling(request, config)
    except ConfigError as error:
        raise ApiError(400, str(error), "bad_value") from None
    if isinstance(request, ChatRequest):
        return [Ask(tuple(message.turn() for message in request.messages), sampling)]
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ApiError(
            400,
            f"prompt: expected 1 to at most {MAX_PROMPTS} prompts, got {len(prompts)}",
            "bad_value",
        )
    return [Ask(prompt, sampling) for prompt in prompts]


def usage(replies: list[Reply]) -> dict[str, int]:
    """Tokens, in OpenAI's words."""
    read, written = (
        sum(r.input_tokens for r in replies), sum(r.output_tokens for r in replies)
    )  # fmt: skip
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def finish_reason(finish: str) -> str:
    """OpenAI's word; an answer that was given up counts as cut."""
    return "stop" if finish == "stop" else "length"


def _sampling(request: Common, config: ServingConfig) -> Sampling:
    new = getattr(request, "max_completion_tokens", None) or request.max_tokens
    new = config.max_new_tokens if new is None else new
    count = request.n or 1
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    for name, value, limit in (
        ("max_tokens", new, config.max_new_tokens),
        ("n", count, config.max_samples),
        ("stop", len(stop), MAX_STOPS),
    ):
        if value > limit:
            raise ConfigError(f"{name}: expected at most {limit}, got {value}")
    root = secrets.randbits(62) if request.seed is None else request.seed
    return Sampling(
        max_new_tokens=new,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seeds=tuple(derive_seed(root, "sample", k) for k in range(count)),
        stop=tuple(stop),
    )


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and no number for a truth value."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
