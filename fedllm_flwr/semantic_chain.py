"""A chain of real models over a task of free texts: everybody writes, similarity decides, a grade says how good."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm_flwr.cascade import ROUGE_L, Similarity, cosine
from fedllm_flwr.cascade.free_text import Written, free_text_rows
from fedllm_flwr.cascade.quality import chr_f
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.sentences import load_minilm
from fedllm_flwr.runs.atomic import write_text
from fedllm_flwr.settings.cascade import CascadeConfig
from fedllm_flwr.tasks.base import Row, Task
from fedllm_flwr.tiers import Tier
from fedllm_flwr.tiers.recorded import QUERIES_AT_ONCE

TEXTS = "texts.jsonl"


def similarity_named(name: str) -> Similarity:
    """What ``cascade.agreement`` names.

    Raises:
        AssetError: The encoder's package is absent.
    """
    if name == "rouge_l":
        return ROUGE_L
    encoder = load_minilm()
    return cosine(encoder.name, encoder)


def run_texts(
    cascade: CascadeConfig,
    task: Task,
    tiers: Sequence[Tier],
    seed: int,
    folder: Path,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Let every tier write to every test row, keep the texts, and draw the curves.

    Quality is chrF against the row's target, which is neither of the similarities that decide. Of each text the first
    line that is not empty counts.

    Args:
        cascade: Which similarity.
        task: Of free texts.
        tiers: Two or more; the first of two members or more.
        seed: Decides the bootstrap's draws.
        folder: Gets ``texts.jsonl``.
        note: Told what happens, line by line.

    Returns:
        Rows as of :func:`fedllm_flwr.cascade.free_text.free_text_rows`.

    Raises:
        ConfigError: The task has labels, or the first tier is one member.
        AssetError: The encoder's package is absent.
    """
    if task.kind != "instruction":
        raise ConfigError(
            f"cascade.agreement={cascade.agreement} and task={task.name}: labels are compared by votes, similar is not "
            "the same; use cascade.agreement=vote"
        )
    if tiers[0].config.size < 2:
        raise ConfigError(
            f"cascade.agreement={cascade.agreement}: expected two members or more in the first tier, got one"
        )
    similarity = similarity_named(cascade.agreement)
    rows = task.splits["test"]
    answers: dict[str, list[list[Written]]] = {}
    lines = []
    for tier in tiers:
        name = tier.config.name
        answers[name] = _written(tier, task, rows, note)
        for row, own in zip(rows, answers[name], strict=True):
            for member, written in zip(tier.config.names, own, strict=True):
                lines.append(_line(row, name, member, written))
    write_text(
        folder / TEXTS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    prices = {tier.config.name: tier.price for tier in tiers}
    return free_text_rows(answers, prices, similarity, seed)


def _written(
    tier: Tier, task: Task, rows: Sequence[Row], note: Callable[[str], None]
) -> list[list[Written]]:
    found = []
    for start in range(0, len(rows), QUERIES_AT_ONCE):
        some = rows[start : start + QUERIES_AT_ONCE]
        for row, replies in zip(some, tier.ask(task, some), strict=True):
            own = []
            for reply in replies:
                text = first_line(reply.text)
                quality = chr_f(text, row.target)
                own.append(
                    Written(text, quality, reply.input_tokens, reply.output_tokens, reply.score)
                )
            found.append(own)
        note(f"tier {tier.config.name}: {start + len(some)} of {len(rows)} queries")
    return found


def first_line(text: str | None) -> str | None:
    """The first line that says something, without outer white space; None where there is none."""
    lines = (line.strip() for line in (text or "").splitlines())
    return next((line for line in lines if line), None)


def _line(row: Row, tier: str, member: str, written: Written) -> Mapping[str, Any]:
    return {
        "query": row.row_id,
        "tier": tier,
        "member": member,
        "text": written.text,
        "quality": written.quality,
        "input_tokens": written.input_tokens,
        "output_tokens": written.output_tokens,
        "score": written.score,
    }
