"""QLIP on MLX: local inference on Metal, and on Linux through MLX's CPU and CUDA builds."""

from qlip_mlx.backend import BACKEND, MlxBackend
from qlip_mlx.model import QLIP, load

__all__ = ["BACKEND", "QLIP", "MlxBackend", "load"]
