"""qlip: one visual tokenizer that reconstructs images and understands them.

An open implementation of QLIP (arXiv 2502.05178). `import qlip_core as qlip` is the public API:

    model = qlip.load("nvidia/QLIP-B-16-256", backend="mlx")
    tokens = model.encode(["a.png", "b.jpg"])
    images = model.decode(tokens)
"""

from qlip_core.backends import backend_names, choose_backend, get_backend
from qlip_core.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from qlip_core.config import PRESETS, QLIPConfig
from qlip_core.errors import QlipError
from qlip_core.model import Model, load
from qlip_core.tokens import VisualTokens

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Checkpoint",
    "Model",
    "QLIPConfig",
    "QlipError",
    "VisualTokens",
    "backend_names",
    "choose_backend",
    "get_backend",
    "load",
    "open_checkpoint",
    "save_checkpoint",
]
