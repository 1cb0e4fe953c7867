"""Pictures of a run: fixed images beside their reconstructions, and the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from qlip_core.files import atomic_file
from qlip_core.metrics import psnr
from qlip_core.preprocessing import Preprocessing

_GAP = 2

# Drawn on a logarithmic axis if the values span a power of ten; and titles for the numbers of `metrics.jsonl`.
_LOGARITHMIC = ("mse", "align", "gradient_norm")
_TITLES = {
    "mse": "squared error of pixels",
    "align": "contrastive loss (InfoNCE)",
    "bsq": "entropy loss: per sample - codebook",
    "per_sample_entropy": "entropy per sample (nats)",
    "codebook_entropy": "entropy of the codebook (nats)",
    "commitment": "commitment loss",
    "lpips": "perceptual loss",
    "ssim": "1 - SSIM",
    "gan": "adversarial loss",
    "discriminator": "discriminator's loss",
    "r1": "discriminator's gradient penalty (R1)",
    "gradient_norm": "norm of the gradient",
    "images_per_second": "images per second",
    "pictures_psnr": "PSNR of the fixed pictures (dB)",
    "low": "rarest bit: how often it is 1",
    "dead": "share of bits that are always equal",
}


def save_comparison(path: Path, pixels: Tensor, reconstruction: Tensor) -> float:
    """Save a PNG with the images, uint8 [B, 3, S, S], in the upper row and their reconstructions, normalised
    [B, 3, S, S], below. Returns their mean PSNR in dB."""
    reconstructions = Preprocessing(pixels.shape[-1]).to_images(
        reconstruction.detach().float().cpu().numpy()
    )
    rows = pixels.permute(0, 2, 3, 1).numpy(), reconstructions
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        Image.fromarray(sheet(np.concatenate(rows), len(pixels))).save(file, "png")
    return float(np.minimum(psnr(*rows), 100).mean())


def sheet(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Pictures uint8 [count, S, S, 3] in rows of `columns`, smaller ones enlarged to about 128 pixels."""
    count, side = pictures.shape[:2]
    scale = max(1, 128 // side)
    step, columns = side * scale + _GAP, min(columns, count)
    rows = -(-count // columns)
    out = np.full((rows * step - _GAP, columns * step - _GAP, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * step, i % columns * step
        large = picture.repeat(scale, 0).repeat(scale, 1)
        out[y : y + side * scale, x : x + side * scale] = large
    return out


def save_curves(path: Path, lines: list[dict[str, Any]]) -> bool:
    """Save curves of `metrics.jsonl`'s lines as a PNG; False if matplotlib is not installed.

    If a step was repeated after an interruption, its last line counts.
    """
    try:
        from matplotlib.axes import Axes
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator
    except ImportError:
        return False

    def logarithmic(axis: Axes) -> None:
        axis.set_yscale("log")
        # 0.1, not 1e-01 or 10^-1.
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(LogFormatter())

    def labelled(axis: Axes) -> None:
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.tick_params(which="both", labelsize=8)

    lines = sorted({line["step"]: line for line in lines}.values(), key=lambda line: line["step"])
    names = list(dict.fromkeys(name for line in lines for name in line["terms"]))
    series = {
        name: [(v["step"], v["terms"][name]) for v in lines if name in v["terms"]] for name in names
    }
    for key in ("gradient_norm", "images_per_second"):
        series[key] = [(v["step"], v[key]) for v in lines]
    for key in ("low", "dead"):
        if points := [(v["step"], v["bits"][key]) for v in lines if "bits" in v]:
            series[key] = points
    if points := [(v["step"], v["pictures_psnr"]) for v in lines if "pictures_psnr" in v]:
        series["pictures_psnr"] = points
    columns = 3
    probed = [v for v in lines if "layer_norms" in v]
    rows = -(-(len(series) + bool(probed)) // columns)
    width, height = 4.5 * columns, 2.8 * rows
    figure = Figure(figsize=(width, height))
    # Fixed margins in inches, wide enough for all labels: automatic layout draws everything twice.
    figure.subplots_adjust(
        0.65 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.3 / height, wspace=0.2, hspace=0.42
    )
    FigureCanvasAgg(figure)
    for i, (name, points) in enumerate(series.items(), 1):
        axis = figure.add_subplot(rows, columns, i)
        axis.plot(*zip(*points), linewidth=1)
        axis.set_title(_TITLES.get(name) or name.replace("_", " "), fontsize=9)
        labelled(axis)
        axis.grid(alpha=0.3)
        # Empty until the first line is written. Over less than a power of ten, labels would all be the same.
        values = [y for _, y in points]
        if points and name in _LOGARITHMIC and max(values) > 10 * min(values) > 0:
            logarithmic(axis)
    if probed:
        axis = figure.add_subplot(rows, columns, len(series) + 1)
        for name in probed[-1]["layer_norms"]:
            norms = [v["layer_norms"][name] for v in probed]
            axis.plot([v["step"] for v in probed], norms, label=name)
        axis.set_title("gradient norm at the last shared layer, weighted", fontsize=9)
        labelled(axis)
        logarithmic(axis)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
    return True
