"""Safetensors weights of the networks behind a metric: found, read, and named by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlip_core.errors import CheckpointError
from qlip_core.hub import find_model


def weight_files(source: str, what: str) -> list[Path]:
    """The safetensors files behind a file, a folder or a hub id. Raises CheckpointError if none."""
    try:
        path = find_model(source)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from None
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{what} {source}: no *.safetensors in it")
    return files


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises CheckpointError if it is not safetensors."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not safetensors ({error})") from None


def sha256_of(files: Sequence[Path]) -> str:
    """SHA-256 of files' bytes, one after another."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
