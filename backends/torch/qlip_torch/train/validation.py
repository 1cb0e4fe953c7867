"""A first look at a model that was trained on the emoji set: `qlip eval`'s measures, on fewer pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from qlip_core.data.emoji import CLASS_NAMES_100
from qlip_core.evaluation.emoji import (
    UNSEEN_CLASS_NAMES,
    reconstruction_examples,
    seen_class_examples,
    unseen_class_examples,
)
from qlip_core.evaluation.reconstruction import evaluate_reconstruction
from qlip_core.evaluation.zero_shot import evaluate_zero_shot
from qlip_core.model import load


def validate_emoji(
    folder: str | Path, device: torch.device, *, scenes: int = 256, renderings: int = 300
) -> list[str]:
    """What an exported model does on pictures that training never saw, in lines to print.

    Two things are kept apart: names that training saw, in renderings it did not see, and names it never
    saw, which alone deserve the word zero-shot.
    """
    model = load(folder, backend="torch", device="cpu" if device.type == "cpu" else str(device))
    size = model.config.image_size
    seen = reconstruction_examples(size, scenes)
    scores = evaluate_reconstruction(model, seen, batch_size=64, shown=0).scores
    line = (
        f"reconstruction of {scenes} held-out scenes: PSNR {scores['PSNR']:.2f} dB, "
        f"SSIM {scores['SSIM']:.3f}"
    )
    if model.config.quantizes:
        low, high = (scores[f"{end} share of ones in a bit"] for end in ("least", "greatest"))
        line += f", bit usage {low:.2f} to {high:.2f}"
    lines = [line]
    for what, examples, names in (
        ("seen names in unseen renderings", seen_class_examples, CLASS_NAMES_100),
        ("unseen names (zero-shot)", unseen_class_examples, UNSEEN_CLASS_NAMES),
    ):
        found = evaluate_zero_shot(model, examples(size, renderings), names, batch_size=64)
        scores = found.scores
        lines.append(
            f"classification by text, {what}: {scores['top-1']:.1%} top-1, {scores['top-5']:.1%} top-5 "
            f"of {len(names)} names over {renderings} plain renderings (chance {scores['chance']:.1%})"
        )
    return lines
