"""Smart-home requests in eight languages, to be sorted into eight intents.

Sentences are drawn from Home Assistant's sentence templates, so this is the language of template writers, not
of logged users. Half of the templates of each (language, intent) cell give its training and validation
sentences and the other half its test sentences: a test sentence never comes from a trained template,
except in the two cells that have a single template ("vacuum" in Italian and Arabic), whose sentences are
disjoint but share it. Every cell has the same number of rows. The language is both the natural client
and the group; it is not a demographic attribute.

Requests about covers, locks, valves, scenes and scripts are left out of "on" and "off", because people do not
say "on" for opening a blind.

Source:
    The Home Assistant Intents project, package ``home-assistant-intents``.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm_flwr.assets import locate
from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.base import SPLITS, Row, Split, Task, TaskOptions, Template
from fedllm_flwr.tasks.intent_words import FILLERS
from fedllm_flwr.tasks.sampling import hash_rank
from fedllm_flwr.tasks.sentence_templates import Node, parse, sample, slots

INTENTS = {
    "HassTurnOn": "on",
    "HassTurnOff": "off",
    "HassGetWeather": "weather",
    "HassSetVolume": "volume",
    "HassStartTimer": "timer",
    "HassClimateGetTemperature": "temperature",
    "HassVacuumStart": "vacuum",
    "HassLightSet": "brightness",
}
"""Home Assistant's intents and the word that a model says for each. The clock and the shopping list are left
out: several languages have too few templates for them."""

LANGUAGES = tuple(FILLERS)
CELL_ROWS: Mapping[Split, int] = {"train": 24, "validation": 8, "test": 16}
"""Rows of each (language, intent) cell."""

TEMPLATES = (
    Template("about", "Smart home request: {text}\nThis request is about the"),
    Template("keyword", "{text}\nKeyword:"),
    Template("list", f"Topics: {', '.join(INTENTS.values())}.\nRequest: {{text}}\nTopic:"),
    Template(
        "expert",
        "{text}",
        chat=True,
        system="You are an expert in smart-home requests. Name the topic of the request: "
        f"{', '.join(INTENTS.values())}.",
    ),
    Template(
        "group_aware",
        "{text}",
        chat=True,
        system="Requests come in several languages, all equally important. Understand the request "
        f"in its language, then name its topic in English: {', '.join(INTENTS.values())}.",
    ),
)
ATTEMPTS_PER_ROW = 200


@dataclass(frozen=True, slots=True)
class Pattern:
    """One parsed sentence template of a cell, and the device domains that its ``{name}`` may be of."""

    source: str
    node: Node
    domains: tuple[str, ...]


class Grammar:
    """The sentence templates of one language.

    Args:
        language: A key of :data:`fedllm_flwr.tasks.intent_words.FILLERS`.

    Raises:
        AssetError: The data package is not installed.
        DataError: A template cannot be parsed.
    """

    def __init__(self, language: str) -> None:
        path = locate("home-assistant-intents", f"home_assistant_intents/data/{language}.json")
        with path.open(encoding="utf-8") as stream:
            self._data: dict[str, Any] = json.load(stream)
        self._words = FILLERS[language]
        self.rules = {name: parse(text) for name, text in self._data["expansion_rules"].items()}

    def patterns(self, intent: str) -> list[Pattern]:
        """The usable templates of one intent, each once, in file order."""
        found: dict[str, Pattern] = {}
        for block in self._data["intents"][intent]["data"]:
            domains = self._domains(block)
            if domains is None:
                continue
            for source in block["sentences"]:
                pattern = Pattern(source, parse(source), domains)
                if self._can_fill(pattern):
                    found.setdefault(source, pattern)
        return list(found.values())

    def sentence(self, pattern: Pattern, random: np.random.Generator) -> str:
        """One random sentence of a pattern."""
        return sample(
            pattern.node,
            self.rules,
            lambda slot, generator: self._fill(slot, pattern.domains, generator),
            random,
        )

    def _domains(self, block: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The device domains of a block that we have words for; None when it is about others only."""
        named = block.get("slots", {}).get("domain")
        if named is None:
            named = block.get("requires_context", {}).get("domain")
        if named is None:
            return ()
        listed = [named] if isinstance(named, str) else named
        return tuple(domain for domain in listed if domain in self._words) or None

    def _can_fill(self, pattern: Pattern) -> bool:
        for slot in slots(pattern.node, self.rules):
            if slot == "name" and not pattern.domains:
                return False
            values = self._data["lists"].get(slot, {})
            if slot != "name" and slot not in self._words and not {"range", "values"} & set(values):
                return False
        return True

    def _fill(self, slot: str, domains: Sequence[str], random: np.random.Generator) -> str:
        if slot == "name":
            return _pick([word for domain in domains for word in self._words[domain]], random)
        if slot in self._words:
            return _pick(self._words[slot], random)
        values = self._data["lists"][slot]
        if "range" in values:
            bounds = values["range"]
            return str(
                _pick(range(bounds["from"], bounds["to"] + 1, bounds.get("step", 1)), random)
            )
        choice = _pick(values["values"], random)
        template = choice if isinstance(choice, str) else choice["in"]
        return sample(parse(template), self.rules, lambda name, _: name, random)


