import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.grass.galore import GaloreSettings
from fedllm_flwr.grass.optimizer import GrassSettings
from fedllm_flwr.grass.rows import RowUpdate
from fedllm_flwr.grass.selection import Rows
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import plan_steps
from fedllm_flwr.training.full import FullJob, FullSettings, row_norms, train_full
from fedllm_flwr.training.settings import LocalSettings

MakeRow = Callable[..., Encoded]
Distance = Callable[[np.ndarray, np.ndarray], float]
TARGETS = ("q_proj", "k_proj", "down_proj")
FIRST = "model.layers.0.self_attn.q_proj"
SGD = LocalSettings(batch_size=3, local_epochs=2, optimizer="sgd", learning_rate=0.05)
ADAMW = LocalSettings(batch_size=3, local_epochs=2, learning_rate=2e-3, weight_decay=0.01)
SOME = GrassSettings(rank=5, rule="norm_nr", refresh_interval=2)
METHODS = {
    "grass": SOME,
    "grass_in": replace(SOME, side="in", rule="norm2_r"),
    "galore": GaloreSettings(rank=4, refresh_interval=2),
    "dense": None,
}


@pytest.fixture(params=list(METHODS))
def settings(request: pytest.FixtureRequest) -> FullSettings:
    return FullSettings(local=ADAMW, projection=METHODS[request.param])


@pytest.fixture
def job(make_row: MakeRow) -> FullJob:
    """Seven rows of different lengths."""
    rows = [make_row(i, 4 + i, prompt=2) for i in range(7)]
    return FullJob(3, rows, TARGETS, seed=11)


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in backbone.model.state_dict().items()}


