import shutil
from pathlib import Path

import pytest

from benchmarks import fab

ROOT = Path(__file__).resolve().parents[1]
LITTER = (
    "outputs/smoke/manifest.json",
    "multirun/conf.yaml",
    "tests/test_more.py",
    "benchmarks/more.py",
    "notes.py",
    "docs/notes.md",
    "conf/experiment/notes.md",
    ".venv/lib/more.py",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the FAB is built from, with what a used checkout has beside it, in a folder of any name."""
    copy = tmp_path / "some_checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    for name in ("fedllm_flwr", "clients", "strategies", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LITTER:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("")
    return copy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "fab"
    path.mkdir()
    return path


@pytest.mark.slow
def test_the_fab_is_whole_without_what_lies_about_and_runs_on_its_own(
    checkout: Path, folder: Path
) -> None:
    assert fab.check(checkout, folder).endswith("both apps load from it alone")


@pytest.mark.slow
def test_a_file_that_the_whitelist_misses_is_found(checkout: Path, folder: Path) -> None:
    settings = checkout / "pyproject.toml"
    settings.write_text(settings.read_text().replace('    "/strategies/**/*.py",\n', ""))
    with pytest.raises(
        fab.FabError, match=r"lacks strategies/__init__\.py, strategies/balance\.py"
    ):
        fab.bundle(checkout, folder)


@pytest.mark.slow
def test_a_file_that_the_whitelist_should_not_name_is_found(checkout: Path, folder: Path) -> None:
    settings = checkout / "pyproject.toml"
    settings.write_text(
        settings.read_text().replace('    "/LICENSE",\n', '    "/LICENSE",\n    "/docs/*",\n')
    )
    with pytest.raises(fab.FabError, match=r"should not hold docs/notes\.md"):
        fab.bundle(checkout, folder)


@pytest.mark.slow
def test_an_app_that_only_loads_from_the_checkout_is_found(checkout: Path) -> None:
    (checkout / "fedllm_flwr/errors.py").unlink()
    with pytest.raises(fab.FabError, match=r"does not load: .*fedllm_flwr\.errors"):
        fab.check_loads(checkout)


@pytest.mark.slow
def test_submitting_a_run_leaves_the_project_file_alone(checkout: Path, folder: Path) -> None:
    settings = checkout / "pyproject.toml"
    before = settings.read_bytes()
    refused = fab.run_flwr("run", str(checkout), "nowhere", folder=folder)
    assert refused.returncode != 0
    assert "nowhere" in refused.stdout + refused.stderr
    assert settings.read_bytes() == before
    legacy = '[tool.flwr.federations]\ndefault = "local"\nlocal.options.num-supernodes = 2\n'
    settings.write_bytes(before + legacy.encode())
    fab.run_flwr("run", str(checkout), "nowhere", folder=folder)
    assert b"# [tool.flwr.federations]" in settings.read_bytes()  # a table that Flower moves away
