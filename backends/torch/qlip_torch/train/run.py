"""A whole run: its stages one after the other, in a folder that records everything about it.

OUT/recipe.toml          the recipe as run; stages.txt says which of its stages
OUT/tokenizer/           if the recipe trains one
OUT/stage1/, OUT/stage2/ metrics.jsonl, curves.png, pictures/, checkpoints/, model/
OUT/stage2/start/        stage 1's result, which stage 2 started from
OUT/report.md            the results
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlip_core.architecture import PARTS
from qlip_core.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from qlip_core.config import QLIPConfig
from qlip_core.errors import CheckpointError, DataError, RecipeError
from qlip_core.files import write_text
from qlip_torch.model import QLIP
from qlip_torch.perceptual import build_perceptual
from qlip_torch.train.assemble import (
    Start,
    check_sources,
    check_start,
    first_start,
    fixed_pixels,
    stage_loader,
    start_from,
    write_tokenizer,
)
from qlip_torch.train.checkpoints import Checkpoints
from qlip_torch.train.data import merge_states
from qlip_torch.train.distributed import StopRequest, World, joined
from qlip_torch.train.export import export_stage
from qlip_torch.train.figures import save_comparison, save_curves
from qlip_torch.train.lock import only_run_in
from qlip_torch.train.loop import Parts, metrics_of, resumed, train_stage
from qlip_torch.train.metrics import read_metrics
from qlip_torch.train.plan import Plan, make_plan, parts_of, planned_on
from qlip_torch.train.recipe import Recipe
from qlip_torch.train.report import write_report
from qlip_torch.train.run_folder import (
    MODEL,
    RECIPE,
    TOKENIZER,
    begun,
    check_begun,
    kept_recipe,
    stage1_model,
    to_stderr,
)
from qlip_torch.train.sources import is_emoji
from qlip_torch.train.stage import Stage
from qlip_torch.train.stage1 import build_stage1
from qlip_torch.train.stage2 import PARTS as STAGE2_PARTS
from qlip_torch.train.stage2 import build_stage2
from qlip_torch.train.throughput import forward_flops
from qlip_torch.train.validation import validate_emoji, validate_on

STAGES = "stages.txt"
THIS_RUN = "stage 1 of this run"


@dataclass(frozen=True)
class Result:
    """What a run produced."""

    out: Path
    models: dict[int, Path]
    """The exported model of each finished stage; empty after a dry run."""
    report: Path | None
    plans: list[Plan]


def train(
    recipe: Recipe | None,
    *,
    stage: str | None = None,
    out: str | Path,
    resume: bool = False,
    steps: int | None = None,
    dry_run: bool = False,
    measure: bool = True,
    say: Callable[[str], None] = to_stderr,
) -> Result:
    """Train as the recipe says, in the folder `out`. Under torchrun every process calls this.

    stage: "1", "2" or "all" (None: all, or with `resume` what the run was started with). resume: continue
    from the newest checkpoint in `out` (from the beginning if there is none yet); the recipe may then be
    None, for the one in `out`. steps: replaces the number of steps of each stage that is run. dry_run:
    make the plan and build everything, without a step and without touching `out`. measure: evaluate the result
    on held-out pictures at the end. say: receives the plan and the results, a line at a time, on the first rank.

    Raises RecipeError for what cannot be run, NonFiniteError when a loss stops being finite,
    Interrupted (with an `exit_code`) after SIGTERM or Ctrl-C, PeerError when another process died.
    """
    out = Path(out)
    if stage is None:
        stage = _begun_with(out) if resume else "all"
    recipe = _settled(recipe, stage, out, resume and not dry_run, steps, dry_run)
    stages = {"1": (1,), "2": (2,), "all": (1, 2)}[stage]
    stop = StopRequest(recipe.checkpoints.grace_seconds)
    if dry_run:  # nothing to save, so Ctrl-C may simply end it
        with joined(recipe.engine) as world:
            return Result(out, {}, None, _dry_run(recipe, stages, out, world, stop, say))
    with ExitStack() as lock:
        with joined(recipe.engine, stop) as world:
            if world.is_first:
                lock.enter_context(only_run_in(out))
                check_begun(out, recipe, resume)  # again: another run may just have ended
            _prepare(recipe, stage, out, world)
            run = _Run(recipe, out, world, stop, say)
            models = {number: run.stage(number) for number in stages}
        # The other ranks are done, and would wait for this one no longer than for any step.
        report = run.report(models, measure)
    return Result(out, models, report, run.plans)


def _dry_run(
    recipe: Recipe,
    stages: tuple[int, ...],
    out: Path,
    world: World,
    stop: StopRequest,
    say: Callable[[str], None],
) -> list[Plan]:
    """Build everything that a run would, in a temporary folder, without taking a step."""
    with tempfile.TemporaryDirectory(prefix="qlip-dry-run-") as folder:
        write_tokenizer(recipe, Path(folder) / TOKENIZER)
        run = _Run(recipe, Path(folder), world, stop, say, dry=True)
        run.dry(stages, out)
    return run.plans


def _stage1_result(recipe: Recipe, out: Path) -> Checkpoint:
    """What stage 2 starts from: the stage 1 that the recipe names, or that of the run in `out`. Raises RecipeError
    if there is none, or it cannot be trained further."""
    origin = recipe.stage2.start or str(out)
    found = stage1_model(origin)
    if not recipe.stage2.start and not (Path(found) / "config.json").is_file():
        raise RecipeError(
            f"{out}: has no finished stage 1 to start from: run --stage 1 first, or name one "
            "with --set stage2.start=RUN"
        )
    source = open_checkpoint(found)
    check_start(source, origin)
    return source


def _settled(
    recipe: Recipe | None,
    stage: str,
    out: Path,
    resume: bool,
    steps: int | None,
    dry_run: bool,
) -> Recipe:
    if stage not in ("1", "2", "all"):
        raise RecipeError(f'stage {stage!r}: expected "1", "2" or "all"')
    recipe = recipe or kept_recipe(Recipe, out)
    if steps is not None:
        changes = [
            f"stage{number}.steps={steps}" for number in (1, 2) if stage in (str(number), "all")
        ]
        recipe = recipe.changed(changes)
    if stage != "1" and not (out / "stage2" / MODEL / "config.json").is_file():
        recipe.stage2.check_weights()
        # Read before stage 1 too, so that an error shows early. A dry run prints its plans first, then builds all.
        if recipe.stage2.start and not dry_run and not begun(out / "stage2"):
            try:
                found = open_checkpoint(stage1_model(recipe.stage2.start))
            except CheckpointError as error:
                raise RecipeError(f"stage2.start: {error}") from None
            check_start(found, f"stage2.start: {recipe.stage2.start}")
        if recipe.stage2.lpips and recipe.stage2.perceptual != "random" and not dry_run:
            try:
                build_perceptual(recipe.stage2.perceptual)
            except CheckpointError as error:
                raise RecipeError(f"stage2.perceptual: {error}") from None
    if not dry_run:
        check_begun(out, recipe, resume)
    return recipe


def _begun_with(out: Path) -> str:
    """The stage or stages that the run in `out` was started with."""
    kept = out / STAGES
    return kept.read_text(encoding="utf-8").strip() if kept.is_file() else "all"


def _prepare(recipe: Recipe, stage: str, out: Path, world: World) -> None:
    if world.is_first:
        # Only if a run that never began left it; any other folder's `tokenizer` is not ours to remove.
        if (out / RECIPE).is_file() and not begun(out):
            shutil.rmtree(out / TOKENIZER, ignore_errors=True)
        # Until stage 2 has begun, its recipe may name another start.
        if (out / RECIPE).is_file() and not begun(out / "stage2"):
            shutil.rmtree(out / "stage2" / "start", ignore_errors=True)
        if not (out / TOKENIZER).is_dir():
            write_tokenizer(recipe, out / TOKENIZER)
        # Written last: without it a folder is not yet a run.
        write_text(out / STAGES, stage + "\n")
        write_text(out / RECIPE, recipe.to_toml())
    world.barrier()


class _Run:
    """The stages of one run on this rank."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        world: World,
        stop: StopRequest,
        say: Callable[[str], None],
        dry: bool = False,
    ) -> None:
        self._dry = dry
        self.recipe, self.out, self.world, self.stop, self._say = recipe, out, world, stop, say
        self.plans: list[Plan] = []
        torch.manual_seed(recipe.seed)

    def stage(self, number: int) -> Path:
        """Run a stage to its end, from its newest checkpoint if there is one. Returns the exported model."""
        folder = self.out / f"stage{number}"
        model = folder / MODEL
        if (model / "config.json").is_file():
            return model
        self._check_sources()
        start = self._planned(number, lambda: self._start(number, folder))
        stage = self._build(number, start)
        checkpoints, done, places = resumed(folder, self.recipe.checkpoints, stage)
        if done < stage.recipe.steps:
            data = merge_states(places) if places else None
            self._train(stage, start, folder, checkpoints, done, data)
        if self.world.is_first:
            save_curves(folder / "curves.png", read_metrics(folder))
            export_stage(folder, model)
        self.world.barrier()
        return model

    def dry(self, stages: tuple[int, ...], out: Path) -> None:
        """Print the plans, first those that follow from the recipe alone, and build everything: weights, engine,
        optimizer, the first batch. `out` is where the run would be."""
        for number in stages:
            if self._known(number):
                self._plan(number, self.recipe.model.config())
        self._check_sources()
        for number in stages:
            start = self._planned(number, lambda n=number: self._dry_start(n, stages, out))
            stage = self._build(number, start)
            with stage_loader(self.recipe, stage.recipe, start, self.world, None) as loader:
                next(loader)

    def _dry_start(self, number: int, stages: tuple[int, ...], out: Path) -> Start:
        named = self.recipe.stage2.start
        if number == 2 and (named or 1 not in stages):
            return start_from(_stage1_result(self.recipe, out), named or THIS_RUN)
        start = first_start(self.recipe, self.out / TOKENIZER)
        # It has the sizes of stage 1's result.
        return start if number == 1 else replace(start, origin=(THIS_RUN,))

    def report(self, models: dict[int, Path], measure: bool) -> Path | None:
        """Write report.md on the first rank; with `measure`, after evaluating the models on held-out pictures."""
        if not self.world.is_first:
            return None
        found: dict[int, list[str]] = {}
        log, device = self.recipe.log, self.world.device
        emoji = any(is_emoji(source.location) for source in self.recipe.data.sources)
        for number, model in models.items() if measure else ():
            lines = validate_emoji(model, device) if emoji else []
            if log.held_out:
                try:
                    lines += validate_on(model, device, log.held_out, log.held_out_count)
                except DataError as error:  # the trained model must not be lost over this
                    lines.append(f"the held-out set was not measured: {error}")
            if lines:
                found[number] = lines
                self.say(f"stage {number}:", *(f"  {line}" for line in lines))
        return write_report(self.out, self.recipe, self.world.device, self.world.size, found)

    def say(self, *lines: str) -> None:
        if self.world.is_first:
            for line in lines:
                self._say(line)

    def _check_sources(self) -> None:
        if self.world.is_first:
            size = self.recipe.model.config().image_size
            check_sources(self.recipe.data, size, self.recipe.log.held_out)

    def _known(self, number: int) -> bool:
        """Whether the recipe alone determines a stage, so that its plan can be printed before anything is fetched."""
        return not self.recipe.start.checkpoint and not (number == 2 and self.recipe.stage2.start)

    def _planned(self, number: int, make: Callable[[], Start]) -> Start:
        """A stage's start; prints its plan, beforehand if the recipe alone determines it."""
        if self._known(number) and not self._dry:
            self._plan(number, self.recipe.model.config())
        start = make()
        if not self._known(number):
            self._plan(number, start.config)
        self.say(*(f"  weights: {line}" for line in start.origin))
        return start

    def _plan(self, number: int, config: QLIPConfig) -> None:
        settings = self.recipe.stage1 if number == 1 else self.recipe.stage2
        recipe, world = self.recipe, self.world
        found = planned_on(recipe.devices, recipe.engine, settings, world, dry=self._dry)
        if found is None:
            return
        devices, notes, rate = found
        plan = make_plan(recipe, config, number, world.device, devices, rate)
        self.plans.append(plan)
        encoder, decoder = config.vision_config.hidden_size, config.decoder_config.hidden_size
        if settings.commitment and encoder != decoder:
            notes = [
                *notes,
                f"  commitment is 0: it needs encoder and decoder of one width, not {encoder} and {decoder}",
            ]
        self.say(*plan.lines(), *notes)

    def _train(
        self,
        stage: Stage,
        start: Start,
        folder: Path,
        checkpoints: Checkpoints,
        done: int,
        data: dict[str, Any] | None,
    ) -> None:
        show = self._pictures(stage, start, folder)
        metrics = metrics_of(
            stage,
            folder,
            self.recipe.log.metrics,
            start=done,
            code_dim=start.config.code_dim,
            flops=forward_flops(start.config).training(*parts_of(stage.recipe)),
        )
        try:
            with stage_loader(self.recipe, stage.recipe, start, self.world, data) as loader:
                parts = Parts(
                    recipe=self.recipe,
                    config=start.config,
                    checkpoint=self.recipe.checkpoints,
                    pictures=self.recipe.log.pictures,
                    gradients=self.recipe.log.gradients,
                    tokenizer_folder=start.tokenizer_folder,
                    stage=stage,
                    loader=loader,
                    checkpoints=checkpoints,
                    stop=self.stop,
                    metrics=metrics,
                    show=show,
                )
                train_stage(parts, done, stage.recipe.steps)
        finally:
            checkpoints.close()
            if metrics is not None:
                metrics.close()

    def _start(self, number: int, folder: Path) -> Start:
        if number == 1:
            return first_start(self.recipe, self.out / TOKENIZER)
        kept = folder / "start"
        if self.world.is_first and not (kept / "config.json").is_file():
            source = _stage1_result(self.recipe, self.out)
            folder.mkdir(parents=True, exist_ok=True)
            card = f"---\nlicense: {source.license}\n---\n" if source.license else None
            save_checkpoint(
                kept,
                source.config,
                source.tensors(),
                tokenizer_from=source.folder,
                preprocessing=source.preprocessing,
                card=card,
            )
        self.world.barrier()
        return start_from(open_checkpoint(kept), self.recipe.stage2.start or THIS_RUN)

    def _build(self, number: int, start: Start) -> Stage:
        recipe, world = self.recipe, self.world
        model = QLIP(start.config, PARTS if number == 1 else STAGE2_PARTS)
        model.init_from(start.weights)
        model.to(world.device)
        if number == 1:
            return build_stage1(model, recipe.stage1, recipe.engine, world)
        return build_stage2(model, recipe.stage2, recipe.engine, world, recipe.seed)

    def _pictures(self, stage: Stage, start: Start, folder: Path) -> Callable[[int], float | None]:
        pixels = fixed_pixels(self.recipe.data, start, self.recipe.log)

        def show(done: int) -> float | None:
            reconstruction = stage.reconstruct(pixels)
            if not self.world.is_first:
                return None
            path = folder / "pictures" / f"step-{done:08d}.png"
            decibels = save_comparison(path, pixels, reconstruction)
            save_curves(folder / "curves.png", read_metrics(folder))
            return decibels

        return show
