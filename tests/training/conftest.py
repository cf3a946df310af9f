"""A tiny float32 backbone, and clients with random rows and random (non-zero) adapters."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedllm_flwr.averaging import Delta, LowRank
from fedllm_flwr.models.adapters import AdapterLayout, LoraSpec, attach, layer_shapes
from fedllm_flwr.models.backbone import Backbone, load
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.soft import embedding_width
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.seeding import numpy_generator
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.local import ClientJob

VOCABULARY = 300
LABELS = (7, 3, 11)
FIXED = (12, 250, 3, 77)

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


@pytest.fixture(scope="session")
def fixed_ids() -> tuple[int, ...]:
    """The text that every row of a client with a soft prompt begins with."""
    return FIXED


@pytest.fixture(scope="session")
def make_prompt_job(backbone: Backbone, make_row: MakeRow) -> MakeJob:
    """A client with a soft prompt of a personal and a shared segment, and rows behind the fixed text."""

    def make(
        client: int,
        *,
        placement: str = "after",
        num_rows: int = 5,
        lengths: tuple[int, int] = (2, 9),
        labels: bool = False,
        trained: tuple[str, ...] = (),
    ) -> ClientJob:
        spec = PromptSpec((Segment("personal", 2), Segment("shared", 3)), placement)
        draws = numpy_generator(client, "prompt client")
        sizes = draws.integers(lengths[0], lengths[1] + 1, num_rows)
        bare = [make_row(500 * client + i, int(n), labels=labels) for i, n in enumerate(sizes)]
        text = np.array(FIXED, dtype=np.int32)
        rows = [
            replace(
                row,
                input_ids=np.concatenate([text, row.input_ids]),
                predict_from=row.predict_from + np.int32(len(text)),
            )
            for row in bare
        ]
        values = 0.3 * draws.standard_normal(spec.length * embedding_width(backbone))
        return ClientJob(client, rows, values.astype(np.float32), spec, 41 + client, trained)

    return make


@pytest.fixture(scope="session")
def prompt_states(backbone: Backbone) -> Callable[..., torch.Tensor]:
    """Final states [t, d] of one row's own tokens, its embeddings and the prompt's being all that the model sees."""

    def states(row: Encoded, prompt: torch.Tensor, at: int) -> torch.Tensor:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        embedded = backbone.model.get_input_embeddings()(ids)
        whole = torch.cat([embedded[:at], prompt, embedded[at:]])[None]
        found = backbone.model.base_model(inputs_embeds=whole, use_cache=False).last_hidden_state[0]
        return torch.cat([found[:at], found[at + len(prompt) :]])

    return states


@pytest.fixture(scope="session")
def prompt_gradient(
    backbone: Backbone, prompt_states: Callable[..., torch.Tensor]
) -> Callable[..., tuple[float, np.ndarray]]:
    """Loss and gradient of a soft prompt over some rows, row by row through full logits."""

    def gradient(
        job: ClientJob,
        rows: Sequence[Encoded],
        head: tuple[int, ...] | None = None,
        weights: Sequence[float] | None = None,
    ) -> tuple[float, np.ndarray]:
        prompt = torch.from_numpy(job.adapter.copy()).view(job.spec.length, -1).requires_grad_()
        at = len(FIXED) if job.spec.placement == "after" else 0
        count = sum(len(row.targets) for row in rows)
        loss = torch.zeros(())
        for row, weight in zip(rows, weights or [1.0] * len(rows), strict=True):
            states = prompt_states(row, prompt, at)[list(row.predict_from)]
            logits = states @ backbone.head_weight().t()
            logits = logits if head is None else logits[:, list(head)]
            targets = torch.from_numpy(row.targets.astype(np.int64))
            loss = loss + weight * cross_entropy(logits, targets, reduction="sum") / count
        [found] = torch.autograd.grad(loss, prompt)
        return float(loss.detach()), found.flatten().numpy()

    return gradient


@pytest.fixture(params=["lean", "transformers"])
def served(request: pytest.FixtureRequest, backbone: Backbone) -> Backbone:
    """The backbone as the lean decoder serves it, or one that asks for fused attention and goes without."""
    if request.param == "lean":
        return backbone
    return replace(backbone, kernels=replace(backbone.kernels, attention="sdpa"))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="session")
def distance() -> Callable[[np.ndarray, np.ndarray], float]:
    """Relative distance of two arrays."""
    return relative
