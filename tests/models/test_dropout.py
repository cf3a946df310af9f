import pytest
import torch

from fedllm_flwr.models.dropout import DropoutSeeds, SeededDropout


def test_off_outside_of_training() -> None:
    dropout = SeededDropout(0.5, "layer", DropoutSeeds()).eval()
    features = torch.ones(2, 3, 4)
    assert dropout(features) is features


def test_zeroes_the_stated_part_and_keeps_the_mean() -> None:
    dropout = SeededDropout(0.25, "layer", DropoutSeeds((1,))).train()
    dropped = dropout(torch.ones(10, 100, 100))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    # 100,000 draws: the standard error of the fraction is 0.0014
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.007)


def test_a_client_gets_the_same_mask_alone_and_in_a_cohort() -> None:
    features = torch.ones(2, 5, 8)
    alone = SeededDropout(0.5, "layer", DropoutSeeds((7,))).train()(features)
    cohort = SeededDropout(0.5, "layer", DropoutSeeds((3, 7))).train()(torch.ones(4, 5, 8))
    assert torch.equal(cohort[2:], alone)
    assert not torch.equal(cohort[:2], alone)


def test_padding_at_the_end_does_not_change_the_mask() -> None:
    short = SeededDropout(0.5, "layer", DropoutSeeds((7,))).train()(torch.ones(3, 5, 8))
    padded = SeededDropout(0.5, "layer", DropoutSeeds((7,))).train()(torch.ones(3, 9, 8))
    assert torch.equal(padded[:, :5], short)


def test_layers_differ_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    features = torch.ones(2, 5, 8)
    first = SeededDropout(0.5, "one", DropoutSeeds((7,))).train()(features)
    second = SeededDropout(0.5, "two", DropoutSeeds((7,))).train()(features)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_seeds_are_an_error() -> None:
    with pytest.raises(ValueError, match="layer q: dropout needs one seed per client"):
        SeededDropout(0.5, "q", DropoutSeeds()).train()(torch.ones(1, 1, 1))