def dense_loss(
    model: torch.nn.Module, rows: Sequence[Encoded], head: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Mean loss over the rows' targets, row by row through full logits."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0][list(row.predict_from)]
        logits = logits if head is None else logits[:, list(head)]
        targets = torch.from_numpy(row.targets.astype(np.int64))
        total = total + cross_entropy(logits, targets, reduction="sum")
    return total / sum(len(row.targets) for row in rows)


def by_torch(backbone: Backbone, job: FullJob, local: LocalSettings) -> dict[str, np.ndarray]:
    """New minus start weights by torch's own optimizer on a copy of the model."""
    model = copy.deepcopy(backbone.model)
    layers = {
        name: model.get_submodule(name) for name in backbone.target_layers(job.target_modules)
    }
    parameters = [layer.weight.requires_grad_() for layer in layers.values()]
    start = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    rate, decay = local.learning_rate, local.weight_decay
    optimizer = (
        torch.optim.SGD(parameters, rate, momentum=local.momentum, weight_decay=decay)
        if local.optimizer == "sgd"
        else torch.optim.AdamW(parameters, rate, weight_decay=decay)
    )
    for step in plan_steps(len(job.rows), local, job.seed):
        optimizer.zero_grad()
        dense_loss(model, [job.rows[i] for i in np.concatenate(step)]).backward()
        optimizer.step()
    return {name: (layers[name].weight.detach() - start[name]).numpy() for name in layers}


@pytest.mark.parametrize(
    ("local", "tolerance"),
    [
        (replace(SGD, momentum=0.9, weight_decay=0.1), 1e-4),
        (ADAMW, 2e-3),  # Adam turns rounding into steps where a gradient is near 0
        (replace(SGD, batch_size=2, gradient_accumulation=3), 1e-4),
    ],
)
@pytest.mark.parametrize("projection", ["dense", "all rows"])
def test_dense_and_all_rows_are_torchs_own_optimizer(
    backbone: Backbone,
    job: FullJob,
    distance: Distance,
    local: LocalSettings,
    tolerance: float,
    projection: str,
) -> None:
    # q_proj and down_proj have 64 rows
    grass = GrassSettings(rank=64, rule="top_r", refresh_interval=100)
    chosen = replace(job, target_modules=("q_proj", "down_proj"))
    settings = FullSettings(local=local, projection=grass if projection == "all rows" else None)
    result = train_full(backbone, chosen, settings)
    assert result.error == ""
    wanted = by_torch(backbone, chosen, local)
    assert list(result.updates) == list(wanted)
    for name, update in result.updates.items():
        assert distance(update.values, wanted[name]) < tolerance
    assert result.first_loss == pytest.approx(float(_first_loss(backbone, chosen, local)), rel=1e-5)
    assert result.steps == sum(1 for _ in plan_steps(7, local, job.seed))
    assert result.tokens == 2 * sum(len(row.input_ids) for row in job.rows)
    assert result.num_examples == 7


def _first_loss(backbone: Backbone, job: FullJob, local: LocalSettings) -> torch.Tensor:
    step = next(iter(plan_steps(len(job.rows), local, job.seed)))
    with torch.no_grad():
        return dense_loss(backbone.model, [job.rows[i] for i in np.concatenate(step)])


def test_the_backbone_is_untouched_and_twice_gives_the_same_bits(
    backbone: Backbone, job: FullJob, settings: FullSettings
) -> None:
    before = weights(backbone)
    state = torch.random.get_rng_state()
    first, second = (train_full(backbone, job, settings) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in weights(backbone).items())
    backbone.check_plain(backbone.linear_layers)
    assert first.error == second.error == ""
    for name, update in first.updates.items():
        assert np.array_equal(update.indices, second.updates[name].indices)
        assert np.array_equal(update.values, second.updates[name].values)
        assert np.abs(update.values).max() > 1e-4


def test_grass_changes_as_many_rows_as_it_chose(backbone: Backbone, job: FullJob) -> None:
    for interval, most in ((100, 5), (2, 15)):  # 6 steps: chosen once, or three times
        projection = replace(SOME, refresh_interval=interval)
        result = train_full(backbone, job, FullSettings(local=ADAMW, projection=projection))
        assert result.steps == 6
        for update in result.updates.values():
            assert 5 <= len(update.indices) <= most
            assert (np.abs(update.values).max(1) > 0).all()
        assert max(len(update.indices) for update in result.updates.values()) > 5 or most == 5


def test_checkpoints_and_other_paths_give_the_same(
    backbone: Backbone, job: FullJob, distance: Distance
) -> None:
    settings = FullSettings(local=SGD, projection=SOME)
    plain = train_full(backbone, job, settings)
    other = replace(backbone, kernels=replace(backbone.kernels, attention="sdpa"))
    by_autograd = train_full(other, job, settings)
    saving = train_full(other, job, replace(settings, checkpointing=True))
    assert plain.error == by_autograd.error == saving.error == ""
    assert saving.loss == by_autograd.loss == pytest.approx(plain.loss, rel=1e-6)
    for name, update in by_autograd.updates.items():
        assert np.array_equal(update.values, saving.updates[name].values)
        assert np.array_equal(update.indices, plain.updates[name].indices)
        assert distance(update.values, plain.updates[name].values) < 1e-4


def test_a_run_goes_on_where_the_last_one_ended(
    backbone: Backbone, job: FullJob, settings: FullSettings, distance: Distance
) -> None:
    """Two calls of one step each under SGD are one call of two steps."""
    one = replace(SGD, batch_size=7, local_steps=1)
    projection = settings.projection
    if isinstance(projection, GrassSettings):
        projection = replace(projection, rule="top_r", refresh_interval=1)
    if isinstance(projection, GaloreSettings):
        projection = replace(projection, refresh_interval=1)
    settings = replace(settings, local=one, projection=projection)
    first = train_full(backbone, job, settings)
    second = train_full(backbone, replace(job, start=first.updates), settings)
    both = train_full(backbone, job, replace(settings, local=replace(one, local_steps=2)))
    assert first.error == second.error == both.error == ""
    assert second.first_loss < first.first_loss
    for name, update in both.updates.items():
        total = first.updates[name].plus(second.updates[name])
        assert np.array_equal(total.indices, update.indices)
        assert distance(total.values, update.values) < 1e-3  # start values are rounded once more


def test_the_mean_of_shared_rows_is_the_central_step(
    backbone: Backbone, make_row: MakeRow, distance: Distance
) -> None:
    """Clients with rows from the server: one SGD step each, averaged, is the step on all rows."""
    rows = [make_row(i, 6, prompt=2) for i in range(8)]  # equally many targets each
    norms = row_norms(backbone, rows, TARGETS)
    chosen = {
        name: Rows(np.sort(np.argsort(-values)[:5]), np.ones(5, dtype=np.float32))
        for name, values in norms.items()
    }
    local = replace(SGD, batch_size=4, local_epochs=1, learning_rate=0.5)
    settings = FullSettings(local=local, projection=SOME)
    parts = (rows[:4], rows[4:])
    jobs = [FullJob(k, part, TARGETS, seed=k, shared_rows=chosen) for k, part in enumerate(parts)]
    results = [train_full(backbone, job, settings) for job in jobs]
    central = train_full(
        backbone,
        FullJob(9, rows, TARGETS, seed=9, shared_rows=chosen),
        replace(settings, local=replace(local, batch_size=8)),
    )
    assert [result.steps for result in (*results, central)] == [1, 1, 1]
    for name, update in central.updates.items():
        mean = sum(result.updates[name].values for result in results) / 2
        assert np.array_equal(update.indices, chosen[name].indices)
        assert distance(mean, update.values) < 1e-5
        assert np.abs(mean - update.values).max() < 1e-6


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("head", [None, (7, 3, 11)])
def test_row_norms_are_those_of_the_dense_gradient(
    backbone: Backbone, make_row: MakeRow, side: str, head: tuple[int, ...] | None
) -> None:
    rows = [make_row(i, 5 + i, prompt=2, labels=head is not None) for i in range(4)]
    model = copy.deepcopy(backbone.model)
    layers = {name: model.get_submodule(name) for name in backbone.target_layers(TARGETS)}
    change = RowUpdate(np.array([2]), np.full((1, 64), 0.4, np.float32))
    for layer in layers.values():
        layer.weight.requires_grad_()
    with torch.no_grad():
        weight = layers[FIRST].weight
        (weight if side == "out" else weight.t())[2] += 0.4
    dense_loss(model, rows, head).backward()
    found = row_norms(
        backbone, rows, TARGETS, side=side, start={FIRST: change}, head_token_ids=head
    )
    for name, layer in layers.items():
        wanted = layer.weight.grad.square().sum(1 if side == "out" else 0).numpy()
        assert found[name] == pytest.approx(wanted, rel=1e-4, abs=1e-6 * float(wanted.max()))
    passed = row_norms(backbone, rows, TARGETS, rule="frozen_pass")
    assert set(passed) == set(found)
    assert all((values > 0).any() for values in passed.values())


def test_a_narrow_backbone_trains(make_row: MakeRow) -> None:
    narrow = load(ModelRef(name="tiny"), dtype="bfloat16", device="cpu")
    rows = [make_row(i, 8, prompt=2) for i in range(4)]
    job = FullJob(0, rows, TARGETS, seed=1)
    local = LocalSettings(batch_size=4, local_steps=12, learning_rate=2e-3)
    result = train_full(
        narrow,
        job,
        FullSettings(local=local, projection=replace(SOME, rank=16, refresh_interval=50)),
    )
    again = train_full(
        narrow, replace(job, start=result.updates), FullSettings(local=local, projection=SOME)
    )
    assert result.error == again.error == ""
    assert again.first_loss < result.first_loss - 0.1


def test_what_cannot_be_trained_is_reported(
    backbone: Backbone, job: FullJob, make_row: MakeRow
) -> None:
    settings = FullSettings(local=ADAMW, projection=SOME)
    bare = replace(
        make_row(0, 4), targets=np.zeros(0, np.int32), predict_from=np.zeros(0, np.int32)
    )
    update = RowUpdate(np.array([1]), np.ones((1, 64), np.float32))
    wild = RowUpdate(np.arange(64), np.full((64, 64), np.nan, np.float32))
    rows = Rows(np.array([1]), np.ones(1, dtype=np.float32))
    shared = dict.fromkeys(backbone.target_layers(TARGETS), rows)
    large = FullSettings(local=ADAMW, projection=replace(SOME, rank=33))
    for bad, how, message in (
        (replace(job, rows=[bare]), settings, "expected rows with label tokens, got none in 1"),
        (replace(job, target_modules=("z",)), settings, "target module 'z' is no linear layer"),
        (job, large, "rank from 1 to its 32 rows, got 33"),
        (replace(job, start={"model.layers.0.mlp.up_proj": update}), settings, "only layers that are trained"),
        (replace(job, start={FIRST: wild}), settings, "loss is nan at step 1"),
        (replace(job, shared_rows={FIRST: rows}), settings, "of every trained layer, got no model"),
        (replace(job, shared_rows=shared), replace(settings, projection=None), "picks no rows"),
    ):  # fmt: skip
        result = train_full(backbone, bad, how)
        assert result.error.startswith("client 3: ")
        assert message in result.error
        assert (result.steps, result.updates, result.num_examples) == (0, {}, 0)
        backbone.check_plain(backbone.linear_layers)
    good = train_full(backbone, replace(job, shared_rows=shared), settings)
    assert {tuple(update.indices) for update in good.updates.values()} == {(1,)}


def test_weights_that_the_last_step_spoiled_are_reported(backbone: Backbone, job: FullJob) -> None:
    wild = replace(SGD, local_steps=1, learning_rate=1e30, weight_decay=1e30)
    result = train_full(backbone, job, FullSettings(local=wild, projection=None))
    assert "weights are not finite after step 1" in result.error
    assert result.updates == {}


def test_matrices_draw_rows_of_their_own(backbone: Backbone, job: FullJob) -> None:
    settings = FullSettings(local=SGD, projection=replace(SOME, rule="uniform_nr"))
    result = train_full(backbone, replace(job, target_modules=("q_proj",)), settings)
    drawn = {tuple(update.indices) for update in result.updates.values()}
    assert len(drawn) == len(result.updates) > 1


def test_row_norms_refuse_what_they_cannot_measure(backbone: Backbone, make_row: MakeRow) -> None:
    with pytest.raises(ConfigError, match="a rule that reads norms, got uniform_r"):
        row_norms(backbone, [make_row(0, 4)], TARGETS, rule="uniform_r")
    with pytest.raises(ConfigError, match="expected rows with label tokens"):
        row_norms(backbone, [], TARGETS)
