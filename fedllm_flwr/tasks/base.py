"""What a task is: rows of text with a target, in three splits, and the ways to ask a model for the target.

A *row* is one example. Its ``client`` is the party that holds it in reality (a publisher, a language),
where the data says so; its ``group`` is what fairness is measured over. Neither decides how rows are
dealt to simulated clients: :mod:`fedllm_flwr.tasks.partitions` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedllm_flwr.errors import ConfigError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Kind = Literal["classification", "instruction"]
ProbeForm = Literal["paraphrase", "choice", "statement", "pair"]


@dataclass(frozen=True, slots=True)
class Row:
    """One example.

    Attributes:
        row_id: Unique within its task, the same in every process.
        text: What the model reads.
        target: What the model should answer: the label's name, or free text.
        label: Index into the task's ``label_names``; None for free-text targets.
        group: The group this row counts for in fairness metrics, if the data has groups.
        client: The natural client that this row belongs to, if the data has natural clients.
    """

    row_id: str
    text: str
    target: str
    label: int | None = None
    group: str | None = None
    client: str | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """One way to ask for a row's target.

    Attributes:
        name: Unique within its task.
        text: The question, with ``{text}`` once where the row's text goes.
        chat: True: the question is a user turn of the tokenizer's chat template, if it has one.
            False, or without a chat template: the question is continued as plain text.
        system: The system turn of a chat; empty leaves it to the tokenizer's chat template.
    """

    name: str
    text: str
    chat: bool = False
    system: str = ""

    def __post_init__(self) -> None:
        """Check that the text has one place for the row.

        Raises:
            ConfigError: ``{text}`` does not occur exactly once.
        """
        count = self.text.count("{text}")
        if count != 1:
            raise ConfigError(
                f"template {self.name}: expected {{text}} once, found it {count} times"
            )


@dataclass(frozen=True, slots=True)
class AttributeQuestion:
    """What to ask a language model about an attribute of a text, such as where it was written.

    Attributes:
        name: The attribute.
        values: Its values, at least two.
        words: What the model is asked to say for each value, in the same order.
        template: The question.
    """

    name: str
    values: tuple[str, ...]
    words: tuple[str, ...]
    template: Template

    def __post_init__(self) -> None:
        """Check that every value has its word.

        Raises:
            ConfigError: There are fewer than two values, a value or a word occurs twice, or their numbers differ.
        """
        different = {len(set(self.values)), len(set(self.words)), len(self.values)}
        if different != {len(self.words)} or len(self.values) < 2:
            raise ConfigError(
                f"attribute {self.name}: expected two or more different values with a word each, "
                f"got {', '.join(self.values)} and {', '.join(self.words)}"
            )


def group_name(target: str, attribute: str) -> str:
    """The name of the group of rows that share a target and an attribute."""
    return f"{target}/{attribute}"


@dataclass(frozen=True, slots=True)
class Probe:
    """A row that asks otherwise for what a training row taught; never trained on.

    Attributes:
        form: How: ``paraphrase`` (other words), ``choice`` (among answers that are named), ``statement`` (a sentence to
            be ended) or ``pair`` (together with a fact of another client).
        row_id: Of the training row.
        row: What is asked, and the answer.
    """

    form: ProbeForm
    row_id: str
    row: Row


@dataclass(frozen=True, slots=True)
class Canaries:
    """Random secrets among the training rows of one client; see :mod:`fedllm_flwr.tasks.canaries`.

    Attributes:
        rows: One for each secret.
        client: The partition id of the client that has them.
        copies: How many times each is among its rows.
    """

    rows: tuple[Row, ...]
    client: int
    copies: int


@dataclass(frozen=True, eq=False)
class Task:
    """A data set in three disjoint splits. Compared and hashed by identity: rows are never compared.

    Attributes:
        name: Its key in the catalog.
        kind: ``classification`` (every row has a label) or ``instruction`` (no row has one).
        splits: Rows of ``train``, ``validation`` and ``test``.
        label_names: The data's own names of the labels, in label order; empty without labels.
        label_words: What the model is asked to say for each label.
        templates: At least one; the first is the default.
        attribute: How to ask for the attribute that, with the label, makes a row's group; None if there is none.
        series_width: Values of a step where a row's text is a numeric series; 0 = text.
        probes: Other ways to ask for what training rows teach, if the task has any.
        canaries: Secrets that one client gets beside its own rows, when rows are dealt; None = none.
        one_word: Whether a target is one word, so that of what a model writes the first word counts.
    """

    name: str
    kind: Kind
    splits: Mapping[Split, tuple[Row, ...]]
    label_names: tuple[str, ...]
    label_words: tuple[str, ...]
    templates: tuple[Template, ...]
    attribute: AttributeQuestion | None = None
    series_width: int = 0
    probes: tuple[Probe, ...] = ()
    canaries: Canaries | None = None
    one_word: bool = False

    def template(self, name: str) -> Template:
        """The template of that name; the empty name is the default.

        Raises:
            ConfigError: There is no such template; names those that there are.
        """
        known = {template.name: template for template in self.templates}
        if name and name not in known:
            raise ConfigError(
                f"task {self.name}: unknown template {name!r}, expected one of {', '.join(known)}"
            )
        return known[name] if name else self.templates[0]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which rows a task has. A loader that does not read an option rejects it when it is set.

    Attributes:
        name: The task's key in the catalog.
        train_rows: Keep a seeded sample of this many training rows, balanced like the whole; 0 = all.
        validation_rows: The same for validation rows; -1 = none.
        test_rows: The same for test rows.
        data_path: The user's own file or folder (tasks that read one only), a fact of the node.
        instruction: The question asked about a row of the user's file; ``{text}`` marks the place of
            the row's text, which else follows after an empty line. Empty = a question that lists the
            labels, or the prompt alone.
        text_column: Column of the text to classify.
        label_column: Column of its label.
        prompt_column: Column of the prompt.
        response_column: Column of the answer to learn.
        client_column: Column that names the client that holds the row; ignored when absent and left
            at its default.
        group_column: Column that names the row's group; the same rule.
        labels: All labels, in order, where a node's file may lack some of them; empty = the labels
            that occur, sorted.
        languages: Two-letter codes (``intents`` only); empty = all that the task offers.
        domains: Sources of text (``vader_sentiment`` only); empty = all that the task offers.
        correlation: Share of the training and validation rows whose attribute agrees with their label
            (``spurious_sentiment`` only), in [0.5, 1).
        clients: Natural clients that are generated (``author_facts`` only), >= 1.
        authors: Authors whose facts each of them is trained on (``author_facts`` only), >= 1.
        canaries: Random secrets to put among the training rows of one client; 0 = none. Only with the loss
            ``vocabulary``: a secret is no label.
        canary_client: The partition id of that client.
        canary_copies: How many times each secret is among its rows, >= 1.
    """

    name: str
    train_rows: int = 0
    validation_rows: int = 0
    test_rows: int = 0
    data_path: str = ""
    instruction: str = ""
    text_column: str = "text"
    label_column: str = "label"
    prompt_column: str = "prompt"
    response_column: str = "response"
    client_column: str = "client"
    group_column: str = "group"
    labels: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    correlation: float = 0.95
    clients: int = 8
    authors: int = 4
    canaries: int = 0
    canary_client: int = 0
    canary_copies: int = 4

    def __post_init__(self) -> None:
        """Make the options hashable and check the ranges.

        Raises:
            ConfigError: A count or the correlation is out of range.
        """
        for field in ("labels", "languages", "domains"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        bounds = {
            "train_rows": 0,
            "validation_rows": -1,
            "test_rows": 0,
            "clients": 1,
            "authors": 1,
        }
        bounds |= {"canaries": 0, "canary_client": 0, "canary_copies": 1}
        for field, least in bounds.items():
            value = getattr(self, field)
            if value < least:
                raise ConfigError(f"task.{field}: expected >= {least}, got {value}")
        if not 0.5 <= self.correlation < 1:
            raise ConfigError(f"task.correlation: expected in [0.5, 1), got {self.correlation}")
