"""A first look at a trained model on the emoji set: reconstruction, and classification by text.

Two things are kept apart: names that training saw, in renderings it did not see, and names it never saw,
which alone deserve the word zero-shot. `qlip eval` measures on any data, with its protocol stamped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlip_core.checkpoint import Checkpoint, open_checkpoint
from qlip_core.data.emoji import CLASS_NAMES_100, UNSEEN_NAMES, EmojiSet
from qlip_core.metrics import psnr, ssim
from qlip_torch.model import QLIP, load
from qlip_torch.train.figures import to_images

_BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """Share of images whose own name is the nearest (top-1) or among the five nearest texts."""

    top1: float
    top5: float
    images: int
    names: int

    @property
    def chance(self) -> float:
        return 1 / self.names


@dataclass(frozen=True)
class Validation:
    """What a model does on emoji renderings that training never sees."""

    psnr: float
    ssim: float
    scenes: int
    bits_low: float
    bits_high: float
    seen: Accuracy
    """Names training saw."""
    unseen: Accuracy
    """Names training never saw: zero-shot."""

    def lines(self) -> list[str]:
        return [
            f"reconstruction of {self.scenes} held-out scenes: PSNR {self.psnr:.2f} dB, "
            f"SSIM {self.ssim:.3f}, bit usage {self.bits_low:.2f} to {self.bits_high:.2f}",
            *(
                f"classification by text, {what}: {a.top1:.1%} top-1, {a.top5:.1%} top-5 of "
                f"{a.names} names over {a.images} plain renderings (chance {a.chance:.1%})"
                for what, a in (
                    ("seen names in unseen renderings", self.seen),
                    ("unseen names (zero-shot)", self.unseen),
                )
            ),
        ]


def validate_emoji(
    folder: str | Path, device: torch.device, *, each: int = 3, scenes: int = 256
) -> Validation:
    """Validate an exported model: `each` plain renderings of every name, and so many held-out scenes."""
    checkpoint = open_checkpoint(folder)
    model = load(checkpoint.config, checkpoint.tensors(), device=device)
    size = checkpoint.config.image_size
    held_out = EmojiSet(size, split="held-out")
    images = np.stack([held_out.sample(i)[0] for i in range(scenes)])
    made, used = _reconstructions(model, checkpoint, images, device)
    return Validation(
        psnr=float(psnr(images, made).mean()),
        ssim=float(ssim(images, made).mean()),
        scenes=scenes,
        bits_low=float(used.min()),
        bits_high=float(used.max()),
        seen=_classify(model, checkpoint, "held-out", CLASS_NAMES_100, each, device),
        unseen=_classify(model, checkpoint, "unseen", tuple(UNSEEN_NAMES), each, device),
    )


def _batches(checkpoint: Checkpoint, images: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(images), _BATCH):
        normalize = checkpoint.preprocessing.normalize
        pixels = np.stack([normalize(image) for image in images[start : start + _BATCH]])
        yield torch.from_numpy(pixels).to(device)


@torch.inference_mode()
def _reconstructions(
    model: QLIP, checkpoint: Checkpoint, images: np.ndarray, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [B, S, S, 3], and each bit's share of ones [L]."""
    made, ones = [], []
    for pixels in _batches(checkpoint, images, device):
        u = model.bottleneck_down(model.encode(pixels)[1])
        ones.append((u > 0).float().mean((0, 1)).cpu().numpy() * len(pixels))
        made.append(to_images(model.decode(model.bottleneck_up(model.quantize(u)))))
    return np.concatenate(made), np.sum(ones, axis=0) / len(images)


@torch.inference_mode()
def _classify(
    model: QLIP,
    checkpoint: Checkpoint,
    split: str,
    names: tuple[str, ...],
    each: int,
    device: torch.device,
) -> Accuracy:
    assert checkpoint.tokenizer is not None and split in ("held-out", "unseen")
    emoji = EmojiSet(checkpoint.config.image_size, split=split, plain=True, names=names)
    images = np.stack([emoji.sample(i)[0] for i in range(each * len(names))])
    ids = torch.from_numpy(checkpoint.tokenizer(names)).to(device)
    text = F.normalize(torch.cat([model.embed_text(part) for part in ids.split(_BATCH)]), dim=-1)
    image = torch.cat(
        [
            F.normalize(model.embed_image(model.encode(pixels)[0]), dim=-1)
            for pixels in _batches(checkpoint, images, device)
        ]
    )
    # The names take turns: sample i shows name i modulo their number.
    own = torch.arange(len(images), device=device) % len(names)
    nearest = (image @ text.T).topk(5, dim=1).indices == own[:, None]
    return Accuracy(
        float(nearest[:, 0].float().mean()),
        float(nearest.any(1).float().mean()),
        len(images),
        len(names),
    )
