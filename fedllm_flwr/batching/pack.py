"""Several items in one prompt, answered by number.

Only items of one client may be packed: whatever stands in one prompt can be read and repeated in any of its answers.

Source:
    Cheng et al. 2023 (Batch Prompting); Lin et al. 2024 (BatchPrompt, arXiv 2309.00384) for answering packs in several
    orders and voting. Differs: answers that cannot be told apart with certainty are not used but asked again.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.seeding import numpy_generator

_ANSWER = re.compile(r"(\d{1,9})[.)](?:\s+(.*))?")


@dataclass(frozen=True, slots=True)
class Item:
    """One question of one client.

    Attributes:
        client: Whose it is.
        text: What is asked.
    """

    client: str
    text: str


@dataclass(frozen=True, slots=True)
class Pack:
    """Items in one prompt.

    Attributes:
        prompt: What to send.
        items: In the order of their numbers.
    """

    prompt: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What an answer to a pack says.

    Attributes:
        answers: By position of the item, from 0.
        failed: Positions without a certain answer, in order: to be asked one by one.
    """

    answers: Mapping[int, str]
    failed: tuple[int, ...]


def pack(instruction: str, items: Sequence[Item]) -> Pack:
    """Put items of one client into one prompt.

    Args:
        instruction: What is to be done with each item.
        items: At least one. White space in them becomes single spaces, so that none of them can add a number.

    Raises:
        ConfigError: There is no item, an item is empty, or the items belong to several clients.
    """
    texts = [" ".join(item.text.split()) for item in items]
    if not items or not all(texts):
        raise ConfigError(f"pack: expected items that are not empty, got {texts}")
    clients = sorted({item.client for item in items})
    if len(clients) > 1:
        raise ConfigError(
            f"pack: expected items of one client, since one prompt shows them to each other, got items of "
            f"{len(clients)} clients ({', '.join(clients[:3])}); use batch across clients"
        )
    lines = [f"{number}. {text}" for number, text in enumerate(texts, start=1)]
    rule = (
        f"Answer each of the {len(items)} items on one line that begins with its number, as in `1. answer`. "
        "Write nothing else."
    )
    return Pack("\n".join([instruction.strip(), rule, "", *lines]) + "\n", tuple(items))


def unpack(packed: Pack, answer: str) -> Unpacked:
    """Read the answer to a pack.

    Strict: each answer is one line, and numbers run upwards. If a number comes twice, out of order or beyond the last
    item, nothing says whose the lines are and every item has failed. An item has failed by itself if its number is
    missing or stands alone, or if its answer goes on in a further line: one that does not begin with a number, a dot or
    bracket, and a space.

    Args:
        packed: What was asked.
        answer: What came.
    """
    everyone = tuple(range(len(packed.items)))
    found: dict[int, str] = {}
    last, broken = -1, set()
    for line in answer.splitlines():
        if not line.strip():
            continue
        match = _ANSWER.fullmatch(line.strip())
        if match is None:
            broken.add(last)  # a line of its own before the first number harms nothing
            continue
        position = int(match[1]) - 1
        if position <= last or position > everyone[-1]:
            return Unpacked({}, everyone)
        last = position
        if match[2]:
            found[position] = match[2]
    kept = {position: text for position, text in found.items() if position not in broken}
    return Unpacked(kept, tuple(k for k in everyone if k not in kept))


def orders(count: int, votes: int, seed: int) -> list[tuple[int, ...]]:
    """Orders in which to ask the items of a pack, since an answer depends on the place of its item.

    Args:
        count: Items.
        votes: Orders; the first one is the items' own.
        seed: Of the others.
    """
    draws = numpy_generator(seed, "pack", "orders")
    shuffled = [tuple(int(k) for k in draws.permutation(count)) for _ in range(votes - 1)]
    return [tuple(range(count)), *shuffled][:votes]


def vote(answers: Sequence[str | None]) -> str | None:
    """The answer that most orders gave to an item; the earliest of equals.

    Args:
        answers: From each order; None where it failed.

    Returns:
        None if it failed in all.
    """
    counted = Counter(answer for answer in answers if answer is not None)
    return max(counted, key=lambda answer: counted[answer], default=None)
