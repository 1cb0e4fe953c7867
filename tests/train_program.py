"""Runs training as a program, for tests that kill it or start several: RECIPE OUT [options]."""

import argparse
import os
import signal
import sys
from typing import Any

import torch

from qlip_core.errors import QlipError
from qlip_torch.train import plan, run, throughput
from qlip_torch.train.generator import run as generator_run
from qlip_torch.train.generator.recipe import GeneratorRecipe
from qlip_torch.train.loop import Interrupted
from qlip_torch.train.recipe import Recipe
from qlip_torch.train.stage import Stage


def kill_at(rank: int, at: int) -> None:
    """SIGKILL this process at the beginning of a step, if it is that rank."""
    honest = Stage.step

    def step(self: Stage, batches: Any, number: int, **options: Any) -> Any:
        if (self.world.rank, number) == (rank, at):
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(self, batches, number, **options)

    Stage.step = step  # type: ignore[method-assign]


def in_haste() -> None:
    """What a run says and draws beside its training takes longer than a tiny one."""
    throughput._matmul_rate = lambda *_: 1e11  # type: ignore[assignment]
    plan.activation_bytes = lambda *_, **__: 0
    for module in (run, generator_run):
        module.save_curves = lambda *_: False  # type: ignore[attr-defined]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("out")
    parser.add_argument("--stage", default="1")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--generator", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--kill", type=int, nargs=2, metavar=("RANK", "STEP"))
    options = parser.parse_args()
    if options.kill:
        kill_at(*options.kill)
    torch.set_num_threads(1)
    in_haste()
    try:
        if options.generator:
            made_for = GeneratorRecipe.load(options.recipe, options.set)
            generator_run.train_generator(made_for, out=options.out, resume=options.resume)
        else:
            recipe = Recipe.load(options.recipe, options.set)
            run.train(recipe, stage=options.stage, out=options.out, resume=options.resume)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except QlipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
