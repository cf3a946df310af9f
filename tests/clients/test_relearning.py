import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clients.relearning import relearned, relearning_job
from clients.workspace import Workspace, open_workspace
from fedllm_flwr.core import whole_json
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.models.soft import embedding_width
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.training.examine import examine

Fixture = Callable[..., Any]


@pytest.fixture
def work(micro: Fixture) -> Workspace:
    return open_workspace(whole_json(micro()))


def test_it_begins_with_the_model_as_it_is_and_gets_better_on_what_it_trains_on(
    work: Workspace,
) -> None:
    encoder, rows = work.encoder(), work.encoded(0, "train")
    job = relearning_job(work, Adaptation(), rows, 5)
    losses = []
    for steps in (0, 4, 20):
        if steps:
            job = relearned(work, job, Adaptation(), steps, encoder)
        model = Adaptation(job.adapter, job.spec)
        found = examine(work.backbone, rows, model, head_token_ids=encoder.head_token_ids)
        losses.append(found.losses.mean())
    plain = examine(work.backbone, rows, head_token_ids=encoder.head_token_ids).losses
    assert losses[0] == pytest.approx(plain.mean(), rel=1e-6)
    assert losses[2] < 0.7 * losses[0]
    again = relearned(work, relearning_job(work, Adaptation(), rows, 5), Adaptation(), 4, encoder)
    assert (
        relearned(work, again, Adaptation(), 20, encoder).adapter.tobytes() == job.adapter.tobytes()
    )


def test_a_prompt_goes_on_from_where_it_is_and_a_proximal_term_does_not_hold_it(
    work: Workspace,
) -> None:
    spec = PromptSpec((Segment("shared", 2),), "before")
    values = np.zeros(2 * embedding_width(work.backbone), np.float32)
    rows = work.encoded(0, "train")
    job = relearning_job(work, Adaptation(values, spec), rows, 5)
    assert (job.adapter.tobytes(), job.spec) == (values.tobytes(), spec)
    heavy = dataclasses.replace(work.config.client, proximal_mu=1e9)
    held = Workspace(dataclasses.replace(work.config, client=heavy), work.task, work.clients)
    moved = [relearned(w, job, Adaptation(), 2, work.encoder()).adapter for w in (work, held)]
    assert moved[0].tobytes() == moved[1].tobytes() != values.tobytes()