def _pick(options: Sequence[Any], random: np.random.Generator) -> Any:
    return options[int(random.integers(len(options)))]


def split_patterns(
    grammar: Grammar, patterns: Sequence[Pattern], seed: int
) -> tuple[list[Pattern], list[Pattern]]:
    """Divide the templates of a cell into halves; a single template is in both.

    Templates with and without slots are dealt in turn, so that neither half is left with the few
    sentences that templates without slots give.

    Args:
        grammar: Where the templates come from.
        patterns: At least one.
        seed: Decides the division.

    Returns:
        The templates for training and validation, and those for testing.
    """
    ranked = sorted(
        patterns,
        key=lambda pattern: (
            not slots(pattern.node, grammar.rules),
            hash_rank(seed, "intents", pattern.source),
        ),
    )
    return ranked[0::2], ranked[1::2] or ranked


def cell_sentences(
    grammar: Grammar, language: str, intent: str, seed: int
) -> dict[Split, list[str]]:
    """The sentences of one (language, intent) cell; no sentence occurs in two splits.

    Args:
        grammar: The language's templates.
        language: Two-letter code.
        intent: A key of :data:`INTENTS`.
        seed: Decides which templates are for testing, and every sentence.

    Raises:
        DataError: The templates give too few different sentences; says how many.
    """
    trained, tested = split_patterns(grammar, grammar.patterns(intent), seed)
    pools = {"train": trained, "validation": trained, "test": tested}
    taken: set[str] = set()
    result: dict[Split, list[str]] = {}
    for split in SPLITS:
        random = numpy_generator(seed, "intents", language, intent, split)
        sentences = _draw(grammar, pools[split], CELL_ROWS[split], taken, random)
        if len(sentences) < CELL_ROWS[split]:
            raise DataError(
                f"home_assistant_intents/data/{language}.json, {intent}: expected templates that give "
                f"{CELL_ROWS[split]} {split} sentences, got {len(sentences)}"
            )
        taken.update(sentences)
        result[split] = sentences
    return result


def _draw(
    grammar: Grammar,
    patterns: Sequence[Pattern],
    count: int,
    taken: Iterable[str],
    random: np.random.Generator,
) -> list[str]:
    """Up to ``count`` different sentences that are not taken."""
    found: dict[str, None] = {}
    avoid = set(taken)
    for _ in range(count * ATTEMPTS_PER_ROW):
        if len(found) == count or not patterns:
            break
        sentence = grammar.sentence(_pick(patterns, random), random)
        if sentence not in avoid:
            found[sentence] = None
    return list(found)


def load(options: TaskOptions, seed: int) -> Task:
    """The rows of the chosen languages.

    Args:
        options: ``languages`` is read: which languages, all eight when empty.
        seed: Decides the division of templates and every sentence.

    Raises:
        ConfigError: A language is unknown.
        AssetError: The data package is not installed.
        DataError: A cell has too few sentences.
    """
    chosen = options.languages or LANGUAGES
    for language in chosen:
        if language not in LANGUAGES:
            raise ConfigError(
                f"task.languages: expected some of {', '.join(LANGUAGES)}, got {language!r}"
            )
    rows: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    for language in (known for known in LANGUAGES if known in chosen):
        grammar = Grammar(language)
        for label, (intent, word) in enumerate(INTENTS.items()):
            for split, sentences in cell_sentences(grammar, language, intent, seed).items():
                rows[split].extend(
                    Row(f"{split}-{language}-{word}-{i:02d}", text, word, label, language, language)
                    for i, text in enumerate(sentences)
                )
    return Task(
        name=options.name,
        kind="classification",
        splits={split: tuple(rows[split]) for split in SPLITS},
        label_names=tuple(INTENTS),
        label_words=tuple(INTENTS.values()),
        templates=TEMPLATES,
    )
