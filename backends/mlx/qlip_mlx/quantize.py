"""Weights in 8 or 4 bits, by MLX's own quantization."""

from __future__ import annotations

import mlx.nn as nn

GROUP = 64  # weights of a row that share a scale


def quantize(model: nn.Module, bits: int) -> None:
    """Quantize every linear whose rows divide into groups of GROUP, in place."""
    nn.quantize(model, GROUP, bits, class_predicate=lambda _, module: fits(module))


def fits(module: nn.Module) -> bool:
    """Whether `quantize` changes a module."""
    return isinstance(module, nn.Linear) and module.weight.shape[-1] % GROUP == 0
