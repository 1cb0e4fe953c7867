"""A backend's generator: its inputs (captions and an order to draw) and its interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from qlip_core.generator.sampling import Sampling


@dataclass(frozen=True)
class Captions:
    """Features of B captions; the last of the T positions is always a caption's last token.

    `features` float32 [B, T, F]; `valid` bool [B, T], False where a shorter caption has padding on the
    left; `null` bool [B], True where the learned null prefix replaces the caption.
    """

    features: np.ndarray
    valid: np.ndarray
    null: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> Captions:
        return Captions(self.features[rows], self.valid[rows], self.null[rows])

    def seen(self) -> np.ndarray:
        """Prefix positions that may be attended to, bool [B, T]; all of them for the null prefix."""
        return self.valid | self.null[:, None]

    def with_null(self) -> Captions:
        """These captions, followed by as many null prefixes, as guidance needs."""
        return Captions(
            np.concatenate([self.features, self.features]),
            np.concatenate([self.valid, self.valid]),
            np.concatenate([self.null, np.ones_like(self.null)]),
        )

    def astype(self, dtype: np.dtype) -> Captions:
        return replace(self, features=self.features.astype(dtype))


@dataclass(frozen=True)
class Draw:
    """An order for B pictures, with everything that a backend's loop needs.

    `keys` uint32 [M, B, 2] and `scales` float32 [M] are `sampling.step_keys` and `guidance_scales`. The
    sub-tokens are returned every `every` steps; only then is the device waited for.
    """

    captions: Captions
    sampling: Sampling
    keys: np.ndarray
    scales: np.ndarray
    every: int

    @property
    def steps(self) -> int:
        """M, or fewer for the beginning of a picture."""
        return len(self.keys)

    @property
    def guided(self) -> bool:
        return bool((self.scales != 1).any())

    @property
    def rows(self) -> Captions:
        """The network's input: the captions and, with guidance, as many null prefixes after them."""
        return self.captions.with_null() if self.guided else self.captions


class GeneratorNetwork(Protocol):
    """A generator on a device."""

    device: str
    dtype: str

    def draw(self, order: Draw) -> Iterator[np.ndarray]:
        """Sub-tokens in raster order, int64 [B, `every`] each time (the last may be shorter)."""
        ...
