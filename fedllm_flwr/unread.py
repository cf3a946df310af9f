"""Settings that were typed and that nothing would read: said before any work starts, never accepted in silence."""

from collections.abc import Callable, Sequence

from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError

Reads = Callable[[RunConfig], bool]
ASCENT = ("group_dro", "agnostic", "bounded_loss", "accuracy_gap")
PENALTIES = ("bounded_loss", "accuracy_gap")


def _searches(config: RunConfig) -> bool:
    return getattr(config.method, "trainer", "") == "black_box"


def _tries_rates(config: RunConfig) -> bool:
    return bool(config.baselines.learning_rates)


READ_WITH: dict[str, tuple[str, Reads]] = {
    "fairness.step_size": (f"fairness={', '.join(ASCENT)}", lambda c: c.fairness.name in ASCENT),
    "fairness.max_multiplier": (f"fairness={' or '.join(PENALTIES)}", lambda c: c.fairness.name in PENALTIES),
    "fairness.bound": ("fairness=bounded_loss", lambda c: c.fairness.name == "bounded_loss"),
    "fairness.max_gap": ("fairness=accuracy_gap", lambda c: c.fairness.name == "accuracy_gap"),
    "fairness.q": ("fairness=q_ffl", lambda c: c.fairness.name == "q_ffl"),
    "method.search_dimension": ("method.trainer=black_box", _searches),
    "method.search_population": ("method.trainer=black_box", _searches),
    "method.search_generations": ("method.trainer=black_box", _searches),
    "method.search_sigma": ("method.trainer=black_box", _searches),
    "client.minimum_fraction": ("client.schedule=linear or cosine", lambda c: c.client.schedule != "constant"),
    "baselines.tuning_rounds": ("baselines.learning_rates", _tries_rates),
    "baselines.tuning_rows": ("baselines.learning_rates", _tries_rates),
    "baselines.local_tuning_steps": ("baselines.local_tuning=true", lambda c: c.baselines.local_tuning),
    "task.canary_client": ("task.canaries above 0", lambda c: c.task.canaries > 0),
    "task.canary_copies": ("task.canaries above 0", lambda c: c.task.canaries > 0),
    "runtime.workers": ("runtime=simulation", lambda c: c.runtime.name == "simulation"),
    "runtime.gpus_per_worker": ("runtime=simulation", lambda c: c.runtime.name == "simulation"),
}  # fmt: skip
"""Key -> what has to be chosen for it to be read, and whether it is. Where a group's files have keys of their own (as
partitions and optimizers do), Hydra refuses the others itself."""


def refuse_unread(configs: Sequence[RunConfig], overrides: Sequence[str]) -> None:
    """Refuse a typed setting that no run would read.

    A file may hold such a setting (a group's defaults do); one that was typed was meant to have an effect.

    Args:
        configs: What the words compose; of a sweep every job, one of which may read what the others do not.
        overrides: The words.

    Raises:
        ConfigError: Names the first such setting, and what it needs.
    """
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        needs, reads = READ_WITH.get(key, ("", None))
        if reads is not None and not any(reads(config) for config in configs):
            raise ConfigError(
                f"{key}: expected together with {needs}, which alone reads it, got {word}"
            )
