import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm_flwr.actions import run_experiment
from fedllm_flwr.forgetting.certify import certify, default_folder, retraining_cost
from fedllm_flwr.forgetting.command import unlearn
from fedllm_flwr.forgetting.request import read_request
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.unlearning.deletion_log import KEY_VARIABLE, verify

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
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, run = done
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    monkeypatch.setenv(KEY_VARIABLE, pem.decode())
    copy = RunDirectory.open(shutil.copytree(run.path, tmp_path / "first"))
    first = certify(request, copy)
    again = certify(request, copy)
    assert first.log_head is not None
    assert again.log_head is not None
    assert again.log_head.entries == 1, "a removal is logged once"
    second = read_request(copy, "0", "rewind")
    folder = unlearn(second, tmp_path / "second", [], run_experiment)
    entries = verify(folder / "deletions.jsonl", key.public_key())
    assert [entry.body["client"] for entry in entries] == [3, 0]


def test_the_new_run_is_named_after_the_old_one_the_method_and_the_client(made: Fixture) -> None:
    request = read_request(made("ledger"), "3", "")
    assert default_folder(request) == request.source.path.parent / "unlearn_run_rewind_client3"
