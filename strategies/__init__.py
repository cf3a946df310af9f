"""Custom Flower strategies: who trains in a round, and how replies merge."""

from fedllm_flwr.config import RunConfig
from strategies.fedlora import FedLora
from strategies.hosting import Hosting
from strategies.rounds import Observer, RoundStrategy

STRATEGIES: dict[str, type[RoundStrategy]] = {"fedlora": FedLora}
"""Method name -> the strategy that federates it."""


def build_strategy(
    config: RunConfig, hosting: Hosting, observer: Observer, *, task_kind: str
) -> RoundStrategy:
    """The strategy of a run's method over all of its clients."""
    return STRATEGIES[config.method.name](config, hosting, observer, task_kind=task_kind)


__all__ = ["STRATEGIES", "FedLora", "Hosting", "Observer", "RoundStrategy", "build_strategy"]
