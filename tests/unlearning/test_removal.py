"""The methods on a federation of logistic regressions, small enough to retrain whenever a test wants to."""

import functools

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.unlearning.ledger import Contribution, Round, weighted_mean
from fedllm_flwr.unlearning.removal import (
    METHODS,
    check_request,
    exactness_of,
    merge,
    rewind,
    shard_mean,
    shard_of,
    shards_of,
)

CLIENTS, FEATURES, ROWS, GONE = tuple(range(10)), 20, 40, 3


@functools.cache
def data_of(client):
    """Rows whose true weights differ from client to client about common ones."""
    rng = np.random.default_rng([11, client])
    common = np.random.default_rng(5).standard_normal(FEATURES)
    x = rng.standard_normal((ROWS, FEATURES))
    logits = x @ (common + rng.standard_normal(FEATURES))
    return x, (rng.random(ROWS) < 1 / (1 + np.exp(-logits))).astype(float)


def trained(client, model, steps):
    """A client's update: steps of full-batch gradient descent."""
    x, y = data_of(client)
    w = model.copy()
    for _ in range(steps):
        w -= 0.5 * x.T @ (1 / (1 + np.exp(-x @ w)) - y) / ROWS
    return w - model


def federated(clients, num_rounds, start=None, first=1, steps=10):
    """The model after the rounds, and the rounds; update and weight are float64, to see the method's error alone."""
    model = np.zeros(FEATURES) if start is None else start.copy()
    rounds = []
    for server_round in range(first, num_rounds + 1):
        made = tuple(Contribution(c, float(ROWS), trained(c, model, steps)) for c in clients)
        rounds.append(Round(server_round, made))
        mean = weighted_mean(made)
        model = model if mean is None else model + mean
    return model, rounds


STAYED = tuple(client for client in CLIENTS if client != GONE)


@pytest.fixture(scope="module")
def twenty_rounds():
    full, rounds = federated(CLIENTS, 20)
    return full, rounds, federated(STAYED, 20)[0]


def apart(first, second):
    return float(np.linalg.norm(first - second))


def test_subtraction_after_twenty_rounds_is_worse_than_doing_nothing(twenty_rounds):
    """The finding that the method carries its label for, whichever client goes."""
    full, rounds, _ = twenty_rounds
    for client in CLIENTS:
        retrained = federated([c for c in CLIENTS if c != client], 20)[0]
        merged = merge(full, rounds, client)
        assert apart(merged, retrained) > 2 * apart(full, retrained)
        # by hand: what the others added up to, renormalised
        others = [[c.update for c in each.contributions if c.client != client] for each in rounds]
        np.testing.assert_allclose(merged, np.mean(others, axis=1).sum(0), atol=1e-12)


def test_subtraction_after_one_round_is_retraining():
    full, rounds = federated(CLIENTS, 1)
    retrained = federated(STAYED, 1)[0]
    assert apart(full, retrained) > 1e-2
    assert apart(merge(full, rounds, GONE), retrained) <= 1e-12


def test_weights_are_renormalised_in_subtraction():
    rounds = [Round(1, tuple(Contribution(c, c + 1.0, np.array([2.0**c])) for c in range(3)))]
    full = np.array([(1 * 1 + 2 * 2 + 3 * 4) / 6])
    assert merge(full, rounds, 1)[0] == pytest.approx((1 * 1 + 3 * 4) / 4)


def test_rounds_without_the_client_and_rounds_of_it_alone():
    alone = Round(1, (Contribution(GONE, 2.0, np.array([1.0, 2.0])),))
    without = Round(2, (Contribution(5, 2.0, np.array([4.0, 8.0])),))
    merged = merge(np.array([5.0, 10.0]), [alone, without], GONE)
    assert merged.tolist() == [4, 8]


def test_updates_of_another_size_are_refused():
    rounds = [Round(7, (Contribution(2, 1.0, np.ones(2)),))]
    with pytest.raises(ShapeError, match=r"merge: round 7: expected updates \[3\], got \[2\]"):
        merge(np.zeros(3), rounds, 2)


