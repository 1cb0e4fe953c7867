"""A run's folder: what lies where in it, whether a run has begun there, and which recipe may go on with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qlip_core.errors import RecipeError
from qlip_torch.train.metrics import read_metrics
from qlip_torch.train.recipe_file import R, RecipeFile

RECIPE, TOKENIZER, MODEL = "recipe.toml", "tokenizer", "model"
"""The recipe as it is run; the vocabulary that the run has trained, if it did; and, in a stage's folder, what
came out."""
# What may change between a run and its continuation: nothing that the losses depend on, but for the
# rounding of another precision or engine.
_MAY_CHANGE = {"name", "description", "devices", "log", "checkpoints", "engine"}
_MAY_CHANGE_IN_DATA = {"workers", "prefetch"}


def to_stderr(line: str) -> None:
    """What takes a run's plan and findings unless told otherwise."""
    print(line, file=sys.stderr, flush=True)


# -- what lies where ---------------------------------------------------------------------------


def stage_folders(run: Path) -> list[Path]:
    """Where a run's stages are, the last first; a folder that is a stage's or a generator's own comes last."""
    return [run / "stage2", run / "stage1", run]


def model_behind(path: str | Path) -> str | Path:
    """The model of a run's newest stage that has one, or of a stage's folder; `path` itself where it is neither."""
    return _model_in(stage_folders(Path(path))) or path


def stage1_model(path: str | Path) -> str | Path:
    """The same of stage 1."""
    return _model_in(stage_folders(Path(path))[1:]) or path


def _model_in(folders: list[Path]) -> Path | None:
    return next((f / MODEL for f in folders if (f / MODEL / "config.json").is_file()), None)


def kept_recipe(kind: type[R], out: Path) -> R:
    """The recipe of the run in `out`. Raises RecipeError where there is none, or one of another kind."""
    kept = out / RECIPE
    if not kept.is_file():
        raise RecipeError(
            f"{out}: no run to resume in this folder (no {RECIPE}); name a recipe to start one"
        )
    return kind.from_file(kept, f"--resume --out {out}")


# -- which recipe may go on --------------------------------------------------------------------


def begun(out: Path) -> bool:
    """Whether the run in `out` has made anything: a checkpoint, or a line of metrics. One that stopped before,
    over its data say, may be begun anew."""
    folders = (out, *out.glob("stage[12]"))
    return any(
        any((folder / "checkpoints").glob("step-*")) or bool(read_metrics(folder))
        for folder in folders
    )


def check_begun(out: Path, recipe: RecipeFile, resume: bool) -> None:
    """Raises RecipeError where `out` holds a run that this one does not go on with."""
    kept = out / RECIPE
    if kept.is_file() and (resume or begun(out)):
        check_same_run(out, type(recipe).from_file(kept), recipe, resume)


def check_same_run(out: Path, old: RecipeFile, new: RecipeFile, resume: bool) -> None:
    """Raises RecipeError where `out`, begun with `old`, cannot go on with `new`. Until stage 2 has begun, all of
    `stage2` may change."""
    if not resume:
        raise RecipeError(
            f"{out}: already holds a run; continue it with --resume, or choose another folder"
        )
    before, now = old.to_dict(), new.to_dict()
    if not begun(out / "stage2"):
        before, now = before | {"stage2": {}}, now | {"stage2": {}}
    if changed := difference(before, now):
        raise RecipeError(
            f"{out}: was begun with another recipe ({changed}); resume it with its own, "
            "or start anew elsewhere (the recipe's `start` continues from weights alone)"
        )


def difference(old: dict[str, Any], new: dict[str, Any], where: str = "") -> str:
    """The first value that decides the losses and is not the same in two recipes; empty if none."""
    for key in sorted(old.keys() | new.keys()):
        if (where == "" and key in _MAY_CHANGE) or (
            where in ("data.", "data.images.") and key in _MAY_CHANGE_IN_DATA
        ):
            continue
        ours, theirs = old.get(key), new.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            if inner := difference(ours, theirs, f"{where}{key}."):
                return inner
        elif ours != theirs:
            return f"{where}{key} was {ours!r}, now {theirs!r}"
    return ""
