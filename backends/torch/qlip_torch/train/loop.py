"""The training loop: batches, steps, progress, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlip_core.errors import QlipError
from qlip_torch.train.checkpoints import Checkpoints
from qlip_torch.train.distributed import StopRequest, World
from qlip_torch.train.metrics import Metrics, Speed
from qlip_torch.train.precision import Precision
from qlip_torch.train.recipe import CheckpointRecipe, StepsRecipe
from qlip_torch.train.stage import StepReport
from qlip_torch.train.train_state import TrainState


class Interrupted(QlipError):
    """A signal stopped the run, which wrote a checkpoint. `exit_code` is 128 + the signal's number."""

    def __init__(self, step: int, exit_code: int) -> None:
        super().__init__(f"stopped after step {step} with a checkpoint; continue with --resume")
        self.exit_code = exit_code


class Described(Protocol):
    """A recipe or a configuration, as checkpoints store it."""

    def to_dict(self) -> dict[str, Any]: ...


class Trained(Protocol):
    """What is trained: stage 1 or 2 of the tokenizer (`qlip_torch.train.stage`), or the generator."""

    @property
    def number(self) -> int | str: ...
    @property
    def recipe(self) -> StepsRecipe: ...
    @property
    def world(self) -> World: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def state(self) -> TrainState: ...

    def step(self, batches: Any, step: int, *, probe: bool = False) -> StepReport: ...


class Feed(Protocol):
    """Endless micro-batches of this rank, and the position in them."""

    def __next__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Parts:
    """What a stage's loop is made of."""

    recipe: Described
    config: Described
    checkpoint: CheckpointRecipe
    pictures: int
    """Steps between pictures; 0 is never."""
    gradients: int
    """Steps between measurements of each loss's gradient; 0 is never."""
    tokenizer_folder: Path
    stage: Trained
    loader: Feed
    checkpoints: Checkpoints
    stop: StopRequest
    metrics: Metrics | None
    """On the first rank."""
    show: Callable[[int], float | None]
    """Makes pictures after the given number of steps; on the first rank returns their PSNR if they have one.
    Every rank calls it."""


def resumed(
    folder: Path, settings: CheckpointRecipe, stage: Trained
) -> tuple[Checkpoints, int, list[dict[str, Any]]]:
    """Read the newest checkpoint in a stage's folder, if any, into `stage`. Returns the folder's checkpoints,
    the steps done by then, and each rank's data position; 0 and [] if there is none."""
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep=settings.keep,
        background=settings.background,
        world=stage.world,
    )
    latest = checkpoints.latest()
    if latest is None:
        return checkpoints, 0, []
    found = checkpoints.load(latest, stage.state.tensors())
    stage.state.restore_numbers(found.state["numbers"])
    return checkpoints, found.state["step"], [rank["data"] for rank in found.ranks]


def metrics_of(
    stage: Trained, folder: Path, every: int, *, start: int, code_dim: int, flops: float
) -> Metrics | None:
    """The record of a stage from step `start` on, on the first rank only; `flops` are those of an image."""
    world = stage.world
    if not world.is_first:
        return None
    with stage.precision.products():
        speed = Speed.measure(flops, world.device, stage.precision.dtype, world.size)
    return Metrics(
        folder,
        every,
        stage=stage.number,
        steps=stage.recipe.steps,
        start=start,
        batch=stage.recipe.batch,
        code_dim=code_dim,
        speed=speed,
        device=world.device,
    )


def train_stage(parts: Parts, start: int, until: int) -> None:
    """Run steps `start` to `until` (exclusive) from the parts' current state, ending with a checkpoint.

    Raises NonFiniteError when a term is not finite (the last checkpoint is kept), Interrupted after
    a signal.
    """
    stage, world = parts.stage, parts.stage.world
    micro_batches = stage.recipe.micro_batches(world.size)
    every = parts.gradients
    for step in range(start, until):
        began = time.perf_counter()
        batches = [next(parts.loader) for _ in range(micro_batches)]
        waited = time.perf_counter() - began
        with stage.precision.products():
            report = stage.step(batches, step, probe=bool(every) and step % every == 0)
        done = step + 1
        pictures = bool(parts.pictures) and (done % parts.pictures == 0 or done == until)
        if parts.metrics is not None:
            parts.metrics.record(done, report, parts.loader.state_dict, waited, always=pictures)
        parts.checkpoints.poll()
        stopping = world.any(parts.stop.signal is not None)
        if stopping or done == until or done % parts.checkpoint.every == 0:
            save(parts, done)
        if stopping:
            parts.checkpoints.wait()
            raise Interrupted(done, parts.stop.exit_code)
        if pictures:  # after the checkpoint, because pictures may take longer
            began = time.perf_counter()
            decibels = parts.show(done)
            if parts.metrics is not None:
                parts.metrics.leave_out(time.perf_counter() - began)
                if decibels is not None:
                    parts.metrics.amend({"pictures_psnr": decibels})
    parts.checkpoints.wait()


def save(parts: Parts, done: int) -> None:
    """Write a checkpoint of everything that the next step depends on."""
    stage = parts.stage
    state = {
        "stage": stage.number,
        "recipe": parts.recipe.to_dict(),
        "config": parts.config.to_dict(),
        "tokenizer": str(parts.tokenizer_folder.absolute()),
        "numbers": stage.state.numbers(),
    }
    own = {"data": parts.loader.state_dict()}
    parts.checkpoints.save(done, stage.state.tensors(), state, own)
