"""The closed table of tasks, and the one function that loads them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks import (
    author_facts,
    canaries,
    headlines,
    intents,
    keyboard,
    reuters,
    series_tasks,
    spurious,
    synthetic,
    user_files,
    vader,
)
from fedllm_flwr.tasks.base import Kind, Task, TaskOptions
from fedllm_flwr.tasks.sampling import subsample

COMMON_OPTIONS = frozenset({"name", "train_rows", "validation_rows", "test_rows"})
FILE_OPTIONS = frozenset(
    {"data_path", "instruction", "labels", "text_column", "label_column", "prompt_column"}
    | {"response_column", "client_column", "group_column"}
)
CANARY_OPTIONS = frozenset({"canaries", "canary_client", "canary_copies"})
"""Read by :func:`load_task`, for the tasks that take them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """How a task is loaded.

    Attributes:
        load: Options and seed to the whole task.
        kind: The task's kind; None where the user's file decides it.
        reads: The options that the loader reads, besides :data:`COMMON_OPTIONS`.
    """

    load: Callable[[TaskOptions, int], Task]
    kind: Kind | None
    reads: frozenset[str] = frozenset()


TASKS: dict[str, Entry] = {
    "r8_topics": Entry(reuters.load, "classification", CANARY_OPTIONS),
    "vader_sentiment": Entry(vader.load, "classification", CANARY_OPTIONS | frozenset({"domains"})),
    "spurious_sentiment": Entry(spurious.load, "classification", frozenset({"correlation"})),
    "intents": Entry(intents.load, "classification", CANARY_OPTIONS | frozenset({"languages"})),
    "keyboard": Entry(keyboard.load, "instruction", frozenset({"languages"})),
    "headlines": Entry(headlines.load, "instruction", CANARY_OPTIONS),
    "author_facts": Entry(author_facts.load, "instruction", frozenset({"clients", "authors"})),
    "level_routing": Entry(series_tasks.load_levels, "classification"),
    "mackey_glass": Entry(series_tasks.load_mackey_glass, "classification"),
    "csv": Entry(user_files.load_csv, None, FILE_OPTIONS),
    "jsonl": Entry(user_files.load_json_lines, None, FILE_OPTIONS),
    "parquet": Entry(user_files.load_parquet, None, FILE_OPTIONS),
    "dataset_folder": Entry(user_files.load_dataset_folder, None, FILE_OPTIONS),
    "synthetic": Entry(synthetic.load, "classification", CANARY_OPTIONS),
}


def check_options(options: TaskOptions) -> None:
    """Reject an unknown task, and options that the task would ignore. Opens no file.

    Raises:
        ConfigError: Names the task or the option, and what is expected.
    """
    if options.name not in TASKS:
        raise ConfigError(f"task.name: expected one of {', '.join(TASKS)}, got {options.name!r}")
    read = COMMON_OPTIONS | TASKS[options.name].reads
    for field in fields(TaskOptions):
        value = getattr(options, field.name)
        if field.name not in read and value != field.default:
            raise ConfigError(
                f"task.{field.name}: expected its default {field.default!r}, because task "
                f"{options.name} does not read it, got {value!r}"
            )


@lru_cache(maxsize=8)
def load_task(options: TaskOptions, seed: int) -> Task:
    """The task with its rows, sampled down to the row counts of the options, and the canaries that are to join them.

    A task is loaded once in a process; the same options and seed give the same object.

    Args:
        options: Which task and how many of its rows.
        seed: Decides the division into splits, where the data has none, and the samples.

    Returns:
        The task; its training and test splits have at least one row each.

    Raises:
        ConfigError: The options do not fit the task.
        AssetError: A data package is absent.
        DataError: A data file is missing or malformed.
    """
    check_options(options)
    task = TASKS[options.name].load(options, seed)
    counts = {
        "train": options.train_rows,
        "validation": options.validation_rows,
        "test": options.test_rows,
    }
    splits = {
        split: subsample(rows, counts[split], seed, f"subsample-{split}")
        for split, rows in task.splits.items()
    }
    return replace(task, splits=splits, canaries=canaries.planted(options, seed))
