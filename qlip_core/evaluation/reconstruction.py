"""How well images survive the tokenizer: PSNR, SSIM, LPIPS, rFID, and how fully the code is used."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from qlip_core.data.samples import Bad, Tally
from qlip_core.evaluation.bits import CodeUsage
from qlip_core.evaluation.examples import Example, Examples, batches, check_some
from qlip_core.evaluation.fid import FeatureStatistics, frechet_distance
from qlip_core.evaluation.grid import Row, draw_grid
from qlip_core.evaluation.protocol import ReferenceHash, Result, make_protocol
from qlip_core.loading import DEFAULT_BATCH, Progress
from qlip_core.metrics import psnr, ssim
from qlip_core.model import Model


class PairMetric(Protocol):
    """A learned distance of two images, such as LPIPS."""

    @property
    def protocol(self) -> str:
        """What it is, with the SHA-256 of its weights."""
        ...

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Two uint8 [B, S, S, 3] to [B]."""
        ...


class Features(Protocol):
    """A network whose features a Fréchet distance compares, such as Inception."""

    @property
    def protocol(self) -> str:
        """What it is and how it resizes, with the SHA-256 of its weights."""
        ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] to [B, F]."""
        ...


def evaluate_reconstruction(
    model: Model,
    examples: Examples,
    *,
    batch_size: int = DEFAULT_BATCH,
    lpips: PairMetric | None = None,
    inception: Features | None = None,
    shown: int = 4,
    progress: Progress | None = None,
) -> Result:
    """Compare images, as preprocessing leaves them, with their reconstructions.

    PSNR is the mean over images of 10 log10(255^2 / mean squared error), in dB, where an exact
    reconstruction counts as 100 dB; SSIM is that of `qlip_core.metrics`. `lpips` and `inception` add LPIPS
    and rFID. If the model quantizes, bit usage and code entropy are added. `shown` pictures each with the
    best, the median and the worst PSNR make the result's `grid` (0: none). Raises DataError if no image
    can be read.
    """
    broken, reference = Tally(), ReferenceHash()
    names: list[str] = []
    decibels, similarities, distances = [], [], []
    before_stats, after_stats = FeatureStatistics(), FeatureStatistics()
    quantizes = model.config.quantizes
    usage = CodeUsage(model.config.code_dim, model.config.group_size) if quantizes else None
    for chunk, pixels in batches(model, examples, batch_size, broken):
        before = model.preprocessing.to_images(pixels)
        if usage is not None:
            tokens = model.encode(pixels, batch_size=batch_size)
            usage.add(tokens)
            after = model.decode(tokens, batch_size=batch_size)
        else:
            after = model.reconstruct(pixels, batch_size=batch_size)
        reference.add(before)
        names += [example.key for example in chunk]
        decibels.append(np.minimum(psnr(before, after), 100.0))
        similarities.append(ssim(before, after))
        if lpips is not None:
            distances.append(np.asarray(lpips(before, after), np.float64))
        if inception is not None:
            before_stats.add(inception(before))
            after_stats.add(inception(after))
        if progress is not None:
            progress(len(chunk))
    check_some(len(names), examples, broken)

    each = np.concatenate(decibels)
    scores: dict[str, float | None] = {
        "PSNR": float(each.mean()),
        "SSIM": float(np.concatenate(similarities).mean()),
    }
    metrics = {
        "PSNR": "mean over images, 8-bit, peak 255, at most 100 dB",
        "SSIM": "Gaussian 11 x 1.5, K 0.01 and 0.03, no padding, RGB channels averaged, 8-bit",
    }
    if lpips is not None:
        scores["LPIPS"] = float(np.concatenate(distances).mean())
        metrics["LPIPS"] = lpips.protocol
    if inception is not None:
        # A single image has no covariance.
        scores["rFID"] = (
            frechet_distance(before_stats.gaussian(), after_stats.gaussian())
            if len(names) > 1
            else None
        )
        metrics["rFID"] = inception.protocol
    details: dict[str, Any] = {
        "images": [
            {"image": n, "PSNR": p, "SSIM": s}
            for n, p, s in zip(names, each.tolist(), np.concatenate(similarities).tolist())
        ]
    }
    if usage is not None:
        scores |= _usage_scores(usage)
        details["codes"] = usage.to_dict()
    protocol = make_protocol(
        model,
        "reconstruction",
        examples.name,
        len(names),
        reference.hexdigest(),
        uses_text=False,
        metrics=metrics,
    )
    grid = _grid(model, examples, names, each, shown) if shown else None
    return Result(protocol, scores, details, broken.to_dict(), grid)


def _usage_scores(usage: CodeUsage) -> dict[str, float]:
    ones = usage.ones()
    return {
        "least share of ones in a bit": float(ones.min()),
        "greatest share of ones in a bit": float(ones.max()),
        "mean entropy of a bit": float(usage.bit_entropy().mean()),
        f"code entropy of a group, of {usage.group_size} bits": float(usage.code_entropy().mean()),
        "share of codes used": float(usage.codes_used().mean()),
    }


def _grid(
    model: Model, examples: Examples, names: list[str], decibels: np.ndarray, shown: int
) -> np.ndarray:
    """Best, median and worst, read and reconstructed again, because measuring keeps no pictures."""
    order = np.argsort(-decibels, kind="stable").tolist()
    shown = min(shown, len(order))
    middle = (len(order) - shown) // 2
    chosen = {
        "best": order[:shown],
        "median": order[middle : middle + shown],
        "worst": order[-shown:][::-1],
    }
    wanted = {names[i] for positions in chosen.values() for i in positions}
    found: list[Example] = []
    for example in examples:
        if not isinstance(example, Bad) and example.key in wanted:
            found.append(example)
            wanted.remove(example.key)
        if not wanted:
            break
    pictures: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for chunk, pixels in batches(model, found, DEFAULT_BATCH, Tally()):
        pairs = zip(model.preprocessing.to_images(pixels), model.reconstruct(pixels))
        pictures |= {example.key: pair for example, pair in zip(chunk, pairs)}
    captions = {
        # Computed from the pictures shown, since keys need not be unique in a set.
        key: f"{min(psnr(a[None], b[None])[0], 100):.1f} dB"
        for key, (a, b) in pictures.items()
    }
    rows = [
        Row(
            f"{title} PSNR: input, reconstruction",
            # Of two with the same key the first readable one is shown.
            [(*pictures[n], captions[n]) for n in (names[i] for i in positions) if n in pictures],
        )
        for title, positions in chosen.items()
    ]
    return draw_grid(rows, scale=max(1, 128 // model.config.image_size))
