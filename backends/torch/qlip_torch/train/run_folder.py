"""A run's folder: its files, whether a run has begun in it, and which recipe may continue it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qlip_core.errors import RecipeError
from qlip_torch.train.metrics import read_metrics
from qlip_torch.train.recipe_file import R, RecipeFile

RECIPE, TOKENIZER, MODEL = "recipe.toml", "tokenizer", "model"
"""The recipe as run; the vocabulary, if the run trained one; and, in a stage's folder, the resulting model."""
# What may change when a run is continued: nothing that affects the losses, except for the rounding of
# another precision or engine.
_MAY_CHANGE = {"name", "description", "devices", "log", "checkpoints", "engine"}
_MAY_CHANGE_IN_DATA = {"workers", "prefetch"}


def to_stderr(line: str) -> None:
    """Where a run's plan and results go by default."""
    print(line, file=sys.stderr, flush=True)


# -- files of a run ----------------------------------------------------------------------------


def stage_folders(run: Path) -> list[Path]:
    """A run's stage folders, the last stage first, then `run` itself, which may be a stage's or a generator's."""
    return [run / "stage2", run / "stage1", run]


def model_behind(path: str | Path) -> str | Path:
    """The model of a run's newest stage that has one, or of a stage's folder; `path` itself if it is neither."""
    return _model_in(stage_folders(Path(path))) or path


def stage1_model(path: str | Path) -> str | Path:
    """Like `model_behind`, for stage 1."""
    return _model_in(stage_folders(Path(path))[1:]) or path


def _model_in(folders: list[Path]) -> Path | None:
    return next((f / MODEL for f in folders if (f / MODEL / "config.json").is_file()), None)


def kept_recipe(kind: type[R], out: Path) -> R:
    """The recipe of the run in `out`. Raises RecipeError if there is none, or it is of another kind."""
    kept = out / RECIPE
    if not kept.is_file():
        raise RecipeError(
            f"{out}: no run to resume in this folder (no {RECIPE}); name a recipe to start one"
        )
    return kind.from_file(kept, f"--resume --out {out}")


# -- which recipe may continue a run -----------------------------------------------------------


def begun(out: Path) -> bool:
    """Whether the run in `out` has produced anything: a checkpoint or a line of metrics. One that stopped
    earlier, for example because of its data, may be started again."""
    folders = (out, *out.glob("stage[12]"))
    return any(
        any((folder / "checkpoints").glob("step-*")) or bool(read_metrics(folder))
        for folder in folders
    )


def check_begun(out: Path, recipe: RecipeFile, resume: bool) -> None:
    """Raises RecipeError if `out` holds a run that this one does not continue."""
    kept = out / RECIPE
    if kept.is_file() and (resume or begun(out)):
        check_same_run(out, type(recipe).from_file(kept), recipe, resume)


def check_same_run(out: Path, old: RecipeFile, new: RecipeFile, resume: bool) -> None:
    """Raises RecipeError if the run in `out`, started with `old`, cannot continue with `new`. Until stage 2 has
    begun, all of `stage2` may change."""
    if not resume:
        raise RecipeError(
            f"{out}: already holds a run; continue it with --resume, or choose another folder"
        )
    before, now = old.to_dict(), new.to_dict()
    if not begun(out / "stage2"):
        before, now = before | {"stage2": {}}, now | {"stage2": {}}
    if changed := difference(before, now):
        raise RecipeError(
            f"{out}: was started with another recipe ({changed}); resume it with its own, or start a new run "
            "elsewhere (the recipe's `start` continues from weights alone)"
        )


def difference(old: dict[str, Any], new: dict[str, Any], where: str = "") -> str:
    """The first value that affects the losses and differs between two recipes; empty if none."""
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
