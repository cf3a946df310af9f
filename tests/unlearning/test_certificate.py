import json
from dataclasses import replace

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.unlearning.attacks import attack
from fedllm_flwr.unlearning.certificate import Certificate, Cost, Retained, as_dict, to_markdown
from fedllm_flwr.unlearning.deletion_log import Head
from fedllm_flwr.unlearning.verdict import CONTROLS, by_bytes, equivalence, identity, judge

CHECKS = [equivalence("LiRA AUC", 0.51, (0.50, 0.51, 0.52)), identity("bytes", ())]
FAILED = [equivalence("LiRA AUC", 0.9, (0.50, 0.51, 0.52)), identity("bytes", ("lora_b",))]
VERDICT = judge(CHECKS, full_auc=0.83, controls=dict.fromkeys(CONTROLS, FAILED))
CERTIFICATE = Certificate(
    run="r8_unlearning",
    client=7,
    time="2025-05-01T12:00:00Z",
    method="rewind",
    exactness="exact",
    verdict=VERDICT,
    queries={"LiRA AUC": 240, "extraction": 60},
    budget=1000,
    removal=Cost(12.0, 3e12),
    retraining=Cost(96.0, 2.4e13),
    model_sha256="ab" * 32,
    purged=("personal prompt of client 7",),
    retained=(
        Retained("metrics.jsonl, rounds 1 to 4", "figures of whole rounds, needed for the report"),
    ),
    retention="all rounds, until the run is deleted",
    log_head=Head(3, "cd" * 32),
    fallen_back_from="merge",
)


def test_the_dictionary_goes_through_json_and_holds_everything():
    fields = as_dict(CERTIFICATE)
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert fields["queries_spent"] == 300
    assert fields["verified_by_attacks"] is True
    assert fields["retrain_cpu_ratio"] == 8
    assert fields["verdict"]["decision"] == "pass"
    assert fields["verdict"]["checks"][0]["null"] == [0.50, 0.51, 0.52]
    assert fields["verdict"]["checks"][0]["difference"]["low"] == pytest.approx(-0.01686, abs=1e-4)
    assert fields["verdict"]["controls"]["no_op"] == "failed"
    assert fields["retained"][0]["reason"] == "figures of whole rounds, needed for the report"
    assert fields["log_head"] == {"entries": 3, "sha256": "cd" * 32}
    assert set(fields) == {
        "format", "run", "client", "time", "method", "exactness", "fallen_back_from", "verdict", "queries",
        "queries_spent", "budget", "removal", "retraining", "retrain_cpu_ratio", "model_sha256", "purged",
        "retained", "retention", "log_head", "verified_by_attacks",
    }  # fmt: skip


def test_what_does_not_apply_is_absent():
    bare = replace(
        CERTIFICATE, verdict=None, retraining=None, log_head=None, fallen_back_from="", queries={}
    )
    fields = as_dict(bare)
    absent = {"verdict", "retraining", "retrain_cpu_ratio", "log_head", "fallen_back_from"}
    assert absent.isdisjoint(fields)
    assert fields["queries_spent"] == 0
    text = to_markdown(bare)
    assert fields["verified_by_attacks"] is False
    assert "No verification by attacks was made: nothing was measured" in text
    assert "Retraining takes" not in text
    assert "Fallen back" not in text
    assert "Deletion log" not in text
    assert replace(CERTIFICATE, removal=Cost(0.0, 0.0)).cpu_ratio is None


def test_the_text_for_people():
    lines = to_markdown(CERTIFICATE).splitlines()
    assert lines[0] == "# Removal of client 7 from r8_unlearning"
    for line in (
        "- Method: `rewind`, exact: the same bytes as if the client had never taken part",
        "- Fallen back from: `merge`, which did not pass",
        f"- Deletion log: 3 entries, the last with hash `{'cd' * 32}`",
        "## Verification: pass",
        "2 checks passed and 4 controls failed.",
        "- AUC of the attack before removal: 0.830",
        "- Queries: 300 of 1000",
        "- Control `refusal_wrapper`: failed",
        "| LiRA AUC | 0.51 | 0.5, 0.51, 0.52 | +0 (-0.01686 to +0.01686) | 0.05, both | passed |",
        "| bytes | 0 | same bytes | +0 (+0 to +0) | 0, both | passed |",
        "| removal | 12 | 3e+12 |",
        "Retraining takes 8 times the CPU time of the removal.",
        "- Deleted: personal prompt of client 7",
        "- Kept: metrics.jsonl, rounds 1 to 4. Reason: figures of whole rounds, needed for the report",
        "- Ledger: all rounds, until the run is deleted",
    ):
        assert line in lines


def test_what_attacks_achieve_and_which_said_nothing_are_in_both():
    result = attack(np.arange(2.0, 12.0), np.arange(10.0), np.random.default_rng(0), resamples=50)
    found = replace(
        CERTIFICATE,
        verdict=by_bytes(CHECKS[1], VERDICT),
        attacks=({"attack": "loss", "model": "full", "result": result},),
        left_out={"LiRA": "no shadow models"},
        rows=(60, 50),
        verification=Cost(500.0, 1e14),
        fallen_back_because="bytes differ",
    )
    fields = as_dict(found)
    assert json.loads(json.dumps(fields, allow_nan=False)) == fields
    assert fields["attacks"][0]["result"]["auc"]["value"] == pytest.approx(0.68)
    assert fields["verdict"]["by_attacks"] == "pass"
    assert fields["left_out"] == {"LiRA": "no shadow models"}
    lines = to_markdown(found).splitlines()
    for line in (
        "- Queries: 300 of 1000, about 60 training and 50 held-out rows",
        "- Left out: LiRA: no shadow models",
        "- Fallen back from: `merge`, which did not pass: bytes differ",
        "| models for the verification | 500 | 1e+14 |",
    ):
        assert line in lines
    assert any(line.startswith("| loss | full | 0.680 (") for line in lines)


def test_a_failure_is_not_worded_as_a_pass():
    verdict = judge(FAILED, full_auc=0.83, controls=dict.fromkeys(CONTROLS, FAILED))
    text = to_markdown(
        replace(CERTIFICATE, verdict=verdict, method="merge", exactness="approximate")
    )
    assert "## Verification: fail" in text
    assert "LiRA AUC is 0.9, +0.39 from retrained models" in text
    assert "not the same as if the client had never taken part" in text


def test_an_approximate_removal_promises_no_checks_that_were_not_made():
    text = to_markdown(replace(CERTIFICATE, verdict=None, exactness="approximate"))
    assert "approximate: not the same as if the client had never taken part\n" in text
    assert "checks" not in text


def test_nothing_is_kept_without_a_reason():
    with pytest.raises(ConfigError, match=r"expected a reason .* got none for moments"):
        replace(CERTIFICATE, retained=(Retained("moments", " "),))
