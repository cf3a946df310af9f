"""Sample sentences from templates written in Home Assistant's sentence grammar.

The grammar: ``[x]`` may be left out, ``(a|b)`` is one of its branches, ``(a;b)`` is all of its branches in
any order, ``<rule>`` is a named rule, and ``{slot}`` or ``{slot:name}`` is filled from a list of values,
which are templates again. Everything else stands for itself.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedllm_flwr.errors import DataError

TOKEN = re.compile(r"[\[\]()|;]|<[^<>]+>|\{[^{}]+\}|[^\[\]()|;<>{}]+")
CLOSING = {"[": "]", "(": ")"}


@dataclass(frozen=True, slots=True)
class Sequence:
    """Parts that follow each other."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the branches, or all of them in any order, or (when optional) nothing."""

    branches: "tuple[Node, ...]"
    kind: Literal["one", "all"]
    optional: bool


@dataclass(frozen=True, slots=True)
class Reference:
    """A rule or a slot, looked up while sampling."""

    kind: Literal["rule", "slot"]
    name: str


Node = str | Sequence | Choice | Reference
Filler = Callable[[str, np.random.Generator], str]


def parse(template: str) -> Node:
    """The tree of one template.

    Args:
        template: Text in the grammar above.

    Raises:
        DataError: Brackets do not match, or one group holds both ``|`` and ``;``.
    """
    tokens = TOKEN.findall(template)
    if "".join(tokens) != template:
        raise DataError(f"sentence template {template!r}: expected matching < > and {{ }}")
    node, used = _group(template, tokens, 0, "")
    if used != len(tokens):
        raise DataError(f"sentence template {template!r}: unexpected {tokens[used]!r}")
    return node


def _group(template: str, tokens: list[str], start: int, closing: str) -> tuple[Node, int]:
    """Parse from ``start`` to the closing token (exclusive) or to the end."""
    branches: list[list[Node]] = [[]]
    separators = set()
    index = start
    while index < len(tokens) and tokens[index] not in ("]", ")"):
        piece = tokens[index]
        if piece in CLOSING:
            inner, index = _group(template, tokens, index + 1, CLOSING[piece])
            branches[-1].append(_optional(inner) if piece == "[" else inner)
        elif piece in ("|", ";"):
            separators.add(piece)
            branches.append([])
        else:
            branches[-1].append(_leaf(piece))
        index += 1
    if closing and (index >= len(tokens) or tokens[index] != closing):
        raise DataError(f"sentence template {template!r}: expected {closing!r}, found none")
    if len(separators) > 1:
        raise DataError(f"sentence template {template!r}: expected | or ; in one group, got both")
    nodes = tuple(Sequence(tuple(parts)) for parts in branches)
    if not separators:
        return nodes[0], index
    return Choice(nodes, "all" if separators == {";"} else "one", optional=False), index


def _optional(node: Node) -> Node:
    if isinstance(node, Choice) and not node.optional:
        return Choice(node.branches, node.kind, optional=True)
    return Choice((node,), "one", optional=True)


def _leaf(piece: str) -> Node:
    if piece.startswith("<"):
        return Reference("rule", piece[1:-1])
    if piece.startswith("{"):
        return Reference("slot", piece[1:-1].split(":")[0])
    return piece


def sample(node: Node, rules: Mapping[str, Node], fill: Filler, random: np.random.Generator) -> str:
    """One random sentence of a template.

    Args:
        node: The parsed template.
        rules: The parsed named rules.
        fill: Gives a value for a slot.
        random: Decides every choice.

    Returns:
        The sentence, with single spaces.

    Raises:
        DataError: A rule is unknown.
    """
    return " ".join(_expand(node, rules, fill, random).split())


def _expand(
    node: Node, rules: Mapping[str, Node], fill: Filler, random: np.random.Generator
) -> str:
    if isinstance(node, str):
        return node
    if isinstance(node, Sequence):
        return "".join(_expand(part, rules, fill, random) for part in node.parts)
    if isinstance(node, Choice):
        if node.optional and random.random() < 0.5:
            return ""
        if node.kind == "one":
            chosen = node.branches[random.integers(len(node.branches))]
            return _expand(chosen, rules, fill, random)
        order = random.permutation(len(node.branches))
        return " ".join(_expand(node.branches[index], rules, fill, random) for index in order)
    if node.kind == "slot":
        return fill(node.name, random)
    if node.name not in rules:
        raise DataError(f"sentence template: unknown rule <{node.name}>")
    return _expand(rules[node.name], rules, fill, random)


def slots(node: Node, rules: Mapping[str, Node]) -> set[str]:
    """The names of all slots that a template can reach."""
    if isinstance(node, str):
        return set()
    if isinstance(node, Reference):
        if node.kind == "slot":
            return {node.name}
        return slots(rules[node.name], rules) if node.name in rules else set()
    children = node.parts if isinstance(node, Sequence) else node.branches
    return set().union(*(slots(child, rules) for child in children))
