"""Fixtures that several packages' tests share."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import settings
from matplotlib.figure import Figure

from fedllm_flwr import actions, records
from fedllm_flwr.averaging import dense, product_of
from fedllm_flwr.client_app import app
from fedllm_flwr.compose import compose_run
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import open_or_create
from fedllm_flwr.journal import Journal
from fedllm_flwr.loopback import LoopbackGrid
from fedllm_flwr.runs import charts, checkpoints
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.progress import Progress
from fedllm_flwr.seeding import derive_seed
from strategies import FedGrass, FedPrompt, FedResPrompt, Hosting, RoundStrategy, build_strategy
from strategies.fedprompt import first_parts
from strategies.observer import Checkpointed

# A third of Hypothesis's usual examples, and no deadline of wall-clock time on a busy machine. The usual number is
# `pytest --hypothesis-profile=default`.
settings.register_profile("quick", max_examples=33, deadline=None)
settings.load_profile("quick")

LONG = ("simulation", "slow")
"""Marks of tests that take long, the longest first."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where files are dealt to workers, the long ones first, so that none is left for one worker at the end."""
    if not hasattr(config, "workerinput"):
        return
    ranks: dict[Path, int] = {}
    for item in items:
        rank = next((n for n, mark in enumerate(LONG) if item.get_closest_marker(mark)), len(LONG))
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread: the same bits as in a worker, and no contention between test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def charts_undrawn() -> Iterator[None]:
    """Reports with empty charts: drawing takes more than half of a tiny run. Tests in ``runs`` have them drawn."""

    def empty(figure: Figure, name: str, title: str) -> str:
        return f"<svg id={quoteattr(name)}><title>{escape(title)}</title></svg>"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "inline_svg", empty)
        yield


@pytest.fixture
def smoke(tmp_path: Path) -> Callable[..., RunConfig]:
    """The smoke experiment with overrides, into the test's own folder."""

    def composed(*overrides: str) -> RunConfig:
        return compose_run(["experiment=smoke", f"out_dir={tmp_path / 'run'}", *overrides]).config

    return composed


