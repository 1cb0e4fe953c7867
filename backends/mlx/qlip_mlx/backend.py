"""The backend `mlx`: QLIP on Metal, on CUDA (MLX's own build) and on the CPU, behind qlip_core.backends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from qlip_core.backends import Weights
from qlip_core.config import QLIPConfig
from qlip_core.errors import BackendError
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.network import GeneratorNetwork
from qlip_core.text import pooled_position
from qlip_mlx import generator
from qlip_mlx.kernels import FUSED, PLAIN_CPU, layout_for_vectors
from qlip_mlx.model import QLIP, load, unquantized
from qlip_mlx.sampler import MlxGenerator

DEVICES = {"gpu": mx.gpu, "cpu": mx.cpu}

# Type of activations and unquantized weights, and bits of quantized ones. With quantized weights the rest
# stays float32, because quantization saves memory and bandwidth, not arithmetic.
DTYPES: dict[str, tuple[mx.Dtype, int | None]] = {
    "float32": (mx.float32, None),
    "bfloat16": (mx.bfloat16, None),
    "float16": (mx.float16, None),
    "int8": (mx.float32, 8),
    "int4": (mx.float32, 4),
}

# MLX keeps freed buffers for reuse, up to most of a Mac's memory; one batch needs less than this limit.
CACHE_BYTES = 1 << 30

Forward = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class MlxBackend:
    """`compile`: fuse pointwise operations of the vision towers with `mx.compile`; None: on a GPU only.

    On a Linux CPU it would run a C++ compiler, which takes seconds per network and gains little.
    """

    compile: bool | None = None

    @property
    def name(self) -> str:
        return "mlx"

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(DTYPES)

    def version(self) -> str:
        return importlib.metadata.version("mlx")

    def devices(self) -> list[str]:
        """`gpu` is Metal on a Mac, CUDA in MLX's CUDA build. Raises BackendError on a Mac without Metal."""
        try:
            # Opens Metal, without which MLX's Mac build cannot even use the CPU. `is_available` does not try.
            mx.device_info(mx.gpu)
        except RuntimeError as error:
            raise BackendError(
                f"MLX cannot use this machine ({error}): use another backend"
            ) from error
        return [name for name, device in DEVICES.items() if mx.is_available(device)]

    def network(
        self, config: QLIPConfig, weights: Weights, *, device: str, dtype: str
    ) -> MlxNetwork:
        _full_float32()
        compile = device == "gpu" if self.compile is None else self.compile
        return MlxNetwork(config, weights, device=device, dtype=dtype, compile=compile)

    def generator(
        self,
        config: GeneratorConfig,
        weights: Mapping[str, np.ndarray],
        *,
        device: str,
        dtype: str,
    ) -> GeneratorNetwork:
        _full_float32()
        kind, bits = DTYPES[dtype]
        linux_cpu = _on_linux_cpu(device)
        with scope(device):
            kernels = replace(PLAIN_CPU, lay_out=layout_for_vectors()) if linux_cpu else FUSED
            model = generator.load(config, weights, dtype=kind, bits=bits, kernels=kernels)
        aside = _streams(1)[0] if linux_cpu else None
        return MlxGenerator(model, device, dtype, kind, partial(scope, device), aside)


