"""numpy arrays as tensors."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


def shared(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory; where that is read-only, nothing may write to the tensor."""
    with warnings.catch_warnings():
        # Checkpoints are mapped read-only; nothing writes to the tensor, but torch cannot know that.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