@pytest.fixture
def act(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Do an action; returns standard output."""

    def done(*overrides: str) -> str:
        capsys.readouterr()
        assert actions.act(compose_run(overrides), overrides) == 0
        return capsys.readouterr().out

    return done


MICRO = (
    "experiment=smoke", "task.train_rows=36", "task.validation_rows=12", "task.test_rows=12",
    "partition=quantity_skew", "partition.num_clients=4", "partition.min_train_rows=2",
    "optimizer.learning_rate=0.02", "client.batch_size=4", "client.local_epochs=0", "client.local_steps=2",
    "runtime.cohort_tokens=0", "runtime.node_wait_seconds=5", "strategy.max_retries=0", "baselines=none",
    "num_rounds=3", "evaluate_every=3",
)  # fmt: skip
"""Four clients of different sizes, two steps each, one after the other: about 0.2 CPU seconds a round."""

MICRO_METHODS = {
    "fedlora": ("method.rank=4", "method.alpha=8", "method.target_modules=[q_proj,v_proj]"),
    "fedprompt": ("strategy=prompt_mean", "method.length=3", "task.template=read"),
    "fedresprompt": ("strategy=controller_mean", "method.length=2", "method.controller_size=4",
                     "method.reservoir_size=20", "method.input_size=6", "method.server_model=surrogate"),
    "fedgrass": ("strategy=row_mean", "client.clip_norm=0", "method.rank=4", "method.target_modules=[q_proj,v_proj]"),
}  # fmt: skip
"""The smallest of each method."""


@pytest.fixture(scope="session")
def micro() -> Callable[..., RunConfig]:
    """The smallest run that has everything; its ``out_dir`` is for the caller to choose."""

    def composed(*overrides: str) -> RunConfig:
        named = [o.removeprefix("method=") for o in overrides if o.startswith("method=")]
        return compose_run([*MICRO, *MICRO_METHODS[(named or ["fedlora"])[0]], *overrides]).config

    return cache(composed)


FACTS = (
    "task=author_facts", "task.loss=vocabulary", "task.clients=2", "task.authors=2", "partition=natural",
    "partition.num_clients=2", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0",
)  # fmt: skip


@pytest.fixture(scope="session")
def facts_run() -> tuple[str, ...]:
    """Overrides of the ``micro`` run: two clients with twelve facts each, and probes."""
    return FACTS


Tamper = Callable[[list[Message], list[Message]], list[Message]]


class EdgeGrid(LoopbackGrid):
    """Carries real messages, keeps copies of them, and may spoil replies at the transport's edge.

    Args:
        num_nodes: Nodes to offer.
        tamper: Gets the messages of one exchange and their replies; returns the replies to hand out.
        client_app: Who answers; by default the project's ClientApp.
        node_config: Facts that every node has.
    """

    def __init__(
        self,
        num_nodes: int = 2,
        tamper: Tamper | None = None,
        client_app: Callable[[Message, Context], Message] = app,
        node_config: dict[str, str | int | float | bool] | None = None,
    ) -> None:
        super().__init__(client_app, num_nodes, node_config)
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        self._tamper = tamper

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        asked = list(messages)
        replies = super().send_and_receive(asked, timeout=timeout)
        self.sent += deepcopy(asked)
        if self._tamper is not None:
            replies = self._tamper(asked, replies)
        self.replies += deepcopy(replies)
        return replies


@pytest.fixture(scope="session")
def edge_grid() -> type[EdgeGrid]:
    """A loopback grid that spies, and spoils replies where it is told to."""
    return EdgeGrid


@pytest.fixture(scope="session")
def wire_bytes() -> Callable[[Message], bytes]:
    """Everything that Flower would put on the network for a message, as Flower's own code lists it."""

    def serialised(message: Message) -> bytes:
        nested = get_all_nested_objects(deepcopy(message))
        return b"".join(piece.deflate() for piece in nested.values())

    return serialised


@pytest.fixture(scope="session")
def spoil() -> Callable[..., Tamper]:
    """Make a ``tamper`` for :class:`EdgeGrid` that rewrites the replies to training messages.

    Its argument gets the decoded infos and parts of a reply and changes them in place, or returns a whole reply.
    """

    def make(change: Callable[..., Message | None], *, rounds: Sequence[int] = ()) -> Tamper:
        def rewritten(asked: Message, reply: Message) -> Message:
            if reply.metadata.message_type != records.TRAIN:
                return reply
            if rounds and records.read_body(asked)["server-round"] not in rounds:
                return reply
            body, parts = records.read(reply, records.ANSWER)
            parts = {name: values.copy() for name, values in parts.items()}
            replaced = change(asked, body["clients"], parts)
            if replaced is not None:
                return replaced
            return Message(records.answer(body, parts, "float32", 1), reply_to=asked)

        def tamper(asked: list[Message], replies: list[Message]) -> list[Message]:
            by_id = {message.metadata.message_id: message for message in asked}
            return [rewritten(by_id[r.metadata.reply_to_message_id], r) for r in replies]

        return tamper

    return make


@dataclass
class Played:
    """What one pass of a strategy over its rounds left."""

    strategy: RoundStrategy
    result: Result
    run: RunDirectory
    grid: LoopbackGrid

    @property
    def sha(self) -> str:
        """Hash of everything that a next round would depend on."""
        return records.arrays_sha256(self.strategy.checkpoint(0).arrays)

    def product(self, layer: str) -> np.ndarray:
        """The update of one layer that the server holds: adapter and carried delta."""
        model = self.strategy.model
        carried = dense(model.delta[layer]) if layer in model.delta else 0.0
        return dense(product_of(model.factors[layer])) + carried

    @property
    def effects(self) -> dict[str, np.ndarray]:
        """What training has changed: the update of each layer, or the way that each part of a prompt has gone."""
        if isinstance(self.strategy, FedPrompt):
            start = first_parts(self.strategy.config)
            return {
                name: values - start[name.partition("/")[0]]
                for name, values in self.strategy.parts.items()
            }
        if isinstance(self.strategy, FedResPrompt):
            start = self.strategy.spec.start(derive_seed(self.strategy.config.seed, "controller"))
            values = self.strategy.controller
            return {"controller": values - start.numpy()[: values.size]}
        if isinstance(self.strategy, FedGrass):
            return {name: update.values for name, update in self.strategy.changed.items()}
        return {layer: self.product(layer) for layer in self.strategy.model.factors}


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Played]:
    """Run, or go on with, the rounds of a configuration: strategy, journal and checkpoints, without reports."""

    def played(
        config: RunConfig,
        *,
        grid: LoopbackGrid | None = None,
        folder: Path | None = None,
        splits: tuple[str, ...] = (),
        flower: bool = False,
    ) -> Played:
        """Play.

        Args:
            config: The run.
            grid: By default a loopback grid of the configured number of nodes.
            folder: A run directory to go on with; by default a new one.
            splits: What the clients evaluate; by default nothing.
            flower: Use Flower's own loop instead of the strategy's.
        """
        run = open_or_create(config, folder or tmp_path_factory.mktemp("run") / "run")
        facts = {"state-path": str(run.path / "clients")}
        grid = grid or EdgeGrid(config.runtime.num_nodes, node_config=facts)
        journal = Journal(run, config, Progress(StringIO()))
        saved = checkpoints.latest(run.checkpoints)
        journal.resume(saved.server_round if saved else -1)
        hosting = Hosting(grid, config.runtime.node_wait_seconds, journal.note, journal.count)
        hosting.refresh()
        strategy = build_strategy(config, hosting, journal, task_kind="classification")
        strategy.evaluated_splits = splits
        if flower:
            result = Strategy.start(strategy, grid, strategy.arrays(), config.num_rounds)
        else:
            resume_from = (
                Checkpointed(saved.server_round, saved.arrays, saved.state) if saved else None
            )
            result = strategy.start(grid, resume_from=resume_from)
        return Played(strategy, result, run, grid)

    return played
