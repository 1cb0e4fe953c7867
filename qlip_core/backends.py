"""The interface of backends, and how they are found: by entry point, imported only when used."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

import numpy as np

from qlip_core.config import QLIPConfig
from qlip_core.errors import BackendError
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.network import GeneratorNetwork

GROUP = "qlip.backends"

# The module that each backend needs.
# mlx.core and not mlx, because `mlx` alone is a namespace package that other packages create, too.
REQUIREMENTS = {"torch": "torch", "mlx": "mlx.core"}


class Weights(Protocol):
    """Where a network's tensors come from, part by part (qlip_core.architecture.PARTS)."""

    def part(self, part: str) -> Mapping[str, np.ndarray]:
        """Published name -> float32 array, checked: complete, of the right shapes, finite."""
        ...


class Network(Protocol):
    """A model on a device. Arrays are numpy; a call runs as one batch.

    `pixels` float32 [B, 3, S, S] normalised; each part's weights are loaded when first used.
    """

    device: str
    dtype: str

    def latents(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [B, N, L]: `u`, before the sign."""
        ...

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Bits uint8 0/1 [B, N, L]: u > 0."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes float32 [B, N, L] (corners, or latents with quantizer "none") -> [B, 3, S, S]."""
        ...

    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [B, P], projected, not normalised."""
        ...

    def embed_texts(self, ids: np.ndarray) -> np.ndarray:
        """Token ids int64 [B, T] -> float32 [B, P], projected, not normalised."""
        ...

    def text_states(self, ids: np.ndarray) -> np.ndarray:
        """Token ids int64 [B, T] -> float32 [B, T, Dt]: the text tower after its last norm."""
        ...

    def hidden_states(self, pixels: np.ndarray, layer: int) -> np.ndarray:
        """float32 [B, N+1, D] after `layer` layers (0: the embeddings), CLS first."""
        ...


class Backend(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What `network` accepts, float32 first."""
        ...

    def version(self) -> str:
        """The framework's version."""
        ...

    def devices(self) -> list[str]:
        """Usable devices, best first; the first is what "auto" picks."""
        ...

    def network(self, config: QLIPConfig, weights: Weights, *, device: str, dtype: str) -> Network:
        """A network on one of `devices()` in one of `dtypes`."""
        ...

    def generator(
        self,
        config: GeneratorConfig,
        weights: Mapping[str, np.ndarray],
        *,
        device: str,
        dtype: str,
    ) -> GeneratorNetwork:
        """A generator on one of `devices()` in one of `dtypes`; `weights` has all tensors, float32."""
        ...


def backend_names() -> list[str]:
    """Names of all registered backends, whether or not their framework is installed."""
    return sorted(_registered())


def is_installed(name: str) -> bool:
    """Whether the framework of a backend can be imported. Does not import it."""
    module = REQUIREMENTS.get(name)
    if module is None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def choose_backend() -> str:
    """What "auto" means: mlx on Apple silicon, else torch, else mlx, else numpy."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    order = ("mlx", "torch") if apple else ("torch", "mlx")
    return next((name for name in order if is_installed(name)), "numpy")


def get_backend(name: str = "auto") -> Backend:
    """Import a backend. Raises BackendError for an unknown one or one that is not installed."""
    if name == "auto":
        name = choose_backend()
    entry = _registered().get(name)
    if entry is None:
        raise BackendError(f'no backend "{name}"; there are: auto, {", ".join(backend_names())}')
    if not is_installed(name):
        raise BackendError(f"backend {name} is not installed: run `pip install 'qlip[{name}]'`")
    try:
        return entry.load()
    except ImportError as error:
        raise BackendError(
            f"backend {name} cannot be imported ({error}): "
            f"reinstall it with `pip install --force-reinstall 'qlip[{name}]'`"
        ) from error


def choose_device(backend: Backend, device: str) -> str:
    """A device of the backend. Raises BackendError, listing the devices, if it has no such one."""
    devices = backend.devices()
    if device == "auto":
        return devices[0]
    if device == "cuda" and "cuda:0" in devices:
        return "cuda:0"
    if device not in devices:
        raise BackendError(
            f'backend {backend.name} has no device "{device}" here; it has: {", ".join(devices)}'
        )
    return device


def check_dtype(backend: Backend, dtype: str) -> None:
    """Raises BackendError, listing the dtypes, for one that the backend does not have."""
    if dtype not in backend.dtypes:
        raise BackendError(
            f'backend {backend.name} has no dtype "{dtype}"; it has: {", ".join(backend.dtypes)}'
        )


def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
