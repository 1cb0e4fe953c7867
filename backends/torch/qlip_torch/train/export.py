"""From a run's checkpoint to a model in the published layout (SPEC section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip_core.architecture import architecture
from qlip_core.checkpoint import card_value, open_checkpoint, save_checkpoint
from qlip_core.config import QLIPConfig
from qlip_core.errors import CheckpointError
from qlip_core.generator.architecture import architecture as generator_architecture
from qlip_core.generator.checkpoint import save_generator
from qlip_core.generator.config import GeneratorConfig
from qlip_core.text import FILES as TOKENIZER_FILES
from qlip_torch.train.checkpoints import (
    latest_checkpoint,
    read_checkpoint,
    read_state,
    tensor_sizes,
)
from qlip_torch.train.recipe_file import GENERATOR
from qlip_torch.train.run_folder import RECIPE, TOKENIZER, stage_folders
from qlip_torch.train.strict import to_toml


def export(run_folder: str | Path, out: str | Path, *, dtype: str = "float32") -> Path:
    """Write the newest model of a run, whatever its stage and step, as a checkpoint folder `out` (for a
    generator's run, a generator's folder).

    dtype: how the weights are stored, float32, float16 or bfloat16. Raises CheckpointError if the run has
    no checkpoint yet.
    """
    run = Path(run_folder)
    for folder in stage_folders(run):
        if (path := latest_checkpoint(folder / "checkpoints")) is not None:
            kind = export_generator if read_state(path)["stage"] == GENERATOR else export_stage
            return kind(folder, Path(out), dtype=dtype)
    raise CheckpointError(
        f"{run}: no checkpoint to export: not a run folder, or none has been written yet"
    )


def export_stage(folder: Path, out: Path, *, dtype: str = "float32") -> Path:
    """The newest checkpoint of a stage's folder as a model: the moving average if it keeps one.

    After stage 2, text tower and encoder are those it started from, bit for bit.
    """
    path, state = _newest(folder)
    config = QLIPConfig.from_dict(state["config"])
    shapes = {name: spec.shape for name, spec in architecture(config).items()}
    start = open_checkpoint(folder / "start").tensors() if state["stage"] == 2 else {}
    weights = _weights(path, shapes, start)
    recipe, tokenizer = state["recipe"], _tokenizer(folder, state)
    # A model derived from a checkpoint keeps the licence that the checkpoint states.
    derived = state["stage"] == 2 or recipe["start"]["checkpoint"]
    licence = card_value(tokenizer, "license") if derived else None
    front = [f"license: {licence}"] if licence else []
    made = [recipe["name"], f"stage {state['stage']}", f"step {state['step']}"]
    front.append(f"note: {', '.join(filter(None, made))}")
    lines = [
        *("---", *front, "---", ""),
        *(f"# {recipe['name'] or 'Tokenizer'}", "", recipe["description"], ""),
        f"Stage {state['stage']} after {state['step']} steps, seed {recipe['seed']}.",
    ]
    return save_checkpoint(
        out,
        config,
        weights,
        dtype=dtype,
        tokenizer_from=tokenizer,
        card="\n".join(lines) + "\n",
        beside={RECIPE: to_toml(recipe)},
    )


def export_generator(folder: Path, out: Path, *, dtype: str = "float32") -> Path:
    """The newest checkpoint of a generator's run as a generator's folder: the moving average if it keeps
    one."""
    path, state = _newest(folder)
    config = GeneratorConfig.from_dict(state["config"])
    shapes = {name: spec.shape for name, spec in generator_architecture(config).items()}
    weights = _weights(path, shapes, {})
    recipe = state["recipe"]
    card = (
        f"# {recipe['name'] or 'Generator'}\n\n{recipe['description']}\n\n"
        f"After {state['step']} steps, seed {recipe['seed']}; draws with the tokenizer {config.tokenizer}.\n"
    )
    beside = {RECIPE: to_toml(recipe), "README.md": card}
    return save_generator(out, config, weights, dtype=dtype, beside=beside)


def _weights(
    path: Path, shapes: Mapping[str, tuple[int, ...]], start: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Every tensor of a model, float32: its moving average if the checkpoint has one (frozen tensors have
    none), else the model's own, else, for parts that the stage did not touch, the one in `start`."""
    kept = tensor_sizes(path)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if f"ema.{name}" in kept:
            found[f"ema.{name}"] = torch.empty(shape)
        elif f"model.{name}" in kept or name not in start:
            found[f"model.{name}"] = torch.empty(shape)
    read_checkpoint(path, found)
    trained = {name.partition(".")[2]: tensor.numpy() for name, tensor in found.items()}
    return {name: trained[name] if name in trained else start[name] for name in shapes}


def _tokenizer(folder: Path, state: dict[str, Any]) -> Path:
    """Where the tokenizer of a stage's run is, even if the run has been moved. Raises CheckpointError if it is
    gone."""
    path = Path(state["tokenizer"])
    if state["stage"] == 2:
        path = folder / "start"
    elif not state["recipe"]["start"]["checkpoint"] and (own := folder.parent / TOKENIZER).is_dir():
        path = own
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder}: the tokenizer it was trained with is no longer in {path}: put it back there"
        )
    return path


def _newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = latest_checkpoint(folder / "checkpoints")
    if path is None:
        raise CheckpointError(f"{folder}: no checkpoint in it to export")
    return path, read_state(path)
