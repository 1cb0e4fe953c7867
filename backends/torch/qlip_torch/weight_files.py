"""Safetensors weights of the networks behind a metric: found, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
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


def fitted(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], what: str
) -> dict[str, Tensor]:
    """The tensors, checked to be exactly those of `shapes`, and finite. Raises CheckpointError, which lists
    what is wrong with `what`."""
    wrong = [f"missing {name}" for name in shapes if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in shapes]
    for name in shapes.keys() & tensors.keys():
        found, wanted = list(tensors[name].shape), list(shapes[name])
        if found != wanted:
            wrong.append(f"{name} is {found}, not {wanted}")
        elif not torch.isfinite(tensors[name]).all():
            wrong.append(f"{name} holds NaN or infinity")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(f"{what}: {'; '.join(wrong[:8])}{more}")
    return dict(tensors)
