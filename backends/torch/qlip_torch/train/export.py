"""From a run's checkpoint to a model in the published layout (SPEC section 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlip_core.architecture import architecture
from qlip_core.checkpoint import open_checkpoint, save_checkpoint, stated
from qlip_core.config import QLIPConfig
from qlip_core.errors import CheckpointError
from qlip_core.generator.architecture import architecture as generator_architecture
from qlip_core.generator.checkpoint import save_generator
from qlip_core.generator.config import GeneratorConfig
from qlip_torch.train.checkpoints import latest_checkpoint, read_checkpoint, read_state
from qlip_torch.train.recipe import GENERATOR
from qlip_torch.train.stage2 import TRAINED
from qlip_torch.train.strict import to_toml

RECIPE = "recipe.toml"
"""Beside an exported model: what it was trained by."""


def export(run_folder: str | Path, out: str | Path, *, dtype: str = "float32") -> Path:
    """Write the newest model of a run, whatever its stage and step, as a checkpoint folder `out`; of a
    generator's run, as a generator's folder.

    dtype: how the weights are stored, float32, float16 or bfloat16. Raises CheckpointError where the
    run has no checkpoint yet.
    """
    run = Path(run_folder)
    for folder in (run / "stage2", run / "stage1", run):
        if (path := latest_checkpoint(folder / "checkpoints")) is not None:
            kind = export_generator if read_state(path)["stage"] == GENERATOR else export_stage
            return kind(folder, Path(out), dtype=dtype)
    raise CheckpointError(
        f"{run}: no checkpoint in it to export: not a run folder, or none is done"
    )


def export_stage(folder: Path, out: Path, *, dtype: str = "float32") -> Path:
    """The newest checkpoint of a stage's folder as a model: its moving average where it keeps one.

    After stage 2, text tower and encoder are those it started from, bit for bit.
    """
    path, state = _newest(folder)
    config = QLIPConfig.from_dict(state["config"])
    prefix = "ema" if state["numbers"]["ema_updates"] else "model"
    tensors = {
        f"{prefix}.{name}": torch.empty(spec.shape)
        for name, spec in architecture(config).items()
        if state["stage"] == 1 or spec.part in TRAINED
    }
    read_checkpoint(path, tensors)
    weights = {name.partition(".")[2]: tensor.numpy() for name, tensor in tensors.items()}
    if state["stage"] == 2:
        weights = open_checkpoint(folder / "start").tensors() | weights
    recipe = state["recipe"]
    # What is derived from a checkpoint keeps the licence that the checkpoint stated.
    derived = state["stage"] == 2 or recipe["start"]["checkpoint"]
    licence = stated(Path(state["tokenizer"]), "license") if derived else None
    card = (
        f"---\n{f'license: {licence}' + chr(10) if licence else ''}"
        f"note: {recipe['name']}, stage {state['stage']}, step {state['step']}\n---\n\n"
        f"# {recipe['name']}\n\n{recipe['description']}\n\n"
        f"Stage {state['stage']} after {state['step']} steps, seed {recipe['seed']}.\n"
    )
    return save_checkpoint(
        out,
        config,
        weights,
        dtype=dtype,
        tokenizer_from=state["tokenizer"],
        card=card,
        beside={RECIPE: to_toml(recipe)},
    )


def export_generator(folder: Path, out: Path, *, dtype: str = "float32") -> Path:
    """The newest checkpoint of a generator's run as a generator's folder: its moving average where it
    keeps one."""
    path, state = _newest(folder)
    config = GeneratorConfig.from_dict(state["config"])
    prefix = "ema" if state["numbers"]["ema_updates"] else "model"
    shapes = {name: spec.shape for name, spec in generator_architecture(config).items()}
    tensors = {f"{prefix}.{name}": torch.empty(shape) for name, shape in shapes.items()}
    read_checkpoint(path, tensors)
    weights = {name.partition(".")[2]: tensor.numpy() for name, tensor in tensors.items()}
    recipe = state["recipe"]
    card = (
        f"# {recipe['name']}\n\n{recipe['description']}\n\n"
        f"After {state['step']} steps, seed {recipe['seed']}; draws with the tokenizer {config.tokenizer}.\n"
    )
    beside = {RECIPE: to_toml(recipe), "README.md": card}
    return save_generator(out, config, weights, dtype=dtype, beside=beside)


def _newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = latest_checkpoint(folder / "checkpoints")
    if path is None:
        raise CheckpointError(f"{folder}: no checkpoint in it to export")
    return path, read_state(path)
