"""Exponential moving average of a model's trained weights."""

# torch's own optimizers are built on _foreach_*, which it does not re-export.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlip_core.errors import CheckpointError, RecipeError


class Ema:
    """`shadow = d * shadow + (1 - d) * w` in float32, for every parameter that is trained.

    The decay warms up: at update n (from 0) `d = min(decay, (1 + n) / (10 + n))`, so that the first
    weights do not linger. Sharded parameters have sharded shadows.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise RecipeError(f"the EMA's decay is in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        # A copy even where the parameter is float32 already.
        self.shadow = {
            name: p.detach().to(torch.float32, copy=True) for name, p in _trained(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the shadow towards the model's weights; call once after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        params = _trained(model)
        shadow = [_local(self.shadow[name]) for name in params]
        torch._foreach_lerp_(shadow, [_local(p).float() for p in params.values()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights into the model."""
        for name, p in _trained(model).items():
            _local(p).copy_(_local(self.shadow[name]))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights inside the block, its own again after it."""
        kept = {name: _local(p.detach()).clone() for name, p in _trained(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in _trained(model).items():
                    _local(p).copy_(kept[name])

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. Raises CheckpointError where the names differ."""
        missing = sorted(self.shadow.keys() - state["shadow"].keys())
        unexpected = sorted(state["shadow"].keys() - self.shadow.keys())
        if missing or unexpected:
            raise CheckpointError(f"EMA state: missing {missing[:5]}, unexpected {unexpected[:5]}")
        self.decay, self.updates = float(state["decay"]), int(state["updates"])
        for name, shadow in self.shadow.items():
            _local(shadow).copy_(_local(state["shadow"][name]))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
