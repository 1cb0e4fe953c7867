"""Strict settings: frozen dataclasses from TOML and back.

The error for an unknown key names it and the nearest valid one; that for a value of the wrong type says what
it should be. Errors from a dataclass's own checks begin with the field; its place in the tree is added.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from qlip_core.errors import QlipError, RecipeError
from qlip_core.training import toml_string

T = TypeVar("T")

# -- TOML --------------------------------------------------------------------------------------


def load_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises OSError or ValueError."""
    with path.open("rb") as file:
        return _tomllib().load(file)


def toml_value(text: str) -> Any:
    """`text` as a TOML value or, if it is not one, the text itself."""
    try:
        return _tomllib().loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _tomllib() -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[import-not-found,no-redef]
        except ImportError:
            raise RecipeError(
                "reading recipes on Python 3.10 needs tomli: pip install 'qlip[train]'"
            ) from None
    return tomllib


def to_toml(values: Mapping[str, Any]) -> str:
    """A tree of dictionaries, lists and values as TOML."""
    return "\n".join(_toml_lines(values, "")).strip() + "\n"


def _toml_lines(values: Mapping[str, Any], where: str) -> list[str]:
    lines = [f"{k} = {_toml_value(v)}" for k, v in values.items() if not isinstance(v, dict)]
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines += ["", f"[{where}{key}]", *_toml_lines(value, f"{where}{key}.")]
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(each) for each in value)}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{k} = {_toml_value(v)}' for k, v in value.items())} }}"
    if isinstance(value, str):
        return toml_string(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


# -- strict building ---------------------------------------------------------------------------


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a tree of dictionaries; `where` is its place in the recipe ("stage1."). Raises RecipeError."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    known = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
            hint = f'; did you mean "{where}{near[0]}"?' if near else ""
            raise RecipeError(f'unknown key "{where}{key}" in the recipe{hint}')
        known[key] = _typed(hints[key], value, f"{where}{key}")
    try:
        return cls(**known)
    except QlipError as error:
        raise RecipeError(f"{where}{error}") from None


def at_least(settings: Any, least: float, *names: str) -> None:
    """Raises RecipeError if one of these fields is below `least`."""
    for name in names:
        value = getattr(settings, name)
        if not value >= least:
            raise RecipeError(f"{name} (={value}) must be at least {least}")


def _typed(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [each for each in arguments if each is not type(None)]
        return None if value is None else _typed(inner[0], value, name)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(
                f"{name} is {value!r}, expected one of {', '.join(map(str, arguments))}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{name} must be a list, got {value!r}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise RecipeError(f"{name} must have {len(kinds)} values, got {value!r}")
        return tuple(_typed(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{name} must be a table, got {value!r}")
        return build(typing.cast(type, kind), value, f"{name}.")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    good, what = {
        int: (number and float(value).is_integer(), "an integer"),
        float: (number and math.isfinite(value), "a finite number"),
        bool: (isinstance(value, bool), "true or false"),
        str: (isinstance(value, str), "a string"),
    }[kind]
    if not good:
        raise RecipeError(f"{name} must be {what}, got {value!r}")
    return kind(value)


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, without values that are None (TOML has no such value)."""
    if dataclasses.is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: plain(each) for name, each in pairs if each is not None}
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return value
