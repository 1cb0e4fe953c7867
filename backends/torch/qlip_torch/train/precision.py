"""Mixed precision: products in bfloat16 under autocast; quantizer, norms and losses in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # LPIPS is measured without a recipe
    from qlip_torch.train.recipe import EngineRecipe


@dataclass(frozen=True)
class Precision:
    """Whether products are taken in bfloat16 (`half`), and on which device."""

    half: bool
    device: torch.device

    @classmethod
    def of(cls, engine: EngineRecipe, device: torch.device) -> Precision:
        half = engine.precision == "bfloat16"
        return cls(half or (engine.precision == "auto" and device.type == "cuda"), device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)


def exactly(device: torch.device) -> AbstractContextManager[object]:
    """Float32 in the middle of autocast."""
    return torch.autocast(device.type, enabled=False)


def lifted(tensor: Tensor) -> Tensor:
    """As float32; float64 stays, for checks of gradients."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
