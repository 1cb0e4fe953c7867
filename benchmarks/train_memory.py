"""What a training step keeps in memory, counted without a GPU.

    python benchmarks/train_memory.py [--preset qlip-b-16-256] [--cases 0,3,4,6,7]

The cases are train_torch.py's, and the steps are the trainer's own, run on fake tensors: shapes without
values, so that sizes which no CPU could hold take minutes and hardly any memory. It reports the peak, in
each of two steps, of the bytes of all live tensors, each rounded up to 512 as CUDA's allocator does. The
blocks are not compiled, whatever the case says; the allocator's reserves, libraries' workspaces and
allocations inside custom kernels are not counted. The first figure is what stays between steps: weights,
the optimizer's state, and in stage 2 LPIPS and the discriminator. Stage 2's first step has the discriminator's
R1 penalty, like every sixteenth step, sixteen images at a time; the second has none.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from train_torch import CASES, Case, micro_batches

from qlip_core.architecture import PARTS
from qlip_core.config import PRESETS, QLIPConfig
from qlip_torch.model import QLIP, Rotary
from qlip_torch.train import stage as stages
from qlip_torch.train.distributed import World
from qlip_torch.train.recipe import EngineRecipe, Stage1Recipe, Stage2Recipe
from qlip_torch.train.stage1 import build_stage1
from qlip_torch.train.stage2 import PARTS as STAGE2_PARTS
from qlip_torch.train.stage2 import build_stage2

_ROUND = 512
"""CUDA's allocator rounds up to multiples of this many bytes."""


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still referenced; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map(self._note, out)
        return out

    def _note(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._seen.pop(key)


def _rotate(self: Rotary, x: Tensor) -> Tensor:
    """As on a GPU; on a CPU the trainer rotates differently, with other intermediate tensors."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = self.cos.to(dtype), self.sin.to(dtype)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _to_host(self: stages.Stage, found: Any, norm: Any, step: int) -> tuple[Any, ...]:
    """Replaces the method that reads the losses' values, which fake tensors do not have."""
    return dict.fromkeys(found.terms, 0.0), 0.0, None, None


@contextmanager
def without_values() -> Iterator[None]:
    """The trainer without what depends on values: reading losses, and whether the gradient is clipped."""
    with (
        mock.patch.object(stages.Stage, "_to_host", _to_host),
        mock.patch.object(stages, "clip_gradients", lambda *_: torch.zeros(())),
        mock.patch.object(Rotary, "forward", _rotate),
        # Everything is on the one device, and fake parameters refuse to be exchanged.
        mock.patch.object(torch.nn.Module, "to", lambda module, *_: module),
    ):
        yield


def count(config: QLIPConfig, case: Case, steps: int = 2) -> tuple[int, list[int]]:
    """(bytes before the first step, most bytes within each step) of a case."""
    engine: EngineRecipe = dataclasses.replace(case.engine, device="cpu", compile=False)
    world = World(0, 1, torch.device("cpu"))
    with (
        without_values(),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        LiveBytes() as bytes_,
    ):
        model = QLIP(config, PARTS if case.stage == 1 else STAGE2_PARTS)
        for module in model.modules():
            if isinstance(module, Rotary):
                module.cos, module.sin = fake.from_tensor(module.cos), fake.from_tensor(module.sin)
        recipe = case.recipe(steps + 1)
        if isinstance(recipe, Stage1Recipe):
            stage = build_stage1(model, recipe, engine, world)
        else:
            assert isinstance(recipe, Stage2Recipe)
            stage = build_stage2(model, recipe, engine, world, 0)
        before = bytes_.live
        batches = micro_batches(config, case, world)
        peaks = []
        for step in range(steps):
            bytes_.peak = bytes_.live
            stage.step(batches, step)
            peaks.append(bytes_.peak)
        return before, peaks


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="qlip-b-16-256", choices=tuple(PRESETS))
    parser.add_argument("--cases", default="0,3,4,6,7", help="which of train_torch.py's CASES")
    args = parser.parse_args(arguments)

    print(f"{args.preset}, torch {torch.__version__}, bfloat16 autocast, not compiled")
    print(f"{'stage':>5}{'batch':>7}{'micro':>7}{'checkpointed':>14}"
          f"{'before, GB':>12}{'1st step':>10}{'2nd step':>10}{'paper':>7}{'seconds':>9}")  # fmt: skip
    for case in (CASES[int(number)] for number in args.cases.split(",")):
        began = time.perf_counter()
        before, peaks = count(PRESETS[args.preset], case)
        paper = f"{case.limit_gb:.0f}" if case.limit_gb else ""
        print(f"{case.stage:5}{case.batch:7,}{case.micro_batch:7,}{'yes' if case.checkpointing else 'no':>14}"
              f"{before / 1e9:12.2f}{peaks[0] / 1e9:10.1f}{peaks[1] / 1e9:10.1f}{paper:>7}{time.perf_counter() - began:9.0f}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
