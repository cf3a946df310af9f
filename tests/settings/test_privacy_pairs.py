import pytest

from fedllm_flwr.compose import compose_run
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.privacy_pairs import check_privacy

ROWS = ["privacy=sample", "client.clip_norm=0"]
CENTRAL = ["privacy=central", "strategy.weighting=uniform"]
DEPLOYED = ["runtime=deployment", "baselines=none"]


@pytest.mark.parametrize("words", [
    ["privacy=none"], ROWS, CENTRAL, ["privacy=local"], ["privacy=local", *DEPLOYED],
    [*CENTRAL, *DEPLOYED, "baselines.local_only=true"],
])  # fmt: skip
def test_what_fits_passes(words: list[str]) -> None:
    check_privacy(compose_run(["experiment=smoke", *words]).config)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["privacy=sample"], "client.clip_norm=1 and privacy=sample"),
        (
            [*ROWS, "fairness=group_dro", "fairness.groups=label"],
            "privacy=sample and fairness=group_dro",
        ),
        ([*CENTRAL, "strategy=svd"], "strategy=svd and privacy=central"),
        (["privacy=central"], "strategy.weighting=examples and privacy=central"),
        ([*ROWS, "baselines.learning_rates=[0.1]"], "privacy=sample and baselines.learning_rates"),
        (
            ["privacy=local", *DEPLOYED, "baselines.local_only=true"],
            "baselines.local_only=true, privacy=local and runtime=deployment: each client would send",
        ),
    ],
)
def test_what_does_not_is_named(words: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        compose_run(["experiment=smoke", *words])
