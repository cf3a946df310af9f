"""What may cross the wire is a closed list; everything else is searched for in the serialised bytes and not found."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from clients.personal import PersonalStore
from clients.workspace import open_workspace
from fedllm_flwr.core import run, whole_json
from fedllm_flwr.models.generation import Adaptation
from fedllm_flwr.tasks.base import SPLITS
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.unlearning.questions import Plan, sizes
from strategies import Hosting
from strategies.baselines import Recorder
from strategies.examination import Examination

Fixture = Callable[..., Any]
RECORD_KEYS = {"package-version", "body", "parts", "codec"}
COMMON = {"config", "fingerprint", "server-round", "partition-ids", "run"}
LORA = {"side-held", "delta-ranks"}
DOWN = {
    "train": COMMON | {"learning-rate"},
    "evaluate": COMMON | {"splits", "template"},
    "query.describe": set(),
}
OWN_DOWN = {
    "fedlora": {"train": LORA | {"side"}, "evaluate": LORA},
    "fedprompt": {"train": set(), "evaluate": set()},
}
"""What a method adds to a message's body."""
UP = {
    "train": {"clients"},
    "evaluate": {"clients"},
    "query.describe": {"partition-id", "num-partitions"},
}
CLIENT = {"partition-id", "num-examples", "loss", "steps", "tokens", "cpu-seconds", "error"}
GROUP = {"loss_sum", "correct", "total"}
SUMS = {"correct", "total", "loss_sum", "label_tokens", "characters"}
CARRIES = {"stack": {"delta"}, "residual": {"adapter", "delta"}}
"""Parts that a server may send, by rule; the others send the adapter."""


@pytest.fixture(scope="module")
def spied(configured: Fixture, play: Fixture) -> Callable[[str], Any]:
    """Two rounds of a case, evaluated on both held-out splits."""

    def played(case: str) -> Any:
        return play(configured(case, "num_rounds=2"), splits=("validation", "test"))

    return played


def parts_down(config: Any) -> set[str]:
    """The parts that a server may send under a configuration; clusters count as one."""
    if config.method.name == "fedprompt":
        return (
            {"shared", "cluster", "cluster-start"} if config.method.cluster_length else {"shared"}
        )
    return CARRIES.get(config.strategy.name, {"adapter"})


def parts_up(config: Any) -> set[str]:
    """The parts that a client may send."""
    if config.method.name == "fedprompt":
        return {"shared", "cluster"} if config.method.cluster_length else {"shared"}
    return {"adapter"}


def test_only_the_listed_records_parts_and_dtypes_cross_the_wire(case: str, spied: Fixture) -> None:
    played = spied(case)
    grid, config = played.grid, played.strategy.config
    weighs = config.fairness.name != "none"
    seen = set()
    for message in grid.sent:
        kind = message.metadata.message_type
        keys = DOWN[kind] | OWN_DOWN[config.method.name].get(kind, set())
        keys |= {"group-weights"} if weighs and kind == "train" else set()
        parts = {name.partition("/")[0] for name in checked(message, "instruction", keys)}
        assert parts <= (parts_down(config) if kind != "query.describe" else set())
        seen |= parts
    assert seen == parts_down(config)
    for reply in grid.replies:
        kind = reply.metadata.message_type
        parts = checked(reply, "answer", UP[kind])
        clients = json.loads(reply.content["answer"]["body"]).get("clients", [])
        names = parts_up(config) if kind == "train" else set()
        assert set(parts) == {f"{c['partition-id']}/{name}" for c in clients for name in names}
        for client in clients:
            check_client(client, kind, config)


def check_client(client: dict[str, Any], kind: str, config: Any) -> None:
    """What one client says of itself: counts and sums."""
    clustered = (
        {"cluster"} if config.method.name == "fedprompt" and config.method.cluster_length else set()
    )
    grouped = {"groups"} if config.fairness.name != "none" else set()
    if kind == "train":
        personal = {"personal"} if getattr(config.method, "personal_length", 0) else set()
        assert set(client) == CLIENT | clustered | grouped | personal
        for sums in client.get("groups", {}).values():
            assert set(sums) == GROUP
        return
    measured = {"groups"} if config.fairness.groups != "none" else set()
    assert set(client) == {"partition-id", "splits"} | clustered | measured
    assert {name: set(sums) for name, sums in client["splits"].items()} == {
        "validation": SUMS,
        "test": SUMS,
    }
    for groups in client.get("groups", {}).values():
        assert all(set(sums) == SUMS for sums in groups.values())


