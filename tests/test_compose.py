import threading
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from fedllm_flwr.compose import CONF, compose_run, from_node, one_line
from fedllm_flwr.errors import ConfigError


def test_groups_are_found_beside_the_package_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CONF.is_absolute()
    assert compose_run(["experiment=smoke"]).config.experiment == "smoke"
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_wins_over_groups_and_the_command_line_over_both() -> None:
    base = compose_run(["experiment=smoke"]).config
    assert (base.model.name, base.num_rounds, base.partition.num_clients) == ("tiny", 2, 4)
    assert base.partition.name == "dirichlet", "what the experiment does not say is the root's"
    changed = compose_run(["num_rounds=7", "experiment=smoke", "partition=iid"]).config
    assert (changed.num_rounds, changed.partition.name, changed.partition.num_clients) == (
        7,
        "iid",
        4,
    )


def test_the_order_of_overrides_does_not_matter() -> None:
    one = compose_run(
        ["experiment=smoke", "seed=3", "strategy=svd", "strategy.cohort_fraction=0.5"]
    )
    two = compose_run(
        ["strategy.cohort_fraction=0.5", "strategy=svd", "seed=3", "experiment=smoke"]
    )
    assert one == two


def test_what_belongs_to_the_door_is_not_part_of_the_run() -> None:
    asked = compose_run(["experiment=smoke", "action=evaluate", "run=outputs/x"])
    assert (asked.action, asked.run) == ("evaluate", "outputs/x")
    plain = compose_run(["experiment=smoke"])
    assert (plain.action, plain.run) == ("run", "")
    assert asked.config == plain.config


def test_a_key_that_the_action_would_not_read_is_refused() -> None:
    asked = compose_run(["action=cascade", "replay=x.jsonl", "prices=[a:1/2,b:3/4]", "format=json"])
    assert (asked.replay, asked.prices, asked.format) == ("x.jsonl", "a:1/2,b:3/4", "json")
    assert asked.config == compose_run([]).config
    for setting in ("format=json", "replay=x.jsonl", "prices=[a:1/2]"):
        key = setting.partition("=")[0]
        with pytest.raises(ConfigError, match=f"{key}=.*: expected with action=.*, got action=run"):
            compose_run(["experiment=smoke", setting])
    with pytest.raises(
        ConfigError, match="replay=x: expected with action=cascade, got action=costs"
    ):
        compose_run(["action=costs", "replay=x"])


def test_a_verification_is_asked_for_and_has_its_words() -> None:
    asked = compose_run(
        [
            "action=unlearn",
            "verify=adversarial",
            "budget=500",
            "fallback=retrain",
            "verification=quick",
        ]
    )
    assert (asked.verify, asked.fallback) == ("adversarial", "retrain")
    assert (asked.verification.budget, asked.verification.shadows) == (500, 0)
    assert compose_run(["action=verify", "budget=300"]).verification.budget == 300
    assert asked.config == compose_run([]).config
    for settings, match in (
        (["action=unlearn", "budget=300"], "expected with action=verify, or action=unlearn verify="),
        (["action=unlearn", "fallback=retrain"], "expected with action=verify, or action=unlearn"),
        (["verification=quick"], "expected with action=verify"),
        (["action=unlearn", "verify=yes"], "verify: expected adversarial, got 'yes'"),
        (["action=unlearn", "verify=adversarial", "fallback=merge"], "fallback: expected retrain, got 'merge'"),
        (["action=verify", "verify=adversarial"], "verify=adversarial: expected with action=unlearn"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            compose_run(settings)


def test_it_composes_inside_another_composition() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        assert compose_run(["experiment=smoke"]).config.seed == 0
    assert compose_run(["experiment=smoke", "seed=1"]).config.seed == 1


def test_it_composes_in_a_thread_as_in_a_server() -> None:
    found = []
    worker = threading.Thread(target=lambda: found.append(compose_run(["experiment=smoke"])))
    worker.start()
    worker.join()
    assert found == [compose_run(["experiment=smoke"])]


def test_an_interpolation_is_resolved_and_a_broken_one_is_one_line() -> None:
    config = compose_run(["experiment=smoke", "num_rounds=${partition.num_clients}"]).config
    assert config.num_rounds == 4
    with pytest.raises(ConfigError, match="nothing") as caught:
        compose_run(["experiment=smoke", "num_rounds=${nothing}"])
    assert "\n" not in str(caught.value)


def test_a_mandatory_value_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Missing mandatory value.* model\.hub_id"):
        compose_run(["experiment=smoke", "model=hub"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["smoke"],
        ["seed=[1"],
        ["experiment=smoke", "seed=0,1"],
        ["experiment=smoke", "~seed"],
        ["=3"],
        ["+x.y=1"],
    ],
)
def test_every_error_is_one_line(overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    text = str(caught.value)
    assert text.strip() == text != ""
    assert "\n" not in text


def test_an_unknown_choice_lists_the_known_ones() -> None:
    text = "In 'config': Could not find 'task/poetry'\n\nAvailable options in 'task':\n\tcsv"
    found = one_line(text, ["task=poetry"])
    assert found.startswith("task: expected one of author_facts, csv, dataset_folder, ")
    assert found.endswith(", got 'poetry'")


def test_another_message_of_hydras_is_kept_on_one_line_with_what_was_given() -> None:
    assert one_line("first\n\n  second\nfirst\n", ["a=1"]) == "first second (given: a=1)"
    assert one_line("x", []) == "x (given: no overrides)"


@pytest.mark.parametrize("name", ["plain", "a b", "it's", 'say "hi"', "back\\slash", "a,b=[c]"])
def test_a_projects_files_are_found_wherever_it_lies(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - smoke\n  - _self_\nexperiment: mine\nseed: 7\n"
    )
    config = compose_run(["experiment=mine"], tmp_path / name).config
    assert (config.experiment, config.seed, config.model.name) == ("mine", 7, "tiny")
    with pytest.raises(ConfigError, match=r"experiment: expected one of .*, got 'mine'"):
        compose_run(["experiment=mine"])
    with pytest.raises(ConfigError, match=r"experiment: expected one of .*mine.*, got 'yours'"):
        compose_run(["experiment=yours"], tmp_path / name)


def test_a_composed_node_is_checked_like_any_other_tree() -> None:
    with pytest.raises(ConfigError, match="config: missing seed"):
        from_node(OmegaConf.create({"action": "run", "run": None, "experiment": "x"}))
