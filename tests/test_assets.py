import sys

import pytest

from fedllm_flwr import assets
from fedllm_flwr.errors import AssetError


def test_locate_finds_a_file_of_an_installed_distribution():
    path = assets.locate("numpy", "numpy/__init__.py")
    assert path.is_file()
    assert path.name == "__init__.py"


def test_locate_names_the_package_and_the_command():
    with pytest.raises(
        AssetError, match=r"^package no-such-thing is not installed; run `make assets`"
    ):
        assets.locate("no-such-thing", "x.txt")


def test_locate_names_the_missing_file():
    with pytest.raises(AssetError, match=r"^package numpy has no file numpy/none\.bin; run `make"):
        assets.locate("numpy", "numpy/none.bin")


def test_shared_asset_looks_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(AssetError, match=r"^data file notes\.txt is absent; run `make assets`"):
        assets.shared_asset("notes.txt")
    folder = tmp_path / "share" / "fedllm-assets"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("hello")
    assert assets.shared_asset("notes.txt").read_text() == "hello"


def test_a_damaged_archive_is_refused(tmp_path, monkeypatch):
    name = next(iter(assets.SHARED_SHA256))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    folder = tmp_path / "share" / "fedllm-assets"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"not the archive")
    with pytest.raises(
        AssetError, match=rf"^{name}: expected SHA-256 {assets.SHARED_SHA256[name]}"
    ):
        assets.shared_asset(name)


def test_verify_knows_the_digest_of_the_empty_file(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    assets.verify(path, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")


@pytest.mark.assets
def test_the_downloaded_archive_is_the_expected_one():
    for name in assets.SHARED_SHA256:
        assert assets.shared_asset(name).stat().st_size > 0
