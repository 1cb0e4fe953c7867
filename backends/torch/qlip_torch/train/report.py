"""`report.md`: a run's settings and results, with curves and pictures."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from qlip_core.files import write_text
from qlip_torch.train.checkpoints import latest_checkpoint, read_state
from qlip_torch.train.generator.recipe import GeneratorRecipe
from qlip_torch.train.metrics import duration, read_metrics
from qlip_torch.train.recipe import Recipe
from qlip_torch.train.sources import is_emoji
from qlip_torch.train.throughput import size_text

REPORT = "report.md"


def write_report(
    out: Path,
    recipe: Recipe,
    device: torch.device,
    ranks: int,
    validations: dict[int, list[str]],
) -> Path:
    """Write `out`/report.md from the run folder and, for each stage's model, lines of measurements."""
    lines = _heading(recipe, device, ranks)
    for number in (1, 2):
        folder = out / f"stage{number}"
        if latest_checkpoint(folder / "checkpoints") is not None:
            lines += [
                "",
                *_stage(number, folder, validations.get(number, []), recipe),
            ]
    return _written(out, lines)


def write_generator_report(
    out: Path, recipe: GeneratorRecipe, device: torch.device, ranks: int, tokenizer: Path
) -> Path:
    """Write `out`/report.md of a finished generator's run from its folder."""
    lines = [
        *_heading(recipe, device, ranks),
        "",
        f"Tokenizer: {tokenizer}",
        "",
        *_progress(recipe.training.steps, read_metrics(out)),
    ]
    if (out / "curves.png").is_file():
        lines += ["", "![curves](curves.png)"]
    if pictures := sorted((out / "pictures").glob("*.png")):
        prompts = ", ".join(f'"{prompt}"' for prompt in recipe.log.prompts)
        lines += [
            "",
            f"Drawn with seed {recipe.log.seed}, row by row: {prompts}.",
            "",
            f"![drawn pictures](pictures/{pictures[-1].name})",
        ]
    return _written(out, lines)


def _heading(recipe: Recipe | GeneratorRecipe, device: torch.device, ranks: int) -> list[str]:
    return [
        f"# {recipe.name or 'Training run'}",
        "",
        *([recipe.description, ""] if recipe.description else []),
        f"Recipe: [recipe.toml](recipe.toml), seed {recipe.seed}. Hardware: {ranks} x "
        f"{_hardware(device)}. PyTorch {torch.__version__}, Python {platform.python_version()}.",
    ]


def _written(out: Path, lines: list[str]) -> Path:
    path = out / REPORT
    write_text(path, "\n".join(lines) + "\n")
    return path


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    cores = "1 thread" if threads == 1 else f"{threads} threads"
    return f"CPU ({platform.processor() or platform.machine()}, {cores})"


def _named(term: str, perceptual: str) -> str:
    """A loss's name in the report; for LPIPS with the weights it was computed with."""
    if term != "lpips":
        return term
    return (
        "lpips (random weights: not LPIPS)" if perceptual == "random" else f"lpips ({perceptual})"
    )


def _terms(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The values of each loss, from the lines that have it: R1, for one, is not computed in every step."""
    out: dict[str, list[float]] = {}
    for line in metrics:
        for name, value in line["terms"].items():
            out.setdefault(name, []).append(value)
    return out


def _progress(steps: int, metrics: list[dict[str, Any]], perceptual: str = "") -> list[str]:
    """How long the steps took, each loss's first and last value, and the skipped samples."""
    if not metrics:
        return []
    last = metrics[-1]
    rates = sorted(line["images_per_second"] for line in metrics)
    shares = sorted(line["utilisation"] for line in metrics)
    lines = [
        f"{steps:,} steps in {duration(last['seconds'])}, median "
        f"{rates[len(rates) // 2]:.1f} images/s ({shares[len(shares) // 2]:.0%} of the measured "
        f"matrix rate), peak memory {size_text(last['memory'])}.",
        "",
        "| loss | first | last |",
        "|---|---|---|",
        *(
            f"| {_named(name, perceptual)} | {values[0]:.4f} | {values[-1]:.4f} |"
            for name, values in _terms(metrics).items()
        ),
    ]
    if skipped := last.get("skipped"):
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items())
        lines += ["", f"Skipped samples (of the first process): {counts}."]
    return lines


def _stage(number: int, folder: Path, validation: list[str], recipe: Recipe) -> list[str]:
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    step = read_state(checkpoint)["step"]
    metrics = read_metrics(folder)
    lines = [f"## Stage {number}", "", *_progress(step, metrics, recipe.stage2.perceptual)]
    if metrics and (bits := metrics[-1].get("bits")):
        lines += [
            "",
            f"Bits: each is 1 in {bits['low']:.0%} to {bits['high']:.0%} of the tokens (healthy: 30% "
            f"to 70%), {bits['dead']:.0%} dead, entropy of the mean soft code "
            f"{bits['entropy']:.0%} of its bits.",
        ]
    if validation:
        lines += ["", *(f"- {line}" for line in validation)]
    if (folder / "curves.png").is_file():
        lines += ["", f"![curves](stage{number}/curves.png)"]
    pictures = sorted((folder / "pictures").glob("*.png"))
    if pictures:
        if recipe.log.held_out:
            which = f"from {recipe.log.held_out}"
        elif all(is_emoji(source.location) for source in recipe.data.sources):
            which = "which training does not see"
        else:
            which = "from the training data: log.held_out in the recipe names another set"
        lines += [
            "",
            f"Fixed pictures ({which}) above, their reconstructions below:",
            "",
            f"![reconstructions](stage{number}/pictures/{pictures[-1].name})",
        ]
    return lines
