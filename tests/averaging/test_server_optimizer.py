import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm_flwr.averaging import SERVER_OPTIMIZERS, RunningMean, State
from fedllm_flwr.averaging.server_optimizer import (
    DiLoCo,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
)
from fedllm_flwr.errors import ConfigError, ShapeError, WireError

SHAPES = {"lora_a": (4, 6), "lora_b": (5, 4)}
ROUNDS = 8
every_optimizer = pytest.mark.parametrize("name", SERVER_OPTIMIZERS)


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}


def local_training(params, server_round, client):
    """Three clients that each pull towards a point of their own, with noise, so that steps change sign."""
    rng = np.random.default_rng([server_round, client])
    return {
        name: (values + 0.4 * (rng.normal(0.1 * client, 0.1, values.shape) - values)).astype(
            np.float32
        )
        for name, values in params.items()
    }


def examples(client):
    return 10 * (client + 1)


def our_mean(replies):
    result = {}
    for name, shape in SHAPES.items():
        mean = RunningMean(int(np.prod(shape)))
        for client, params in enumerate(replies):
            mean.add(params[name].reshape(-1), examples(client))
        result[name] = mean.result().reshape(shape)
    return result


def our_trajectory(optimizer, rounds=ROUNDS):
    params = start()
    state = optimizer.init(params)
    for server_round in range(1, rounds + 1):
        replies = [local_training(params, server_round, client) for client in range(3)]
        state, params = optimizer.apply(state, params, our_mean(replies), server_round)
        yield params


def arrays_of(params):
    return ArrayRecord({name: Array(values) for name, values in params.items()})


def reply(params, client):
    content = RecordDict(
        {"arrays": arrays_of(params), "metrics": MetricRecord({"num-examples": examples(client)})}
    )
    metadata = Metadata(
        run_id=1,
        message_id="",
        src_node_id=client,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1.0,
        message_type="train",
    )
    return Message(content=content, metadata=metadata)


