from typing import Any

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.galore import GaloreSettings
from fedllm_flwr.grass.optimizer import GrassSettings
from fedllm_flwr.settings.grass import FedGrassConfig


def method(**changes: Any) -> FedGrassConfig:
    return FedGrassConfig(name="fedgrass", **changes)


def test_each_trainer_has_its_projection() -> None:
    shared = method(rank=3, rule="top_r", refresh_rounds=5, scale=2.0).projection()
    assert shared == GrassSettings(rank=3, rule="top_r", scale=2.0)
    local = method(sharing="local", rank=3, refresh_steps=7).projection()
    assert local == GrassSettings(rank=3, refresh_interval=7)
    galore = method(trainer="galore", rank=3, refresh_steps=7, scale=0.25).projection()
    assert galore == GaloreSettings(rank=3, refresh_interval=7, scale=0.25)
    assert method(trainer="dense").projection() is None


@pytest.mark.parametrize(
    ("changes", "server", "clients"),
    [
        ({}, True, False),
        ({"sharing": "local"}, False, True),
        ({"trainer": "galore"}, False, False),
        ({"trainer": "dense"}, False, False),
    ],
)
def test_who_picks_rows(changes: dict[str, Any], server: bool, clients: bool) -> None:
    found = method(**changes)
    assert (found.picks_at_server, found.picks_at_clients) == (server, clients)


def test_only_uniform_rules_read_no_norms() -> None:
    assert not method(rule="uniform_r").reads_norms
    assert not method(rule="uniform_nr").reads_norms
    assert method(rule="norm_r").reads_norms
    assert method(rule="frozen_pass").reads_norms


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 0}, r"method\.rank: expected >= 1, got 0"),
        ({"refresh_rounds": 0}, r"method\.refresh_rounds: expected >= 1, got 0"),
        ({"refresh_steps": -1}, r"method\.refresh_steps: expected >= 1, got -1"),
        ({"scale": 0.0}, "scale: expected a finite number > 0"),
        ({"rule": "best"}, "rule: expected top_r"),
        ({"target_modules": ()}, r"method\.target_modules: expected at least one"),
        ({"row_average": "counts"}, r"method\.row_average=counts, .*sharing=shared: nothing reads it"),
        ({"refresh_steps": 5}, r"method\.refresh_steps=5, .*sharing=shared: nothing reads it"),
        ({"sharing": "local", "refresh_rounds": 2}, r"refresh_rounds=2, .*sharing=local: nothing reads it"),
        ({"trainer": "dense", "rank": 4}, r"method\.rank=4, method\.trainer=dense"),
        ({"trainer": "galore", "rule": "top_r"}, r"method\.rule=top_r, method\.trainer=galore"),
        ({"trainer": "galore", "sharing": "local"}, r"method\.sharing=local, method\.trainer=galore"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        method(**changes)
