import os

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError, DataError, ShapeError, WireError
from fedllm_flwr.runs.atomic import write_bytes
from fedllm_flwr.unlearning.ledger import Contribution, Ledger, weighted_mean

SIZE = 6
COHORTS = {1: (0, 1, 2), 2: (1, 3), 3: (0, 3)}
POLICY = "all rounds, until the run is deleted by its owner"


def update_of(server_round, client):
    return np.random.default_rng([server_round, client]).standard_normal(SIZE).astype(np.float32)


def contribution(server_round, client):
    address = ("client", client, server_round)
    return Contribution(client, 1.5 + client, update_of(server_round, client), address)


@pytest.fixture
def ledger(tmp_path):
    made = Ledger.create(tmp_path / "ledger", size=SIZE, retention=POLICY, write=write_bytes)
    for server_round, cohort in COHORTS.items():
        for client in reversed(cohort):
            made.record(server_round, contribution(server_round, client))
        made.close(server_round)
    return made


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_was_written_comes_back_from_the_disk(ledger):
    again = Ledger(ledger.folder, write_bytes)
    assert (again.size, again.retention, again.rounds()) == (SIZE, POLICY, (1, 2, 3))
    for server_round, cohort in COHORTS.items():
        read = again.read(server_round)
        assert read.server_round == server_round
        assert tuple(each.client for each in read.contributions) == cohort
        for each in read.contributions:
            assert each.update.tobytes() == update_of(server_round, each.client).tobytes()
            assert each.update.dtype == np.float32
            assert each.weight == 1.5 + each.client
            assert each.seed == ("client", each.client, server_round)
    assert again.participation() == {0: (1, 3), 1: (1, 2), 2: (1,), 3: (2, 3)}


def test_a_forgotten_client_is_nowhere_and_the_others_are_untouched(ledger):
    before = files(ledger.folder)
    freed = sum(len(content) for name, content in before.items() if "client-00000" in name)
    assert ledger.forget(0) == freed > 0
    after = files(ledger.folder)
    assert not any("client-00000" in name for name in after)
    assert set(before) - set(after) == {f"round-{r:04d}/client-00000.safetensors" for r in (1, 3)}
    assert all(after[name] == before[name] for name in after if name.endswith(".safetensors"))
    assert ledger.participation() == {1: (1, 2), 2: (1,), 3: (2, 3)}
    assert update_of(1, 0).tobytes() not in b"".join(after.values())
    assert ledger.forget(0) == 0


def test_a_ledger_without_a_client_has_the_bytes_of_one_that_never_had_it(ledger, tmp_path):
    ledger.forget(3)
    other = Ledger.create(tmp_path / "never", size=SIZE, retention=POLICY, write=write_bytes)
    for server_round, cohort in COHORTS.items():
        for client in cohort:
            if client != 3:
                other.record(server_round, contribution(server_round, client))
        other.close(server_round)
    assert files(other.folder) == files(ledger.folder)


def test_a_deletion_that_was_killed_is_finished_by_the_next(ledger, monkeypatch):
    from pathlib import Path

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger.forget(0)
    assert [c.client for c in ledger.read(1).contributions] == [1, 2]
    assert ledger.forget(0) > 0
    assert not list(ledger.folder.rglob("client-00000*"))


def test_a_round_counts_once_it_is_closed_and_leftovers_are_cut(ledger):
    ledger.record(4, contribution(4, 2))
    again = Ledger(ledger.folder, write_bytes)
    assert again.rounds() == (1, 2, 3)
    again.cut(2)
    assert again.rounds() == (1, 2)
    assert {path.name for path in again.folder.iterdir() if path.is_dir()} == {
        "round-0001",
        "round-0002",
    }
    again.record(3, contribution(3, 1))
    again.close(3)
    assert again.participation()[1] == (1, 2, 3)


def test_a_second_update_of_a_round_replaces_the_first(tmp_path):
    ledger = Ledger.create(tmp_path, size=SIZE, retention=POLICY, write=write_bytes)
    ledger.record(1, contribution(9, 5))
    ledger.record(1, contribution(1, 5))
    ledger.close(1)
    [only] = ledger.read(1).contributions
    assert only.update.tobytes() == update_of(1, 5).tobytes()
    ledger.close(2)
    assert ledger.read(2).contributions == ()


def test_missing_and_damaged_files_are_named(ledger):
    file = ledger.folder / "round-0002" / "client-00003.safetensors"
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (flipped, whole[:-3], b"", b"\0" * 100):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"round-0002.client-00003\.safetensors: expected"):
            ledger.read(2)
    os.remove(file)
    with pytest.raises(DataError, match=r"client-00003\.safetensors: expected an update"):
        ledger.read(2)
    index = ledger.folder / "round-0001.json"
    for text in ("{", "[]", '{"clients": {"0": {}}}', '{"clients": 3}', "{}"):
        index.write_text(text)
        with pytest.raises(DataError, match=r"round-0001\.json: expected"):
            ledger.participation()
    with pytest.raises(DataError, match=r"round-0009\.json: expected JSON"):
        ledger.read(9)


def test_a_folder_without_a_ledger_or_with_another_is_refused(ledger, tmp_path):
    with pytest.raises(ConfigError, match="got none: the run was not told to keep it"):
        Ledger(tmp_path / "absent", write_bytes)
    with pytest.raises(ConfigError, match=r"expected none in .*, got one"):
        Ledger.create(ledger.folder, size=SIZE, retention=POLICY, write=write_bytes)
    (ledger.folder / "ledger.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="expected format 1, got 2"):
        Ledger(ledger.folder, write_bytes)
    (ledger.folder / "ledger.json").write_text('{"format": 1, "size": 6}')
    with pytest.raises(DataError, match=r"ledger\.json: expected a size and a retention policy"):
        Ledger(ledger.folder, write_bytes)


def test_bad_input_is_refused_and_nothing_is_written(ledger, tmp_path):
    before = files(ledger.folder)
    with pytest.raises(ConfigError, match="expected a round that is open, got 2"):
        ledger.record(2, contribution(2, 1))
    with pytest.raises(ConfigError, match="expected a round that is open, got 2"):
        ledger.close(2)
    with pytest.raises(ShapeError, match=r"client 4: expected shape \[6\], got \[5\]"):
        ledger.record(4, Contribution(4, 1.0, np.ones(5, np.float32)))
    with pytest.raises(WireError, match="client 4: weight"):
        ledger.record(4, Contribution(4, 0.0, np.ones(6, np.float32)))
    with pytest.raises(WireError, match="client 4: expected finite values"):
        ledger.record(4, Contribution(4, 1.0, np.full(6, np.inf, np.float32)))
    with pytest.raises(WireError, match="client 4: expected finite values, got 6 of 6"):
        ledger.record(4, Contribution(4, 1.0, np.full(6, 1e300)))
    assert files(ledger.folder) == before
    with pytest.raises(ConfigError, match="a retention policy, got 6 and ' '"):
        Ledger.create(tmp_path / "new", size=SIZE, retention=" ", write=write_bytes)
    assert not (tmp_path / "new").exists()


def test_the_mean_is_weighted_by_hand():
    pair = (
        Contribution(0, 1.0, np.array([1, 0], np.float32)),
        Contribution(1, 3.0, np.array([5, 4], np.float32)),
    )
    mean = weighted_mean(pair)
    assert mean.tolist() == [4, 3]
    assert mean.dtype == np.float64
    assert weighted_mean(()) is None
