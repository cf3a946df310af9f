"""The account of what prompts give away; that runs record it is in test_fedresprompt_wire."""

import math

import pytest

from fedllm_flwr.errors import WireError
from fedllm_flwr.privacy import single_release_epsilon
from fedllm_flwr.settings.adaptation import ClientConfig
from fedllm_flwr.settings.methods import FedResPromptConfig
from strategies.exchange import ClientReply
from strategies.leaks import DELTA, Leaks

STEPS = ClientConfig(batch_size=4, local_epochs=0, local_steps=5)


def account(noise: float = 2.0, client: ClientConfig = STEPS) -> Leaks:
    method = FedResPromptConfig(name="fedresprompt", clip_norm=1.0, noise_multiplier=noise)
    return Leaks(method, client)


def done(examples: int, client: int = 0) -> ClientReply:
    return ClientReply(client, {"num-examples": examples}, {})


def releases(leaks: Leaks) -> int:
    """From ε back to the number of releases, which it rises with."""
    found = leaks.figures()["prompt_epsilon"]
    return next(n for n in range(1, 99) if single_release_epsilon(2.0, n, DELTA) >= found)


@pytest.mark.parametrize(("examples", "sends"), [(3, 5), (4, 5), (5, 3), (8, 3), (12, 2), (99, 1)])
def test_a_row_is_sent_once_an_epoch(examples: int, sends: int) -> None:
    """Five steps of four rows; the last step of an epoch is what is left of it."""
    leaks = account()
    leaks.trained(done(examples))
    assert releases(leaks) == sends


def test_epochs_and_rounds_add_up_and_the_client_with_most_counts() -> None:
    leaks = account(client=ClientConfig(local_epochs=2))
    for _ in range(3):
        leaks.trained(done(10))
    leaks.trained(done(10, client=1))
    assert releases(leaks) == 6
    again = account(client=ClientConfig(local_epochs=2))
    again.restore(leaks.state())
    assert again.figures() == leaks.figures()
    again.trained(done(10))
    assert releases(again) == 8


@pytest.mark.parametrize(
    "reply", [ClientReply(0, {}, {}, "lost"), ClientReply(0, {"num-examples": "x"}, {})]
)
def test_a_client_that_failed_counts_with_all_that_it_may_have_sent(reply: ClientReply) -> None:
    leaks = account()
    leaks.trained(reply)
    assert releases(leaks) == 5


def test_held_out_rows_are_sent_once_an_evaluation() -> None:
    leaks = account()
    for _ in range(4):
        leaks.begin_evaluation()
    leaks.trained(done(99))
    assert releases(leaks) == 4


def test_without_noise_there_is_no_epsilon() -> None:
    leaks = account(noise=0.0)
    leaks.trained(done(10))
    assert leaks.figures() == {}


def test_figures_are_means_over_the_clients_that_say_them() -> None:
    leaks = account(noise=0.0)
    leaks.begin_evaluation()
    leaks.heard(ClientReply(1, {"energy-share": 0.25, "reconstruction-r2": 0.5}, {}))
    leaks.heard(ClientReply(0, {"energy-share": 0.75}, {}))
    leaks.heard(ClientReply(2, {}, {}))
    assert leaks.figures() == {"state_energy_share": 0.5, "reconstruction_r2": 0.5}
    assert leaks.lines(3) == [
        {"kind": "leak", "round": 3, "partition_id": 0, "state_energy_share": 0.75},
        {"kind": "leak", "round": 3, "partition_id": 1, "state_energy_share": 0.25, "reconstruction_r2": 0.5},
    ]  # fmt: skip
    leaks.begin_evaluation()
    assert leaks.figures() == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, "much", None])
def test_what_is_no_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(WireError, match="client 4: energy-share: expected a finite number"):
        account().heard(ClientReply(4, {"energy-share": value}, {}))
