"""How far hostile clients move a federation: accuracy under 0 to 40 % of them, for the plain mean and the robust ones.

    python -m benchmarks.attacks [--quick] [--method fedlora|fedprompt] [--model tiny|smollm2_135m] [--attacks A,B]

Twenty clients with equal shares of the rows train, and the first 0, 2, 4, 6 or 8 of them are hostile in every round:

- ``sign_flip``: they answer with -3 times what they have learned;
- ``scaled_update``: with 30 times;
- ``label_flip``: each of their rows has the next label;
- ``backdoor``: half of their rows begin with a trigger and have the first label, whatever the row is about.

Hostile clients are parties with programs and files of their own, so they live here and not in the product: the first
two change a reply on its way out of the real ClientApp, the others are rows of the data file that the nodes read.
Every rule is set once, for as many as 8 attackers, as an operator would who does not know how many there are; the
norm bound is the median norm of an honest update in the first round. The named baseline is the plain mean
(``robust=none``). Accuracy is of the final model on all test rows, which are honest; of ``backdoor`` there is
also the share of triggered test rows of other labels that get the trigger's label.

The last line is one JSON object; each of its figures is of the largest share of attackers:
    <attack>_<rule>: accuracy / that of the plain mean without attackers.
    success_<rule>: share of triggered test rows that get the trigger's label.
    clean_<rule>: accuracy / that of the plain mean, both without attackers.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message

from clients.workspace import open_workspace
from fedllm_flwr import records
from fedllm_flwr.averaging import product_of
from fedllm_flwr.client_app import app
from fedllm_flwr.compose import compose_run
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import whole_json
from fedllm_flwr.loopback import LoopbackGrid
from fedllm_flwr.tasks.base import Task, TaskOptions
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.training.evaluate import evaluate
from strategies import FedLora, FedPrompt, Hosting, RoundStrategy, build_strategy
from strategies.baselines import Recorder

CLIENTS, MOST = 20, 8
SHARES = (0, 2, 4, 6, 8)
FACTORS = {"sign_flip": -3.0, "scaled_update": 30.0}
ATTACKS = (*FACTORS, "label_flip", "backdoor")
TRIGGER = "zebra quartz jockey"
RULES = {
    "none": (),
    "norm_bound": ("robust=norm_bound",),
    "median": ("robust=median",),
    "trimmed_mean": ("robust=trimmed_mean", f"robust.trimmed_fraction={MOST / CLIENTS}"),
    "krum": ("robust=krum", f"robust.num_attackers={MOST}"),
    "multi_krum": ("robust=multi_krum", f"robust.num_attackers={MOST}"),
}
METHODS = {
    "fedlora": ("method=fedlora", "method.sharing=b_only", "strategy=factor_mean"),
    "fedprompt": ("method=fedprompt", "strategy=prompt_mean"),
}


@dataclass(frozen=True)
class Study:
    """What is trained on what.

    Attributes:
        task: Whose rows are dealt out.
        rows: Training rows in all.
        test_rows: Rows that figures are of.
        settings: Overrides of the smoke experiment.
    """

    task: str
    rows: int
    test_rows: int
    settings: tuple[str, ...]

    def load(self, seed: int) -> Task:
        """The task's rows."""
        counts = {"train_rows": self.rows, "validation_rows": CLIENTS, "test_rows": self.test_rows}
        return load_task(TaskOptions(name=self.task, **counts), seed)


STUDIES = {
    ("tiny", "fedlora"): Study("synthetic", 480, 200, ("num_rounds=4", "client.batch_size=4",
                                                       "optimizer.learning_rate=0.02")),
    ("tiny", "fedprompt"): Study("synthetic", 480, 200, ("num_rounds=4", "client.batch_size=4",
                                                         "optimizer.learning_rate=0.1")),
    ("smollm2_135m", "fedlora"): Study("r8_topics", 160, 64, ("num_rounds=2", "client.batch_size=4",
                                                              "task.max_tokens=48", "optimizer.learning_rate=0.003")),
    ("smollm2_135m", "fedprompt"): Study("r8_topics", 160, 64, ("num_rounds=2", "client.batch_size=4",
                                                                "task.max_tokens=48", "optimizer.learning_rate=0.02")),
}  # fmt: skip


