"""Stacks of soft prompts against automatic differentiation row by row."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.adapters import LoraSpec
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.soft import soft_inputs
from fedllm_flwr.prompts import PromptSpec, Segment
from fedllm_flwr.tasks.encode import Encoded
from fedllm_flwr.training.batches import Share, collate
from fedllm_flwr.training.find_decoder import find_decoder
from fedllm_flwr.training.local import ClientJob, plan_cohorts, train
from fedllm_flwr.training.prompt_stacks import PromptStack, extra_positions, reused_tokens
from fedllm_flwr.training.settings import LocalSettings
from fedllm_flwr.training.stacks import make_stack

MakeJob = Callable[..., ClientJob]
States = Callable[..., Tensor]
Fixed = tuple[int, ...]
TOGETHER = 10_000
PLACEMENTS = pytest.mark.parametrize("placement", ["before", "after"])


def stack_of(
    backbone: Backbone, jobs: Sequence[ClientJob], fixed_ids: Fixed, *, reuse: bool
) -> PromptStack:
    stack = PromptStack(
        backbone,
        jobs[0].spec,
        len(jobs),
        jobs[0].trained,
        fixed_ids=fixed_ids,
        decoder=find_decoder(backbone),
        reuse=reuse,
    )
    for client, job in enumerate(jobs):
        stack.load(client, job.adapter)
    return stack


@PLACEMENTS
@pytest.mark.parametrize("reuse", [True, False], ids=["cached", "recomputed"])
def test_states_and_gradients_are_those_of_rows_by_themselves(
    served: Backbone,
    fixed_ids: Fixed,
    make_prompt_job: MakeJob,
    prompt_states: States,
    placement: str,
    reuse: bool,
) -> None:
    jobs = [make_prompt_job(client, placement=placement, num_rows=3 - client) for client in (0, 1)]
    stack = stack_of(served, jobs, fixed_ids, reuse=reuse)
    batch = collate([Share(job.rows) for job in jobs], torch.device("cpu"))
    found = stack.hidden(batch.input_ids)
    slope = torch.zeros_like(found)
    known = 0 if placement == "before" or not reuse else len(fixed_ids)
    assert bool((found[:, :known] == 0).all())
    at = len(fixed_ids) if placement == "after" else 0
    wanted_gradients = []
    for client, job in enumerate(jobs):
        prompt = torch.tensor(job.adapter).view(job.spec.length, -1).requires_grad_()
        total = torch.zeros(())
        for line, row in enumerate(job.rows, start=3 * client):
            own = slice(known, len(row.input_ids))
            wanted = prompt_states(row, prompt, at)[own]
            torch.testing.assert_close(found[line, own], wanted, rtol=1e-4, atol=1e-5)
            drawn = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(line))
            slope[line, own] = drawn
            total = total + (drawn * wanted).sum()
        wanted_gradients.append(torch.autograd.grad(total, prompt)[0].flatten())
    stack.backward(found, slope)
    for client, wanted in enumerate(wanted_gradients):
        [parameter] = stack.parameters(client)
        assert (parameter.grad - wanted).norm() < 1e-4 * wanted.norm()


@PLACEMENTS
def test_a_prompt_one_token_off_would_be_noticed(
    backbone: Backbone,
    fixed_ids: Fixed,
    make_prompt_job: MakeJob,
    prompt_states: States,
    placement: str,
) -> None:
    job = make_prompt_job(0, placement=placement, num_rows=1, lengths=(6, 6))
    [row] = job.rows
    prompt = torch.tensor(job.adapter).view(job.spec.length, -1)
    right = len(fixed_ids) if placement == "after" else 0
    with torch.no_grad():
        batch = collate([Share([row])], torch.device("cpu"))
        found = stack_of(backbone, [job], fixed_ids, reuse=True).hidden(batch.input_ids)[0, -1]
        for at in (right, right + 1, len(fixed_ids) - right):
            off = float((prompt_states(row, prompt, at)[-1] - found).norm() / found.norm())
            assert off < 1e-4 if at == right else off > 0.05


@PLACEMENTS
def test_what_is_loaded_is_read_back(
    backbone: Backbone, fixed_ids: Fixed, make_prompt_job: MakeJob, placement: str
) -> None:
    jobs = [make_prompt_job(k, placement=placement, trained=("personal",)) for k in range(3)]
    stack = make_stack(
        backbone, jobs[0].spec, 3, "both", trained=("personal",), fixed_ids=fixed_ids
    )
    for client, job in enumerate(jobs):
        stack.load(client, job.adapter)
    for client, job in enumerate(jobs):
        assert np.array_equal(stack.read(client), job.adapter)
        [parameter] = stack.parameters(client)
        assert np.array_equal(parameter.detach(), job.spec.split(job.adapter)["personal"])


def test_only_clients_that_train_the_same_share_a_cohort(make_prompt_job: MakeJob) -> None:
    kinds = (("after", ()), ("after", ("shared",)), ("before", ()))
    jobs = {
        3 * copy + k: make_prompt_job(k, placement=placement, trained=trained)
        for copy in range(2)
        for k, (placement, trained) in enumerate(kinds)
    }
    settings = LocalSettings(batch_size=2, cohort_tokens=TOGETHER)
    assert sorted(map(sorted, plan_cohorts(jobs, settings))) == [[0, 3], [1, 4], [2, 5]]


def test_the_budget_counts_soft_tokens_and_not_the_reused_text(
    backbone: Backbone, fixed_ids: Fixed, make_prompt_job: MakeJob
) -> None:
    def cohorts(budget: int, reused: int, placement: str = "after") -> list[int]:
        jobs = {
            k: make_prompt_job(k, placement=placement, num_rows=2, lengths=(6, 6)) for k in range(4)
        }
        settings = LocalSettings(batch_size=2, cohort_tokens=budget)
        return [len(cohort) for cohort in plan_cohorts(jobs, settings, reused)]

    # a row: 4 tokens of fixed text, 6 more, 5 soft tokens
    assert cohorts(4 * 2 * 15, 0) == [4]
    assert cohorts(4 * 2 * 15 - 1, 0) == [3, 1]
    assert cohorts(4 * 2 * 11, 4) == [4]
    assert cohorts(4 * 2 * 11 - 1, 4) == [3, 1]
    assert cohorts(4 * 2 * 15 - 1, 4, "before") == [3, 1]
    prompt, lora = make_prompt_job(0).spec, LoraSpec(rank=1, alpha=1.0)
    assert extra_positions(lora, 4) == 0
    known = {
        specs: reused_tokens(backbone, specs, fixed_ids, plain_layers=True)
        for specs in ((lora,), (replace(prompt, placement="before"),), (lora, prompt))
    }
    assert list(known.values()) == [0, 0, 4]
    assert reused_tokens(backbone, (prompt,), fixed_ids, plain_layers=False) == 0
    assert reused_tokens(backbone, (prompt,), (), plain_layers=True) == 0


def test_impossible_settings_are_refused(
    backbone: Backbone, fixed_ids: Fixed, make_prompt_job: MakeJob, make_job: MakeJob
) -> None:
    spec = PromptSpec((Segment("shared", 2),), "after")
    with pytest.raises(ConfigError, match="soft prompt: expected side both"):
        make_stack(backbone, spec, 1, "a")
    with pytest.raises(
        ConfigError, match=r"LoraSpec: expected no segments to train, got \['shared'\]"
    ):
        make_stack(backbone, LoraSpec(rank=1, alpha=1.0), 1, "both", trained=("shared",))
    jobs = [make_prompt_job(0, trained=("own",)), replace(make_job(1), trained=("own",))]
    errors = [
        result.error for result in train(backbone, jobs, LocalSettings(), fixed_ids=fixed_ids)
    ]
    assert "prompt segment 'own': expected one of personal, shared" in errors[0]
    assert "expected no segments to train" in errors[1]


def test_soft_inputs_are_what_the_stack_computes_with(
    backbone: Backbone, fixed_ids: Fixed, make_prompt_job: MakeJob
) -> None:
    """Padded on the left, as generation pads, the last states are those that training sees."""
    job = make_prompt_job(6, num_rows=3, lengths=(2, 9))
    right = collate([Share(job.rows)], torch.device("cpu"))
    longest = right.input_ids.shape[1]

    def left(row: Encoded) -> tuple[list[int], list[int]]:
        pads = [0] * (longest - len(row.input_ids))
        return pads + row.input_ids.tolist(), pads + [1] * len(row.input_ids)

    ids, mask = (torch.tensor(part) for part in zip(*map(left, job.rows), strict=True))
    prompts = torch.tensor(job.adapter).view(1, job.spec.length, -1).expand(3, -1, -1)
    inputs = soft_inputs(backbone, ids, mask, prompts, at=len(fixed_ids), padding="left")
    with torch.no_grad():
        states = backbone.model.base_model(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
        ).last_hidden_state[:, -1]
        found = stack_of(backbone, [job], fixed_ids, reuse=True).hidden(right.input_ids)
    last = torch.stack([found[k, len(row.input_ids) - 1] for k, row in enumerate(job.rows)])
    torch.testing.assert_close(states, last, rtol=1e-4, atol=1e-5)