def joined_late():
    """Client 3 joins in round 6 of 9."""
    early, before = federated(STAYED, 5)
    full, after = federated(CLIENTS, 9, early, first=6)
    return full, [*before, *after]


def test_rewinding_gives_the_bytes_of_a_training_without_the_client():
    full, rounds = joined_late()
    touched = [r.server_round for r in rounds if GONE in [x.client for x in r.contributions]]
    saved = {2: federated(STAYED, 2)[0], 4: federated(STAYED, 4)[0], 8: federated(CLIENTS, 8)[0]}
    begin = rewind(touched, saved)
    assert (min(touched), begin) == (6, 4)
    again = federated(STAYED, 9, saved[begin], first=begin + 1)[0]
    assert again.tobytes() == federated(STAYED, 9)[0].tobytes()
    assert again.tobytes() != full.tobytes()


def test_rewinding_goes_back_to_the_start_where_nothing_older_was_saved():
    assert rewind((3, 5), (3, 4, 5)) == 0
    assert rewind((5, 3), (2, 3)) == 2


def sharded(clients, num_shards=4):
    return {
        shard: federated(members, 3)[0]
        for shard, members in shards_of(clients, num_shards, 1).items()
    }


def test_retraining_one_shard_gives_the_bytes_of_a_training_without_the_client():
    models = sharded(CLIENTS)
    touched = shard_of(GONE, 4, 1)
    members = shards_of(STAYED, 4, 1)
    again = {shard: model for shard, model in models.items() if shard != touched}
    if touched in members:
        again[touched] = federated(members[touched], 3)[0]
    never = shard_mean(sharded(STAYED))
    assert shard_mean(again).tobytes() == never.tobytes()
    assert shard_mean(models).tobytes() != never.tobytes()
    backwards = dict(reversed(list(again.items())))
    assert shard_mean(backwards).tobytes() == never.tobytes()


def test_shards_hold_every_client_once_and_nobody_moves_when_one_goes():
    clients = range(200)
    shards = shards_of(clients, 8, seed=3)
    assert sorted(c for members in shards.values() for c in members) == list(clients)
    # 25 in each on average; a binomial's deviation is 4.7
    assert all(5 < len(members) < 45 for members in shards.values())
    fewer = shards_of([c for c in clients if c != 17], 8, seed=3)
    assert fewer == {s: tuple(c for c in members if c != 17) for s, members in shards.items()}
    assert shards_of([9, 4], 1, seed=0) == {0: (4, 9)}
    assert shards_of(clients, 8, seed=4) != shards


def test_models_of_shards_are_averaged_plainly_or_refused():
    assert shard_mean(
        {1: np.array([1, 3], np.float32), 4: np.array([3, 5], np.float32)}
    ).tolist() == [2, 4]
    with pytest.raises(ConfigError, match="at least one model"):
        shard_mean({})
    with pytest.raises(ShapeError, match="models of one shape"):
        shard_mean({0: np.ones(2), 1: np.ones(3)})
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        shard_of(1, 0, 0)


def test_every_method_says_what_it_promises():
    assert {name for name, promise in METHODS.items() if promise == "exact"} == {
        "exact_merge",
        "shards",
        "rewind",
        "retrain",
    }
    assert exactness_of("merge", num_rounds=1) == "rounding"
    assert exactness_of("merge", num_rounds=2) == "approximate"
    assert exactness_of("replay", num_rounds=1) == "approximate"
    with pytest.raises(ConfigError, match=r"expected exact_merge, shards, .* got 'noise'"):
        exactness_of("noise", num_rounds=1)


def test_requests_that_cannot_be_met_are_refused():
    state = {"known": range(5), "participated": (0, 1, 2), "removed": (2, 3)}
    check_request(1, **state)
    for client, why in (
        (7, "one of the run's 5 clients, got client 7"),
        (4, "got client 4, whose update was never used"),
        (2, "got client 2, removed already"),
        (3, "got client 3, removed already"),
    ):
        with pytest.raises(ConfigError, match=why):
            check_request(client, **state)
