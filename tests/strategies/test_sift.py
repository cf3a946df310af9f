from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedllm_flwr import records
from fedllm_flwr.errors import VerificationError
from fedllm_flwr.settings.unlearning import run_signs
from strategies.sift import SiftMerge, joined, parted

Fixture = Callable[..., Any]
SIFT = ("num_rounds=1", "strategy=sift_merge", "method.sharing=b_only")
PROMPT = ("method=fedprompt", "strategy=sift_merge", "num_rounds=1")
FIFTY = ("partition=iid", "partition.num_clients=50", "partition.min_train_rows=1", "task.train_rows=100",
         "task.validation_rows=52", "task.test_rows=52", "client.local_steps=1")  # fmt: skip


def merging(played: Any) -> SiftMerge:
    found = played.strategy.privacy
    return found if isinstance(found, SiftMerge) else found.inner


def updates(played: Any) -> dict[int, np.ndarray]:
    """Every client's task vector as it crossed the wire."""
    start = joined(
        {
            n.partition("/")[2]: v
            for n, v in merging(played).arrays().items()
            if n.startswith("start/")
        }
    )
    found = {}
    for reply in played.grid.replies:
        if reply.metadata.message_type == records.TRAIN:
            for name, values in records.read(reply, records.ANSWER)[1].items():
                found[int(name.partition("/")[0])] = values - start
    return found


@pytest.fixture(scope="module")
def lora(micro: Fixture, play: Fixture) -> Any:
    return play(micro(*SIFT), splits=("test",))


@pytest.fixture(scope="module")
def prompt(micro: Fixture, play: Fixture) -> Any:
    return play(micro(*PROMPT), splits=("test",))


@pytest.fixture(params=["lora", "prompt"])
def either(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_parts_are_joined_by_name_and_come_apart_again() -> None:
    parts = {"b": np.arange(2.0), "a": np.arange(3.0)}
    flat = joined(parts)
    np.testing.assert_array_equal(flat, [0, 1, 2, 0, 1])
    assert {n: v.tolist() for n, v in parted(flat, parts).items()} == {"a": [0, 1, 2], "b": [0, 1]}


def test_every_update_moves_the_way_of_the_signs_and_the_model_is_start_plus_their_mean(
    either: Any,
) -> None:
    found = updates(either)
    assert len(found) == 4
    signs = run_signs(either.strategy.config.seed, found[0].size)
    for tau in found.values():
        assert (tau * signs >= 0).all()
        assert 0.2 < (tau != 0).mean() < 0.8, "about half of the values move"
    mean = np.mean([tau.astype(np.float64) for tau in found.values()], axis=0)
    start = merging(either)._start
    either.strategy.begin_sum(2)
    values = joined(either.strategy.start_values(2)) - joined(start)
    np.testing.assert_allclose(values, mean, atol=2e-7)


def test_each_client_is_served_its_own_mask_of_the_model(either: Any) -> None:
    own = merging(either).own_parts([0, 1, 2, 3, 9])
    assert sorted(own) == ["served/0", "served/1", "served/2", "served/3"]
    start = joined(merging(either)._start)
    either.strategy.begin_sum(2)
    whole = joined(either.strategy.start_values(2))
    for client, tau in updates(either).items():
        np.testing.assert_array_equal(own[f"served/{client}"], np.where(tau != 0, whole, start))
    evaluations = [m for m in either.grid.sent if m.metadata.message_type == records.EVALUATE]
    names = {n for m in evaluations for n in records.read(m, records.INSTRUCTION)[1]}
    assert names >= set(own), "they travel with the message that asks for an evaluation"


def test_a_clients_figures_are_those_of_what_it_is_served(
    lora: Any, micro: Fixture, play: Fixture
) -> None:
    """A run of one client alone serves it its own update whole, and its mask changes nothing."""
    alone = play(micro(*SIFT, "unlearning.removed=[1,2,3]"), splits=("test",))
    tau = updates(alone)[0]
    np.testing.assert_array_equal(tau, updates(lora)[0])
    [evaluation] = alone.run.records("evaluation")[-1:]
    assert evaluation["partition_id"] == 0
    own = joined({"served": merging(alone).own_parts([0])["served/0"]})
    alone.strategy.begin_sum(2)
    np.testing.assert_array_equal(own, joined(alone.strategy.start_values(2)))


def test_a_client_trains_the_same_whoever_else_is_there(
    micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    both = ("runtime.cohort_tokens=4096", *SIFT)
    all_of_them, few = play(micro(*both)), play(micro(*both, "unlearning.removed=[0,2]"))
    for client, tau in updates(few).items():
        np.testing.assert_array_equal(tau, updates(all_of_them)[client])


@pytest.mark.parametrize("count", [1, 5, 20])
def test_removal_of_some_of_fifty_is_to_the_byte_as_if_they_had_never_come(
    count: int, micro: Fixture, play: Fixture, fifty: Any
) -> None:
    random = np.random.default_rng(count)
    leaving = sorted(int(c) for c in random.choice(50, size=count, replace=False))
    without = play(micro(*SIFT, *FIFTY, f"unlearning.removed={leaving}".replace(" ", "")))
    taus = updates(fifty)
    shrunk = SiftMerge(fifty.strategy.config)
    shrunk.restore_arrays(merging(fifty).arrays())
    for client in random.permutation(leaving):
        shrunk.remove(int(client), taus[int(client)])
    shrunk.finish(without.strategy, 2)
    expected, found = merging(without).arrays(), shrunk.arrays()
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert found[name].tobytes() == values.tobytes(), name
    model = without.strategy.checkpoint(1).arrays["adapter"]
    assert model.tobytes() == play_again(micro, play, leaving).tobytes()


def play_again(micro: Fixture, play: Fixture, leaving: list[int]) -> np.ndarray:
    again = play(micro(*SIFT, *FIFTY, f"unlearning.removed={leaving}".replace(" ", "")))
    found: np.ndarray = again.strategy.checkpoint(1).arrays["adapter"]
    return found


@pytest.fixture(scope="module")
def fifty(micro: Fixture, play: Fixture) -> Any:
    return play(micro(*SIFT, *FIFTY))


def test_another_update_than_was_added_does_not_take_a_client_out(lora: Any) -> None:
    copy = SiftMerge(lora.strategy.config)
    copy.restore_arrays(merging(lora).arrays())
    before = copy.arrays()
    tau = updates(lora)[2]
    with pytest.raises(VerificationError, match="client 2: expected the update that was added"):
        copy.remove(2, tau * np.float32(1.0001))
    assert all(v.tobytes() == before[n].tobytes() for n, v in copy.arrays().items())


def test_an_update_against_the_signs_is_left_out_and_named(
    micro: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture
) -> None:
    def turned(asked: Message, infos: list[Any], parts: dict[str, np.ndarray]) -> None:
        for name in parts:
            if name.startswith("1/"):
                parts[name] = -parts[name]

    played = play(micro(*SIFT, "runtime.num_nodes=2"), grid=edge_grid(2, spoil(turned)))
    [failure] = played.run.records("failure")
    assert failure["partition_id"] == 1
    assert "client 1: expected an update that moves the way of the run's signs" in failure["reason"]
    assert merging(played).clients == (0, 2, 3)


def test_it_resumes_from_its_checkpoint_with_the_same_bits(either: Any, play: Fixture) -> None:
    again = play(either.strategy.config, folder=either.run.path)
    assert again.sha == either.sha
    found, expected = merging(again).arrays(), merging(either).arrays()
    assert {n: v.tobytes() for n, v in found.items()} == {
        n: v.tobytes() for n, v in expected.items()
    }