def flower_trajectory(strategy, rounds=ROUNDS):
    """Drive Flower's own class; `current_arrays` is what its `configure_train` would set."""
    params = start()
    for server_round in range(1, rounds + 1):
        keeps_record = isinstance(strategy, flower.FedAvgM)
        strategy.current_arrays = arrays_of(params) if keeps_record else params
        replies = [
            reply(local_training(params, server_round, client), client) for client in range(3)
        ]
        record, _ = strategy.aggregate_train(server_round, replies)
        params = {name: array.numpy().astype(np.float32) for name, array in record.items()}
        yield params


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FedAvg(), flower.FedAvg()),
        (FedAvgM(), flower.FedAvgM(server_learning_rate=1.0, server_momentum=0.9)),
        (FedAvgM(0.5, 0.3), flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.3)),
        (FedAvgM(0.5, 0.0), flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.0)),
        (FedAdam(), flower.FedAdam()),
        (FedAdam(0.02, 0.5, 0.9, 0.01), flower.FedAdam(eta=0.02, beta_1=0.5, beta_2=0.9, tau=0.01)),
        (FedYogi(), flower.FedYogi()),
        (FedYogi(0.05, 0.5, 0.6, 0.01), flower.FedYogi(eta=0.05, beta_1=0.5, beta_2=0.6, tau=0.01)),
        (FedAdagrad(), flower.FedAdagrad()),
        (FedAdagrad(0.03, 0.02), flower.FedAdagrad(eta=0.03, tau=0.02)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_trajectory_is_flowers(ours, theirs):
    before = start()
    for params, oracle in zip(our_trajectory(ours), flower_trajectory(theirs), strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(params[name], oracle[name], rtol=0, atol=1e-6)
            assert np.abs(params[name] - before[name]).max() > 1e-4  # both move
        before = params


def test_defaults_are_flowers_but_for_momentum():
    for ours, theirs in [(FedAdam(), flower.FedAdam()), (FedYogi(), flower.FedYogi())]:
        assert (ours.learning_rate, ours.beta_1, ours.beta_2, ours.tau) == (
            theirs.eta,
            theirs.beta_1,
            theirs.beta_2,
            theirs.tau,
        )
    theirs = flower.FedAdagrad()
    assert (FedAdagrad().learning_rate, FedAdagrad().tau) == (theirs.eta, theirs.tau)
    assert FedAvgM().momentum == 0.9


@pytest.mark.parametrize(
    ("optimizer", "nesterov"), [(DiLoCo(), True), (DiLoCo(0.4, 0.5), True), (FedAvgM(), False)]
)
def test_momentum_is_torchs_sgd_on_the_pseudo_gradient(optimizer, nesterov):
    params = {name: torch.from_numpy(values.copy()).double() for name, values in start().items()}
    sgd = torch.optim.SGD(
        params.values(), lr=optimizer.learning_rate, momentum=optimizer.momentum, nesterov=nesterov
    )
    for server_round, ours in enumerate(our_trajectory(optimizer), start=1):
        sent = {name: values.float().numpy() for name, values in params.items()}
        mean = our_mean([local_training(sent, server_round, client) for client in range(3)])
        for name, values in params.items():
            values.grad = values - torch.from_numpy(mean[name]).double()
        sgd.step()
        for name, values in params.items():
            np.testing.assert_allclose(ours[name], values.numpy(), rtol=0, atol=1e-6)


def test_diloco_defaults_are_the_papers():
    assert (DiLoCo().learning_rate, DiLoCo().momentum) == (0.7, 0.9)


def test_one_diloco_step_by_hand():
    optimizer = DiLoCo(learning_rate=0.5, momentum=0.5)
    current = {"x": np.array([1, 2], np.float32)}
    state, first = optimizer.apply(
        optimizer.init(current), current, {"x": np.array([0, 2], np.float32)}, 1
    )
    assert first["x"].tolist() == [0.25, 2]  # 1 - 0.5 * (1 + 0.5 * 1)
    assert state.moments["momentum"]["x"].tolist() == [1, 0]
    assert current["x"].tolist() == [1, 2]


@given(hnp.arrays(np.float32, 3, elements=st.floats(-1e6, 1e6, width=32)))
@settings(deadline=None)
def test_fedavg_and_fedavgm_without_momentum_return_the_mean(mean):
    current = {"x": np.array([0.1, -0.2, 3e4], np.float32)}
    for optimizer in (FedAvg(), FedAvgM(learning_rate=1.0, momentum=0.0)):
        _, params = optimizer.apply(optimizer.init(current), current, {"x": mean}, 1)
        np.testing.assert_allclose(params["x"], mean, rtol=1e-7, atol=1e-11)
    _, params = FedAvg().apply(FedAvg().init(current), current, {"x": mean}, 1)
    np.testing.assert_array_equal(params["x"], mean)


@every_optimizer
def test_nothing_moves_when_the_clients_did_not(name):
    optimizer = SERVER_OPTIMIZERS[name]()
    params = start()
    _, after = optimizer.apply(optimizer.init(params), params, params, 1)
    for key, values in params.items():
        np.testing.assert_array_equal(after[key], values)


@every_optimizer
def test_a_state_read_back_from_arrays_goes_on_with_the_same_bits(name, tmp_path):
    optimizer = SERVER_OPTIMIZERS[name]()
    params = start()
    state = optimizer.init(params)
    for server_round in (1, 2, 3):
        mean = our_mean([local_training(params, server_round, client) for client in range(3)])
        state, params = optimizer.apply(state, params, mean, server_round)
        assert all(values.dtype == np.float32 for values in params.values())
    np.savez(tmp_path / "state.npz", **state.arrays())
    with np.load(tmp_path / "state.npz") as file:
        restored = State.from_arrays(dict(file))
    assert restored.server_round == 3
    assert {v.dtype for held in restored.moments.values() for v in held.values()} <= {
        np.dtype(np.float32)
    }
    mean = our_mean([local_training(params, 4, client) for client in range(3)])
    kept, expected = optimizer.apply(state, params, mean, 4)
    resumed, got = optimizer.apply(restored, params, mean, 4)
    for key, values in expected.items():
        np.testing.assert_array_equal(got[key], values)
    for key, values in kept.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[key], values)


@every_optimizer
def test_a_step_changes_none_of_its_arguments(name):
    optimizer = SERVER_OPTIMIZERS[name]()
    params = start()
    mean = start(seed=1)
    state, _ = optimizer.apply(optimizer.init(params), params, mean, 1)
    before = {key: values.copy() for key, values in state.arrays().items()}
    optimizer.apply(state, params, mean, 2)
    for key, values in state.arrays().items():
        np.testing.assert_array_equal(values, before[key])
    for key, values in start().items():
        np.testing.assert_array_equal(params[key], values)
    for key, values in start(seed=1).items():
        np.testing.assert_array_equal(mean[key], values)


@every_optimizer
def test_a_round_is_applied_once(name):
    optimizer = SERVER_OPTIMIZERS[name]()
    params = start()
    state, params = optimizer.apply(optimizer.init(params), params, params, 3)
    with pytest.raises(ValueError, match="expected a round after 3, got 3"):
        optimizer.apply(state, params, params, 3)


@every_optimizer
def test_names_and_shapes_must_agree(name):
    optimizer = SERVER_OPTIMIZERS[name]()
    params = start()
    state = optimizer.init(params)
    with pytest.raises(
        ShapeError, match=r"mean of clients: expected arrays .*'lora_a', 'lora_b'.* got .*'lora_a'"
    ):
        optimizer.apply(state, params, {"lora_a": params["lora_a"]}, 1)
    with pytest.raises(
        ShapeError, match=r"mean of clients, lora_b: expected \(5, 4\), got \(1, 4\)"
    ):
        optimizer.apply(state, params, params | {"lora_b": params["lora_b"][:1]}, 1)


def test_a_state_of_another_optimizer_is_refused():
    params = start()
    with pytest.raises(ShapeError, match="state first_moment: expected arrays"):
        FedAdam().apply(FedAvgM().init(params), params, params, 1)


def test_arrays_that_are_no_state_are_refused():
    with pytest.raises(WireError, match="expected server_round, got none"):
        State.from_arrays({"momentum/x": np.zeros(1)})
    with pytest.raises(WireError, match="expected <moment>/<parameter>, got 'momentum'"):
        State.from_arrays({"server_round": np.array(1), "momentum": np.zeros(1)})


def test_parameter_names_may_hold_slashes():
    optimizer = FedAvgM()
    state = optimizer.init({"layer/0": np.zeros(2, np.float32)})
    assert State.from_arrays(state.arrays()).moments["momentum"].keys() == {"layer/0"}


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (
            "fedavgm",
            {"learning_rate": 0.0},
            "FedAvgM: learning_rate: expected a finite number > 0, got 0.0",
        ),
        ("fedavgm", {"momentum": 1.0}, "FedAvgM: momentum: expected 0 <= value < 1, got 1.0"),
        ("diloco", {"momentum": -0.1}, "DiLoCo: momentum: expected 0 <= value < 1, got -0.1"),
        (
            "diloco",
            {"learning_rate": float("inf")},
            "DiLoCo: learning_rate: expected a finite number",
        ),
        ("fedadam", {"beta_1": 1.5}, "FedAdam: beta_1: expected 0 <= value < 1, got 1.5"),
        ("fedadam", {"tau": 0.0}, "FedAdam: tau: expected a finite number > 0, got 0.0"),
        ("fedyogi", {"beta_2": float("nan")}, "FedYogi: beta_2: expected 0 <= value < 1, got nan"),
        ("fedadagrad", {"tau": -1.0}, "FedAdagrad: tau: expected a finite number > 0"),
    ],
)
def test_options_outside_their_ranges_are_refused(optimizer, options, message):
    with pytest.raises(ConfigError, match=message):
        SERVER_OPTIMIZERS[optimizer](**options)
