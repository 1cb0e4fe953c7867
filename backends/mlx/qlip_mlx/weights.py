"""A checkpoint's tensors put into a model: in its dtype, stored as its kernels read them fastest, or in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

GROUP = 64  # weights of a row that share a scale, in 8 and 4 bits


def load_weights(
    model: nn.Module,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: mx.Dtype,
    bits: int | None,
    lay_out: Callable[[mx.array], mx.array],
    linears: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> None:
    """Fill `model` with `tensors` (name -> array), one by one: of those that are laid out or quantized, at most
    one is in memory twice.

    bits: 8, 4 or None; `fits` says which linears are quantized. lay_out: how the weights of all other
    `linears` are stored.
    """
    modules = list(model.named_modules())
    weights = {f"{name}.weight" for name, module in modules if isinstance(module, linears)}
    quantized = {f"{name}.weight" for name, module in modules if bits is not None and fits(module)}
    if bits is not None:
        # Only for the modules: arrays are lazy, and these are replaced before anything computes them.
        nn.quantize(model, GROUP, bits, class_predicate=lambda _, module: fits(module))
    held: list[tuple[str, mx.array]] = []
    for name, array in tensors:
        tensor = mx.array(array, dtype)
        if name in quantized:
            found = zip(("weight", "scales", "biases"), mx.quantize(tensor, GROUP, bits))
            parts = [(f"{name.removesuffix('weight')}{part}", value) for part, value in found]
        else:
            parts = [(name, lay_out(tensor) if name in weights else tensor)]
        mx.eval([value for _, value in parts])
        held += parts
    model.load_weights(held)


def fits(module: nn.Module) -> bool:
    """Whether quantization changes a module: linears whose rows divide into groups of GROUP."""
    return isinstance(module, nn.Linear) and module.weight.shape[-1] % GROUP == 0
