import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as npst

from fedllm_flwr.runs import checkpoints
from fedllm_flwr.runs.checkpoints import Checkpoint, latest, save

SAVER = """
import sys
from pathlib import Path
import numpy as np
from fedllm_flwr.runs.checkpoints import latest, save
folder = Path(sys.argv[1])
found = latest(folder)
number = found.server_round if found else 0
while True:
    number += 1
    save(folder, number, {"adapter": np.full(20_000, number, np.float32)}, {"round": number}, keep=2)
    print(number, flush=True)
"""


def fill(folder: Path, rounds: range) -> None:
    for number in rounds:
        save(folder, number, {"x": np.full(3, number, np.float32)}, {"round": number})


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def same(got: Checkpoint | None, number: int) -> bool:
    return (
        got is not None
        and got.server_round == got.state["round"] == number
        and bool((got.arrays["x"] == number).all())
    )


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    arrays = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "strided": np.arange(10, dtype=np.int64)[::3],
        "scalar": np.array(2.5, dtype=np.float64),
        "empty": np.zeros((0, 4), dtype=np.float16),
        "bits": np.array([np.nan, -0.0, np.inf, 1e-45], dtype=np.float32),
    }
    state = {
        "server_round": 2,
        "nested": {"seed": 2**63 - 1, "third": 1 / 3},
        "list": [1, None, "ü"],
    }
    path = save(tmp_path / "checkpoints", 2, arrays, state)
    assert path == tmp_path / "checkpoints" / "round-0002"
    assert names(path) == ["arrays.safetensors", "sha256", "state.json"]
    got = latest(tmp_path / "checkpoints")
    assert got is not None
    assert (got.server_round, got.state) == (2, state)
    for name, array in arrays.items():
        assert (got.arrays[name].shape, got.arrays[name].dtype) == (array.shape, array.dtype)
        assert got.arrays[name].tobytes() == array.tobytes()


@settings(max_examples=30, deadline=None)
@given(
    npst.arrays(
        npst.integer_dtypes() | npst.floating_dtypes(endianness="<", sizes=(16, 32, 64)),
        npst.array_shapes(),
    )
)
def test_any_array_comes_back(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray) -> None:
    folder = tmp_path_factory.mktemp("any")
    array = array.astype(array.dtype.newbyteorder("="))
    save(folder, 0, {"x": array}, {})
    got = latest(folder)
    assert got is not None
    np.testing.assert_array_equal(got.arrays["x"], array, strict=True)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    arrays = {"b": np.ones(2), "a": np.zeros(3)}
    one = save(tmp_path / "one", 1, arrays, {"k": 1})
    two = save(tmp_path / "two", 1, dict(reversed(arrays.items())), {"k": 1})
    for name in names(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_digests_are_those_that_sha256sum_reads(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"x": np.ones(2)}, {})
    done = subprocess.run(
        ["sha256sum", "--check", "sha256"], cwd=path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "arrays.safetensors: OK\nstate.json: OK\n"


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    assert latest(tmp_path) is None


def test_only_the_newest_stay(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 6))
    assert names(tmp_path) == ["round-0003", "round-0004", "round-0005"]
    save(tmp_path, 10_000, {}, {"round": 10_000}, keep=1)
    assert names(tmp_path) == ["round-10000"]


def test_a_round_can_be_saved_again(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 3))
    save(tmp_path, 2, {"x": np.zeros(1)}, {"again": True})
    got = latest(tmp_path)
    assert got is not None
    assert got.state == {"again": True}
    assert names(tmp_path) == ["round-0001", "round-0002"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file_name", ["arrays.safetensors", "state.json", "sha256"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_is_named_and_the_previous_one_used(
    tmp_path: Path, file_name: str, damage
) -> None:
    fill(tmp_path, range(1, 4))
    damage(tmp_path / "round-0003" / file_name)
    warnings: list[str] = []
    # A cut newline at the end of the digests damages nothing that is checked.
    expected = 3 if (file_name, damage) == ("sha256", cut) else 2
    assert same(latest(tmp_path, warnings.append), expected)
    assert len(warnings) == 3 - expected
    assert all(
        "round-0003 is damaged and is passed over" in text and "\n" not in text for text in warnings
    )
    fill(tmp_path, range(3, 4))
    assert same(latest(tmp_path), 3)