class MlxNetwork:
    """A model that reads each of its parts when it is first used."""

    def __init__(
        self, config: QLIPConfig, weights: Weights, *, device: str, dtype: str, compile: bool
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self._weights = weights
        self._type, self._bits = DTYPES[dtype]
        self._compile: Callable[[Forward], Forward] = mx.compile if compile else _as_is
        self._parts: dict[str, QLIP] = {}
        self._compiled: dict[str, Forward] = {}
        linux_cpu = _on_linux_cpu(device)
        # The polynomial kernels are made for operations that run one by one.
        self._kernels = PLAIN_CPU if linux_cpu and not compile else FUSED
        # There, everything except a tuned BLAS uses one core per stream.
        self._streams = _streams(len(os.sched_getaffinity(0))) if linux_cpu else []

    def _part(self, part: str) -> QLIP:
        if part not in self._parts:
            with self._scope():
                self._parts[part] = load(
                    self.config,
                    self._weights.part(part),
                    (part,),
                    dtype=self._type,
                    bits=self._bits,
                    kernels=self._kernels,
                )
        return self._parts[part]

    def hidden_states(self, pixels: np.ndarray, layer: int) -> np.ndarray:
        encoder = self._part("encoder")
        return self._run(lambda x: encoder.hidden_states(x, layer), pixels)

    def latents(self, pixels: np.ndarray) -> np.ndarray:
        return self._run(self._latents(), pixels)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        latents = self._latents()
        return self._run(lambda x: (latents(x) > 0).astype(mx.uint8), pixels)

    def _latents(self) -> Forward:
        encoder, down = self._part("encoder"), self._part("down")
        return self._once("latents", lambda x: down.bottleneck_down(encoder.encode(x)[1]))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        up, decoder = self._part("up"), self._part("decoder")
        forward = self._once("decode", lambda x: decoder.decode(up.bottleneck_up(x)))
        return self._run(forward, codes)

    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        encoder = self._part("encoder")
        forward = self._once("embed_images", lambda x: encoder.embed_image(encoder.encode(x)[0]))
        return self._run(forward, pixels)

    def embed_texts(self, ids: np.ndarray) -> np.ndarray:
        pooled = pooled_position(ids, self.config.text_config.eos_token_id)
        # Attention is causal, so positions after the last pooled one are not needed.
        needed = ids[:, : pooled.max(initial=0) + 1]
        # Not compiled: texts are short and vary in length, and each length would be traced again.
        text = self._part("text")
        with self._scope():
            return _to_numpy(text.embed_text(mx.array(needed), mx.array(pooled)))

    def text_states(self, ids: np.ndarray) -> np.ndarray:
        text = self._part("text")
        with self._scope():
            return _to_numpy(text.text_model(mx.array(ids)))

    def unquantized(self) -> list[str]:
        """Linears that keep their weights although `dtype` is int8 or int4, by published name."""
        return [] if self._bits is None else unquantized(self.config)

    def _once(self, name: str, forward: Forward) -> Forward:
        """The compiled form of a forward, made at its first call."""
        if name not in self._compiled:
            self._compiled[name] = self._compile(forward)
        return self._compiled[name]

    def _run(self, forward: Forward, batch: np.ndarray) -> np.ndarray:
        """Run and evaluate a forward on one batch, split over the streams if there are several."""
        count = max(1, min(len(batch), len(self._streams)))
        pieces = []
        with self._scope():
            for i, piece in enumerate(np.array_split(batch, count)):
                with mx.stream(self._streams[i]) if self._streams else nullcontext():
                    pieces.append(forward(mx.array(piece, self._type)))
            mx.eval(pieces)
            return np.concatenate([_to_numpy(piece) for piece in pieces])

    def _scope(self) -> AbstractContextManager[None]:
        return scope(self.device)


@contextmanager
def scope(device: str) -> Iterator[None]:
    """Set the device and the cache limit, and restore the caller's afterwards."""
    before = mx.set_cache_limit(CACHE_BYTES)
    mx.set_cache_limit(min(before, CACHE_BYTES))
    try:
        with mx.stream(DEVICES[device]):
            yield
    finally:
        mx.set_cache_limit(before)


def _full_float32() -> None:
    """Ask MLX for full float32 products, unless the user has set MLX_ENABLE_TF32.

    By default the GPUs of Apple's M5 and later, and CUDA's, round the factors of a float32 product to about
    11 bits, which changes bits. MLX reads this variable once, at the process's first product on a GPU.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


def _on_linux_cpu(device: str) -> bool:
    """Where MLX's fused kernels are slower than plain ones, and one stream keeps one core busy."""
    return device == "cpu" and platform.system() == "Linux"


def _streams(count: int) -> list[mx.ThreadLocalStream]:
    # Thread-local, so that a network made in one thread runs in another.
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(count)]


def _as_is(forward: Forward) -> Forward:
    return forward


def _to_numpy(values: mx.array) -> np.ndarray:
    # numpy has no bfloat16; bits stay uint8.
    return np.array(values if values.dtype == mx.uint8 else values.astype(mx.float32))


BACKEND = MlxBackend()
