"""numpy arrays as tensors."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


def shared(array: np.ndarray) -> Tensor:
    """A tensor on the array's own memory, which may be read-only: nothing may write to it then."""
    with warnings.catch_warnings():
        # Checkpoints are mapped read-only, and torch cannot know that nothing writes to the tensor.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
