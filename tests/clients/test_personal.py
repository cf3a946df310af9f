from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from clients.personal import PersonalStore


def context(folder: Path | None = None) -> Context:
    facts = {"state-path": str(folder)} if folder else {}
    return Context(run_id=1, node_id=1, node_config=facts, state=RecordDict(), run_config={})


def value(number: float) -> np.ndarray:
    return np.full(6, number, np.float32)


@pytest.fixture(params=["context", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PersonalStore:
    return PersonalStore(context(tmp_path if request.param == "disk" else None), "f", kept=3)


def loaded(store: PersonalStore, client: int, before: int) -> float | None:
    found = store.load(client, before)
    return None if found is None else float(found[0])


def test_a_round_begins_where_the_one_before_it_ended(store: PersonalStore) -> None:
    assert loaded(store, 0, 1) is None
    for server_round in (1, 2, 3):
        store.save(0, server_round, value(server_round))
    assert loaded(store, 0, 4) == 3.0
    assert loaded(store, 0, 3) == 2.0, "the same round asked again begins where it began"
    assert loaded(store, 1, 4) is None, "another client's is its own"


def test_a_round_that_is_repeated_drops_what_came_after(store: PersonalStore) -> None:
    for server_round in (1, 2, 3):
        store.save(0, server_round, value(server_round))
    store.save(0, 2, value(20.0))
    assert loaded(store, 0, 9) == 20.0


def test_another_configuration_has_other_prompts(store: PersonalStore) -> None:
    store.save(0, 1, value(1.0))
    assert loaded(PersonalStore(store.context, "g"), 0, 5) is None


def test_a_node_that_restarts_finds_them_on_its_disk(tmp_path: Path) -> None:
    store = PersonalStore(context(tmp_path), "f", kept=3)
    for server_round in range(1, 6):
        store.save(7, server_round, value(server_round))
    fresh = PersonalStore(context(tmp_path), "f", kept=3)
    assert [loaded(fresh, 7, before) for before in (6, 5, 4, 3)] == [5.0, 4.0, 3.0, None]
    fresh.save(7, 4, value(40.0))
    assert loaded(PersonalStore(context(tmp_path), "f"), 7, 9) == 40.0
    assert sorted(p.name for p in (tmp_path / "f" / "7").iterdir()) == [
        "round-3.f32",
        "round-4.f32",
    ]


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    PersonalStore(context(), "f").save(0, 1, value(1.0))
    assert list(tmp_path.iterdir()) == []


def test_the_context_stays_small() -> None:
    store = PersonalStore(context(), "f", kept=50)
    for server_round in range(1, 30):
        store.save(0, server_round, value(server_round))
    assert len(store.context.state["personal/0"]) == 2


def test_kinds_know_nothing_of_each_other(tmp_path: Path) -> None:
    node = context(tmp_path)
    for kind, number in (("personal", 1.0), ("residual", 2.0)):
        PersonalStore(node, "f", kind=kind).save(0, 1, value(number))
    for holder in (node, context(tmp_path)):
        for kind, number in (("personal", 1.0), ("residual", 2.0), ("other", None)):
            assert loaded(PersonalStore(holder, "f", kind=kind), 0, 2) == number
