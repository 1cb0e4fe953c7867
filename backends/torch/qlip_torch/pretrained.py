"""Models that `transformers` reads from a folder, with checks that it does not make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from qlip_core.errors import CheckpointError

T = TypeVar("T")


def pretrained(cls: Any, folder: Path) -> Any:
    """The model of a `transformers` class in a folder. Reads safetensors only, runs no code from the folder and
    downloads nothing.

    Raises CheckpointError for weights that are missing (all or some), of the wrong shape or not finite.
    """
    model, found = read(
        folder,
        lambda: cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        ),
    )
    # transformers fills missing weights with random values and continues.
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(f"{folder}: weights are missing: {', '.join(missing[:4])}{more}")
    for name, values in model.named_parameters():
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{folder}: tensor {name} has NaN or infinite values")
    return model


def read(folder: Path, how: Callable[[], T]) -> T:
    """What `how` reads from a folder. Any failure becomes a CheckpointError of one line."""
    try:
        return how()
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: cannot be loaded ({line})") from None