def test_a_personal_prompt_is_in_no_message(
    configured: Fixture, play: Fixture, wire_bytes: Fixture
) -> None:
    played = play(configured("prompt_personal"), splits=("validation", "test"))
    stores = [
        PersonalStore(context, played.strategy.run) for context in played.grid.contexts.values()
    ]
    own = [stores[p % 2].load(p, before) for p in range(4) for before in (2, 3, 9)]
    assert all(v is not None for v in own), "each client after rounds 1, 2 and 3"
    everything = b"".join(
        wire_bytes(message) for message in (*played.grid.sent, *played.grid.replies)
    )
    shared = played.strategy.parts["shared"]
    last = [m for m in played.grid.sent if m.metadata.message_type == "evaluate"][-1]
    assert shared[:8].tobytes() in wire_bytes(last), "the search finds what does cross"
    width = shared.size // played.strategy.config.method.length
    for values in own:
        for token in values.reshape(-1, width):
            for start in range(0, width - 3):
                assert token[start : start + 4].tobytes() not in everything


def checked(message: Message, key: str, body_keys: set[str]) -> dict[str, int]:
    """Check the records of a message by their exact keys, and return its parts' sizes."""
    content = message.content
    parts = dict(json.loads(content[key]["parts"]))
    metrics = {"metrics"} if key == "answer" else set()
    assert set(content) == {key, *metrics, *(["arrays"] if parts else [])}
    assert set(content[key]) == RECORD_KEYS
    assert all(isinstance(value, str) for value in content[key].values())
    assert set(json.loads(content[key]["body"])) == body_keys
    if metrics:
        assert set(content["metrics"]) == {"num-examples"}
    if parts:
        assert list(content["arrays"]) == ["flat"]
        array = content["arrays"]["flat"].numpy()
        assert (array.dtype, array.shape) == (np.float32, (sum(parts.values()),))
    return parts


@pytest.mark.parametrize("sharing", ["both", "b_only", "alternating"])
def test_one_shared_side_halves_what_is_sent(sharing: str, micro: Fixture, play: Fixture) -> None:
    played = play(micro(f"method.sharing={sharing}", "num_rounds=2", "runtime.num_nodes=4"))
    shapes, rank = played.strategy.shapes, played.strategy.spec.rank
    a = rank * sum(shape.in_features for shape in shapes)
    b = rank * sum(shape.out_features for shape in shapes)
    sizes = [
        r.content["arrays"]["flat"].numpy().size
        for r in played.grid.replies
        if r.metadata.message_type == "train"
    ]
    one, two = {"both": (a + b, a + b), "b_only": (b, b), "alternating": (b, a)}[sharing]
    assert sizes == [one] * 4 + [two] * 4
    down = {
        m.content["arrays"]["flat"].numpy().size for m in played.grid.sent if "arrays" in m.content
    }
    assert down == ({b} if sharing == "b_only" else {a + b})


def test_no_row_no_label_and_no_row_id_crosses_the_wire(
    micro: Fixture, edge_grid: Fixture, wire_bytes: Fixture, tmp_path: Path
) -> None:
    config = micro("baselines=all", "num_rounds=1", "method.dropout=0.1", f"out_dir={tmp_path}")
    grid = edge_grid()
    run(grid, config, config.out_dir)
    everything = b"".join(wire_bytes(message) for message in (*grid.sent, *grid.replies))
    assert b"learning-rate" in everything, "the search finds what does cross"
    task = load_task(config.task.options(""), config.seed)
    rows = [row for split in task.splits.values() for row in split]
    assert len(rows) == 60
    for row in rows:
        for secret in (row.text, row.text[:24], row.row_id, f'"{row.target}"'):
            assert secret.encode() not in everything


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """A user's file, in a folder whose name is nobody's business."""
    path = tmp_path / "hospital-7" / "patients.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows(
            [f"patient {n} says number {n * n}", "well" if n % 2 else "ill"] for n in range(60)
        )
    return path


OWN = ("task=csv", "task.train_rows=0", "task.validation_rows=0", "task.test_rows=0",
       "partition=iid", "partition.num_clients=2", "num_rounds=1")  # fmt: skip


def test_a_file_on_a_node_stays_there(
    micro: Fixture, play: Fixture, edge_grid: Fixture, wire_bytes: Fixture, own_file: Path
) -> None:
    grid = edge_grid(node_config={"data-path": str(own_file)})
    played = play(micro(*OWN), grid=grid, splits=("test",))
    assert played.run.records("round")[-1]["num_examples"] > 0
    everything = b"".join(wire_bytes(message) for message in (*grid.sent, *grid.replies))
    for secret in (b"patient", b"hospital", b"says number"):
        assert secret not in everything


