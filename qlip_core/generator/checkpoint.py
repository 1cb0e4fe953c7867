"""A generator on disk: a folder with `config.json` and `model.safetensors`, read and written strictly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from qlip_core.checkpoint import weight_files, write_folder
from qlip_core.errors import CheckpointError
from qlip_core.generator.architecture import architecture, diff_tensors
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.sampling import Sampling
from qlip_core.hub import find_model
from qlip_core.tensorfile import TensorFiles

FOLDER = "generator"  # inside a tokenizer's folder


@dataclass(frozen=True)
class GeneratorCheckpoint:
    """A generator's config and its tensors, which are read on demand."""

    config: GeneratorConfig
    folder: Path
    files: TensorFiles

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the config, without its sampling settings, and of all tensors."""
        config = replace(self.config, sampling=Sampling())
        digest = hashlib.sha256(config.to_json().encode())
        for name in sorted(self.files.names):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.files.float32(name), "<f4").data)
        return digest.hexdigest()[:32]

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors, float32. Raises CheckpointError for NaN or infinite values."""
        return {name: self.files.float32(name) for name in architecture(self.config)}


def open_generator(named: str | Path) -> GeneratorCheckpoint:
    """Open a generator's folder; reads headers only.

    `named`: that folder, or a model with a generator in it, as `qlip_core.hub.find_model` takes it.
    Raises ConfigError or CheckpointError; the latter lists tensors that are missing, unexpected or of the
    wrong shape, up to 100 of each kind.
    """
    folder = find_model(named)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: a generator is a folder with config.json, not a file")
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    config = GeneratorConfig.from_file(folder / "config.json")
    files = TensorFiles(weight_files(folder), folder)
    files.check_fit(diff_tensors(config, files.shapes), architecture(config))
    return GeneratorCheckpoint(config, folder, files)


def save_generator(
    folder: str | Path,
    config: GeneratorConfig,
    weights: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Write a generator's folder, whole or not at all; in an existing one the generator is replaced.

    `weights`: all tensors, float32 by name; `dtype`: how they are stored (float32, float16, bfloat16);
    `beside`: other text files by name.
    Raises CheckpointError if the weights do not fit the config or are not finite.
    """
    return write_folder(
        Path(folder),
        {name: weights[name] for name in architecture(config) if name in weights},
        {**(beside or {}), "config.json": config.to_json()},
        dtype=dtype,
        problem=diff_tensors(config, {name: w.shape for name, w in weights.items()}),
    )
