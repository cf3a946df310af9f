"""Find the parts of one prompt that can be answered apart, by rules; in doubt a prompt stays whole.

Wrongly taking a prompt apart spoils its answer, leaving one whole only costs time. So parts have to be marked (a list,
`each of`, an explicit number), what is to be done has to be known, and any sign that one part needs another, or that
all parts make one answer, keeps the prompt whole. Only English is understood.

Source:
    Kolawole et al. 2025 (ParallelPrompt, NeurIPS Datasets and Benchmarks, arXiv 2506.18728) for the schema, its
    categories and the two degrees of confidence. Differs: rules instead of a language model extract the schema, so
    finding it costs no call.
"""

import re
from dataclasses import dataclass
from typing import Literal

Category = Literal[
    "repeated_generation", "reading_comprehension", "keyword_extraction", "named_entity_recognition", "translation",
    "language_correction", "sentiment", "novel",
]  # fmt: skip
Confidence = Literal["high", "medium"]
DATA, CONTEXT = "{data}", "{context}"
MAX_PARTS = 64


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A prompt as a template and its parts.

    Attributes:
        template: With ``{data}`` in the place of a part, and ``{context}`` if there is one.
        context: What every part needs, such as a passage; empty if nothing.
        items: The parts, in order; empty for a generation that is repeated.
        count: How often the same prompt is answered; 0 where there are items. The answers have to be drawn with
            different seeds, or they will all be the same.
        category: What kind of work it is.
        confidence: ``high`` for a numbered list or an explicit number, ``medium`` for other lists.
    """

    template: str
    context: str
    items: tuple[str, ...]
    count: int
    category: Category
    confidence: Confidence

    def prompts(self) -> list[str]:
        """One prompt for each part."""
        whole = self.template.partition(CONTEXT)
        filled = whole[0] + self.context + whole[2] if whole[1] else self.template
        before, mark, after = filled.rpartition(DATA) if self.items else (filled, "", "")
        return (
            [before + item + after for item in self.items] if mark else [self.template] * self.count
        )

    def join(self, answers: list[str]) -> str:
        """The answers as one, numbered in the order of the parts.

        Raises:
            ValueError: There are not as many answers as parts.
        """
        parts = self.items or [""] * self.count
        if len(answers) != len(parts):
            raise ValueError(f"decompose: expected {len(parts)} answers, got {len(answers)}")
        return "\n".join(f"{k}. {answer.strip()}" for k, answer in enumerate(answers, start=1))


@dataclass(frozen=True, slots=True)
class Serial:
    """A prompt that stays whole.

    Attributes:
        reason: Why.
    """

    reason: str


_REFERENCE = re.compile(
    r"\b(then|afterwards|after that|next|finally|lastly|above|previous|preceding|former|latter|last one|earlier|"
    r"result|results|outcome|your answer|your list|the answers?|the list|same|other one|another|both|"
    r"(?:step|item|part|question|sentence|number) ?#?\d+|building on|based on)\b",
    re.I,
)
"""One part speaks of another one, or of its answer."""
_PRONOUN = re.compile(
    r"\b(it|its|he|she|him|his|her|hers|they|them|their|theirs|this|these|those|there|one|such)\b",
    re.I,
)
"""May stand for something in another part."""
_WHOLE = re.compile(
    r"\b(compare|contrast|rank|sort|order|group|cluster|arrange|combine|merge|join|match|connect|which of|which one|"
    r"most|least|largest|smallest|biggest|best|worst|fastest|longest|shortest|total|sum|average|count|common|odd one|"
    r"duplicates?|consistent|story with|all of|between|together|each other|single|outline|plan|steps?|game|recipe|"
    r"dialogue|poem that|parts|poem|song|lyrics|verses?|code|function|class|database|unique|different|distinct|alike|"
    r"in total|one paragraph|one list|one answer|one sentence using|follow)\b",
    re.I,
)
"""All parts make one answer, or are looked at together."""
_EACH = re.compile(r"\b(each|every)\b(?! other)|\bfor all\b", re.I)
_FOLLOWING = re.compile(r"\b(the following|these|those|the)\b", re.I)
_OPERATIONS: tuple[tuple[Category, re.Pattern[str]], ...] = (
    ("translation", re.compile(r"\btranslat\w*\b", re.I)),
    ("sentiment", re.compile(r"\bsentiments?\b|\bpositive or negative\b", re.I)),
    ("keyword_extraction", re.compile(r"\bkey ?(words?|phrases?)\b", re.I)),
    ("named_entity_recognition", re.compile(r"\b(named )?entit(y|ies)\b", re.I)),
    ("language_correction", re.compile(
        r"\b(correct|fix|proofread|improve)\b.*\b(grammar|spelling|sentences?|lines?|punctuation|mistakes?|errors?)\b",
        re.I)),
)  # fmt: skip
"""Work on given texts, whose own words say nothing about other parts."""
_TEXTS = re.compile(
    r"\b(sentences?|words?|phrases?|texts?|reviews?|lines?|tweets?|comments?|messages?|titles?|headlines?|paragraphs?|"
    r"articles?|passages?)\b",
    re.I,
)
_VERB = re.compile(
    r"^(?:please |can you |could you )?(translate|classify|correct|fix|extract|answer|define|describe|paraphrase|"
    r"rewrite|summari[sz]e|give|convert|write|explain|identify|name|list|label|detect|state|proofread|find|tag|what is|"
    r"what are|who is|who wrote|for each of|for each|for every)\b",
    re.I,
)
_QUESTIONS = re.compile(r"^(please )?answer\b.*\bquestions?\b", re.I)
_QUESTION = re.compile(
    r"^(what|who|whom|whose|when|where|which|why|how|is|are|was|were|do|does|did|can)\b.*\?$", re.I
)
_NUMBERED = re.compile(r"^\s*\(?(\d{1,3})[.):]\s+(\S.*)$")
_BULLET = re.compile(r"^\s*[-*•]\s+(\S.*)$")
_CLAUSE = re.compile(
    r"\b(so|that|which|who|whose|where|when|while|without|but|unless|until|if|whether|by|at|before|after|only|than|"
    r"from|because|keep|skip|avoid|no|not|except|also|relation|others?|first|second|third|last|will|list|form|"
    r"conversation|dialogue|chat|thread|quiz|puzzle|series|sequence|argument|premise|rhymes?|(?!during)\w{3,}ing)\b",
    re.I,
)
"""More than one plain clause, or a text that is one whole: what it asks for is not understood."""
_PART_OF = re.compile(
    r"\b(?:each|every|following|these|those)(?: of (?:the following|these|those))? (?:\w+ ){1,2}?(?:of|from) "
    r"(?:this|that|the|a|an|my|our|your|his|her|their) (?!following\b)\w+",
    re.I,
)
"""The parts are pieces of one thing: ``each scene of the play``."""
_DEGREES = re.compile(r"\b(more|less|fewer|rather)\b|\b\w+er or \w+er\b", re.I)
"""The parts are measured against each other."""
_HARMLESS = re.compile(r"\b(the following|spelling|yes or no|from(?= each\b))\b", re.I)
MAX_INSTRUCTION_WORDS = 16
_DEFINITE = re.compile(r"\b(?:the|that) (?:\w+ )?(\w{4,})\b", re.I)
_COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {word: count for count, word in enumerate(_COUNTS, start=2)}
_REPEATED = re.compile(
    r"^(?P<verb>(?:please )?(?:write|generate|compose|create|make up|give me|tell me)) (?P<count>\d{1,2}|"
    + "|".join(_WORDS)
    + r") (?P<kind>(?:(?:short|funny|brief|simple|one-line) )?"
    r"(?:poem|haiku|limerick|joke|slogan|tagline|riddle|tweet|headline|short storie|storie|story|caption))s?"
    r"(?P<rest>(?: (?:about|for|on|of) (?:\w+ ){0,2}\w+)?)[.!]?$",
    re.I,
)
_LABEL = re.compile(r"^(text|passage|context|article|document|paragraph)\s*:", re.I)


def decompose(prompt: str) -> Decomposition | Serial:
    """Take a prompt apart if its parts are surely independent.

    Args:
        prompt: Of a user.

    Returns:
        The parts, or why there are none.
    """
    text = prompt.strip()
    if DATA in text or CONTEXT in text:
        return Serial("it has the marks of a template")
    return _repeated(text) or _listed(text) or _inline(text) or Serial("no parts are marked")


def _repeated(text: str) -> Decomposition | Serial | None:
    """The same thing several times: ``write 5 haikus about autumn``."""
    match = _REPEATED.match(text)
    if match is None:
        return None
    count = int(match["count"]) if match["count"].isdigit() else _WORDS[match["count"].lower()]
    if not 2 <= count <= MAX_PARTS or _in_doubt(match["rest"]):
        return Serial("the parts may depend on each other")
    kind = re.sub(r"storie$", "story", match["kind"])
    template = f"{match['verb']} one {kind}{match['rest']}."
    return Decomposition(template, "", (), count, "repeated_generation", "high")


def _in_doubt(words: str) -> bool:
    """Whether a simple phrase has words that may tie parts together."""
    ties = (_EACH, _REFERENCE, _PRONOUN, _WHOLE, _CLAUSE, re.compile(r"\b(and|to)\b", re.I))
    return any(tie.search(words) for tie in ties)


def _listed(text: str) -> Decomposition | Serial | None:
    """An instruction, and a list of parts in lines of their own."""
    lines = text.splitlines()
    for pattern, confidence in ((_NUMBERED, "high"), (_BULLET, "medium")):
        places = [k for k, line in enumerate(lines) if pattern.match(line)]
        if len(places) < 2:
            continue
        if len(places) != len([k for k in range(places[0], len(lines)) if lines[k].strip()]):
            return Serial("text stands between or after the parts")
        found = [pattern.match(lines[k]) for k in places]
        groups = [match.groups() for match in found if match]
        if pattern is _NUMBERED and [int(g[0]) for g in groups] != list(range(1, len(groups) + 1)):
            return Serial("the parts are not numbered from 1 upwards")
        items = tuple(g[-1].strip() for g in groups)
        head = "\n".join(lines[: places[0]]).strip()
        context, _, instruction = head.rpartition("\n\n")
        return _assemble(instruction.strip(), context.strip(), items, confidence)  # type: ignore[arg-type]
    return None


def _inline(text: str) -> Decomposition | Serial | None:
    """Parts in one line: ``translate these words: a, b, c`` or ``for each of a, b and c, do this``."""
    if "\n" in text:
        return None
    listed = re.fullmatch(r"([^:]+):\s*([^:?!]+?)[.?]?", text)
    led = re.fullmatch(
        r"(for (?:each|every one) of) ((?!the|these|those)[^:]+?), ([a-z][^,:]+)", text, re.I
    )
    if listed:
        items = _enumerated(listed[2])
        return _assemble(listed[1].strip() + ":", "", items, "medium") if items else None
    if led:
        items = _enumerated(led[2])
        reason = _dependence(led[3], items, "novel")
        if not items or reason or not _VERB.match(led[3]):
            return Serial(reason or "what is to be done is not known")
        return Decomposition(f"For {DATA}, {led[3]}", "", items, 0, "novel", "medium")
    return None


def _enumerated(text: str) -> tuple[str, ...]:
    """``a, b and c``: short things of the same kind; empty if it is no such list."""
    pieces = re.split(r"\s*,\s*(?:and |or )?|\s+and\s+", text.strip())
    short = all(0 < len(piece.split()) <= 4 for piece in pieces)
    return tuple(pieces) if len(pieces) >= 2 and short and len(pieces) <= MAX_PARTS else ()


def _assemble(
    instruction: str, context: str, items: tuple[str, ...], confidence: Confidence
) -> Decomposition | Serial:
    category: Category = next(
        (own for own, found in _OPERATIONS if found.search(instruction)), "novel"
    )
    reason = _refusal(instruction, context, items, category)
    if reason:
        return Serial(reason)
    if context:
        category = "reading_comprehension" if category == "novel" else category
    ahead = f"{CONTEXT}\n\n" if context else ""
    return Decomposition(f"{ahead}{instruction}\n{DATA}", context, items, 0, category, confidence)


def _refusal(
    instruction: str, context: str, items: tuple[str, ...], category: Category
) -> str | None:
    """Why parts under an instruction are not taken apart; None if they are."""
    if len(items) > MAX_PARTS:
        return f"more than {MAX_PARTS} parts"
    if not _VERB.match(instruction):
        return "what is to be done is not known"
    if context and not _LABEL.match(context):
        return "the context may be a task of its own"
    if _QUESTIONS.match(instruction):
        if not all(_QUESTION.match(item) for item in items):
            return "the parts are not all questions"
    elif not _EACH.search(instruction) and (
        category == "novel" or not _FOLLOWING.search(instruction) or not _TEXTS.search(instruction)
    ):
        return "nothing says that the parts are meant one by one"
    return _dependence(instruction, items, category) or (
        None if context else _definite_reference(items)
    )


def _dependence(instruction: str, items: tuple[str, ...], category: Category) -> str | None:
    """A sign that parts need each other."""
    if (
        re.search(r"\band\b(?!.*\b(negative|false|neutral)\b.*$)", instruction, re.I)
        or ";" in instruction
    ):
        return "several things are to be done"
    if re.search(r"[.?!]\s+\S", instruction):
        return "the instruction has several sentences"
    if len(instruction.split()) > MAX_INSTRUCTION_WORDS:
        return "the instruction is long"
    rest = _HARMLESS.sub("", _VERB.sub("", instruction, count=1))
    if found := _PART_OF.search(instruction):
        return f"the parts are pieces of one thing: {found[0]!r}"
    for pattern in (_DEGREES, _REFERENCE, _WHOLE, _CLAUSE):
        if found := pattern.search(rest):
            return f"the instruction says {found[0]!r}"
    for item in items:
        if found := _REFERENCE.search(item):
            return f"a part says {found[0]!r}"
        if category in ("novel", "translation") and (found := _PRONOUN.search(item)):
            return f"a part says {found[0]!r}"
    return None


def _definite_reference(items: tuple[str, ...]) -> str | None:
    """Whether a part names ``the thing`` of an earlier part."""
    earlier: set[str] = set()
    for item in items:
        for found in _DEFINITE.finditer(item):
            if found[1].lower() in earlier or found[0].split()[1].lower() in earlier:
                return f"a part says {found[0]!r} after another one"
        earlier.update(re.findall(r"(?!with|from|that|what|which|does)\w{4,}", item.lower()))
    return None
