"""Training on a GPU: images per second, share of the matrix rate, and peak memory by batch per device.

    python benchmarks/train_torch.py [--preset qlip-b-16-256] [--steps 4] [--seconds 600]

The steps are the trainer's own (forward, losses, backward, clipping, optimizer) on random pictures and
captions already on the device, so that data costs nothing. FLOPs are model FLOPs (qlip_torch.train.throughput):
what activation checkpointing or feature-cached accumulation computes twice counts once. The share is of the
rate that a plain bfloat16 product of 8192 reaches in the same run. The paper trains B-16 with 51 GB at a
batch of 2,048 per device and 28 GB at 1,024 (stage 1), and 42 GB at 256 with LPIPS and GAN (stage 2).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlip_core.architecture import PARTS
from qlip_core.config import PRESETS, QLIPConfig
from qlip_torch.model import QLIP
from qlip_torch.train.distributed import World
from qlip_torch.train.pictures import Batch
from qlip_torch.train.plan import parts_of
from qlip_torch.train.recipe import EngineRecipe, Stage1Recipe, Stage2Recipe, StageRecipe
from qlip_torch.train.stage import Stage
from qlip_torch.train.stage1 import build_stage1
from qlip_torch.train.stage2 import PARTS as STAGE2_PARTS
from qlip_torch.train.stage2 import build_stage2
from qlip_torch.train.throughput import forward_flops, matmul_rate


@dataclass(frozen=True)
class Case:
    """A batch on one device, and how it is run."""

    name: str
    batch: int
    micro_batch: int
    compile: bool = False
    checkpointing: bool = False
    stage: int = 1
    limit_gb: float | None = None
    """The memory that the paper reports."""

    @property
    def engine(self) -> EngineRecipe:
        return EngineRecipe(
            device="cuda",
            precision="bfloat16",
            compile=self.compile,
            activation_checkpointing=self.checkpointing,
        )

    def recipe(self, steps: int) -> StageRecipe:
        if self.stage == 1:
            return Stage1Recipe(
                batch=self.batch, micro_batch=self.micro_batch, steps=steps, warmup=0
            )
        return Stage2Recipe(
            batch=self.batch,
            micro_batch=self.micro_batch,
            steps=steps,
            warmup=0,
            perceptual="random",
        )


CASES = (
    Case("plain", 128, 128),
    Case("compiled", 128, 128, compile=True),
    Case("compiled, checkpointed", 128, 128, compile=True, checkpointing=True),
    Case("compiled, accumulated", 1024, 64, compile=True, limit_gb=28),
    Case("compiled, accumulated", 2048, 128, compile=True, limit_gb=51),
    Case("both, accumulated", 1024, 128, compile=True, checkpointing=True, limit_gb=28),
    Case("LPIPS and GAN, accumulated", 256, 64, compile=True, stage=2, limit_gb=42),
    Case("LPIPS and GAN, checkpointed", 256, 64, stage=2, checkpointing=True, limit_gb=42),
    Case("checkpointed", 1024, 1024, checkpointing=True, limit_gb=28),
)


def build(config: QLIPConfig, case: Case, steps: int, world: World) -> Stage:
    with torch.device("meta"):
        model = QLIP(config, PARTS if case.stage == 1 else STAGE2_PARTS)
    model.to_empty(device=world.device)
    model.reset_rotary()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.fill_(2.6)
            elif parameter.ndim < 2:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
            else:
                parameter.normal_(std=0.02)
    recipe = case.recipe(steps)
    if isinstance(recipe, Stage1Recipe):
        return build_stage1(model, recipe, case.engine, world)
    assert isinstance(recipe, Stage2Recipe)
    return build_stage2(model, recipe, case.engine, world, 0)


def micro_batches(config: QLIPConfig, case: Case, world: World) -> list[Batch]:
    """All of them the same one, which no cost depends on."""
    text = config.text_config
    rows, side = case.micro_batch, config.image_size
    pixels = torch.randn(rows, 3, side, side, device=world.device)
    shape = (rows, text.max_position_embeddings)
    ids = torch.randint(1, text.vocab_size - 3, shape, device=world.device)
    ids[:, -1] = text.eos_token_id
    return [Batch(pixels, ids, [])] * (case.batch // rows)


def run(config: QLIPConfig, case: Case, steps: int, world: World) -> tuple[float, float, float]:
    """(images per second, peak memory in GB, seconds of the first step); the median step."""
    torch.compiler.reset()  # a run compiles for its own shapes, and for few of them
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    stage = build(config, case, steps + 1, world)
    batches = micro_batches(config, case, world)
    times = []
    for step in range(steps + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        stage.step(batches, step)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = sorted(times[1:])[len(times[1:]) // 2]
    return case.batch / seconds, torch.cuda.max_memory_allocated() / 1e9, times[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="qlip-b-16-256", choices=tuple(PRESETS))
    parser.add_argument("--steps", type=int, default=4, help="timed, after one that is not")
    parser.add_argument("--seconds", type=float, default=600, help="start no case after so many")
    parser.add_argument(
        "--cases", default="0,1,2,3,4,5,6,7,8", help="which of CASES, in what order"
    )
    args = parser.parse_args(arguments)

    config = PRESETS[args.preset]
    world = World(0, 1, torch.device("cuda", torch.cuda.current_device()))
    rate = matmul_rate(world.device, torch.bfloat16)
    print(
        f"{args.preset}, {torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16; "
        f"a product of 8192: {rate / 1e12:.0f} TFLOP/s"
    )
    print(f"{'':30}{'stage':>6}{'batch':>7}{'micro':>7}{'images/s':>10}{'share':>8}"
          f"{'GB':>8}{'paper':>8}{'first step':>12}")  # fmt: skip
    began = time.perf_counter()
    for case in (CASES[int(number)] for number in args.cases.split(",")):
        if time.perf_counter() - began > args.seconds:
            break
        line = f"{case.name:30}{case.stage:6}{case.batch:7,}{case.micro_batch:7,}"
        paper = f"{case.limit_gb:8.0f}" if case.limit_gb else f"{'':8}"
        try:
            speed, memory, first = run(config, case, args.steps, world)
        except torch.cuda.OutOfMemoryError:
            print(f"{line}  out of memory", flush=True)
            continue
        flops = forward_flops(config).training(*parts_of(case.recipe(1)))
        print(f"{line}{speed:10.0f}{flops * speed / rate:8.1%}{memory:8.1f}{paper}{first:11.1f}s",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
