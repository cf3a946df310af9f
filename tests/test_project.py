from pathlib import Path

import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.project import find_project, project_conf


@pytest.mark.parametrize(
    ("text", "is_project"),
    [
        ("[tool.fedllm]\n", True),
        ('[tool.flwr.app]\npublisher = "me"\n', False),
        ("tool = 3\n", False),
        ("", False),
    ],
)
def test_a_table_makes_a_folder_a_project(text: str, is_project: bool, tmp_path: Path) -> None:
    assert find_project(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text(text)
    assert find_project(tmp_path) == (tmp_path if is_project else None)
    (tmp_path / "inner").mkdir()
    assert find_project(tmp_path / "inner") is None


@pytest.mark.parametrize("content", [b"[tool", b"\xff\xfe"])
def test_what_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"pyproject\.toml: expected TOML, got"):
        find_project(tmp_path)


def test_a_file_that_the_package_has_too_is_refused(tmp_path: Path) -> None:
    package, project = tmp_path / "package", tmp_path / "project"
    for folder in (package / "task", project / "conf" / "task"):
        folder.mkdir(parents=True)
    (package / "task" / "csv.yaml").write_text("")
    (project / "conf" / "task" / "mine.yaml").write_text("")
    assert project_conf(project, package) == project / "conf"
    (project / "conf" / "task" / "csv.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"csv\.yaml: fedllm has conf/task/csv\.yaml too"):
        project_conf(project, package)
    with pytest.raises(ConfigError, match="expected a folder conf"):
        project_conf(package, package)
