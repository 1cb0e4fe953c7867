"""Finds a tokenizer's generator, checks that they fit, and loads it on a backend."""

from __future__ import annotations

from pathlib import Path

from qlip_core.backends import Network, get_backend
from qlip_core.checkpoint import Checkpoint
from qlip_core.errors import CheckpointError, GenerationError
from qlip_core.generator.checkpoint import FOLDER, GeneratorCheckpoint, open_generator
from qlip_core.generator.conditioning import Conditioner, TextTower, t5
from qlip_core.generator.generate import TokenDrawer


def find_generator(checkpoint: Checkpoint, named: str | Path | None) -> GeneratorCheckpoint | None:
    """The generator `named` (as in `open_generator`), or else the one in the tokenizer's folder; None if that
    has none.

    Raises ConfigError or CheckpointError, also if it was made for another tokenizer.
    """
    if named is None and not (checkpoint.folder / FOLDER).is_dir():
        return None
    found = open_generator(checkpoint.folder if named is None else named)
    folder = found.folder
    made_for, ours = found.config.tokenizer, checkpoint.fingerprint
    if made_for and made_for != ours:
        raise CheckpointError(
            f"{folder}: this generator was made for another tokenizer ({made_for}, this one is {ours}): "
            "name the model it was trained with"
        )
    text, ours = found.config.text_tower, checkpoint.text_fingerprint
    if text and text != ours:
        raise CheckpointError(
            f"{folder}: this generator takes captions from another text tower ({text}, this one is "
            f"{ours}): name the model it was trained with"
        )
    if problem := found.config.misfit(checkpoint.config):
        raise CheckpointError(f"{folder}: this generator does not fit the model: {problem}")
    return found


def require_generator(
    checkpoint: Checkpoint, found: GeneratorCheckpoint | None
) -> GeneratorCheckpoint:
    """`found`, if there is one. Raises GenerationError otherwise."""
    if found is None:
        raise GenerationError(
            f"{checkpoint.folder}: this model has no generator (no folder {FOLDER}/ in it): name one "
            "with --generator, or train one"
        )
    return found


def load_drawer(
    checkpoint: Checkpoint, generator: GeneratorCheckpoint | None, network: Network, backend: str
) -> TokenDrawer:
    """Load the generator's weights on the device of `network`. Raises GenerationError if there is none."""
    found = require_generator(checkpoint, generator)
    config = found.config
    drawn_by = get_backend(backend).generator(
        config, found.tensors(), device=network.device, dtype=network.dtype
    )
    return TokenDrawer(config, drawn_by, _conditioner(checkpoint, found, network))


def _conditioner(
    checkpoint: Checkpoint, found: GeneratorCheckpoint, network: Network
) -> Conditioner:
    config = found.config
    if config.conditioner == "t5":
        return t5(config, found.folder, network.device)
    if config.conditioner == "none":
        raise GenerationError(
            f"{found.folder}: this generator has no conditioner, so it cannot take prompts"
        )
    text = checkpoint.config.text_config
    return TextTower(checkpoint.tokenizer, network.text_states, text, config.prefix_length)
