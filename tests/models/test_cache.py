import os
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm_flwr.errors import AssetError
from fedllm_flwr.models.cache import CHECKSUMS, cache_root, converted, is_intact
from fedllm_flwr.models.catalog import ModelRef
from fedllm_flwr.models.sources import stored_dtype


@pytest.fixture
def ref(checkpoint: Path, own_cache: Path) -> ModelRef:
    return ModelRef("path", path=str(checkpoint))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FEDLLM_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b"),
        ({"HOME": "/h"}, "/h/.cache"),
    ],
)
def test_root(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected) / "fedllm_flwr" / "models"


def test_checkpoint_in_the_compute_dtype_is_used_in_place(ref: ModelRef, own_cache: Path) -> None:
    assert converted(ref, "float32") == Path(ref.path)
    assert not own_cache.exists()


def test_converts_once_and_says_so(ref: ModelRef, capfd: pytest.CaptureFixture[str]) -> None:
    folder = converted(ref, "bfloat16")
    told = capfd.readouterr().err
    assert "converting 0 MiB to bfloat16" in told
    assert "3/4 reading the weights" in told
    assert "it/s" not in told
    assert stored_dtype(folder) == "bfloat16"
    assert folder.name.startswith("checkpoint-bfloat16-")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted(ref, "bfloat16") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert capfd.readouterr().err == ""
    assert [path.name for path in folder.parent.iterdir() if ".tmp-" in path.name] == []


def test_copy_holds_the_same_values_and_tokenizer(ref: ModelRef) -> None:
    folder = converted(ref, "bfloat16")
    copy = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    original = AutoModelForCausalLM.from_pretrained(ref.path).state_dict()
    assert copy.keys() == original.keys()
    for name, value in original.items():
        assert (copy[name] == value.to(copy[name].dtype)).all()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert (
        tokenizer("grain").input_ids == AutoTokenizer.from_pretrained(ref.path)("grain").input_ids
    )


def test_truncated_copy_is_rebuilt(ref: ModelRef) -> None:
    weights = converted(ref, "bfloat16") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert not is_intact(weights.parent)
    converted(ref, "bfloat16")
    assert weights.read_bytes() == whole


def test_flipped_byte_is_found_by_its_time_or_by_a_full_check(ref: ModelRef) -> None:
    weights = converted(ref, "bfloat16") / "model.safetensors"
    whole = weights.read_bytes()
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    broken = whole[:-1] + bytes([whole[-1] ^ 1])
    weights.write_bytes(broken)
    assert not is_intact(weights.parent)
    os.utime(weights, ns=times)
    assert is_intact(weights.parent)  # the fast check trusts size and time
    assert not is_intact(weights.parent, full_check=True)
    converted(ref, "bfloat16", full_check=True)
    assert weights.read_bytes() == whole


def test_touched_copy_is_compared_and_kept(
    ref: ModelRef, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = converted(ref, "bfloat16")
    os.utime(folder / "model.safetensors", ns=(5, 5))
    capfd.readouterr()
    converted(ref, "bfloat16")
    assert capfd.readouterr().err == ""
    assert '"mtime_ns": 5' in (folder / CHECKSUMS).read_text()


@pytest.mark.parametrize(
    "content", ["", "{", '{"model.safetensors": 1}', "[]", "{}", "5", '{"gone": {}}']
)
def test_unreadable_record_means_rebuild(ref: ModelRef, content: str) -> None:
    folder = converted(ref, "bfloat16")
    (folder / CHECKSUMS).write_text(content)
    assert not is_intact(folder)
    converted(ref, "bfloat16")
    assert is_intact(folder, full_check=True)


def test_leftovers_of_a_killed_process_are_removed(ref: ModelRef) -> None:
    folder = converted(ref, "bfloat16")
    leftover = folder.with_name(f"{folder.name}.tmp-killed")
    leftover.mkdir()
    (folder / "config.json").unlink()
    converted(ref, "bfloat16")
    assert not leftover.exists()
    assert is_intact(folder)


def test_other_weights_get_another_folder(ref: ModelRef) -> None:
    first = converted(ref, "bfloat16")
    os.utime(Path(ref.path) / "model.safetensors", ns=(7, 7))
    assert converted(ref, "bfloat16") != first
    assert converted(ref, "float16") not in (first, converted(ref, "bfloat16"))


def test_cache_that_cannot_be_written_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set FEDLLM_CACHE to another folder"):
        converted(ModelRef("path", path=str(checkpoint)), "bfloat16")


SCRIPT = """
from fedllm_flwr.models.cache import converted
from fedllm_flwr.models.catalog import ModelRef
import fedllm_flwr.models.convert
print("ready", flush=True)
print(converted(ModelRef("path", path={path!r}), "bfloat16"), flush=True)
"""


@pytest.mark.slow
def test_of_two_processes_one_converts(
    ref: ModelRef, own_cache: Path, start_python: Callable[..., "Popen[str]"]
) -> None:
    """Both find no copy and wait for the lock, which this test holds; then one converts and the other takes it over."""
    folder = converted(ref, "bfloat16")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    with FileLock(f"{folder}.lock"):
        script = SCRIPT.format(path=ref.path)
        processes = [start_python(script, FEDLLM_CACHE=str(own_cache)) for _ in range(2)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        time.sleep(1)  # time to look for the copy and to reach the lock
        assert not folder.exists()
    results = [process.communicate(timeout=120) for process in processes]
    assert [out.strip() for out, _ in results] == [str(folder)] * 2, results
    assert sum("converting" in error for _, error in results) == 1, results
    assert is_intact(folder, full_check=True)
