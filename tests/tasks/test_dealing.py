import numpy as np
import pytest
from datasets import are_progress_bars_disabled

from fedllm_flwr.tasks.base import SPLITS, TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.dealing import SCHEMES, _quiet, _table, deal
from fedllm_flwr.tasks.partitions import PartitionOptions

TASK = load_task(TaskOptions(name="synthetic"), 0)
SIZES = [len(TASK.splits[split]) for split in SPLITS]


@pytest.mark.parametrize("name", SCHEMES)
def test_any_stretch_of_the_table_holds_its_share_of_each_split(name):
    table = _table(TASK, SCHEMES[name], 0)
    positions, labels = np.array(table["position"][:]), np.array(table["label"][:])
    edges = np.cumsum(SIZES)
    split_of = np.searchsorted(edges, positions, side="right")
    streams = (
        [labels == label for label in range(4)] if SCHEMES[name].by == "label" else [labels >= 0]
    )
    for stream in streams:
        splits = split_of[stream]
        for split, size in enumerate(SIZES):
            walk = np.cumsum(splits == split) - np.arange(1, len(splits) + 1) * size / sum(SIZES)
            assert np.ptp(walk) <= 2  # so a stretch is off by at most two rows, one at each end


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "site"])
def test_row_numbers_are_divided(name):
    count = 2 if name == "natural" else 7
    parts = deal(TASK, PartitionOptions(name=name, num_clients=count), count, 0)
    assert sorted(number for part in parts for number in part) == list(range(sum(SIZES)))


def test_a_sites_client_has_all_rows_of_the_nodes_file():
    parts = deal(TASK, PartitionOptions(name="site", num_clients=3), 3, 0)
    assert [sorted(part) for part in parts] == [list(range(sum(SIZES)))] * 3


def test_progress_bars_are_as_before_afterwards(capsys):
    before = are_progress_bars_disabled()
    deal(TASK, PartitionOptions(name="natural", num_clients=2), 2, 0)
    assert are_progress_bars_disabled() == before
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError), _quiet():
        1 / 0  # noqa: B018
    assert are_progress_bars_disabled() == before