def test_all_damaged_is_none_with_a_warning_each(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 4))
    for number in range(1, 4):
        flip(tmp_path / f"round-000{number}" / "state.json")
    warnings: list[str] = []
    assert latest(tmp_path, warnings.append) is None
    assert [text.split()[1] for text in warnings] == ["round-0003", "round-0002", "round-0001"]


@pytest.mark.parametrize("state", [{"loss": float("nan")}, {"pair": (1, 2)}, {"by_id": {3: "x"}}])
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: dict) -> None:
    fill(tmp_path, range(1, 2))
    with pytest.raises(ValueError, match=r"JSON"):
        save(tmp_path, 2, {}, state)
    assert names(tmp_path) == ["round-0001"]


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0: expected at least 1"):
        save(tmp_path, 1, {}, {}, keep=0)


def test_leftovers_go_but_not_those_of_a_living_process(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 2))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for name in (f".tmp-{child.pid}-a", f".tmp-{os.getpid()}-b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "arrays.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").touch()
    assert same(latest(tmp_path), 1)
    assert names(tmp_path) == [f".tmp-{child.pid}-a", "notes.txt", "round-0001"]
    child.communicate(b"\n")
    assert same(latest(tmp_path), 1)
    assert names(tmp_path) == ["notes.txt", "round-0001"]


class Killed(BaseException):
    """Stands for a kill: nothing below catches it."""


class StopAt:
    """Stops the process at its n-th change of the disk."""

    STEPS = ((os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree"))

    def __init__(self, step: int, patch: pytest.MonkeyPatch) -> None:
        self.left = step
        for module, name in self.STEPS:
            patch.setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, real: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            self.left -= 1
            if self.left == 0:
                raise Killed
            return real(*arguments, **options)

        return call


def test_a_stop_before_any_single_step_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    stopped = 0
    for step in range(1, 100):
        folder = tmp_path / str(step)
        fill(folder, range(1, 4))
        with pytest.MonkeyPatch.context() as patch:
            StopAt(step, patch)
            try:
                save(folder, 4, {"x": np.full(3, 4, np.float32)}, {"round": 4})
                came_through = True
            except Killed:
                came_through = False
                stopped += 1
        problems: list[str] = []
        got = latest(folder, problems.append)
        assert same(got, 4) or (same(got, 3) and not came_through)
        assert problems == []
        assert not [name for name in names(folder) if name.startswith(".")]
        if came_through:
            break
    assert stopped >= 8  # three files, two folders, two renames and a removal were all interrupted


def test_killed_at_any_moment_the_latest_is_whole_and_no_older_than_promised(
    tmp_path: Path,
) -> None:
    draw = random.Random(7)
    for _ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        promised = [int(child.stdout.readline())]
        timer = threading.Timer(draw.uniform(0, 0.15), child.kill)
        timer.start()
        promised += [int(line) for line in child.stdout if line.endswith("\n")]
        assert child.wait() == -9
        child.stdout.close()
        problems: list[str] = []
        got = latest(tmp_path, problems.append)
        assert got is not None
        assert problems == []
        assert got.server_round == got.state["round"] >= promised[-1]
        assert (got.arrays["adapter"] == got.server_round).all()
        assert (
            len(names(tmp_path)) <= 3
        )  # a kill may come between the rename and the removal of the oldest


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path, 1, {}, {"object": checkpoints})
    path = save(tmp_path, 1, {"x": np.ones(1)}, {"a": 1})
    assert json.loads((path / "state.json").read_text()) == {"a": 1}


def test_a_round_can_be_asked_for_and_is_none_if_it_is_absent_or_damaged(tmp_path: Path) -> None:
    assert checkpoints.saved_rounds(tmp_path / "absent") == ()
    fill(tmp_path, range(1, 4))
    assert checkpoints.saved_rounds(tmp_path) == (1, 2, 3)
    found = checkpoints.at(tmp_path, 2)
    assert found is not None
    assert (found.server_round, found.state) == (2, {"round": 2})
    np.testing.assert_array_equal(found.arrays["x"], np.full(3, 2, np.float32))
    assert checkpoints.at(tmp_path, 9) is None
    (tmp_path / "round-0002" / checkpoints.STATE).write_text("{}")
    assert checkpoints.at(tmp_path, 2) is None
    assert checkpoints.saved_rounds(tmp_path) == (1, 2, 3), "what is there is not looked into"
