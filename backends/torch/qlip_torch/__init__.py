"""QLIP on PyTorch: training at scale on CUDA, and inference on CUDA, Apple's GPUs and the CPU."""

from qlip_torch.backend import BACKEND, TorchBackend, TorchNetwork
from qlip_torch.model import QLIP, load

__all__ = ["BACKEND", "QLIP", "TorchBackend", "TorchNetwork", "load"]