@pytest.mark.parametrize(
    "damage", ["a cell is missing", "the label is unknown", "the file is gone"]
)
def test_a_node_with_bad_data_does_not_quote_it(
    damage: str,
    micro: Fixture,
    play: Fixture,
    edge_grid: Fixture,
    wire_bytes: Fixture,
    own_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if damage == "the file is gone":
        own_file.unlink()
    else:
        cells = "patient 99" if damage == "a cell is missing" else "patient 99,patient 100 is dead"
        own_file.write_text(own_file.read_text() + cells + "\n")
    grid = edge_grid(1, node_config={"data-path": str(own_file)})
    with pytest.raises(Exception, match="0 of 2 clients"):
        play(micro(*OWN, "task.labels=[ill,well]"), grid=grid)
    errors = [reply for reply in grid.replies if reply.has_error()]
    assert "this node cannot use its data" in errors[0].error.reason
    for error in errors:
        assert b"patient" not in wire_bytes(error)
        assert b"hospital" not in wire_bytes(error)
    assert "patients.csv" in caplog.text, "the node's own log says what is wrong"


@pytest.mark.parametrize("kind", ["facts", "canaries"])
def test_a_verification_tells_figures_of_rows_and_no_row(
    kind: str, micro: Fixture, facts_run: tuple[str, ...], edge_grid: Fixture, wire_bytes: Fixture
) -> None:
    secret = (
        "task.loss=vocabulary",
        "task.canaries=3",
        "task.canary_client=1",
        "task.test_rows=40",
    )
    config = micro(*(facts_run if kind == "facts" else secret))
    grid = edge_grid(2, node_config={"forget": "1"})
    recorder = Recorder(lambda text: None)
    hosting = Hosting(grid, 5.0, lambda text: None, recorder.count)
    hosting.refresh()
    examination = Examination(config, hosting, recorder, 1)
    plan = Plan(8, 8, reworded=2, paired=2, probed=2, candidates=3, relearn_steps=(1,), seed=0)
    examination.examine(Adaptation(), plan)
    asked = [m for m in grid.sent if m.metadata.message_type == "query.examine"]
    for message in asked:
        keys = {"config", "fingerprint", "model", "plan", "refuses", "partition-ids"}
        assert checked(message, "instruction", keys) == {}
    replies = [m for m in grid.replies if m.metadata.message_type == "query.examine"]
    (first,), (second,) = (json.loads(r.content["answer"]["body"])["clients"] for r in replies)
    assert set(first) == {"partition-id", "material"}
    assert set(first["material"]) == {
        "members",
        "others",
        "wordings",
        "unfit",
        "several_tokens",
        "forms",
        "canaries",
    }
    assert set(second) == {"partition-id", "queries"}
    parts = checked(replies[1], "answer", {"clients"})
    assert parts == {f"1/{name}": n for name, n in sizes(plan, examination.material()).items()}
    everything = b"".join(wire_bytes(m) for m in (*grid.sent, *grid.replies))
    assert b"relearn_steps" in everything, "the search finds what does cross"
    work = open_workspace(whole_json(config))
    rows = [row for client in work.clients for split in SPLITS for row in getattr(client, split)]
    rows += [probe.row for probe in work.task.probes]
    for row in rows:
        for text in (row.text, row.text[:24], row.row_id, f'"{row.target}"'):
            assert text.encode() not in everything


def test_bytes_of_an_adapter_are_four_a_value(micro: Fixture, play: Fixture) -> None:
    played = play(micro("runtime.num_nodes=4", "num_rounds=1"))
    for reply in played.grid.replies:
        if reply.metadata.message_type == "train":
            array = reply.content["arrays"]["flat"]
            assert array.numpy().nbytes == 4 * played.strategy.layout.size
            assert len(array.data) - array.numpy().nbytes <= 128, "the header of a .npy file"


@pytest.mark.parametrize(("codec", "width"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_codecs_set_the_width_of_a_value_and_nothing_else(
    codec: str, width: int, micro: Fixture, play: Fixture
) -> None:
    played = play(micro(f"wire={codec}", "runtime.num_nodes=4", "num_rounds=1"))
    arrays = [r.content["arrays"]["flat"] for r in played.grid.replies if "arrays" in r.content]
    assert {a.numpy().nbytes for a in arrays} == {width * played.strategy.layout.size}
    exact = play(micro("runtime.num_nodes=4", "num_rounds=1"))
    for layer in played.strategy.model.factors:
        # bfloat16 keeps 8 bits of each factor, once down and once up
        np.testing.assert_allclose(
            played.product(layer),
            exact.product(layer),
            rtol=0,
            atol=4e-2 * np.abs(exact.product(layer)).max(),
        )


def test_the_workspace_of_a_message_holds_no_node_fact(micro: Fixture, own_file: Path) -> None:
    config = micro(*OWN, f"runtime.data_path={own_file}")
    assert str(own_file) in whole_json(config)
    assert "hospital" not in config.to_json()
    assert len(open_workspace(whole_json(config)).clients) == 2
