"""A training run small enough for tests: a model of 16 px, a folder of noise pictures, a tiny vocabulary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip_core.data.vocabulary import train_bpe

WORDS = ("red", "green", "blue", "noise", "square", "left", "right", "dark")
TIMEOUT = 300.0  # seconds, for what takes a few unless it hangs
ENDLESS = ("--set", "stage1.steps=100000", "--set", "checkpoints.every=100000")
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextmanager
def in_haste() -> Iterator[None]:
    """One thread, on which models this small are faster, and runs without curves, which take longer to draw."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("run", "generator.run"):
            patch.setattr(f"qlip_torch.train.{module}.save_curves", lambda *_: False)
        yield
    torch.set_num_threads(threads)


def with_curves(patch: pytest.MonkeyPatch) -> None:
    """Runs as users know them, in the midst of `in_haste`."""
    from qlip_torch.train.figures import save_curves

    for module in ("run", "generator.run"):
        patch.setattr(f"qlip_torch.train.{module}.save_curves", save_curves)


def write_data(folder: Path, count: int = 48) -> None:
    """`data/` with pictures and captions, `tokenizer/` with a vocabulary of 530 tokens."""
    generator = np.random.default_rng(0)
    data = folder / "data"
    data.mkdir(parents=True)
    captions = []
    for i in range(count):
        coarse = generator.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse.repeat(4, 0).repeat(4, 1)).save(data / f"{i:03d}.png")
        captions.append(" ".join(generator.choice(WORDS, 3)) + f" {i}")
        (data / f"{i:03d}.txt").write_text(captions[-1])
    train_bpe(captions, 530, folder / "tokenizer", context_length=12)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as a dictionary; `changes` as "stage1__steps=3"."""
    tower = {"width": 32, "intermediate": 48, "layers": 2, "heads": 2}
    stage = {"steps": 8, "batch": 8, "micro_batch": 8, "warmup": 2}
    values: dict[str, Any] = {
        "name": "test",
        "seed": 3,
        "model": {
            "preset": "tiny",
            "tokenizer": str(folder / "tokenizer"),
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 16,
            "bits": 8,
            "group_size": 4,
            "encoder": dict(tower),
            "decoder": dict(tower),
            "text": {**tower, "context": 12, "vocabulary": 530},
        },
        "data": {"sources": [{"location": str(folder / "data")}], "workers": 0},
        "stage1": {
            **stage,
            "learning_rate": dict.fromkeys(("rest", "encoder", "text", "decoder"), 3e-2),
        },
        "stage2": {**stage, "lpips": 0.0, "gan": 0.0},
        "log": {"metrics": 1, "gradients": 4, "pictures": 0, "picture_count": 2},
        "checkpoints": {"every": 2},
    }
    for name, value in changes.items():
        *tables, key = name.split("__")
        at = values
        for table in tables:
            at = at.setdefault(table, {})
        at[key] = value
    return values


def curve(run: Path, stage: int = 1) -> list[tuple[int, dict[str, float], float]]:
    """(step, terms, gradient norm) of every line of a stage's metrics."""
    text = (run / f"stage{stage}" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["step"], line["terms"], line["gradient_norm"]) for line in lines]


def metrics_in(folder: Path, **changes: Any) -> Any:
    """Metrics of two steps of stage 1 on the CPU, written at each."""
    from qlip_torch.train.metrics import Metrics, Speed

    given = {"stage": 1, "steps": 2, "start": 0, "batch": 4, "code_dim": 8} | changes
    device = torch.device("cpu")
    return Metrics(folder, 1, speed=Speed(1e11, 1e12, 1), device=device, **given)


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    from qlip_torch.train.recipe import Recipe

    path.write_text(Recipe.from_dict(values).to_toml(), encoding="utf-8")
    return path


def start_run(recipe: Path, out: Path, *options: str, ranks: int = 1) -> subprocess.Popen[str]:
    """A run in a process of its own, or under torchrun in several."""
    program = [str(Path(__file__).parent / "train_program.py"), str(recipe), str(out), *options]
    launcher = [sys.executable]
    if ranks > 1:
        # By default it is found by the machine's name, which may lead nowhere.
        here = ["--standalone", "--local-addr=127.0.0.1"]
        launcher += ["-m", "torch.distributed.run", *here, f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*launcher, *program],
        env={**os.environ, **THREADS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def endless_run(recipe: Path, out: Path, ranks: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A run that has begun to train, and goes on until it is stopped; at the latest at the end."""
    process = start_run(recipe, out, *ENDLESS, ranks=ranks)
    metrics = out / "stage1" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    try:
        while not (metrics.is_file() and metrics.stat().st_size):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()


def finish(process: subprocess.Popen[str], timeout: float = TIMEOUT) -> str:
    """Wait for a run that must succeed; what it wrote to stderr."""
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    return errors
