"""Ways to take a client out of a model, each with the word for what it can promise.

`exact` is the same bytes as a training that the client never joined, `rounding` the same but for the rounding of
floats, `approximate` anything else. Nothing here knows how a client trains.

What "never joined" means for training in rounds: the draw of each round's cohort is the same, and the client, where it
is drawn, is passed over. A draw among fewer clients would change every cohort, also those before the client came.

Axes: d parameters.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import numpy as np

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.seeding import derive_seed
from fedllm_flwr.unlearning.ledger import Round, weighted_mean

Exactness = Literal["exact", "rounding", "approximate"]

METHODS: dict[str, Exactness] = {
    "exact_merge": "exact",
    "shards": "exact",
    "rewind": "exact",
    "retrain": "exact",
    "merge": "approximate",
    "replay": "approximate",
}
"""What each method promises. `exact_merge` is :class:`fedllm_flwr.unlearning.exact_merge.ExactSum`; `retrain` is what
the others are measured by."""


def exactness_of(method: str, *, num_rounds: int) -> Exactness:
    """What a method promises for a training of so many rounds.

    Returns:
        As in ``METHODS``, but `rounding` for `merge` after one round: then no client has seen another's update, and
        what is left when one is subtracted is what the others made.

    Raises:
        ConfigError: The method is unknown; lists those that are known.
    """
    if method not in METHODS:
        raise ConfigError(f"unlearning method: expected {', '.join(METHODS)}, got {method!r}")
    return "rounding" if method == "merge" and num_rounds == 1 else METHODS[method]


def check_request(
    client: int,
    *,
    known: Collection[int],
    participated: Collection[int],
    removed: Collection[int],
) -> None:
    """Refuse to remove a client that is not there to be removed.

    Args:
        client: Who asks to be forgotten.
        known: Clients of the run.
        participated: Those whose update was ever used, as :meth:`Ledger.participation` lists them.
        removed: Those that were removed before.

    Raises:
        ConfigError: The client is unknown, was removed already, or never took part.
    """
    if client not in known:
        raise ConfigError(
            f"unlearning: expected one of the run's {len(known)} clients, got client {client}"
        )
    if client in removed:
        raise ConfigError(
            f"unlearning: expected a client that is in the model, got client {client}, removed already"
        )
    if client not in participated:
        raise ConfigError(
            f"unlearning: expected a client that took part, got client {client}, whose update was never used"
        )


def merge(model: np.ndarray, rounds: Iterable[Round], client: int) -> np.ndarray:
    """Subtract a client's part from the sum of updates: M - (M_with - M_without), from the ledger.

    M_with - M_without is Σ over rounds of the mean with the client less the mean without, weights renormalised; a
    round with nobody else is taken out whole. That is what the others' updates add up to, *as they were made*: in the
    client's presence, and often against its pull. After several rounds the result is as a rule farther from the
    retrained model than the model that it began with.

    Args:
        model: M, the start plus the sum of the rounds' weighted means: it holds for federated averaging with a
            server step of 1, and for no server optimizer with moments. [d]
        rounds: All of them; each is read once.
        client: Whom to take out.

    Returns:
        float64 [d].

    Raises:
        ShapeError: An update is not of the model's size.

    Source:
        Task arithmetic by negation (Ilharco et al. 2023, arXiv 2212.04089), with the ledger's updates as task vectors.
        Liu et al. 2021 (FedEraser) say why it misses in several rounds.
    """
    result = model.astype(np.float64)
    for each in rounds:
        if all(other.client != client for other in each.contributions):
            continue
        rest = tuple(other for other in each.contributions if other.client != client)
        with_all, without = weighted_mean(each.contributions), weighted_mean(rest)
        assert with_all is not None  # noqa: S101  # the client itself is there
        if with_all.shape != result.shape:
            raise ShapeError(
                f"merge: round {each.server_round}: expected updates {list(result.shape)}, "
                f"got {list(with_all.shape)}"
            )
        result -= with_all if without is None else with_all - without
    return result


def rewind(touched: Collection[int], checkpoints: Collection[int]) -> int:
    """The newest state that a client has not touched.

    Going on from there is exact if training repeats itself to the bit and the state is whole: server optimizer,
    personal parts, draws.

    Args:
        touched: The rounds that the client was drawn for; at least one.
        checkpoints: Rounds after which the state was saved.

    Returns:
        The round after which it was saved; 0, the start, where none is older.
    """
    return max((saved for saved in checkpoints if saved < min(touched)), default=0)


def shard_of(client: int, num_shards: int, seed: int) -> int:
    """The shard of a client, in [0, num_shards): a draw of its own, that no other client's presence changes.

    Dealing clients out evenly would not do: with one client less the deal is another one, and the shards that are not
    trained again would be others than if the client had never come.

    Raises:
        ConfigError: There is not at least one shard.

    Source:
        Bourtoule et al. 2021, Machine unlearning (SISA), section IV, with clients in place of rows and without slices.
    """
    if num_shards < 1:
        raise ConfigError(f"shards: expected at least 1, got {num_shards}")
    return derive_seed(seed, "shard", client) % num_shards


def shards_of(clients: Iterable[int], num_shards: int, seed: int) -> dict[int, tuple[int, ...]]:
    """The clients of each shard that has any, both in rising order; a shard is federated by itself.

    Taking a client out means training anew the shard that :func:`shard_of` names, with the rest of its clients.

    Raises:
        ConfigError: There is not at least one shard.
    """
    found: dict[int, list[int]] = {}
    for client in sorted(set(clients)):
        found.setdefault(shard_of(client, num_shards, seed), []).append(client)
    return {shard: tuple(members) for shard, members in sorted(found.items())}


def shard_mean(models: Mapping[int, np.ndarray]) -> np.ndarray:
    """The model that is used: the plain mean of the shards' models.

    Args:
        models: Of each shard that has clients. [d]

    Returns:
        float64 [d], summed in the order of shards, so that the same models give the same bits.

    Raises:
        ConfigError: There is no shard.
        ShapeError: The models differ in shape.
    """
    if not models:
        raise ConfigError("shards: expected at least one model, got none")
    shapes = {model.shape for model in models.values()}
    if len(shapes) > 1:
        raise ShapeError(f"shards: expected models of one shape, got {sorted(shapes)}")
    total = np.zeros(shapes.pop())
    for shard in sorted(models):
        total += models[shard]
    return total / len(models)