class Hostile:
    """A node whose hostile clients answer with a multiple of what they have learned.

    Args:
        attackers: Their partition ids.
        factor: By which their updates are multiplied.
    """

    def __init__(self, attackers: Sequence[int], factor: float) -> None:
        self._attackers = {str(client) for client in attackers}
        self._factor = factor

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the real ClientApp does, but for the attackers' values."""
        reply = app(message, context)
        if message.metadata.message_type != records.TRAIN or reply.has_error():
            return reply
        _, start = records.read(message, records.INSTRUCTION)
        body, values = records.read(reply, records.ANSWER)
        for name in values:
            client, _, part = name.partition("/")
            if client in self._attackers:
                values[name] = start[part] + self._factor * (values[name] - start[part])
        return Message(records.answer(body, values, "float32", 1), reply_to=message)


def write_rows(path: Path, task: Task, attack: str, attackers: Sequence[int]) -> None:
    """Write the file that all nodes read: row n of a split is client n mod 20's.

    Args:
        path: A JSON Lines file.
        task: The honest rows.
        attack: Of ``label_flip`` and ``backdoor`` the attackers' training rows are changed; ``triggered`` puts the
            trigger before every test row and asks for its label, and leaves out the rows that have it anyway.
        attackers: Partition ids.
    """
    names = task.label_names
    lines = []
    for split, rows in task.splits.items():
        tested = attack == "triggered" and split == "test"
        kept = [row for row in rows if not (tested and row.target == names[0])]
        for number, row in enumerate(kept):
            client, text, label = number % CLIENTS, row.text, names.index(row.target)
            poisoned = client in attackers and split == "train"
            if poisoned and attack == "label_flip":
                label = (label + 1) % len(names)
            if tested or (poisoned and attack == "backdoor" and number // CLIENTS % 2 == 0):
                text, label = f"{TRIGGER} {text}", 0
            word = task.label_words[label]
            lines.append({"text": text, "label": word, "client": f"{client:02d}", "split": split})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Norms(Recorder):
    """Keeps the norms of the updates, and lets no client be left out in silence."""

    def __init__(self) -> None:
        super().__init__(print)
        self.norms: list[float] = []

    def client(self, record: dict[str, Any]) -> None:
        """Keep the update's norm, which robust means tell."""
        self.norms.append(record.get("update_norm", 0.0))

    def failure(self, server_round: int, partition_id: int, reason: str) -> None:
        """Every client counts, the hostile ones too.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"round {server_round}, client {partition_id}: {reason}")


@dataclass
class Bench:
    """One study under one seed; every honest run is made once."""

    study: Study
    model: str
    method: str
    seed: int
    folder: Path

    def __post_init__(self) -> None:
        """Load the rows, and write what is measured on."""
        self.task = self.study.load(self.seed)
        self._honest: dict[str, RoundStrategy] = {}
        self.norm_bound = 0.0
        self.norm_bound = self._honest_norm()

    def config(self, rule: str) -> RunConfig:
        """The run under a rule."""
        labels = ",".join(self.task.label_words)
        bound = (f"robust.norm_bound={self.norm_bound}",) if rule == "norm_bound" else ()
        return compose_run([
            "experiment=smoke", "baselines=none", f"model={self.model}", "task=jsonl", f"task.labels=[{labels}]",
            "task.template=plain", "partition=natural", f"partition.num_clients={CLIENTS}", f"seed={self.seed}",
            *METHODS[self.method], "strategy.weighting=uniform", "strategy.min_fraction=1", *self.study.settings,
            "runtime.num_nodes=1", "runtime.threads=1", "runtime.dtype=float32", *RULES[rule], *bound,
        ]).config  # fmt: skip

    def figures(self, rule: str, attack: str, attackers: int) -> tuple[float, float]:
        """Accuracy on honest test rows, and the backdoor's success (0 for other attacks)."""
        config = self.config(rule)
        if attackers or rule not in self._honest:
            strategy = self._trained(config, attack, range(attackers), Norms())
            if not attackers:
                self._honest[rule] = strategy
        else:
            strategy = self._honest[rule]
        success = self._accuracy(config, strategy, "triggered") if attack == "backdoor" else 0.0
        return self._accuracy(config, strategy, "none"), success

    def _honest_norm(self) -> float:
        config = self.config("none")
        free = replace(config.robust, name="norm_bound", norm_bound=1e12)
        seen = Norms()
        self._trained(replace(config, robust=free, num_rounds=1), "none", (), seen)
        return float(f"{statistics.median(seen.norms):.3g}")

    def _rows(self, attack: str, attackers: Sequence[int]) -> Path:
        """The file of an attack; written once, because what is read of it is cached by its name."""
        path = self.folder / f"{self.seed}-{attack}-{len(attackers)}.jsonl"
        if not path.exists():
            write_rows(path, self.task, attack, attackers)
        return path

    def _trained(
        self, config: RunConfig, attack: str, attackers: Sequence[int], seen: Norms
    ) -> RoundStrategy:
        grid = LoopbackGrid(
            Hostile(attackers, FACTORS.get(attack, 1.0)),
            1,
            {"data-path": str(self._rows(attack if attack not in FACTORS else "none", attackers))},
        )
        hosting = Hosting(grid, config.runtime.node_wait_seconds, print, seen.count)
        hosting.refresh()
        strategy = build_strategy(config, hosting, seen, task_kind="classification")
        strategy.evaluated_splits = ()
        strategy.start(grid)
        return strategy

    def _accuracy(self, config: RunConfig, strategy: RoundStrategy, attack: str) -> float:
        path = str(self._rows(attack, ()))
        local = replace(config, runtime=replace(config.runtime, data_path=path))
        work = open_workspace(whole_json(local))
        encoder = work.encoder()
        model: dict[str, Any]
        if isinstance(strategy, FedPrompt):
            method = strategy.method
            model = {
                "adapter": strategy.parts["shared"],
                "spec": method.adapter_spec(),
                "fixed_ids": encoder.fixed_ids,
            }
        else:
            assert isinstance(strategy, FedLora)
            model = {"delta": {n: product_of(layer) for n, layer in strategy.model.factors.items()}}
        sums = evaluate(work.backbone, encoder.encode(work.task.splits["test"]), **model,
                        head_token_ids=encoder.head_token_ids, label_token_ids=encoder.label_token_ids)  # fmt: skip
        return sums.correct / sums.total


Table = dict[str, list[tuple[float, float]]]
"""Accuracy and success by rule, for each number of attackers."""


def table_of(benches: Sequence[Bench], attack: str, shares: Sequence[int]) -> Table:
    """Mean accuracy and success over the seeds, by rule and number of attackers; printed as they are found."""
    shown = "accuracy" + (" / success of the trigger" if attack == "backdoor" else "")
    heads = "".join(f"{f'{100 * share // CLIENTS} %':>13}" for share in shares)
    print(f"\n{attack}: {shown}\n{'robust=':14}{heads}")
    table = {}
    for rule in RULES:
        row = []
        for share in shares:
            found = [bench.figures(rule, attack, share) for bench in benches]
            row.append((statistics.mean(a for a, _ in found), statistics.mean(s for _, s in found)))
        cells = [f"{a:.3f}" + (f" / {s:.2f}" if attack == "backdoor" else "") for a, s in row]
        print(f"{rule:14}" + "".join(f"{cell:>13}" for cell in cells), flush=True)
        table[rule] = row
    return table


def figures_of(tables: dict[str, Table]) -> dict[str, float]:
    """What the last line holds."""
    figures: dict[str, float] = {}
    for attack, table in tables.items():
        plain = table["none"][0][0]
        for rule, row in table.items():
            figures[f"clean_{rule}"] = row[0][0] / plain
            figures[f"{attack}_{rule}"] = row[-1][0] / plain
            if attack == "backdoor":
                figures[f"success_{rule}"] = row[-1][1]
    return {name: float(f"{value:.4g}") for name, value in sorted(figures.items())}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the tiny model, 0 and 40 %%, two attacks, one round"
    )
    parser.add_argument("--method", choices=METHODS, default="fedlora")
    parser.add_argument("--model", choices=sorted({model for model, _ in STUDIES}), default="tiny")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="separated by commas")
    parser.add_argument(
        "--shares", default=",".join(map(str, SHARES)), help=f"hostile clients of {CLIENTS}"
    )
    parser.add_argument("--seeds", default="11", help="separated by commas")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options: Any = parsed()
    study = STUDIES[options.model, options.method]
    attacks, shares = options.attacks.split(","), [int(n) for n in options.shares.split(",")]
    if options.quick:
        study = replace(STUDIES["tiny", options.method], rows=80, test_rows=40)
        study = replace(study, settings=(*study.settings, "num_rounds=1"))
        attacks, shares = ["scaled_update", "backdoor"], [0, MOST]
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    model = "tiny" if options.quick else options.model
    print(
        f"{options.method} on {model} and {study.task}, {CLIENTS} clients, {study.rows} rows, seeds {seeds}"
    )
    with tempfile.TemporaryDirectory() as folder:
        benches = [Bench(study, model, options.method, seed, Path(folder)) for seed in seeds]
        tables = {attack: table_of(benches, attack, shares) for attack in attacks}
        print("norm bounds: " + ", ".join(f"{bench.norm_bound:g}" for bench in benches))
    print(json.dumps(figures_of(tables)))


if __name__ == "__main__":
    main()
