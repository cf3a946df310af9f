"""Custom Flower strategies: who trains in a round, and how replies merge."""

from collections.abc import Sequence

from fedllm_flwr.config import RunConfig
from strategies.fedgrass import FedGrass
from strategies.fedlora import FedLora
from strategies.fedprompt import FedPrompt
from strategies.fedresprompt import FedResPrompt
from strategies.hosting import Hosting
from strategies.observer import Observer
from strategies.rounds import RoundStrategy

STRATEGIES: dict[str, type[RoundStrategy]] = {
    "fedlora": FedLora,
    "fedprompt": FedPrompt,
    "fedresprompt": FedResPrompt,
    "fedgrass": FedGrass,
}
"""Method name -> the strategy that federates it."""


def build_strategy(
    config: RunConfig,
    hosting: Hosting,
    observer: Observer,
    *,
    task_kind: str,
    partition_ids: Sequence[int] | None = None,
) -> RoundStrategy:
    """The strategy of a run's method over all of its clients, or over some."""
    return STRATEGIES[config.method.name](
        config, hosting, observer, task_kind=task_kind, partition_ids=partition_ids
    )


__all__ = [
    "STRATEGIES",
    "FedGrass",
    "FedLora",
    "FedPrompt",
    "FedResPrompt",
    "Hosting",
    "Observer",
    "RoundStrategy",
    "build_strategy",
]
