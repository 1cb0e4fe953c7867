"""A quick evaluation of a trained model: `qlip eval`'s measures on fewer pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from qlip_core.data.emoji_names import CLASS_NAMES_100
from qlip_core.errors import DataError
from qlip_core.evaluation.emoji import (
    UNSEEN_CLASS_NAMES,
    reconstruction_examples,
    seen_class_examples,
    unseen_class_examples,
)
from qlip_core.evaluation.examples import Examples, StoredExamples
from qlip_core.evaluation.reconstruction import evaluate_reconstruction
from qlip_core.evaluation.retrieval import evaluate_retrieval
from qlip_core.evaluation.zero_shot import evaluate_zero_shot
from qlip_core.model import Model, load


def validate_emoji(
    folder: str | Path, device: torch.device, *, scenes: int = 256, renderings: int = 300
) -> list[str]:
    """How an exported model does on pictures that training never saw, in lines to print.

    Two results are kept apart: for names that training saw, in renderings it did not see, and for names it
    never saw. Only the latter is zero-shot.
    """
    model = _load(folder, device)
    size = model.config.image_size
    lines = [_reconstruction(model, reconstruction_examples(size, scenes), "scenes")]
    for what, examples, names in (
        ("seen names in unseen renderings", seen_class_examples, CLASS_NAMES_100),
        ("unseen names (zero-shot)", unseen_class_examples, UNSEEN_CLASS_NAMES),
    ):
        found = evaluate_zero_shot(model, examples(size, renderings), names, batch_size=64)
        scores, chance = found.scores, 1 / len(names)
        lines.append(
            f"classification by text, {what}: {scores['top-1']:.1%} top-1 (chance {chance:.1%}), "
            f"{scores['top-5']:.1%} top-5 (chance {5 * chance:.1%}), of {len(names)} names over {renderings} "
            "plain renderings"
        )
    return lines


def validate_on(folder: str | Path, device: torch.device, location: str, count: int) -> list[str]:
    """How an exported model does on the first `count` pictures of a set, in lines to print: PSNR, SSIM and
    retrieval of captions. Raises DataError if the set cannot be read."""
    model = _load(folder, device)
    examples = StoredExamples(location, limit=count)
    lines = [_reconstruction(model, examples, f"pictures of {location}")]
    try:
        found = evaluate_retrieval(model, examples, batch_size=64)
    except DataError as error:  # the other figures need no captions
        return [*lines, f"retrieval was not measured: {error}"]
    lines.append(
        f"retrieval among the captions of {found.protocol.count} pictures of {location}: R@1 "
        f"{found.scores['image to text R@1']:.1%} image to text, "
        f"{found.scores['text to image R@1']:.1%} text to image"
    )
    return lines


def _load(folder: str | Path, device: torch.device) -> Model:
    return load(folder, backend="torch", device="cpu" if device.type == "cpu" else str(device))


def _reconstruction(model: Model, examples: Examples, what: str) -> str:
    found = evaluate_reconstruction(model, examples, batch_size=64, shown=0)
    scores = found.scores
    line = (
        f"reconstruction of {found.protocol.count} held-out {what}: PSNR {scores['PSNR']:.2f} dB, "
        f"SSIM {scores['SSIM']:.3f}"
    )
    if model.config.quantizes:
        low, high = (scores[f"{end} share of ones in a bit"] for end in ("least", "greatest"))
        line += f", bit usage {low:.2f} to {high:.2f}"
    return line
