"""In how many of 20 seeds a model that was really retrained passes the attacks, and whether the controls fail.

    python -m benchmarks.verification [--quick]

Two clients train with an odd one (`benchmarks.odd_client`) on the tiny model until it can be told from held-out rows
like its own. Then 20 models are trained without it, from 20 seeds, and each is judged by attacks alone (the checks of
`fedllm_flwr.unlearning.battery`, settings `verification=quick`) beside five others of them, and by the defaults
beside eight. Named baselines: the model before removal, and the four controls, which have to fail beside each five.

Nothing here is about speed: the figures are counts. With --quick 10 models and not 20.

The last line is one JSON object:
    retrained: how many retrained models were judged.
    retrained_passed, retrained_failed, retrained_inconclusive: of these, how many.
    retrained_passed_default: how many pass by the defaults: beside eight, and a third of the full model's difference is
        the margin, not half.
    controls_missed: judgements of controls that were not `failed`, of 4 for each retrained model.
    full_auc: least over the judgements of the best AUC on the model before removal.
"""

import argparse
import contextlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import torch

from benchmarks.odd_client import ODD, odd_rows, overrides
from fedllm_flwr.actions import run_experiment
from fedllm_flwr.compose import compose_run
from fedllm_flwr.forgetting.command import unlearn
from fedllm_flwr.forgetting.examiner import LocalExaminer
from fedllm_flwr.forgetting.request import read_request
from fedllm_flwr.forgetting.rivals import control, reference, utility_of
from fedllm_flwr.forgetting.verify import Asking, model_of, plan_of
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.settings.verification import VerificationConfig
from fedllm_flwr.unlearning.battery import Battery
from fedllm_flwr.unlearning.verdict import CONTROLS, outcome_of

SEEDS, QUICK_SEEDS = 20, 10
QUICK = compose_run(["action=verify", "verification=quick"]).verification
DEFAULT = VerificationConfig()
GATES = {"retrained_passed": 0.95, "controls_missed": 0.0}


def asking(folder: Path) -> Asking:
    """The run with the odd client, a removal of it, and its questions."""
    rows = folder / "rows.csv"
    odd_rows(rows)
    settings = overrides(rows)
    run_experiment(compose_run(settings).config, settings, str(folder / "run"))
    composed = compose_run(["action=verify", "verification=quick", *settings])
    source = RunDirectory.open(folder / "run")
    request = read_request(source, str(ODD), "retrain", composed.config.runtime)
    new = RunDirectory.open(unlearn(request, folder / "new", [], run_experiment))
    examiner = LocalExaminer(request.config, ODD)
    plan = plan_of(request, composed.verification, examiner.material())
    return Asking(request, new, plan, examiner, run_experiment, [])


def counts(asked: Asking, models: int) -> dict[str, float]:
    """What the last line has."""
    request = asked.request
    told = [asked.made(reference(request, number)) for number in range(1, models + 1)]
    stay = set(told[0].utility)
    retrained = [model_of(each, stay) for each in told]
    controls = [model_of(asked.made(control(request, name)), stay) for name in CONTROLS]
    full = model_of(asked.told("full", request.source), stay)
    start = {c: q for c, q in utility_of(request.source, 0).items() if c in stay}
    outcomes: Counter[str] = Counter()
    missed, areas, by_default = 0, [], 0
    for number, model in enumerate(retrained):
        quick, default = (
            Battery(full, [retrained[(number + step) % models] for step in range(1, settings.retrains + 1)], None,
                    start=start, relearn_steps=(0, *asked.plan.relearn_steps), margin=settings.margin,
                    share=settings.share)
            for settings in (QUICK, DEFAULT)
        )  # fmt: skip
        checks = quick.checks(model)
        outcomes[outcome_of(checks)] += 1
        by_default += outcome_of(default.checks(model)) == "passed"
        missed += sum(outcome_of(quick.checks(each)) != "failed" for each in controls)
        areas.append(quick.full_auc)
        odd = [f"{c.name}: {c.measured:.3g}" for c in checks if c.outcome != "passed"]
        print(f"seed {number + 1}: {outcome_of(checks)} {'; '.join(odd)}")
    found = {f"retrained_{name}": outcomes[name] for name in ("passed", "failed", "inconclusive")}
    return {"retrained": models, **found, "retrained_passed_default": by_default, "controls_missed": missed,
            "full_auc": min(areas)}  # fmt: skip


def main() -> None:
    """Measure, print, and say where a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        figures = counts(asking(Path(folder)), QUICK_SEEDS if options.quick else SEEDS)
    rate = figures["retrained_passed"] / figures["retrained"]
    for name, holds in (
        ("retrained_passed", rate >= GATES["retrained_passed"]),
        ("controls_missed", figures["controls_missed"] <= GATES["controls_missed"]),
    ):
        print(f"{name}: {figures[name]:g}, gate {GATES[name]:g}: {'ok' if holds else 'MISSED'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
