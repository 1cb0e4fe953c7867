"""LPIPS on VGG16 (arXiv 1801.03924), stage 2's perceptual term.

Weights are safetensors, in one file or several:

- `features.N.weight`, `features.N.bias`: torchvision's names of VGG16's convolutions, N in 0, 2, 5,
  7, 10, 12, 14, 17, 19, 21, 24, 26, 28 (its classifier may be present and is ignored);
- `linK.model.1.weight` [1, C, 1, 1], K in 0..4: lpips's names of its linear weights
  (`lpips/weights/v0.1/vgg.pth`).

Both are published as pickles, which this program never reads. Convert each once, outside:
`safetensors.torch.save_file(torch.load(path, "cpu", weights_only=True), "out.safetensors")`.

Legend: x, y [B, 3, S, S] in [-1, 1]; f_k the features of tap k with C_k channels.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from qlip_core.errors import QlipError
from qlip_core.preprocessing import CLIP_MEAN, CLIP_STD
from qlip_torch.train.precision import at_least_float32, no_autocast
from qlip_torch.weight_files import fitted, read_weights, weight_files

log = logging.getLogger(__name__)

# LPIPS' own input scaling: ImageNet's mean and deviation, converted to [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

# (convolutions, channels) of VGG16's five stages; the last ReLU of each stage is a tap.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
SMALLEST_SIDE = 16
IGNORED = ("classifier.", "pre_logits.", "head.")


def clip_to_signed(pixels: Tensor) -> Tensor:
    """CLIP-normalised pixels [B, 3, S, S] to [-1, 1] (SPEC 2), unclipped, in float32."""
    mean = pixels.new_tensor(CLIP_MEAN, dtype=torch.float32).view(3, 1, 1)
    std = pixels.new_tensor(CLIP_STD, dtype=torch.float32).view(3, 1, 1)
    return (pixels.float() * std + mean) * 2 - 1


class Lpips(nn.Module):
    """`d(x, y) = mean_B sum_k mean_hw sum_c w_kc (n(f_k(x)) - n(f_k(y)))_c^2`, n to unit channels.

    The network is frozen; gradients flow to the inputs that require them. Its convolutions follow
    autocast; normalisation, differences and means are float32. `name` says which weights these are, for
    logs and reports.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        channels = 3
        for stage, (count, width) in enumerate(STAGES):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.linear = nn.ParameterList([torch.empty(width) for _, width in STAGES])
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def extract(self, x: Tensor) -> list[Tensor]:
        """relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of x [B, 3, S, S] in [-1, 1]."""
        if min(x.shape[-2:]) < SMALLEST_SIDE:
            raise QlipError(
                f"LPIPS needs images of at least {SMALLEST_SIDE} px, got {list(x.shape[-2:])}"
            )
        x = (x - self.get_buffer("shift")) / self.get_buffer("scale")
        features = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                features.append(x)
        return features

    def distances(self, x: Tensor, y: Tensor) -> Tensor:
        """One distance per image: two [B, 3, S, S] in [-1, 1] to float32 [B]."""
        pairs = zip(self.extract(x), self.extract(y), self.linear)
        with no_autocast(x.device):
            terms = [
                ((_unit(fx) - _unit(fy)).square() * w.view(-1, 1, 1)).sum(1).mean((-1, -2))
                for fx, fy, w in pairs
            ]
            return torch.stack(terms).sum(0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of two batches [B, 3, S, S] in [-1, 1]: a float32 scalar."""
        return self.distances(x, y).mean()


def _unit(features: Tensor) -> Tensor:
    """Channels [B, C, h, w] to unit length. vector_norm has gradient 0 at 0, where sqrt's is infinite."""
    features = at_least_float32(features)
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def build_perceptual(perceptual: str, seed: int = 0) -> Lpips:
    """The LPIPS a recipe names.

    perceptual: `"random"` (seeded random weights, with a warning: for tests and machines without
    weights), or one or several sources separated by commas, each a safetensors file, a folder of
    them, or a hub id `owner/name`. Raises CheckpointError if weights are missing, unexpected or of the
    wrong shape.
    """
    if perceptual == "random":
        return _random(seed)
    tensors: dict[str, Tensor] = {}
    for path in perceptual_files(perceptual):
        tensors |= read_weights(path)
    return _load(tensors, ", ".join(_sources(perceptual)))


def perceptual_files(perceptual: str) -> list[Path]:
    """The safetensors files of all sources, in order. Raises CheckpointError if one has none."""
    return [
        path
        for source in _sources(perceptual)
        for path in weight_files(source, "perceptual weights")
    ]


def _sources(perceptual: str) -> list[str]:
    return [source.strip() for source in perceptual.split(",") if source.strip()]


def _random(seed: int) -> Lpips:
    model = Lpips(f"random(seed={seed})")
    generator = torch.Generator().manual_seed(seed)
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            deviation = (2 / (9 * layer.in_channels)) ** 0.5
            layer.weight.normal_(0, deviation, generator=generator)
            assert layer.bias is not None
            layer.bias.zero_()
    for weight in model.linear:
        # The published ones average 0.07 to 0.11 at each tap.
        weight.uniform_(0, 0.2, generator=generator)
    log.warning(
        "perceptual loss: %s, VGG16 with RANDOM weights; its values are not LPIPS and not comparable to "
        "any published figure. Name weights in the recipe (perceptual = PATH) for real LPIPS.",
        model.name,
    )
    return model


def _load(tensors: dict[str, Tensor], name: str) -> Lpips:
    model = Lpips(name)
    own = {f"features.{key}": value for key, value in model.features.state_dict().items()}
    shapes = {key: list(value.shape) for key, value in own.items()}
    for k, weight in enumerate(model.linear):
        own[f"lin{k}.model.1.weight"] = weight.data
        shapes[f"lin{k}.model.1.weight"] = [1, len(weight), 1, 1]
    found = {key: value for key, value in tensors.items() if not key.startswith(IGNORED)}
    found = fitted(found, shapes, f"perceptual weights {name}")
    for key, value in own.items():
        value.copy_(found[key].view(value.shape))
    return model
