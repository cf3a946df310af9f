import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm_flwr.actions import run_experiment
from fedllm_flwr.forgetting.certify import certify, default_folder, retraining_cost
from fedllm_flwr.forgetting.command import unlearn
from fedllm_flwr.forgetting.prepare import UNLEARNED
from fedllm_flwr.forgetting.request import read_request
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.unlearning.deletion_log import KEY_VARIABLE, Head, verify
from fedllm_flwr.unlearning.removal import shard_of

Fixture = Callable[..., Any]


@pytest.fixture(scope="module")
def done(made: Fixture, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RunDirectory]:
    """Client 3, which came in the last of three rounds, taken out."""
    request = read_request(made("ledger"), "3", "rewind")
    folder = tmp_path_factory.mktemp("certify") / "new"
    unlearn(request, folder, [], run_experiment)
    return request, RunDirectory.open(folder)


def test_the_certificate_says_what_was_done_what_it_cost_and_what_is_left(done: Any) -> None:
    request, run = done
    found = json.loads((run.path / "certificate.json").read_text())
    assert (found["client"], found["method"], found["exactness"]) == (3, "rewind", "exact")
    assert found["model_sha256"] == run.summary()["adapter_sha256"]
    assert "verdict" not in found, "none was asked for"
    assert found["retention"] == request.ledger.retention
    assert len(found["purged"]) >= 4
    assert all(kept["reason"] for kept in found["retained"])
    text = (run.path / "certificate.md").read_text()
    assert text.startswith(f"# Removal of client 3 from {request.source.path.name}\n")


def test_only_the_rounds_that_were_run_again_are_counted(done: Any) -> None:
    request, run = done
    cost = json.loads((run.path / "certificate.json").read_text())
    tokens = {r["round"]: 0 for r in run.records("client")}
    for record in run.records("client"):
        tokens[record["round"]] += record["tokens"]
    assert sorted(tokens) == [1, 2, 3]
    others = [r for r in request.source.records("client") if r["partition_id"] != 3]
    per_token = cost["removal"]["flops"] / tokens[3]
    assert cost["retraining"]["flops"] / per_token == pytest.approx(
        sum(r["tokens"] for r in others)
    )
    assert retraining_cost(request).cpu_seconds == pytest.approx(
        sum(r["cpu_seconds"] for r in others)
    )


def test_with_a_key_the_removal_is_logged_and_the_log_goes_on_with_the_next(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Fixture
) -> None:
    request, run = done
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    monkeypatch.setenv(KEY_VARIABLE, pem.decode())
    copy = RunDirectory.open(shutil.copytree(run.path, tmp_path / "first"))
    certify(request, copy)
    handed_out = contents(copy.path)
    head = Head(**json.loads(handed_out["certificate.json"])["log_head"])
    monkeypatch.setattr(time, "strftime", lambda *_: "2030-01-01T00:00:00Z")
    certify(request, copy)
    assert contents(copy.path) == handed_out, "a removal is logged once"
    assert len(verify(copy.path / "deletions.jsonl", key.public_key(), head=head)) == 1
    monkeypatch.delenv(KEY_VARIABLE)
    certify(request, copy)
    assert contents(copy.path) == handed_out
    monkeypatch.setenv(KEY_VARIABLE, pem.decode())
    second = read_request(copy, "0", "rewind")
    folder = unlearn(second, tmp_path / "second", [], run_experiment)
    entries = verify(folder / "deletions.jsonl", key.public_key())
    assert [entry.body["client"] for entry in entries] == [3, 0]
    verify(folder / "deletions.jsonl", key.public_key(), head=head)


def test_a_merge_has_run_no_round_again_and_keeps_what_was_measured_before(
    made: Fixture, tmp_path: Path
) -> None:
    """Its records of the rounds before the client's first are the old run's."""
    request = read_request(made("ledger"), "3", "merge")
    folder = unlearn(request, tmp_path / "new", [], run_experiment)
    run = RunDirectory.open(folder)
    assert {r["round"] for r in run.records("client")} == {1, 2}
    found = json.loads((folder / "certificate.json").read_text())
    assert found["removal"]["flops"] == 0
    assert 0 < found["removal"]["cpu_seconds"] == run.manifest[UNLEARNED]["prepare_cpu_seconds"]
    kept = [entry["what"] for entry in found["retained"]]
    assert "figures of the rounds up to 2" in kept
    assert "the other clients' updates in the ledger" in kept


def test_the_policy_is_that_of_the_shards_ledgers_too(made: Fixture, tmp_path: Path) -> None:
    request = read_request(made("shards"), "4", "shards")
    folder = unlearn(request, tmp_path / "new", [], run_experiment)
    found = json.loads((folder / "certificate.json").read_text())
    assert found["retention"] == request.config.unlearning.retention
    assert list(folder.glob("shards/*/ledger/ledger.json")), "updates are kept"
    shape = list(RunDirectory.open(folder).records("client"))
    own = shard_of(4, request.config.unlearning.shards, request.config.seed)
    again = [r for r in shape if shard_of(r["partition_id"], 2, request.config.seed) == own]
    assert 0 < len(again) < len(shape)
    tokens = [sum(r["tokens"] for r in records) for records in (again, shape)]
    whole = retraining_cost(request).flops
    others = sum(r["tokens"] for r in request.source.records("client") if r["partition_id"] != 4)
    assert found["removal"]["flops"] == pytest.approx(whole / others * tokens[0])


def test_the_new_run_is_named_after_the_old_one_the_method_and_the_client(made: Fixture) -> None:
    request = read_request(made("ledger"), "3", "")
    assert default_folder(request) == request.source.path.parent / "unlearn_run_rewind_client3"
