"""A member of a tier that answers elsewhere: a server with OpenAI's chat interface.

Axes: n rows, k samples.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from fedllm_flwr.cascade import parsed_label
from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.tasks.base import Row, Task, Template
from fedllm_flwr.tiers.members import Asking, Reply

TIMEOUT_SECONDS = 120.0
CONNECT_RETRIES = 2
LARGEST_SEED = 2**31
"""Servers read seeds as 32-bit integers."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind a URL. It is sent the text of every query that reaches its tier.

    Attributes:
        name: In recorded answers.
        base_url: Up to and without ``/chat/completions``.
        model: The server's name of the model.
        key_variable: Environment variable that holds the key; empty = no key is sent.
        template: Name of one of the task's templates; empty = its first.
    """

    name: str
    base_url: str
    model: str
    key_variable: str = ""
    template: str = ""

    def headers(self) -> dict[str, str]:
        """With the key, if there is to be one.

        Raises:
            ConfigError: The variable is not set, or no header can hold what is in it.
        """
        if not self.key_variable:
            return {}
        key = os.environ.get(self.key_variable, "")
        if not key:
            raise ConfigError(
                f"endpoint {self.name}: expected a key in the environment variable {self.key_variable}, got none"
            )
        if not (key.isascii() and key.isprintable()) or key != key.strip():
            raise ConfigError(  # httpx would quote the key
                f"endpoint {self.name}: expected a key in one line of ASCII in the environment variable "
                f"{self.key_variable}, got other characters"
            )
        return {"Authorization": f"Bearer {key}"}

    def ask(self, task: Task, rows: Sequence[Row], asking: Asking) -> list[tuple[Reply, ...]]:
        """Answer queries, one call for each sample.

        Args:
            task: Its template asks; a label counts where the answer states it and no other one.
            rows: Queries; their targets are not sent.
            asking: How.

        Returns:
            For each row ``asking.samples`` answers, with the tokens that the server says it has counted. [n][k]

        Raises:
            ConfigError: The key is missing.
            RunStoppedError: The server does not answer, refuses, or answers something else.
        """
        template = task.template(self.template)
        transport = httpx.HTTPTransport(retries=CONNECT_RETRIES)
        with httpx.Client(
            base_url=self.base_url.rstrip("/") + "/",
            headers=self.headers(),
            timeout=TIMEOUT_SECONDS,
            transport=transport,
        ) as client:
            return [
                tuple(
                    self._answer(client, task, template, row, asking, s) for s in asking.seeds(row)
                )
                for row in rows
            ]

    def _answer(
        self,
        client: httpx.Client,
        task: Task,
        template: Template,
        row: Row,
        asking: Asking,
        seed: int,
    ) -> Reply:
        body = {
            "model": self.model,
            "messages": turns(template, row.text),
            "temperature": asking.temperature,
            "max_tokens": asking.max_new_tokens,
            "seed": seed % LARGEST_SEED,
        }
        try:
            response = client.post("chat/completions", json=body)
            if response.is_error:
                raise RunStoppedError(
                    f"endpoint {self.name}: expected an answer, got status {response.status_code}: "
                    f"{' '.join(response.text.split())[:200]}"
                )
            text, read, written = self._parts(response.json())
        except (httpx.HTTPError, ValueError) as error:
            raise RunStoppedError(
                f"endpoint {self.name}: expected an answer, got {type(error).__name__}: {error}"
            ) from error
        if task.kind == "classification":
            text = parsed_label(text, task.label_words)
        return Reply(text, read, written)

    def _parts(self, answer: Any) -> tuple[str | None, int, int]:
        """Text, and tokens read and written."""
        try:
            text = answer["choices"][0]["message"]["content"]
            read, written = (
                answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")
            )
        except (KeyError, IndexError, TypeError):
            raise RunStoppedError(
                f"endpoint {self.name}: expected choices with a message, and usage, got {str(answer)[:200]}"
            ) from None
        counted = all(type(count) is int and count >= 0 for count in (read, written))
        if not counted or not isinstance(text, str | None):
            raise RunStoppedError(
                f"endpoint {self.name}: expected text and whole numbers of tokens, got {str(answer)[:200]}"
            )
        return (text or "").strip() or None, read, written


def turns(template: Template, text: str) -> list[dict[str, str]]:
    """A template's question about a text as turns of a chat."""
    question = {"role": "user", "content": template.text.replace("{text}", text)}
    system = [{"role": "system", "content": template.system}] if template.system else []
    return [*system, question]
