"""What a client does for a cascade: count for a threshold, answer its own queries, take the answers to the rest.

Its queries are the rows of its test split, as in the evaluation of a run; a threshold is chosen on its validation
rows. Of a query that its tier answers nothing leaves it but counts; of a deferred one its text does, and nothing else.
Answers stay at the node: in its Flower context until the deferred ones are back, then in a file, if a folder is given
(node config ``state-path``, or an environment variable).
"""

import json
import os
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message

from clients.base import attempt
from clients.workspace import Asked, read
from fedllm_flwr import records
from fedllm_flwr.errors import WireError
from fedllm_flwr.runs.atomic import write_text
from fedllm_flwr.settings.runtime import STATE_PATH_VARIABLE
from fedllm_flwr.tiers import Computing, Tier, is_right, tier_histogram, unpack_tier
from fedllm_flwr.tiers.tier import agreement, text_of

PENDING = ""
"""In place of an answer that is to come; an answer is never empty."""


def calibrate(message: Message, context: Context) -> Message:
    """For each asked client two lists of counts: right answers and answers, by agreement."""
    asked = read(message, context)
    tier = _tier(asked)

    def counted(partition_id: int) -> dict[str, Any]:
        rows = asked.work.rows(partition_id).validation
        found = tier_histogram(tier, asked.work.task, rows)
        return {"correct": found.correct.tolist(), "total": found.total.tolist()}

    return _each(message, asked, "calibration", counted)


def pending(message: Message, context: Context) -> Message:
    """Answer what the tier's members agree on; the texts of the other queries are the answer."""
    asked = read(message, context)
    tier, theta = _tier(asked), float(asked.body["theta"])

    def answered(partition_id: int) -> dict[str, Any]:
        rows = asked.work.rows(partition_id).test
        replies = tier.ask(asked.work.task, rows)
        agreed = [agreement(own) for own in replies]
        texts = [
            (text_of(own, found) or PENDING) if found.accepted(theta) else PENDING
            for own, found in zip(replies, agreed, strict=True)
        ]
        context.state[_key(partition_id)] = ConfigRecord({"run": asked.body["run"], "texts": texts})
        return {
            "queries": len(rows),
            "input-tokens": sum(reply.input_tokens for own in replies for reply in own),
            "output-tokens": sum(reply.output_tokens for own in replies for reply in own),
            "deferred": [
                [place, row.text]
                for place, (row, text) in enumerate(zip(rows, texts, strict=True))
                if text == PENDING
            ],
        }

    return _each(message, asked, "answering", answered)


def answers(message: Message, context: Context) -> Message:
    """Put the server's answers to the client's own, keep both, and say how many are right."""
    asked = read(message, context)

    def completed(partition_id: int) -> dict[str, Any]:
        own = _kept(asked, context, partition_id)
        given = {int(place): text for place, text in asked.body["answers"]}
        waiting = {place for place, text in enumerate(own) if text == PENDING}
        if set(given) != waiting:
            raise WireError(
                f"client {partition_id}: expected answers to its {len(waiting)} deferred queries, got {len(given)}"
            )
        rows = asked.work.rows(partition_id).test
        merged = [given.get(place, text) for place, text in enumerate(own)]
        right = [
            is_right(asked.work.task, row, text) for row, text in zip(rows, merged, strict=True)
        ]
        _write(context, partition_id, [
            {"query": row.row_id, "answer": text, "deferred": place in given}
            for place, (row, text) in enumerate(zip(rows, merged, strict=True))
        ])  # fmt: skip
        del context.state[_key(partition_id)]
        return {
            "queries": len(rows),
            "correct": sum(right),
            "deferred": len(given),
            "deferred-correct": sum(right[place] for place in given),
        }

    return _each(message, asked, "taking answers", completed)


def _tier(asked: Asked) -> Tier:
    runtime = asked.work.config.runtime
    computing = Computing(runtime.dtype, runtime.device, runtime.threads)
    return unpack_tier(asked.body["cascade"], asked.parts, runtime.model_path, computing)


def _each(message: Message, asked: Asked, what: str, function: Any) -> Message:
    """Do something for every asked client; one client's failure is its own."""
    infos = []
    for partition_id in asked.partition_ids:
        found, reason = attempt(partition_id, what, lambda p=partition_id: function(p))  # type: ignore[misc]
        infos.append({"partition-id": partition_id, **(found or {"error": reason})})
    return Message(records.answer({"clients": infos}, {}, "float32", 0), reply_to=message)


def _kept(asked: Asked, context: Context, partition_id: int) -> list[str]:
    """A client's own answers from the message before.

    Raises:
        WireError: There are none of this run, say because its node was started anew.
    """
    held = context.state.get(_key(partition_id))
    if not isinstance(held, ConfigRecord) or held["run"] != asked.body["run"]:
        raise WireError(f"client {partition_id}: expected to have answered its queries before")
    texts: Any = held["texts"]
    return list(texts)


def _write(context: Context, partition_id: int, lines: list[dict[str, Any]]) -> None:
    folder = str(context.node_config.get("state-path", os.environ.get(STATE_PATH_VARIABLE, "")))
    if folder:
        path = Path(folder) / "answers" / f"client-{partition_id}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _key(partition_id: int) -> str:
    return f"cascade/{partition_id}"
