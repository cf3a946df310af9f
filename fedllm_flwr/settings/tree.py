"""Plain trees (YAML or JSON) into frozen dataclasses; every error names the key, the expected and the given."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from fedllm_flwr.errors import ConfigError

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raise a ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def from_tree(cls: type[T], tree: Any, where: str) -> T:
    """Build a frozen dataclass from a mapping, naming the key, the expected and the given in every error.

    Raises:
        ConfigError: See :func:`run_config`.
    """
    label = where or "config"
    require(isinstance(tree, Mapping), f"{label}: expected a mapping, got {tree!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        require(key in known, f"{label}: unknown key {key!r}; known keys: {', '.join(known)}")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in tree.items()}
    missing = [
        name
        for name, spec in known.items()
        if name not in values
        and spec.default is dataclasses.MISSING
        and spec.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"{label}: missing {', '.join(missing)}")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one value against its annotation; lists become tuples, integers may stand for floats."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_tree(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        choices = typing.get_args(hint)
        require(value in choices, f"{where}: expected one of {list(choices)}, got {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in typing.get_args(hint):
            return None
        return _convert(_member(hint, value, where), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where}: expected float, got an integer beyond its range") from None
    right = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    right = right and not (hint is float and not math.isfinite(value))
    require(right, f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _member(hint: Any, value: Any, where: str) -> Any:
    """Which type of a union a value is meant for: of dataclasses, the one whose literal ``name`` it has."""
    members = [a for a in typing.get_args(hint) if a is not types.NoneType]
    if not all(dataclasses.is_dataclass(member) for member in members):
        return members[0]
    require(isinstance(value, Mapping), f"{where}: expected a mapping, got {value!r}")
    by_name = {typing.get_args(typing.get_type_hints(m)["name"])[0]: m for m in members}
    name = value.get("name")
    require(
        isinstance(name, str) and name in by_name,
        f"{where}.name: expected one of {sorted(by_name)}, got {name!r}",
    )
    return by_name[name]
