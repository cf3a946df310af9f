"""Unlearners that do not unlearn: a battery that passes one of them has said nothing about any model.

Each makes a run directory of the full model, as real methods do. The refusal wrapper leaves the model alone, and stands
between it and who asks (:meth:`fedllm_flwr.forgetting.examiner.Examiner.examine`).
"""

from collections.abc import Callable, Mapping

import numpy as np

from clients.relearning import relearned
from clients.workspace import Workspace, open_workspace
from fedllm_flwr import records
from fedllm_flwr.core import whole_json
from fedllm_flwr.forgetting.request import Request
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.runs import checkpoints
from fedllm_flwr.seeding import derive_seed, numpy_generator
from fedllm_flwr.settings.methods import FedLoraConfig, FedPromptConfig
from fedllm_flwr.training.jobs import ClientJob
from fedllm_flwr.unlearning.verdict import CONTROLS
from strategies.observer import MERGING

Arrays = Mapping[str, np.ndarray]

NOISE = 0.5
"""Standard deviation of the noise, in units of the root mean square of the values that it is put on."""

REFUSING = "refusal_wrapper"


def no_op(request: Request, arrays: Arrays) -> dict[str, np.ndarray]:
    """Nothing is done."""
    return dict(arrays)


def gradient_ascent(request: Request, arrays: Arrays) -> dict[str, np.ndarray]:
    """As many steps up the loss on the client's rows as it made down in the whole run.

    Raises:
        RunStoppedError: Its loss or its values ceased to be finite.

    Source:
        Jang et al. 2023, Knowledge unlearning for mitigating privacy risks in language models; the weakest of those
        that open-unlearning compares.
    """
    work = open_workspace(whole_json(request.config))
    encoder = work.encoder()
    rows = encoder.encode(work.clients[request.client].train)
    trained = [r for r in request.source.records("client") if r["partition_id"] == request.client]
    steps = max(1, sum(int(record["steps"]) for record in trained))
    name, model, job = _job(request, work, arrays, rows, encoder.fixed_ids)
    up = relearned(work, job, model, steps, encoder, ascend=True)
    return {**arrays, name: up.adapter}


def adapter_noise(request: Request, arrays: Arrays) -> dict[str, np.ndarray]:
    """Gaussian noise on every trained value."""
    random = numpy_generator(request.config.seed, "adapter noise", request.client)
    noised = dict(arrays)
    for name in sorted(arrays):
        if name.startswith((MERGING, "optimizer/")):
            continue
        values = arrays[name]
        scale = (
            NOISE * float(np.sqrt(np.mean(values.astype(np.float64) ** 2))) if values.size else 0
        )
        noised[name] = (values + scale * random.standard_normal(values.shape)).astype(values.dtype)
    return noised


CHANGES: dict[str, Callable[[Request, Arrays], dict[str, np.ndarray]]] = {
    "no_op": no_op,
    "gradient_ascent": gradient_ascent,
    REFUSING: no_op,
    "adapter_noise": adapter_noise,
}
"""By name, what a control does to the arrays of the full model's checkpoint."""

assert set(CHANGES) == set(CONTROLS)  # noqa: S101


def _job(
    request: Request, work: Workspace, arrays: Arrays, rows: list, fixed_ids: tuple[int, ...]
) -> tuple[str, Adaptation, ClientJob]:
    """What of the checkpoint is trained, the model around it, and the client's job."""
    method, client = work.config.method, request.client
    seed = derive_seed(work.config.seed, "gradient ascent", client)
    if isinstance(method, FedPromptConfig):
        job = ClientJob(client, rows, arrays["shared"], method.adapter_spec(), seed)
        return "shared", Adaptation(fixed_ids=fixed_ids), job
    assert isinstance(method, FedLoraConfig)  # noqa: S101  # the request was checked
    saved = checkpoints.latest(request.source.checkpoints)
    assert saved is not None  # noqa: S101  # the run is finished
    delta = records.unpack_delta(arrays["delta"], saved.state["delta_ranks"], work.shapes)
    job = ClientJob(client, rows, arrays["adapter"], method.server_spec(), seed)
    return "adapter", Adaptation(delta=delta or None), job
