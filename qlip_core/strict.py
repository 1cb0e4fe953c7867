"""Strict reading of JSON configurations, for both kinds of `config.json`.

An unknown key is an error that names it and the nearest known one; so is a value of the wrong type, with
what it should be.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qlip_core.errors import ConfigError

T = TypeVar("T")


def read_json(path: str | Path, of: str, build: Callable[[dict[str, Any]], T]) -> T:
    """`build` applied to the JSON object in the file `path`, which `of` ("a checkpoint") needs.

    Raises ConfigError, which names the file, if there is none, if it is not a JSON object, and for what
    `build` raises.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {of} needs its config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    try:
        return build(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def peek_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, to tell its kind; empty if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def unknown_key(key: str, where: str, known: Iterable[str], what: str) -> ConfigError:
    """The error for a key that `what` ("the model config") does not have; `where`: "a.b."."""
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return ConfigError(f'unknown key "{where}{key}" in {what}{hint}')


def scalar(kind: str, value: Any, name: str) -> Any:
    """`value` as the `kind` ("int", "float", "bool", "str") that `name` takes; a float may be an int."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    good, what = {
        "int": (isinstance(value, int) and number, "an integer"),
        "float": (number and math.isfinite(value), "a finite number"),
        "bool": (isinstance(value, bool), "true or false"),
        "str": (isinstance(value, str), "a string"),
    }[kind]
    if not good:
        raise ConfigError(f"{name} must be {what}, got {value!r}")
    return float(value) if kind == "float" else value


def check_positive(config: Any, *names: str) -> None:
    """Raises ConfigError if one of these fields is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} (={getattr(config, name)}) must be positive")


def check_one_of(config: Any, name: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError if a field has none of the allowed values."""
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f'{name} is "{value}", expected one of {", ".join(allowed)}')
