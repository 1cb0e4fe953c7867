"""What training costs and how well it uses the machine: FLOPs, matrix rate, memory.

FLOPs are model FLOPs: 2 per multiply-add of the linear layers and of attention's two products
(the whole N x N square, causal or not); norms, activations, softmax and embeddings are left out,
and so are the loss's logits, LPIPS and the discriminator.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass

import torch

from qlip_core.config import QLIPConfig, TextConfig, VisionConfig


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one image's (and one caption's) forward pass, by part."""

    encoder: float
    bottleneck: float
    decoder: float
    text: float

    def training(self, trained: Collection[str], present: Collection[str]) -> float:
        """FLOPs of an image's training step, by `qlip_core.architecture.PARTS`.

        Backward costs two forwards for a trained part; for a frozen part one if gradients flow through it to
        an earlier trained part, else none. `present`: the parts that run at all.
        """
        bottleneck = self.bottleneck / 2
        costs = {
            "encoder": self.encoder,
            "down": bottleneck,
            "up": bottleneck,
            "decoder": self.decoder,
        }
        total = self.text * (3 if "text" in trained else 1) if "text" in present else 0.0
        behind = False
        for part, cost in costs.items():
            if part in present:
                total += cost * (3 if part in trained else 2 if behind else 1)
                behind |= part in trained
        return total


def forward_flops(config: QLIPConfig) -> ForwardFlops:
    """FLOPs per image of a QLIP of this configuration.

    The caption counts as `max_position_embeddings` tokens, since that is what runs.
    """
    vision, decoder, text = config.vision_config, config.decoder_config, config.text_config
    patches, pixels = config.num_patches, 3 * vision.patch_size**2
    width, length, post = vision.hidden_size, config.code_dim, vision.hidden_size_post_q
    encoder = 2 * patches * pixels * width + 2 * width * config.projection_dim
    encoder += _tower(vision, patches + 1)
    bottleneck = patches * 2 * (width * width + width * length + length * post + post * post)
    head = decoder.hidden_size * decoder.intermediate_size + decoder.intermediate_size * pixels
    return ForwardFlops(
        encoder=encoder,
        bottleneck=bottleneck if vision.quantizer_embed_type == "mlp" else 0.0,
        decoder=_tower(decoder, patches) + patches * 2 * head,
        text=_tower(text, text.max_position_embeddings)
        + 2 * text.hidden_size * config.projection_dim,
    )


def _tower(tower: TextConfig | VisionConfig, tokens: int) -> float:
    """Transformer blocks: per token 4 D^2 of projections, 2 or 3 D*I of MLP, 2 T*D of attention."""
    width = tower.hidden_size
    mlp = (3 if tower.swiglu else 2) * width * tower.intermediate_size
    return tower.num_hidden_layers * tokens * 2 * (4 * width**2 + mlp + 2 * tokens * width)


def matmul_rate(
    device: str | torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.5
) -> float:
    """Measured FLOP/s of square matrix products, the denominator of model-FLOPs utilisation.

    size: side of the matrices, by default 8192 on CUDA and 1024 elsewhere. The best of the runs
    that fit into `seconds`, after one to warm up.
    """
    device = torch.device(device)
    size = size or (8192 if device.type == "cuda" else 1024)
    return _matmul_rate(device, dtype, size, seconds)


@functools.cache
def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    # Its own random numbers, so that the measurement does not affect the run's.
    own = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=own) for _ in range(2))
    out = torch.empty_like(a)
    repeats = 4
    if device.type == "cpu" and dtype != torch.float32:
        # A product takes seconds if the CPU has no instructions for the type; a small one is enough then. The
        # best of several, since one may have waited for a busy CPU.
        each = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a[:128, :128], b[:128, :128])
            each = min(each, time.perf_counter() - start)
        if each > 2e-3:
            return 2 * 128**3 / each
    best, deadline = float("inf"), 0.0
    while best == float("inf") or time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        _synchronize(device)
        elapsed = time.perf_counter() - start
        if deadline:
            best = min(best, elapsed)
        else:
            deadline = time.perf_counter() + seconds
    return repeats * 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: str | torch.device) -> int:
    """Bytes: the device allocator's peak on CUDA; elsewhere the process's largest resident set, which Windows
    does not tell (0)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def size_text(count: int) -> str:
    """Bytes for people, in decimal units."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
