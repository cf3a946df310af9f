"""A setting that was typed either has an effect or is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from fedllm_flwr.cli import main
from fedllm_flwr.compose import compose_run
from fedllm_flwr.config import RunConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.unread import READ_WITH, refuse_unread

PROMPTS = ["method=fedprompt", "strategy=prompt_mean"]
IN_USE = {
    "fairness.step_size": [*PROMPTS, "fairness=group_dro"],
    "fairness.max_multiplier": [*PROMPTS, "fairness=bounded_loss"],
    "fairness.bound": [*PROMPTS, "fairness=bounded_loss"],
    "fairness.max_gap": [*PROMPTS, "fairness=accuracy_gap"],
    "fairness.q": [*PROMPTS, "fairness=q_ffl", "client.minimum_fraction=0.1"],
    "method.search_dimension": [*PROMPTS, "method.trainer=black_box"],
    "method.search_population": [*PROMPTS, "method.trainer=black_box"],
    "method.search_generations": [*PROMPTS, "method.trainer=black_box"],
    "method.search_sigma": [*PROMPTS, "method.trainer=black_box"],
    "client.minimum_fraction": ["client.schedule=cosine"],
    "baselines.tuning_rounds": ["baselines.learning_rates=[0.1]"],
    "baselines.tuning_rows": ["baselines.learning_rates=[0.1]"],
    "baselines.local_tuning_steps": ["baselines.local_tuning=true"],
    "task.canary_client": ["task.canaries=1", "task.loss=vocabulary"],
    "task.canary_copies": ["task.canaries=1", "task.loss=vocabulary"],
    "runtime.workers": ["runtime=simulation"],
    "runtime.gpus_per_worker": ["runtime=simulation"],
}
NOT_IN_USE = {
    "fairness.q": PROMPTS,
    "method.search_sigma": PROMPTS,
    "method.search_dimension": PROMPTS,
    "method.search_population": PROMPTS,
    "method.search_generations": PROMPTS,
    "client.minimum_fraction": ["client.schedule=constant"],
}


def config_of(*words: str) -> RunConfig:
    return compose_run(["experiment=smoke", "partition=iid", *words]).config


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def test_every_key_is_a_field_of_a_configuration() -> None:
    for key, chosen in IN_USE.items():
        value_of(config_of(*chosen), key)
    assert IN_USE.keys() == READ_WITH.keys()


@pytest.mark.parametrize("key", READ_WITH)
def test_a_key_is_refused_unless_something_reads_it(key: str) -> None:
    config = config_of(*NOT_IN_USE.get(key, []))
    word = f"{key}={value_of(config_of(*IN_USE[key]), key)}"
    with pytest.raises(ConfigError, match=f"^{key}: expected together with .* got {key}="):
        refuse_unread([config], [word])
    refuse_unread([config_of(*IN_USE[key])], [word])


def test_of_a_sweep_one_job_is_enough() -> None:
    jobs = [config_of(*PROMPTS), config_of(*PROMPTS, "fairness=q_ffl")]
    refuse_unread(jobs, ["fairness=none,q_ffl", "fairness.q=2"])


def test_what_a_file_holds_is_not_a_word() -> None:
    config = config_of()
    assert config.fairness.q > 0
    refuse_unread([config], ["fairness=none", "num_rounds=2"])


@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_the_command_line_refuses_it_and_writes_nothing(
    flags: tuple[str, ...], tmp_path: Any, capsys: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "experiment=smoke", "runtime=loopback", "runtime.workers=4"]) == 2
    assert "runtime.workers: expected together with" in capsys.readouterr().err  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []
