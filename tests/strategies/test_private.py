import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr import records
from fedllm_flwr.errors import WireError
from strategies.exchange import ClientReply
from strategies.private import privacy_notes
from strategies.sampling import draw_poisson_cohort

Fixture = Callable[..., Any]
ONE = ("num_rounds=1", "strategy.weighting=uniform")
CENTRAL = (*ONE, "method.sharing=b_only", "privacy=central")
SILENT = (*CENTRAL, "privacy.noise_multiplier=0")
SEEDED = (*CENTRAL, "privacy.reproducible_noise=true")


def bodies(played: Any, kind: str) -> list[dict[str, Any]]:
    """What training messages say, without the facts that name the run."""
    found = [records.read_body(m) for m in played.grid.sent if m.metadata.message_type == kind]
    return [
        {k: v for k, v in b.items() if k not in ("config", "fingerprint", "run")} for b in found
    ]


def uplink(played: Any) -> dict[str, np.ndarray]:
    """Every client's values as they crossed the wire, by client and part, in the order of clients."""
    replies = [r for r in played.grid.replies if r.metadata.message_type == records.TRAIN]
    found = {n: v for r in replies for n, v in records.read(r, records.ANSWER)[1].items()}
    return dict(sorted(found.items()))


def downlink(played: Any) -> np.ndarray:
    """What the clients of the first round started from."""
    sent = next(m for m in played.grid.sent if m.metadata.message_type == records.TRAIN)
    return records.read(sent, records.INSTRUCTION)[1]["adapter"]


def held(played: Any) -> np.ndarray:
    """The side that the server holds and clients train."""
    return played.strategy.broadcast(9, train=True)[1]["adapter"]


@pytest.fixture(scope="module")
def silent(micro: Fixture, play: Fixture) -> Any:
    """One round without noise whose clip norm is below some updates and above others."""
    return play(micro(*SILENT, "privacy.clip_norm=0.855"))


@pytest.mark.parametrize(
    "method",
    [
        ("method.sharing=b_only",),
        ("method.sharing=both", "wire=flasc"),
        ("method=fedprompt", "wire=int8"),
    ],
)
def test_without_noise_and_bound_it_is_the_plain_mean_bit_for_bit(
    method: tuple[str, ...], micro: Fixture, play: Fixture
) -> None:
    plain = play(micro(*ONE, *method))
    free = play(micro(*ONE, *method, "privacy=central", "privacy.noise_multiplier=0",
                      "privacy.clip_norm=1e30"))  # fmt: skip
    assert free.sha == plain.sha
    assert bodies(free, records.TRAIN) == bodies(plain, records.TRAIN)
    ours, theirs = uplink(free), uplink(plain)
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_clients_see_nothing_of_it_and_the_server_holds_the_clipped_mean(silent: Any) -> None:
    start, clip_norm = downlink(silent).astype(np.float64), 0.855
    updates = [values - start for values in uplink(silent).values()]
    norms = [float(np.linalg.norm(update)) for update in updates]
    assert min(norms) < clip_norm < max(norms), f"a clip norm that cuts some: {norms}"
    clipped = [
        update * min(1, clip_norm / norm) for update, norm in zip(updates, norms, strict=True)
    ]
    np.testing.assert_allclose(held(silent), start + sum(clipped) / 4, rtol=0, atol=1e-7)
    clients = silent.run.records("client")
    assert [c["update_norm"] for c in clients] == pytest.approx(norms)
    assert [c["is_clipped"] for c in clients] == [norm > clip_norm for norm in norms]


def test_a_client_that_fails_counts_as_no_update(
    silent: Any, micro: Fixture, play: Fixture, edge_grid: Fixture, spoil: Fixture
) -> None:
    def failing(asked: Any, infos: list[dict[str, Any]], parts: dict[str, np.ndarray]) -> None:
        for info in infos:
            if info["partition-id"] == 1:
                info["error"] = "no power"

    grid = edge_grid(2, spoil(failing))
    found = play(micro(*SILENT, "privacy.clip_norm=0.855"), grid=grid)
    start = downlink(silent).astype(np.float64)
    update = uplink(silent)["1/adapter"] - start
    missing = update * min(1, 0.855 / float(np.linalg.norm(update)))
    np.testing.assert_allclose(held(found), held(silent) - missing / 4, rtol=0, atol=1e-7)


def test_a_client_that_is_asked_again_counts_once(
    silent: Any, micro: Fixture, play: Fixture, edge_grid: Fixture
) -> None:
    lost: list[Any] = []

    def lose_first(asked: list[Any], replies: list[Any]) -> list[Any]:
        if asked[0].metadata.message_type == records.TRAIN and not lost:
            lost.append(replies[0])
            return replies[1:]
        return replies

    config = micro(
        *SILENT, "privacy.clip_norm=0.855", "strategy.max_retries=1", "strategy.min_fraction=1"
    )
    found = play(config, grid=edge_grid(2, lose_first))
    assert lost
    assert found.sha == silent.sha
    strategy = found.strategy
    reply = ClientReply(1, {}, {})
    with pytest.raises(WireError, match="client 1: expected one update in round 1, got another"):
        strategy.privacy.add(strategy, reply, 1)


def test_noise_has_the_deviation_of_the_sum_over_the_cohort(
    silent: Any, micro: Fixture, play: Fixture
) -> None:
    noised = play(micro(*SEEDED, "privacy.clip_norm=0.855", "privacy.noise_multiplier=2"))
    noise = held(noised).astype(np.float64) - held(silent)
    expected = 2 * 0.855 / 4
    assert noise.std() == pytest.approx(expected, rel=4 / math.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 4 * expected / math.sqrt(noise.size)


def test_noise_is_fresh_unless_it_is_asked_to_repeat_itself(micro: Fixture, play: Fixture) -> None:
    seeded = micro(*SEEDED, "privacy.noise_multiplier=2")
    assert play(seeded).sha == play(seeded).sha
    fresh = micro(*CENTRAL, "privacy.noise_multiplier=2")
    assert play(fresh).sha != play(fresh).sha


def test_the_clip_norm_follows_the_quantile_and_is_kept(micro: Fixture, play: Fixture) -> None:
    config = micro(*SILENT, "num_rounds=2", "privacy.clip_norm=0.855", "privacy.clip_quantile=0.25",
                   "privacy.clip_learning_rate=0.4")  # fmt: skip
    found = play(config)
    norms = [r["clip_norm"] for r in found.run.records("privacy")]
    for server_round in (1, 2):
        below = np.mean([c["update_norm"] <= norms[server_round - 1]
                         for c in found.run.records("client") if c["round"] == server_round])  # fmt: skip
        norms.append(norms[server_round - 1] * math.exp(-0.4 * (below - 0.25)))
    assert norms[0] == 0.855
    assert norms[1] == pytest.approx(norms[2])
    kept = found.strategy.snapshot(2).state["privacy"]
    assert kept == {"clip_norm": pytest.approx(norms[3])}


def test_coins_draw_the_cohort_and_an_empty_one_is_a_round_of_nothing_but_noise(
    micro: Fixture, play: Fixture
) -> None:
    seed = next(s for s in range(99) if not draw_poisson_cohort(s, 1, range(4), 0.5)
                and draw_poisson_cohort(s, 2, range(4), 0.5))  # fmt: skip
    overrides = (*SILENT, f"seed={seed}", "num_rounds=2", "strategy.cohort_fraction=0.5")
    found = play(micro(*overrides, "privacy.clip_norm=10"))
    _, first, second = found.run.records("round")
    assert first["cohort"] == []
    assert "train_loss" not in first
    assert first["num_examples"] == 0
    assert second["cohort"] == draw_poisson_cohort(seed, 2, range(4), 0.5)
    assert math.isfinite(second["train_loss"])
    values = uplink(found)
    base = downlink(found).astype(np.float64)
    assert not base.any(), "B is 0 at first, and a round of nothing leaves it"
    whole = sum(v.astype(np.float64) for v in values.values()) / 2  # two of four are expected
    np.testing.assert_allclose(held(found), whole, rtol=0, atol=1e-7)


def test_local_noise_is_on_what_leaves_a_client(micro: Fixture, play: Fixture) -> None:
    plain = play(micro(*ONE, "method=fedprompt"))
    free = play(micro(*ONE, "method=fedprompt", "privacy=local", "privacy.noise_multiplier=0",
                      "privacy.clip_norm=1e30"))  # fmt: skip
    assert free.sha == plain.sha
    noised = play(micro(*ONE, "method=fedprompt", "privacy=local", "privacy.noise_multiplier=0.5",
                        "privacy.clip_norm=100"))  # fmt: skip
    ours, theirs = uplink(noised), uplink(plain)
    noise = np.concatenate([ours[name] - theirs[name] for name in theirs])
    assert noise.std() == pytest.approx(50, rel=4 / math.sqrt(2 * noise.size))
    [record] = noised.run.records("privacy")
    assert record["clients"] == [0, 1, 2, 3]
    assert (record["mechanism"], record["neighbours"]) == ("local", "replaced")


def test_what_is_allowed_and_unwise_is_said(micro: Fixture) -> None:
    assert privacy_notes(micro()) == []
    assert privacy_notes(micro(*SILENT)) == []
    assert privacy_notes(micro(*CENTRAL)) == []
    [line] = privacy_notes(micro(*CENTRAL, "privacy.delta=0.25"))
    assert line.startswith("privacy.delta=0.25 and partition.num_clients=4: ")
    [line] = privacy_notes(micro(*ONE, "privacy=central"))
    assert line.startswith(
        "method.sharing=both and privacy=central: noise on A and on B is multiplied"
    )
    assert "can subtract the noise" in privacy_notes(micro(*SEEDED))[0]
    assert "without noise" in privacy_notes(micro(*ONE, "method=fedprompt", "privacy=local"))[0]


def test_sample_privacy_says_what_is_not_covered(micro: Fixture) -> None:
    rows = ("privacy=sample", "client.clip_norm=0")
    [line] = privacy_notes(micro(*rows, "method.sharing=b_only"))
    assert line.startswith("privacy=sample: ε is of single rows in what clients send for training")
    _, both, alone = privacy_notes(micro(*rows, "baselines.local_only=true"))
    assert both.startswith("method.sharing=both and privacy=sample: noise on A and on B")
    assert alone.startswith(
        "baselines.local_only, baselines.centralised and privacy=sample: these train"
    )
