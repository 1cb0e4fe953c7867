"""A recipe as a TOML file: finding one by its name, reading it strictly, changing values, writing it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import qlip_core
from qlip_core.errors import RecipeError
from qlip_torch.train.strict import build, load_toml, plain, to_toml, toml_value

TOKENIZER, GENERATOR = "tokenizer", "generator"
"""The kinds of recipe."""
_COMMANDS = {TOKENIZER: "qlip train", GENERATOR: "qlip train generator"}
R = TypeVar("R", bound="RecipeFile")


@dataclass(frozen=True)
class RecipeFile:
    """A whole run as a TOML file: reading, changing, writing. `KIND` says what is trained."""

    KIND: ClassVar[str]

    @classmethod
    def from_dict(cls: type[R], values: Mapping[str, Any], named: str = "RECIPE") -> R:
        """Raises RecipeError for an unknown key (naming the nearest), an impossible value, or a recipe of
        another kind; `named` is what the suggested command calls the recipe."""
        kind = values.get("kind", TOKENIZER)
        if kind != cls.KIND and kind in _COMMANDS:
            raise RecipeError(
                f"this is the recipe of a {kind}, not of a {cls.KIND}: run it as "
                f"`{_COMMANDS[kind]} {named}`"
            )
        return build(cls, values)

    @classmethod
    def from_file(cls: type[R], path: str | Path, named: str = "RECIPE") -> R:
        path = Path(path)
        try:
            values = load_toml(path)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: not a readable TOML file ({error})") from None
        try:
            return cls.from_dict(values, named)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    def changed(self: R, changes: Iterable[str]) -> R:
        """A copy with each "a.b=value" applied; the value is TOML or else taken as a string."""
        values = self.to_dict()
        for change in changes:
            key, equals, text = change.partition("=")
            if not equals or not key.strip():
                raise RecipeError(f"{change!r}: expected key=value, such as stage1.steps=100")
            table, *rest = key.strip().split(".")
            at = values
            for part in rest:
                at = at.setdefault(table, {})
                if not isinstance(at, dict):
                    raise RecipeError(f"{key.strip()}: {table} is a value, not a table")
                table = part
            at[table] = toml_value(text.strip())
        return self.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults included, without those that are None (TOML has no such value)."""
        return plain(self)

    def to_toml(self) -> str:
        return to_toml(self.to_dict())


def recipe_folders() -> list[Path]:
    """Where the shipped recipes are: inside the package, or beside it in a source tree."""
    package = Path(qlip_core.__file__).parent
    return [package / "recipes", package.parent / "recipes"]


def recipe_names(kind: str = TOKENIZER) -> list[str]:
    """Names of the shipped recipes of a kind, "tokenizer" or "generator"."""
    paths = (path for folder in recipe_folders() for path in folder.glob("*.toml"))
    return sorted({path.stem for path in paths if load_toml(path).get("kind", TOKENIZER) == kind})


def find_recipe(name: str | Path, kind: str = TOKENIZER) -> Path:
    """The file for a shipped recipe's name, or a path. Raises RecipeError that lists the shipped ones."""
    if Path(name).is_file():
        return Path(name)
    for folder in recipe_folders():
        path = folder / f"{name}.toml"
        if path.is_file():
            return path
    names = recipe_names(kind)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise RecipeError(f"no recipe {str(name)!r}: give a path, or one of {', '.join(names)}{hint}")
