"""Ask a client that wants to be forgotten what a model says of its rows; the rows stay with it.

One message carries a run's model down, and figures come up: an array for each kind of question, of sizes that the plan
gives beforehand. It is no strategy of Flower's, since nothing is aggregated; it uses the same messages and waves.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedllm_flwr import records
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError, RunStoppedError, WireError
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.tiers import pack_adaptation
from fedllm_flwr.unlearning.questions import Material, Plan, queries, sizes
from strategies.client_tier import Account
from strategies.exchange import ClientReply, by_client, checked_number, messages_for, stream
from strategies.hosting import Hosting

MODEL = "model"
MOST_NAMES, LONGEST_NAME = 16, 64


class Examination:
    """One client's answers.

    Args:
        config: The run that the client leaves.
        hosting: Which node hosts it.
        account: Who is told what crosses the wire.
        client: Its partition id.
    """

    def __init__(self, config: RunConfig, hosting: Hosting, account: Account, client: int) -> None:
        self._config, self._hosting, self._account = config, hosting, account
        self._client = client
        self._material: Material | None = None

    def material(self) -> Material:
        """What the client has to ask with; asked for once.

        Raises:
            RunStoppedError: It did not answer, or what it says cannot be.
        """
        if self._material is None:
            self._material = self._checked(self._asked(None, None, refuses=False), read_material)
        return self._material

    def examine(
        self, model: Adaptation, plan: Plan, *, refuses: bool = False
    ) -> dict[str, np.ndarray]:
        """What a model says of the client's rows.

        Args:
            model: What a run has added to the frozen model: an update or a prompt.
            plan: What is asked.
            refuses: Whether a wrapper answers every prompt that holds a text of the client's with a refusal.

        Returns:
            Flat arrays, as :func:`fedllm_flwr.unlearning.questions.sizes` lists them; float64 that were float32 on the
            wire.

        Raises:
            RunStoppedError: It did not answer, or what it says is not what was asked for.
            ConfigError: The model is neither an update nor a prompt.
        """
        material = self.material()
        reply = self._asked(model, plan, refuses=refuses)
        return self._checked(reply, lambda r: read_figures(r, plan, material))

    def _asked(self, model: Adaptation | None, plan: Plan | None, *, refuses: bool) -> ClientReply:
        """One message and its answer."""
        facts, values = pack_adaptation(model or Adaptation())
        content = records.instruction({}, {} if values is None else {MODEL: values}, "float32")
        body = {
            "config": json.loads(self._config.to_json()),
            "fingerprint": self._config.fingerprint(),
            MODEL: facts,
            "plan": None if plan is None else asdict(plan),
            "refuses": refuses,
        }

        def shared(_: Any) -> RecordDict:
            return content

        messages = messages_for(
            self._hosting,
            shared,
            body,
            message_type=records.EXAMINE,
            partition_ids=[self._client],
            clients_per_wave=1,
            server_round=0,
        )
        seconds = self._config.strategy.round_timeout_seconds
        replies = stream(self._hosting.grid, messages, seconds, self._account.count)
        return next(r for r in by_client(messages, replies) if not r.stray)

    def _checked(self, reply: ClientReply, reading: Any) -> Any:
        try:
            return reading(reply)
        except (WireError, ConfigError) as error:
            self._account.failure(0, self._client, str(error))
            raise RunStoppedError(f"verification: {error}") from error


def read_material(reply: ClientReply) -> Material:
    """Counts and names of an answer.

    Raises:
        WireError: The client failed, or a count is no number >= 0, or a name is no short text.
    """
    told = _told(reply, "material")
    who = f"client {reply.partition_id}"
    members, others, canaries = (
        checked_number(who, told, name, whole=True) for name in ("members", "others", "canaries")
    )
    wordings, forms, several = (told.get(n) for n in ("wordings", "forms", "several_tokens"))
    unfit = told.get("unfit")
    lists = isinstance(wordings, list) and isinstance(forms, list) and isinstance(unfit, dict)
    names = [*wordings, *forms, *unfit] if lists else [0]  # type: ignore[misc]
    good = all(isinstance(n, str) and 0 < len(n) <= LONGEST_NAME and "/" not in n for n in names)
    counts = (members, others, canaries)
    if min(counts) < 0 or not good or len(names) > MOST_NAMES or type(several) is not bool:
        raise WireError(f"{who}: material: expected counts and short names, got {told!r:.80}")
    reasons = {name: str(reason)[:LONGEST_NAME] for name, reason in dict(unfit or {}).items()}
    return Material(
        members, others, tuple(wordings or ()), tuple(forms or ()), canaries, reasons, several
    )


def read_figures(reply: ClientReply, plan: Plan, material: Material) -> dict[str, np.ndarray]:
    """Arrays of an answer, float64.

    Raises:
        WireError: The client failed, other figures came than were asked for, one is not finite or of another size, or
            it did not ask what it was to ask.
    """
    who, wanted = f"client {reply.partition_id}", sizes(plan, material)
    asked = _told(reply, "queries")
    if dict(asked) != queries(plan, material):
        raise WireError(f"{who}: queries: expected {queries(plan, material)}, got {asked!r:.80}")
    got = {name: values.size for name, values in reply.parts.items()}
    if got != wanted:
        different = sorted(set(got.items()) ^ set(wanted.items()))
        raise WireError(
            f"{who}: figures: expected those of the plan, got others: {different!r:.120}"
        )
    for name, values in reply.parts.items():
        if not np.isfinite(values).all():
            raise WireError(f"{who}: {name}: expected finite figures, got others")
        if not name.endswith("/min_k") and (values < 0).any():
            raise WireError(f"{who}: {name}: expected figures >= 0, got others")
    return {name: reply.parts[name].astype(np.float64) for name in wanted}


def _told(reply: ClientReply, name: str) -> Mapping[str, Any]:
    if reply.error:
        raise WireError(reply.error)
    told = reply.info.get(name)
    if not isinstance(told, dict):
        raise WireError(
            f"client {reply.partition_id}: {name}: expected an object, got {told!r:.60}"
        )
    return told
