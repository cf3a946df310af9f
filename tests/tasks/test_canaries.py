import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks import canaries
from fedllm_flwr.tasks.base import TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.partitions import PartitionOptions, partition

PLAIN = TaskOptions(name="synthetic", train_rows=60)
OPTIONS = TaskOptions(name="synthetic", train_rows=60, canaries=3, canary_client=1, canary_copies=2)


def deal(options, **changes):
    return partition(load_task(options, 0), PartitionOptions(num_clients=4, **changes), 0)


def test_they_join_the_rows_of_one_client_and_leave_all_others_where_they_were():
    for changes in ({}, {"name": "dirichlet"}, {"max_train_rows_per_client": 5}):
        plain, with_secrets = deal(PLAIN, **changes), deal(OPTIONS, **changes)
        for before, after in zip(plain, with_secrets, strict=True):
            own = [row for row in after.train if not row.row_id.startswith("canary")]
            secrets = [row for row in after.train if row.row_id.startswith("canary")]
            assert sorted(r.row_id for r in own) == sorted(r.row_id for r in before.train)
            assert (before.validation, before.test) == (after.validation, after.test)
            assert len(secrets) == len({r.row_id for r in secrets}) == 6 * (after.partition_id == 1)
            assert len({(r.text, r.target) for r in secrets}) == len(secrets) / 2
    assert [r.row_id for r in secrets] == []
    assert load_task(PLAIN, 0).canaries is None


def test_secrets_follow_the_seed_and_the_held_out_ones_are_others():
    first = canaries.planted(OPTIONS, 0)
    assert first == canaries.planted(OPTIONS, 0) != canaries.planted(OPTIONS, 1)
    others = canaries.held_out(50, 0)
    assert len({row.row_id for row in (*first.rows, *others)}) == 53
    assert not {row.text for row in first.rows} & {row.text for row in others}
    for row in (*first.rows, *others):
        assert row.target.isdecimal()
        assert len(row.target) == canaries.DIGITS
        assert (row.label, row.group, row.client) == (None, None, None)


def test_candidates_are_every_other_code_once(monkeypatch):
    monkeypatch.setattr(canaries, "DIGITS", 2)
    canary = canaries.planted(OPTIONS, 0).rows[0]
    found = canaries.candidates(canary, 99, 0)
    assert {*found, canary.target} == {f"{n:02d}" for n in range(100)}
    assert len(found) == 99
    assert found != canaries.candidates(canary, 99, 1)


def test_a_client_that_is_not_there_cannot_have_them():
    with pytest.raises(
        ConfigError, match=r"task\.canary_client: expected one of the 4 clients, got 4"
    ):
        deal(TaskOptions(name="synthetic", canaries=1, canary_client=4))
    with pytest.raises(ConfigError, match=r"^task\.canary_copies: expected >= 1, got 0$"):
        TaskOptions(name="synthetic", canary_copies=0)
