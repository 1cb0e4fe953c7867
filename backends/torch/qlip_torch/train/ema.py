"""Exponential moving average of a model's trained weights."""

# torch's own optimizers are built on _foreach_*, which it does not re-export.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import torch
from torch import nn

from qlip_torch.train.optimizers import local


class Ema:
    """`shadow = d * shadow + (1 - d) * w` in float32, for every parameter that is trained.

    The decay warms up: at update n (from 0) `d = min(decay, (1 + n) / (10 + n))`, so that the first
    weights do not linger. Sharded parameters have sharded shadows.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        self.decay = decay
        self.updates = 0
        # Copies even if the parameter is already float32.
        self.shadow = {
            name: p.detach().to(torch.float32, copy=True) for name, p in _trained(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the shadow towards the model's weights; call once after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        params = _trained(model)
        shadow = [local(self.shadow[name]) for name in params]
        torch._foreach_lerp_(shadow, [local(p).float() for p in params.values()], 1 - decay)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
