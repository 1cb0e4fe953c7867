"""The backend `torch`: QLIP on CPU, CUDA and Apple's GPUs behind the interface of qlip_core.backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qlip_core.backends import Network, Weights
from qlip_core.config import QLIPConfig
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.network import GeneratorNetwork
from qlip_core.text import pooled_position
from qlip_torch import generator
from qlip_torch.model import QLIP, load
from qlip_torch.sampler import TorchGenerator
from qlip_torch.t5 import T5Encoder

if TYPE_CHECKING:
    from qlip_core.evaluation.clip_score import Towers
    from qlip_core.evaluation.reconstruction import Features, PairMetric

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TorchBackend:
    """`compile` runs the vision towers, and a generator's steps on CUDA, through `torch.compile`, block by
    block. It takes up to a minute to start, which pays off for many thousands of images on a GPU; without it
    the first call is fast. `kernels` runs a generator's bfloat16 steps on CUDA with this project's Triton
    kernels instead (`qlip_torch.step_kernels`), which have not been timed yet."""

    compile: bool = False
    kernels: bool = False

    @property
    def name(self) -> str:
        return "torch"

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(DTYPES)

    def version(self) -> str:
        return torch.__version__

    def devices(self) -> list[str]:
        cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        mps = ["mps"] if torch.backends.mps.is_available() else []
        return [*cuda, *mps, "cpu"]

    def network(self, config: QLIPConfig, weights: Weights, *, device: str, dtype: str) -> Network:
        return TorchNetwork(config, weights, device=device, dtype=dtype, compile=self.compile)

    def generator(
        self,
        config: GeneratorConfig,
        weights: Mapping[str, np.ndarray],
        *,
        device: str,
        dtype: str,
    ) -> GeneratorNetwork:
        model = generator.load(config, weights, device=device, dtype=DTYPES[dtype])
        return on_device(
            model, device=device, dtype=dtype, compile=self.compile, kernels=self.kernels
        )

    def t5(self, name: str, length: int, device: str) -> T5Encoder:
        """FLAN-T5's encoder for captions of at most `length` tokens (qlip_core.generator.conditioning)."""
        return T5Encoder(name, length, self.devices()[0] if device == "auto" else device)

    def lpips(self, weights: str, device: str) -> PairMetric:
        """With `inception` and `clip` this makes a `qlip_core.evaluation.learned.LearnedMetrics`."""
        from qlip_torch.evaluation import lpips_metric

        return lpips_metric(weights, device)

    def inception(self, weights: str, device: str) -> Features:
        from qlip_torch.evaluation import inception_features

        return inception_features(weights, device)

    def clip(self, source: str, device: str) -> Towers:
        from qlip_torch.clip import clip_towers

        return clip_towers(source, device)


def on_device(
    model: generator.Generator, *, device: str, dtype: str, compile: bool, kernels: bool
) -> TorchGenerator:
    """A fused model on `device`, ready to draw; `compile` and `kernels` have an effect on CUDA only."""
    cuda = device.startswith("cuda")
    fused = None
    if cuda and kernels:
        from qlip_torch.step_kernels import FusedStep

        fused = FusedStep(model, model.rope(device))
    if cuda and compile:
        for block in model.blocks():
            block.compile(dynamic=False)
    return TorchGenerator(model, device=device, dtype=dtype, compiled=cuda and compile, fused=fused)


class TorchNetwork:
    """A model that reads each of its parts when it is first used."""

    def __init__(
        self, config: QLIPConfig, weights: Weights, *, device: str, dtype: str, compile: bool
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self._weights = weights
        self._compile = compile
        self._parts: dict[str, QLIP] = {}

    def _part(self, part: str) -> QLIP:
        if part not in self._parts:
            model = load(
                self.config,
                self._weights.part(part),
                (part,),
                device=self.device,
                dtype=DTYPES[self.dtype],
            )
            # Texts are short and vary in length: recompiling for each length does not pay off.
            if self._compile and part != "text":
                for block in model.blocks():
                    block.compile()
            self._parts[part] = model
        return self._parts[part]

    @torch.inference_mode()
    def hidden_states(self, pixels: np.ndarray, layer: int) -> np.ndarray:
        return _to_numpy(self._part("encoder").hidden_states(self._to_device(pixels), layer))

    @torch.inference_mode()
    def latents(self, pixels: np.ndarray) -> np.ndarray:
        return _to_numpy(self._latents(pixels))

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray | torch.Tensor) -> np.ndarray:
        return (self._latents(pixels) > 0).to(torch.uint8).cpu().numpy()

    def _latents(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        _, z = self._part("encoder").encode(self._to_device(pixels))
        return self._part("down").bottleneck_down(z)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        z_hat = self._part("up").bottleneck_up(self._to_device(codes))
        return _to_numpy(self._part("decoder").decode(z_hat))

    @torch.inference_mode()
    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        encoder = self._part("encoder")
        cls, _ = encoder.encode(self._to_device(pixels))
        return _to_numpy(encoder.embed_image(cls))

    @torch.inference_mode()
    def embed_texts(self, ids: np.ndarray) -> np.ndarray:
        # Attention is causal, so positions after the last pooled one are not needed.
        last = pooled_position(ids, self.config.text_config.eos_token_id).max(initial=0)
        needed = torch.tensor(ids[:, : last + 1], dtype=torch.int64, device=self.device)
        return _to_numpy(self._part("text").embed_text(needed))

    @torch.inference_mode()
    def text_states(self, ids: np.ndarray) -> np.ndarray:
        return _to_numpy(self._part("text").text_states(torch.tensor(ids, device=self.device)))

    def _to_device(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        if isinstance(values, np.ndarray):
            if not values.flags.writeable:  # torch.from_numpy would warn
                values = values.copy()
            values = torch.from_numpy(values)
        return values.to(self.device, DTYPES[self.dtype])


def _to_numpy(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


BACKEND = TorchBackend()
