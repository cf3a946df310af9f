from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clients.questions import Questions
from clients.workspace import open_workspace
from fedllm_flwr.averaging import LowRank
from fedllm_flwr.config import RunConfig
from fedllm_flwr.core import whole_json
from fedllm_flwr.errors import RunStoppedError, WireError
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.models.shapes import layer_shapes
from fedllm_flwr.unlearning.questions import Material, Plan, queries, sizes
from strategies import Hosting
from strategies.baselines import Recorder
from strategies.examination import Examination, read_figures, read_material
from strategies.exchange import ClientReply

Fixture = Callable[..., Any]
PLAN = Plan(8, 8, reworded=1, paired=1, probed=2, candidates=0, relearn_steps=(1,), seed=2)
MATERIAL = Material(12, 18, ("choice",), ("pair",), 0, {}, True)


@pytest.fixture(scope="module")
def config(micro: Fixture, facts_run: tuple[str, ...]) -> RunConfig:
    found: RunConfig = micro(*facts_run)
    return found


@pytest.fixture
def asked(config: RunConfig, edge_grid: Fixture) -> Callable[[str], Examination]:
    def opened(forget: str) -> Examination:
        recorder = Recorder(lambda text: None)
        grid = edge_grid(2, node_config={"forget": forget})
        hosting = Hosting(grid, 5.0, lambda text: None, recorder.count)
        hosting.refresh()
        return Examination(config, hosting, recorder, 1)

    return opened


def test_answers_over_the_wire_are_those_of_the_client(
    config: RunConfig, asked: Callable[[str], Examination]
) -> None:
    draws = np.random.default_rng(1)
    delta = {
        s.name: LowRank(
            0.1 * draws.standard_normal((s.out_features, 1)).astype(np.float32),
            draws.standard_normal((1, s.in_features)).astype(np.float32),
        )
        for s in layer_shapes(ModelRef("tiny"), ("q_proj", "v_proj"))
    }
    questions, remote = Questions(open_workspace(whole_json(config)), 1), asked("1")
    assert remote.material() == questions.material
    for model, refuses in ((Adaptation(delta=delta), False), (Adaptation(), True)):
        wanted = questions.ask(model, PLAN, refuses=refuses)
        found = remote.examine(model, PLAN, refuses=refuses)
        assert set(found) == set(wanted)
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-6)
            assert found[name].dtype == np.float64


def test_a_client_that_says_nothing_stops_it(asked: Callable[[str], Examination]) -> None:
    with pytest.raises(
        RunStoppedError, match="client 1: expected one that has asked to be forgotten"
    ):
        asked("0").material()


def answer(**changes: Any) -> ClientReply:
    parts = {n: np.full(size, 0.5, np.float32) for n, size in sizes(PLAN, MATERIAL).items()}
    info: dict[str, Any] = {"queries": queries(PLAN, MATERIAL)}
    return ClientReply(1, changes.pop("info", info), parts | changes)


def test_a_good_answer_is_taken_as_it_is() -> None:
    found = read_figures(answer(), PLAN, MATERIAL)
    assert {name: values.size for name, values in found.items()} == sizes(PLAN, MATERIAL)
    negative = np.full(8, -0.5, np.float32)
    assert (
        read_figures(answer(**{"members/min_k": negative}), PLAN, MATERIAL)["members/min_k"][0]
        == -0.5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members/losses": np.zeros(7)}, "figures: expected those of the plan"),
        ({"rows": np.zeros(7)}, "figures: expected those of the plan"),
        ({"others/losses": np.full(8, np.nan)}, "others/losses: expected finite figures"),
        ({"choice/others": np.full(1, -1.0)}, "choice/others: expected figures >= 0"),
        ({"info": {"queries": {"membership": 3}}}, "queries: expected {'membership': 16"),
        ({"info": {}}, "queries: expected an object, got None"),
    ],
)
def test_a_bad_answer_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=rf"^client 1: {message}"):
        read_figures(answer(**changes), PLAN, MATERIAL)


@pytest.mark.parametrize(
    "change",
    [{"members": -1}, {"wordings": "choice"}, {"wordings": ["a" * 65]}, {"wordings": ["a/b"]},
     {"wordings": [str(n) for n in range(17)]}, {"several_tokens": 1}, {"unfit": []}],
)  # fmt: skip
def test_bad_material_is_refused(change: dict[str, Any]) -> None:
    told = {
        "members": 12,
        "others": 18,
        "canaries": 0,
        "wordings": ["choice"],
        "forms": ["pair"],
        "unfit": {},
        "several_tokens": True,
    }
    assert read_material(ClientReply(1, {"material": told}, {})) == replace(MATERIAL)
    with pytest.raises(WireError, match=r"^client 1: m"):
        read_material(ClientReply(1, {"material": told | change}, {}))
