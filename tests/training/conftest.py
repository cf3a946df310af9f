"""A tiny float32 backbone, and clients with random rows and random (non-zero) adapters."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedllm_flwr.averaging import Delta, LowRank
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, attach, layer_shapes
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.local import ClientJob

VOCABULARY = 300
LABELS = (7, 3, 11)

MakeRow = Callable[..., Encoded]
MakeJob = Callable[..., ClientJob]
Gradient = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """The tiny model in float32."""
    return load(ModelRef(name="tiny"), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def spec() -> LoraSpec:
    """A small adapter whose scaling is not 1."""
    return LoraSpec(rank=3, alpha=6.0)


@pytest.fixture(scope="session")
def layout(backbone: Backbone, spec: LoraSpec) -> AdapterLayout:
    """Order of a flat adapter."""
    return AdapterLayout(layer_shapes(backbone.ref, spec.target_modules), spec.rank)


@pytest.fixture(scope="session")
def make_row() -> MakeRow:
    """Rows with random tokens: next-token targets behind a prompt, or one label."""

    def make(seed: int, length: int, *, prompt: int = 1, labels: bool = False) -> Encoded:
        ids = numpy_generator(seed, "row").integers(0, VOCABULARY, length + 1).astype(np.int32)
        label = seed % len(LABELS)
        positions = np.arange(length - 1 if labels else prompt - 1, length, dtype=np.int32)
        targets = np.array([label], dtype=np.int32) if labels else ids[prompt:]
        return Encoded(
            row_id=f"row{seed}",
            input_ids=ids[:length],
            predict_from=positions,
            targets=targets,
            label=label if labels else -1,
            characters=2 * len(targets),
        )

    return make


@pytest.fixture(scope="session")
def make_job(layout: AdapterLayout, spec: LoraSpec, make_row: MakeRow) -> MakeJob:
    """A client with rows of different lengths and an adapter whose both sides are random."""

    def make(
        client: int,
        *,
        num_rows: int = 6,
        lengths: tuple[int, int] = (4, 12),
        labels: bool = False,
        own_spec: LoraSpec = spec,
    ) -> ClientJob:
        draws = numpy_generator(client, "client")
        sizes = draws.integers(lengths[0], lengths[1] + 1, num_rows)
        rows = [
            make_row(1000 * client + i, int(size), prompt=2, labels=labels)
            for i, size in enumerate(sizes)
        ]
        own_layout = AdapterLayout(layout.layers, own_spec.rank)
        adapter = (0.2 * draws.standard_normal(own_layout.size)).astype(np.float32)
        return ClientJob(client, rows, adapter, own_spec, seed=31 + client)

    return make


@pytest.fixture(scope="session")
def full_gradient(backbone: Backbone) -> Gradient:
    """Gradient of the mean loss over all targets of some rows, row by row through full logits."""

    def gradient(
        job: ClientJob, rows: Sequence[Encoded], head: tuple[int, ...] | None = None
    ) -> np.ndarray:
        attached = attach(backbone, job.spec)
        attached.load_flat(job.adapter)
        parameters = attached.parameters()
        count = sum(len(row.targets) for row in rows)
        with attached.active(train=True):
            for parameter in parameters:
                parameter.grad = None
            for row in rows:
                ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
                logits = backbone.model(input_ids=ids).logits[0][list(row.predict_from)]
                logits = logits if head is None else logits[:, list(head)]
                targets = torch.from_numpy(row.targets.astype(np.int64))
                (cross_entropy(logits, targets, reduction="sum") / count).backward()
            flat = np.concatenate([parameter.grad.flatten().numpy() for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
        return flat

    return gradient


@pytest.fixture(params=["lean", "transformers"])
def delta(request: pytest.FixtureRequest, layout: AdapterLayout) -> Delta | None:
    """None, or a delta of width 0: it adds nothing, but only transformers' modules can compute it."""
    if request.param == "lean":
        return None
    first = layout.layers[0]
    left = np.zeros((first.out_features, 0), dtype=np.float32)
    return {first.name: LowRank(left, np.zeros((0, first.in_features), dtype=np.float32))}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="session")
def distance() -> Callable[[np.ndarray, np.ndarray], float]:
    """Relative distance of two arrays."""
    return relative
