import re

import pytest

from fedllm_flwr import cli
from fedllm_flwr.compose import compose_run
from fedllm_flwr.elsewhere import ELSEWHERE, counterpart
from fedllm_flwr.errors import ConfigError

FLAGS = (
    "base-model",
    "training-method",
    "cascade",
    "sparse-gradients",
    "fairness",
    "cascade-models",
    "batch-queries",
)
COMMANDS = ("train-llm", "deploy-llm")
CALLS = ("train", "infer", "learn_prompts", "train_prompts", "request_unlearning")
OPTIONS = (
    "adapter", "agreement_samples", "agreement_threshold", "base_model", "batch_size", "batch_timeout", "batching",
    "cascade_enabled", "cascade_strategy", "device_model", "error_feedback", "fairness_constraint",
    "fallback_to_retrain", "group_aware_prompts", "groups", "local_epochs", "lora_alpha", "lora_rank",
    "max_group_disparity", "models", "parallel_strategy", "personal_prompt_length", "personalized_prompts",
    "project_id", "prompt_aggregation", "prompt_initialization", "prompt_length", "prompt_tuning", "prompting",
    "query_batching", "rounds", "semantic_threshold", "shared_prompt_length", "similarity_model", "sparse_gradients",
    "sparsity", "sparsity_structure", "target_sparsity", "task_type", "training_method", "unlearning_enabled",
    "unlearning_method", "unlearning_verification", "verification_budget", "verify_unlearning",
)  # fmt: skip
"""Everything that the published sketch of such a tool can be told."""


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_another_tool_is_an_error_that_says_what_it_is_called_here(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for typed in ([f"--{name}", "a"], [f"--{name}=a"], ["experiment=smoke", f"--{name}"]):
        assert cli.main(typed) == cli.WRONG_INPUT
        said = capsys.readouterr().err
        assert said.startswith(f"fedllm: --{name}")
        assert f"unknown flag; here it is {ELSEWHERE[name]}" in said


@pytest.mark.parametrize("command", ["deploy", "init"])
@pytest.mark.parametrize("name", FLAGS)
def test_commands_say_it_too(name: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = ["my-app"] if command == "init" else []
    assert cli.main([command, *named, f"--{name}", "a"]) == cli.WRONG_INPUT
    assert f"; here it is {ELSEWHERE[name]}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*COMMANDS, "dance"])
def test_a_command_that_is_not_there_is_an_error(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([name, "experiment=smoke"]) == cli.WRONG_INPUT
    said = capsys.readouterr().err
    assert said.startswith(f"fedllm: {name}: unknown command")
    assert ("; here it is" in said) == (name != "dance")


@pytest.mark.parametrize("name", ["sparse_gradients", "cascade_strategy", "batching"])
def test_a_key_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: unknown key; here it is "):
        compose_run(["experiment=smoke", f"{name}=true"])


def test_everything_that_can_be_told_elsewhere_is_answered() -> None:
    for word in (*FLAGS, *COMMANDS, *CALLS, *OPTIONS):
        assert counterpart(word), word
    assert counterpart("--Cascade_Models=a,b") == counterpart("cascade-models") != ""
    assert counterpart("--colour") == ""


NEEDED = {
    "fairness": ["method=fedprompt", "strategy=prompt_mean"],
    "method": ["method=fedprompt", "strategy=prompt_mean"],
    "serving": ["action=serve", "run=outputs/a"],
    "cascade": ["action=cascade", "cascade=prompt_lora"],
    "wire": ["wire=top_k"],
}
"""What settings of a group need beside them."""
OWN = {
    "method=fedlora": [], "method=fedgrass": ["strategy=row_mean", "client.clip_norm=0"],
    "method=fedresprompt": ["strategy=controller_mean", "baselines=none"], "method.rank": [], "method.alpha": [],
    "strategy=row_mean": ["method=fedgrass", "client.clip_norm=0"], "fairness.max_gap": ["fairness=accuracy_gap"],
    "strategy=prompt_mean": ["method=fedprompt"], "client.clip_norm": [],
    "privacy=central": ["strategy.weighting=uniform"],
    "fairness=accuracy_gap": [*NEEDED["fairness"], "fairness.groups=data", "task=vader_sentiment"],
}  # fmt: skip


def settings() -> list[str]:
    found = {
        s for text in ELSEWHERE.values() for s in re.findall(r"[a-z][a-z_.]*=[\w.\[\]]*\w\]?", text)
    }
    doors = (
        "action=",
        "experiment=",
        "run=",
        "client=",
        "method=retrain",
        "model.hub_id",
        "model=hub",
        "task=",
    )
    return sorted(s for s in found if not s.startswith(doors))


@pytest.mark.parametrize("setting", settings())
def test_settings_that_are_named_exist(setting: str) -> None:
    name = setting.partition("=")[0]
    group = name.partition(".")[0]
    needed = OWN.get(setting, OWN.get(name, NEEDED.get(group, [])))
    if group == "fairness":
        needed = [*NEEDED["fairness"], "task=vader_sentiment", *needed]
    compose_run(["experiment=smoke", *needed, setting])
