import dataclasses
import json
from collections.abc import Callable

import pytest

from fedllm_flwr.compose import compose_run
from fedllm_flwr.config import RunConfig, run_config
from fedllm_flwr.errors import ConfigError

Smoke = Callable[..., RunConfig]


def test_json_brings_the_same_configuration_back(smoke: Smoke) -> None:
    config = smoke("method.client_ranks=[2,4]", "client.clip_norm=1")
    again = run_config(json.loads(config.to_json()))
    assert dataclasses.replace(again, out_dir=config.out_dir) == config
    assert again.fingerprint() == config.fingerprint()


def test_runtime_and_folder_are_outside_the_fingerprint_and_everything_else_is_inside(
    smoke: Smoke,
) -> None:
    base = smoke().fingerprint()
    for same in (
        "runtime.threads=2",
        "runtime.cohort_tokens=0",
        "runtime=simulation",
        "out_dir=elsewhere",
    ):
        assert smoke(same).fingerprint() == base, same
    changes = ["seed=1", "data_seed=1", "num_rounds=3", "method.rank=4", "task.max_tokens=40", "partition.alpha=0.5",
               "optimizer.learning_rate=0.01", "client.batch_size=4", "strategy=svd", "wire=float16"]  # fmt: skip
    assert len({base, *(smoke(change).fingerprint() for change in changes)}) == len(changes) + 1


def test_paths_on_a_node_never_enter_the_message(smoke: Smoke) -> None:
    text = smoke("runtime.data_path=/secret/rows.csv", "runtime.model_path=/secret/model").to_json()
    assert "secret" not in text


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("experiment=nothing", "experiment: expected one of .*smoke.*, got 'nothing'"),
        ("model=gpt5", "model: expected one of .*tiny.*, got 'gpt5'"),
        ("method.rnak=4", "method.rnak: unknown key"),
        ("method.rank=big", "method.rank: expected int, got 'big'"),
        ("method.rank=2.5", "method.rank: expected int, got 2.5"),
        ("method.rank=true", "method.rank: expected int, got True"),
        ("method.rank=0", "expected >= 1, got 0"),
        ("method.client_ranks=4", "method.client_ranks: expected a list, got 4"),
        ("method.client_ranks=[4,x]", r"method.client_ranks\[1\]: expected int, got 'x'"),
        ("method.sharing=a_only", "method.sharing: expected one of .*'b_only'.*, got 'a_only'"),
        ("method.dropout=1.0", r"method.dropout: expected in \[0, 1\), got 1.0"),
        ("client.local_steps=3", "exactly one above 0, got local_epochs=1 local_steps=3"),
        ("strategy.server_optimizer=adam", "strategy.server_optimizer: expected one of .*fedadam"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate: expected > 0, got -1"),
        ("data_seed=-2", "data_seed: expected >= -1, got -2"),
        ("num_rounds=0", "num_rounds: expected >= 1, got 0"),
        ("num_rounds=three", "num_rounds: expected int, got 'three'"),
        ("model.hub_id=a/b", "model.hub_id: belongs to model=hub"),
        ("+strategy._target_=os.system", "unknown key '_target_'"),
        ("task.languages=[en]", "task.languages: unknown key"),
    ],
)
def test_bad_input_is_one_line(smoke: Smoke, override: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        smoke(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["strategy=stack", "method.sharing=b_only"], "method.sharing=b_only and strategy=stack"),
        (
            ["strategy=svd", "strategy.server_optimizer=fedadam"],
            "server_optimizer=fedadam and strategy=svd",
        ),
        (
            ["strategy.server_learning_rate=0.5"],
            "server_learning_rate=0.5 and strategy.server_optimizer=fedavg",
        ),
        (
            ["strategy.server_optimizer=fedadagrad", "strategy.server_momentum=0.5"],
            "server_momentum=0.5 and strategy.server_optimizer=fedadagrad",
        ),
        (["task=headlines", "task.loss=labels"], "task.loss=labels and task=headlines"),
        (["task.canaries=2"], "task.canaries=2 and task.loss=labels"),
        (
            ["task.canaries=2", "task.loss=vocabulary", "fairness.groups=label"],
            "task.canaries=2 and fairness.groups=label",
        ),
        (["selection=best_validation", "task.validation_rows=-1"], "no validation rows"),
        (
            ["baselines.learning_rates=[0.1,0.2]", "task.validation_rows=-1"],
            "baselines.learning_rates and task.validation_rows=-1: there are no validation rows",
        ),
        (
            [
                "method=fedprompt",
                "strategy=prompt_mean",
                "fairness=q_ffl",
                "client.schedule=cosine",
                "client.minimum_fraction=0",
            ],
            "fairness=q_ffl, client.schedule=cosine and client.minimum_fraction=0",
        ),
        (
            ["runtime=deployment", "baselines=all"],
            "baselines.centralised=true and runtime=deployment",
        ),
    ],
)
def test_impossible_pairs_name_both(smoke: Smoke, overrides: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        smoke(*overrides)


NOISY = ("privacy=central", "strategy.weighting=uniform")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["privacy=central"], "strategy.weighting=examples and privacy=central"),
        ([*NOISY, "strategy=stack"], "strategy=stack and privacy=central: .* use strategy=factor_mean"),
        ([*NOISY, "strategy=svd"], "strategy=svd and privacy=central"),
        ([*NOISY, "method.client_ranks=[2,4]"], "method.client_ranks, method.client_alphas and privacy=central"),
        ([*NOISY, "selection=best_validation"], "selection=best_validation and privacy=central"),
        ([*NOISY, "baselines.learning_rates=[0.1]"], "privacy=central and baselines.learning_rates"),
        ([*NOISY, "privacy.clip_quantile=0.5"], "expected a count noise above noise_multiplier / 2"),
        (["privacy=local", "fairness=group_dro", "fairness.groups=data"], "privacy=local and fairness=group_dro"),
        (["privacy=local", "privacy.epsilon_budget=2"], "privacy=local and strategy.max_retries=2"),
        (["privacy=sample"], "client.clip_norm=1 and privacy=sample"),
        (["privacy=sample", "client.clip_norm=0", "privacy.epsilon_budget=2"],
         "privacy=sample and strategy.max_retries=2"),
        (["privacy=sample", "client.clip_norm=0", "method=fedprompt", "strategy=prompt_mean",
          "method.personal_length=2", "method.local_training=alternating"],
         "local_training=alternating and privacy=sample"),
        (["privacy=sample", "client.clip_norm=0", "method=fedprompt", "strategy=prompt_mean",
          "method.trainer=black_box"], "trainer=black_box and privacy=sample"),
        (["privacy=local", "method=fedresprompt", "strategy=controller_mean", "baselines=none"],
         "privacy=local and method=fedresprompt"),
        ([*NOISY, "method=fedprompt", "strategy=prompt_mean", "method.cluster_length=2"],
         "privacy=central and method.cluster_length > 0"),
        ([*NOISY, "method=fedprompt", "strategy=prompt_mean", "method.common_start=false"],
         "method.common_start=false and privacy=central"),
    ],
)  # fmt: skip
def test_pairs_that_the_account_does_not_hold_are_named(
    smoke: Smoke, overrides: list[str], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        smoke(*overrides)


def test_privacy_goes_with_what_keeps_its_account(smoke: Smoke) -> None:
    assert (
        smoke(*NOISY, "privacy.clip_quantile=0.5", "privacy.count_noise=1").privacy.name
        == "central"
    )
    assert smoke(*NOISY, "wire=int8", "method.sharing=b_only").privacy.name == "central"
    assert (
        smoke("privacy=local", "strategy=stack", "method.client_ranks=[2,4]").privacy.name
        == "local"
    )
    personal = ("method=fedprompt", "strategy=prompt_mean", "method.personal_length=2")
    assert smoke(*NOISY, *personal).privacy.name == "central"


SPLIT = ("method=fedresprompt", "strategy=controller_mean", "baselines=none")


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("strategy=factor_mean", "strategy=factor_mean and method=fedresprompt"),
        ("fairness.groups=label", "fairness.groups=label and method=fedresprompt"),
        ("client.proximal_mu=0.1", "client.proximal_mu=0.1 and method=fedresprompt"),
        (
            "client.gradient_accumulation=2",
            "client.gradient_accumulation=2 and method=fedresprompt",
        ),
        ("task.loss=vocabulary", "task.loss=vocabulary and method=fedresprompt"),
        ("baselines.zero_shot=true", "baselines.zero_shot=true and method=fedresprompt"),
        ("baselines.local_tuning=true", "baselines.local_tuning=true and method=fedresprompt"),
    ],
)
def test_what_a_split_model_cannot_do_is_refused(smoke: Smoke, override: str, match: str) -> None:
    assert smoke(*SPLIT).method.name == "fedresprompt"
    with pytest.raises(ConfigError, match=match):
        smoke(*SPLIT, override)


def test_modes_of_a_split_model_exclude_some_settings(smoke: Smoke) -> None:
    with pytest.raises(ConfigError, match=r"server_optimizer=fedavgm and method\.mode=sync_sgd"):
        smoke(*SPLIT, "method.mode=sync_sgd", "strategy.server_optimizer=fedavgm")
    with pytest.raises(ConfigError, match=r"selection=best_validation and method\.mode=private"):
        smoke(*SPLIT, "method.mode=private_controller", "selection=best_validation")
    with pytest.raises(ConfigError, match="strategy=controller_mean and method=fedlora"):
        smoke("strategy=controller_mean")


@pytest.mark.parametrize("hub_id", ["../weights", "/etc/model", "a/b/c", "C:\\model", "~/m"])
def test_a_hub_id_cannot_be_a_path(hub_id: str) -> None:
    with pytest.raises(ConfigError, match="expected owner/name"):
        compose_run(["experiment=smoke", "model=hub", f"model.hub_id='{hub_id}'"])


def test_ranks_and_alphas_cycle_over_clients(smoke: Smoke) -> None:
    method = smoke(
        "method.client_ranks=[2,8]", "method.client_alphas=[4,8,16]", "method.rank=4"
    ).method
    assert [method.spec(p).rank for p in range(4)] == [2, 8, 2, 8]
    assert [method.spec(p).alpha for p in range(4)] == [4, 8, 16, 4]
    assert method.server_spec().rank == 8


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["strategy.weighting=uniform", "fairness=group_dro"], "strategy.weighting=uniform and fairness=group_dro"),
        (["method=fedprompt", "strategy=prompt_mean", "method.trainer=black_box", "baselines.learning_rates=[0.1]"],
         "a search has no learning rate"),
        (["method=fedprompt", "strategy=prompt_mean", "method.trainer=black_box", "baselines.local_tuning=true"],
         "tuning takes gradients"),
        (["method=fedprompt", "strategy=prompt_mean", "runtime=deployment", "task=csv", "task.loss=labels"],
         "use placement=before"),
        (["method=fedprompt", "strategy=prompt_mean", "method.personal_length=2", "selection=best_validation"],
         "use selection=last"),
    ],
)  # fmt: skip
def test_pairs_of_prompts_and_fairness_that_cannot_work_are_named(
    smoke: Smoke, overrides: list[str], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        smoke(*overrides)
