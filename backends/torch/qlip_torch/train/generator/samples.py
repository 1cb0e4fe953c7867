"""Pictures of a run: fixed prompts, drawn with a fixed seed as `qlip generate` draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qlip_core.files import atomic_file
from qlip_core.generator.conditioning import Conditioner
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.generate import Request, TokenDrawer
from qlip_core.model import Model
from qlip_core.tokens import VisualTokens
from qlip_torch.backend import DTYPES
from qlip_torch.generator import load
from qlip_torch.sampler import TorchGenerator
from qlip_torch.train.figures import sheet
from qlip_torch.train.generator.recipe import GeneratorLogRecipe

_COLUMNS, _BATCH = 8, 16


def draw_samples(
    config: GeneratorConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: Model,
    conditioner: Conditioner,
    prompts: tuple[str, ...],
    seed: int,
    dtype: str = "float32",
) -> np.ndarray:
    """A picture of each prompt, uint8 [len(prompts), S, S, 3]. `weights` float32 by name."""
    device = tokenizer.device
    model = load(config, weights, device=torch.device(device), dtype=DTYPES[dtype])
    drawer = TokenDrawer(config, TorchGenerator(model, device=device, dtype=dtype), conditioner)
    request = Request.of(prompts, 1, seed, config.sampling, config.visual_vocab_size)
    bits = np.concatenate([bits for _, bits in drawer.draw(request, _BATCH)])
    return tokenizer.decode(VisualTokens.from_bits(bits, config.grid))


def save_samples(
    path: Path,
    config: GeneratorConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: Model,
    conditioner: Conditioner,
    log: GeneratorLogRecipe,
    dtype: str,
) -> None:
    """Save a PNG with pictures of the log's prompts, in rows; its metadata has the prompts and the seed."""
    pictures = draw_samples(config, weights, tokenizer, conditioner, log.prompts, log.seed, dtype)
    metadata = PngInfo()
    metadata.add_itxt("prompts", "\n".join(log.prompts))
    metadata.add_itxt("seed", str(log.seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        Image.fromarray(sheet(pictures, _COLUMNS)).save(file, "png", pnginfo=metadata)
