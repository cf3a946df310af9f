from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.odd_client import ODD
from fedllm_flwr.forgetting.request import Request, read_request
from fedllm_flwr.forgetting.rivals import (
    Answers,
    control,
    read_answers,
    reference,
    shadow,
    utility_of,
    write_answers,
)

Fixture = Callable[..., Any]


@pytest.fixture(scope="module")
def removal(odd: Fixture) -> Request:
    return read_request(odd()[0], str(ODD), "replay")


def test_references_differ_in_training_alone_and_never_had_the_client(removal: Request) -> None:
    configs = [reference(removal, number).config for number in range(4)]
    own = removal.config
    assert configs[0].seed == own.seed
    assert len({config.seed for config in configs}) == 4
    for config in configs:
        assert config.rows_seed == own.rows_seed
        assert (config.unlearning.removed, config.unlearning.removal) == ((ODD,), "none")
        assert config.unlearning.name == "none", "no second ledger"
        assert config.client == own.client, "not the half of a replay"
        assert (config.num_rounds, config.method) == (own.num_rounds, own.method)


def test_shadow_models_have_the_client_and_say_which_half(removal: Request) -> None:
    models = [shadow(removal, number) for number in (0, 1)]
    for number, model in enumerate(models):
        unlearning = model.config.unlearning
        assert (unlearning.removed, unlearning.shadowed, unlearning.shadow) == ((), ODD, number)
        assert model.config.rows_seed == removal.config.rows_seed
    assert models[0].config.seed != models[1].config.seed


def test_controls_have_the_seed_of_the_run(removal: Request) -> None:
    made = control(removal, "no_op")
    assert (made.config.seed, made.change) == (removal.config.seed, "no_op")


def test_answers_come_back_as_they_were_and_only_to_their_question(tmp_path: Path) -> None:
    told = Answers({"members/losses": np.array([0.1, 2.0])}, {0: 0.5, 3: 0.25}, 1.5, 7, ("adapter",))  # fmt: skip
    path = tmp_path / "folder" / "full.safetensors"
    assert read_answers(path, "q") is None
    write_answers(path, "q", told)
    back = read_answers(path, "q")
    assert back is not None
    assert back.arrays["members/losses"].tobytes() == told.arrays["members/losses"].tobytes()
    assert (back.utility, back.cpu_seconds, back.tokens, back.different) == (
        told.utility, told.cpu_seconds, told.tokens, told.different)  # fmt: skip
    assert read_answers(path, "another") is None
    path.write_bytes(path.read_bytes()[:-3])
    assert read_answers(path, "q") is None


def test_utility_is_of_the_last_round_and_by_client(odd: Fixture) -> None:
    source, _ = odd()
    last, first = utility_of(source), utility_of(source, 0)
    assert set(last) == set(first) == {0, 1, 2}
    [record] = [r for r in source.records("evaluation")
                if (r["round"], r["partition_id"], r["split"]) == (4, 1, "test")]  # fmt: skip
    assert last[1] == pytest.approx(np.exp(-record["loss_sum"] / record["label_tokens"]))
    assert last != first
