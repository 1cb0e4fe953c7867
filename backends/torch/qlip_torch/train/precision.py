"""Mixed precision: products in bfloat16 under autocast; quantizer, norms and losses in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # evaluation uses this module without recipes
    from qlip_torch.train.recipe import EngineRecipe


@dataclass(frozen=True)
class Precision:
    """Whether a step computes products in bfloat16 (`half`), on which device, and whether its remaining float32
    products use TensorFloat-32 (`tf32`)."""

    half: bool
    device: torch.device
    tf32: bool = False

    @classmethod
    def of(cls, engine: EngineRecipe, device: torch.device) -> Precision:
        half = engine.precision == "bfloat16"
        half = half or (engine.precision == "auto" and device.type == "cuda")
        return cls(half, device, engine.tf32)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    @contextmanager
    def products(self) -> Iterator[None]:
        """Sets how a step computes float32 products. The setting is global, so it is restored afterwards: between
        steps products stay exact, and a frozen tokenizer's tokens are those of `qlip tokenize`."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turns autocast off, for code that must run in float32."""
    return torch.autocast(device.type, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """As float32; float64 stays, for gradient checks."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
