"""``fedllm init``: a project folder for an experiment of one's own, ready to be tried and sent to nodes."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedllm_flwr import __version__
from fedllm_flwr.compose import compose_run
from fedllm_flwr.deploying import templates
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.catalog import HUB_ID, MODELS
from fedllm_flwr.words import Words

NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
"""What Flower accepts as the name of an app and of its folder."""

SITES = len(templates.SITES)
STRATEGY = {
    "fedlora": "factor_mean",
    "fedprompt": "prompt_mean",
    "fedresprompt": "controller_mean",
    "fedgrass": "row_mean",
}
"""The methods that a project can be made for, and how their updates merge."""

QUESTION = {
    "csv": "do sites learn together to sort messages that they keep to themselves?",
    "level_routing": "can the sites' reservoirs route three levels of a series to three words?",
}


def init(words: Sequence[str]) -> int:
    """Write a new project folder into the working directory.

    Args:
        words: ``NAME --method METHOD --model MODEL``.

    Returns:
        0.

    Raises:
        ConfigError: An option is wrong, or the folder exists; nothing was written.
    """
    parser = Words(prog="fedllm init", description=(init.__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the folder, the app and its experiment")
    parser.add_argument("--method", default="fedlora", help=", ".join(STRATEGY))
    parser.add_argument(
        "--model", default="smollm2_135m", help=f"{', '.join(MODELS)}, or a hub's owner/name"
    )
    chosen = parser.parse_args(list(words))
    folder = make_project(Path.cwd(), chosen.name, chosen.method, chosen.model)
    print(
        f"{folder.name}/ is a project; to try it:\n  cd {folder.name}\n  fedllm experiment={folder.name}"
    )
    return 0


def make_project(
    parent: Path, name: str, method: str = "fedlora", model: str = "smollm2_135m"
) -> Path:
    """Write a project folder, and make sure that its experiment composes.

    Args:
        parent: Where the folder will be.
        name: Letters, digits and hyphens, at most 32; the folder, the app and the experiment have this name.
        method: A key of :data:`STRATEGY`.
        model: A key of ``MODELS``, or ``owner/name`` of a model hub.

    Returns:
        The folder.

    Raises:
        ConfigError: An argument is wrong, the package has an experiment of this name, or something has it already.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"init: name: expected a letter, then at most 31 letters, digits or hyphens, got {name!r}"
        )
    if method not in STRATEGY:
        raise ConfigError(f"init: --method: expected one of {', '.join(STRATEGY)}, got {method!r}")
    if model == "hub" or (
        model not in MODELS and ("/" not in model or not HUB_ID.fullmatch(model))
    ):
        known = ", ".join(m for m in MODELS if m != "hub")
        raise ConfigError(f"init: --model: expected {known} or a hub's owner/name, got {model!r}")
    target = parent / name
    if target.exists() or target.is_symlink():
        raise ConfigError(f"init: {name}: expected a name that is free, got one that is taken here")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as beside:
            folder = Path(beside) / name
            for path, text in project_files(name, method, model).items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text, encoding="utf-8")
            compose_run([f"experiment={name}"], folder)
            shutil.move(folder, target)
    except OSError as error:
        raise ConfigError(
            f"init: {parent}: expected a folder to write to, got: {error.strerror}"
        ) from error
    return target


def project_files(name: str, method: str, model: str) -> dict[str, str]:
    """The files of a project folder: path within it to text."""
    has_data = method != "fedresprompt"  # a server that scores label words cannot read nodes' files
    leaf = model if model in MODELS else "hub"
    task = "csv" if has_data else "level_routing"
    own = "partition=site " if has_data else ""
    facts = {
        "name": name, "method": method, "model": model, "version": __version__, "strategy": STRATEGY[method],
        "model_leaf": leaf, "task": task, "question": QUESTION[task], "num_nodes": str(SITES),
        "partition": "natural" if has_data else "iid", "baselines": "quick" if has_data else "none",
        "settings": templates.SETTINGS[method] + (f"model:\n  hub_id: {model}\n" if leaf == "hub" else ""),
        "data": templates.NODE_DATA if has_data else "",
        "data_line": templates.DATA_LINE if has_data else "",
        "data_step": templates.DATA_STEP if has_data else "",
        "real": f"{own}runtime=deployment runtime.connection=fedllm runtime.num_nodes={SITES}",
        "deploy": "fedllm deploy"
        + (' --data-path "$PWD/data/site-{node}.csv"' if has_data else "")
        + f" experiment={name} {own}".rstrip(),
    }  # fmt: skip
    nodes = {
        f"nodes/site-{place}.toml": templates.NODE.substitute(facts, place=place)
        for place in range(SITES)
    }
    return {
        "pyproject.toml": templates.PYPROJECT.substitute(facts),
        "server.py": templates.SERVER,
        "client.py": templates.CLIENT,
        ".gitignore": templates.IGNORED,
        f"conf/experiment/{name}.yaml": templates.EXPERIMENT.substitute(facts),
        "README.md": templates.README.substitute(facts),
        **nodes,
        **(_data_files() if has_data else {}),
    }


def _data_files() -> dict[str, str]:
    rows = templates.example_rows()
    own = {
        f"data/site-{place}.csv": [row for row in rows if row["client"] == site]
        for place, site in enumerate(templates.SITES)
    }
    return {
        path: templates.csv_text(found) for path, found in {"data/example.csv": rows, **own}.items()
    }
