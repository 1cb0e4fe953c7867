"""The overhead of `qlip train`: CPU time of its loop, against a bare loop's.

    python benchmarks/train_overhead.py [--recipe emoji] [--steps 60] [--bare 20]

The whole loop is stage 1 of the recipe as `qlip train` runs it: pictures drawn, prepared and collated,
metrics, pictures, gradient probes, checkpoints. Data is made in the process itself (no workers), so that
all of it is in this process's CPU time. The bare loop is the same network, losses and optimizer on one batch
of random pictures. Both run on one thread; half of the bare steps come before the whole loop and half after
it. It prints medians of CPU time per step, and the mean of the whole loop, which includes rare work.
Exits 1 if the ratio of the medians is over 1.33.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch

from qlip_core.config import QLIPConfig
from qlip_torch.model import QLIP
from qlip_torch.train import loop
from qlip_torch.train.accumulate import accumulated_backward
from qlip_torch.train.distributed import World
from qlip_torch.train.pictures import Batch
from qlip_torch.train.precision import Precision
from qlip_torch.train.recipe import Recipe, Stage1Recipe
from qlip_torch.train.run import train
from qlip_torch.train.stage import Stage
from qlip_torch.train.stage1 import Stage1Losses, Stage1Network

LIMIT = 1.33


def whole_loop(recipe: Recipe, out: Path) -> list[float]:
    """CPU seconds of each step of `qlip train`, from one step's begin to the next one's."""
    began: list[float] = []
    honest = Stage.step

    def step(self: Stage, *arguments: object, **options: object) -> object:
        began.append(time.process_time())
        return honest(self, *arguments, **options)  # type: ignore[arg-type]

    def train_stage(parts: loop.Parts, start: int, until: int) -> None:
        loop.train_stage(parts, start, until)
        began.append(time.process_time())

    with (
        mock.patch.object(Stage, "step", step),
        mock.patch("qlip_torch.train.run.train_stage", train_stage),
        mock.patch("qlip_torch.train.run.validate_emoji", lambda *_: []),
    ):
        train(recipe, stage="1", out=out, say=lambda line: None)
    return [after - before for before, after in pairwise(began)]


def bare_loop(config: QLIPConfig, recipe: Recipe) -> Callable[[], float]:
    """Runs one step: forward, losses, backward, optimizer. Gives its CPU seconds."""
    settings: Stage1Recipe = recipe.stage1
    world = World(0, 1, torch.device("cpu"))
    model = QLIP(config).train()
    network = Stage1Network(model, Precision.of(recipe.engine, world.device))
    losses = Stage1Losses(network, model, settings, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=settings.betas, fused=True)
    text = config.text_config
    ids = torch.randint(1, text.vocab_size - 3, (settings.batch, text.max_position_embeddings))
    ids[:, -1] = text.eos_token_id
    pixels = torch.randint(0, 256, (settings.batch, 3, config.image_size, config.image_size))
    batch = Batch(pixels.to(torch.uint8), ids, [])

    def step() -> float:
        start = time.process_time()
        accumulated_backward(losses, [batch])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="emoji")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bare", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.load(args.recipe, ["data.workers=0", f"stage1.steps={args.steps}"])
    if recipe.stage1.micro_batches(1) != 1:
        parser.error(f"{args.recipe}: takes its batch in several pieces")
    step = bare_loop(recipe.model.config(), recipe)
    step()  # kernels are chosen
    bare = [step() for _ in range(args.bare // 2)]
    with tempfile.TemporaryDirectory() as folder:
        whole = whole_loop(recipe, Path(folder) / "run")[1:]
    bare += [step() for _ in range(args.bare - args.bare // 2)]

    ratio = statistics.median(whole) / statistics.median(bare)
    batch = recipe.stage1.batch
    print(
        f"recipe {args.recipe}, stage 1, batch {batch}, one thread, torch {torch.__version__}\n\n"
        "| CPU seconds a step | median | mean |\n|---|---|---|"
    )
    for name, times in (("whole loop", whole), ("bare loop", bare)):
        print(
            f"| {name} ({len(times)}) | {statistics.median(times):.3f} | {statistics.mean(times):.3f} |"
        )
    print(
        f"\nmedians: {ratio:.3f} (at most {LIMIT}); "
        f"means: {statistics.mean(whole) / statistics.mean(bare):.3f}"
    )
    sys.exit(0 if ratio <= LIMIT else 1)


if __name__ == "__main__":
    main()
