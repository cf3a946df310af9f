import inspect

import numpy as np

from fedllm_flwr.journal import Journal
from strategies.baselines import Recorder
from strategies.observer import Checkpointed, Observer


def test_the_two_observers_know_every_call() -> None:
    calls = [
        n for n, f in inspect.getmembers(Observer, inspect.isfunction) if not n.startswith("_")
    ]
    assert len(calls) == 8
    for name in calls:
        wanted = list(inspect.signature(getattr(Observer, name)).parameters)
        for kind in (Journal, Recorder):
            assert list(inspect.signature(getattr(kind, name)).parameters) == wanted, name


def test_a_checkpoint_is_arrays_and_json() -> None:
    saved = Checkpointed(3, {"a": np.zeros(2)}, {"b": 1})
    assert (saved.server_round, list(saved.arrays), saved.state["b"]) == (3, ["a"], 1)
