import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.runs.atomic import plain, write_bytes, write_json


def test_a_failed_write_leaves_the_old_file_and_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    write_bytes(target, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match="disk full"):
                write_bytes(target, b"new")
        assert target.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new"


def test_an_open_reader_keeps_the_old_content(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")
    with (tmp_path / "file").open("rb") as reader:
        write_bytes(tmp_path / "file", b"new")
        assert reader.read() == b"old"


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_bytes(tmp_path / "ours", b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")}
    assert len(modes) == 1


def test_the_content_is_on_the_disk_before_the_name_points_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]
        )
    write_bytes(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(),
        lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    )
)
def test_plain_values_are_strict_json_and_keep_everything_finite(value: object) -> None:
    def finite(entry: object) -> object:
        if isinstance(entry, float) and not math.isfinite(entry):
            return None
        if isinstance(entry, list):
            return [finite(child) for child in entry]
        return {k: finite(v) for k, v in entry.items()} if isinstance(entry, dict) else entry

    assert json.loads(json.dumps(plain(value), allow_nan=False)) == finite(value)


def test_plain_turns_numpy_and_tuples_into_json_types() -> None:
    got = plain(
        {
            "a": np.float32(0.5),
            "b": (np.int64(3), np.bool_(True)),
            "c": Path("x/y"),
            4: np.float64("nan"),
        }
    )
    assert got == {"a": 0.5, "b": [3, True], "c": "x/y", "4": None}
    assert [type(v) for v in (got["a"], *got["b"])] == [float, int, bool]


def test_an_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a ndarray cannot be written as JSON"):
        write_json(tmp_path / "file.json", {"weights": np.zeros(3)})
    assert os.listdir(tmp_path) == []
