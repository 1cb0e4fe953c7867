"""A whole run of a generator's training, in a folder that records everything about it.

OUT/recipe.toml    the recipe as run
OUT/metrics.jsonl, curves.png, pictures/, checkpoints/
OUT/generator/     the trained generator, once all steps are done
OUT/report.md      the results
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlip_core.backends import get_backend
from qlip_core.checkpoint import open_checkpoint
from qlip_core.errors import CheckpointError, RecipeError
from qlip_core.files import write_text
from qlip_core.generator.architecture import diff_tensors, init_weights
from qlip_core.generator.checkpoint import FOLDER, open_generator
from qlip_core.generator.conditioning import Conditioner, TextTower
from qlip_core.generator.config import GeneratorConfig
from qlip_core.model import Model
from qlip_torch.generator import Generator
from qlip_torch.t5 import T5Encoder
from qlip_torch.train.checkpoints import Checkpoints
from qlip_torch.train.data import merge_states
from qlip_torch.train.distributed import StopRequest, World, joined
from qlip_torch.train.export import export_generator
from qlip_torch.train.figures import save_curves
from qlip_torch.train.generator.feed import Prepared, make_feed
from qlip_torch.train.generator.plan import GeneratorPlan, forward_flops, make_plan
from qlip_torch.train.generator.recipe import GeneratorRecipe
from qlip_torch.train.generator.samples import save_samples
from qlip_torch.train.generator.stage import GeneratorStage
from qlip_torch.train.lock import only_run_in
from qlip_torch.train.loop import Parts, metrics_of, resumed, train_stage
from qlip_torch.train.metrics import read_metrics
from qlip_torch.train.plan import planned_on
from qlip_torch.train.report import REPORT, write_generator_report
from qlip_torch.train.run_folder import (
    RECIPE,
    check_begun,
    kept_recipe,
    model_behind,
    to_stderr,
)


@dataclass(frozen=True)
class GeneratorResult:
    """What a run produced."""

    out: Path
    generator: Path | None
    """The exported generator; None after a dry run."""
    report: Path | None
    """None after a dry run, and in folders of runs that wrote none."""
    plan: GeneratorPlan | None
    """On the first rank, unless the run was already finished."""


def train_generator(
    recipe: GeneratorRecipe | None,
    *,
    out: str | Path,
    resume: bool = False,
    steps: int | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = to_stderr,
) -> GeneratorResult:
    """Train as the recipe says, in the folder `out`. Under torchrun every process calls this.

    Arguments and errors are those of `qlip_torch.train.run.train`; also raises CheckpointError for a tokenizer
    that does not exist, TokenFileError for token shards of another one.
    """
    out = Path(out)
    recipe = _settled(recipe, out, resume, steps, dry_run)
    stop = StopRequest(recipe.checkpoints.grace_seconds)
    with joined(recipe.engine, None if dry_run else stop) as world:
        run = _Run(recipe, out, world, stop, say)
        if dry_run:
            return GeneratorResult(out, None, None, run.dry())
        with only_run_in(out) if world.is_first else nullcontext():
            if world.is_first:
                check_begun(out, recipe, resume)  # again: another run may just have ended
                write_text(out / RECIPE, recipe.to_toml())
            world.barrier()
            plan = run.train()
    report = out / REPORT
    return GeneratorResult(out, out / FOLDER, report if report.is_file() else None, plan)


def _settled(
    recipe: GeneratorRecipe | None, out: Path, resume: bool, steps: int | None, dry_run: bool
) -> GeneratorRecipe:
    recipe = recipe or kept_recipe(GeneratorRecipe, out)
    if steps is not None:
        recipe = recipe.changed([f"training.steps={steps}"])
    if not dry_run:
        check_begun(out, recipe, resume)
    return recipe


class _Run:
    """A run on this rank: the frozen tokenizer, the generator fitted to it, and the steps."""

    def __init__(
        self,
        recipe: GeneratorRecipe,
        out: Path,
        world: World,
        stop: StopRequest,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.out, self.world, self.stop, self._say = recipe, out, world, stop, say
        self.tokenizer = load_tokenizer(recipe, world)
        checkpoint = self.tokenizer.checkpoint
        self.config = recipe.model.config().fitted(
            checkpoint.config, checkpoint.fingerprint, checkpoint.text_fingerprint
        )
        wanted, most = recipe.model.prefix_length, self.config.prefix_length
        if wanted is not None and wanted > most:
            raise RecipeError(
                f"model.prefix_length (={wanted}): the tokenizer's text tower takes at most {most} tokens; "
                'a longer caption needs model.conditioner = "t5"'
            )
        self.conditioner = make_conditioner(self.config, self.tokenizer, world)

    def dry(self) -> GeneratorPlan | None:
        """Build everything: weights, engine, optimizer, the first batch. Returns the plan."""
        plan = self._plan(dry=True)
        stage = self._build()
        feed = self._feed(stage, None)
        with feed.opened():
            next(feed)
        return plan

    def train(self) -> GeneratorPlan | None:
        """Run all steps, from the newest checkpoint if there is one; then write the generator's folder."""
        recipe, world, out = self.recipe, self.world, self.out
        if (out / FOLDER / "config.json").is_file():
            return None
        # Missing data is reported before anything costly is done.
        make_feed(recipe, self.config, self.tokenizer, world)
        plan = self._plan()
        stage = self._build()
        # Each rank draws its own dropout.
        torch.manual_seed(recipe.seed + world.rank)
        checkpoints, done, places = resumed(out, recipe.checkpoints, stage)
        if done < recipe.training.steps:
            data = None
            if places:
                data = places[0] if recipe.data.tokens else merge_states(places)
            self._steps(stage, checkpoints, done, data)
        if world.is_first:
            save_curves(out / "curves.png", read_metrics(out))
            write_generator_report(
                out, recipe, world.device, world.size, self.tokenizer.checkpoint.folder
            )
            # Last: with it the run counts as finished.
            export_generator(out, out / FOLDER)
        world.barrier()
        return plan

    def _steps(
        self,
        stage: GeneratorStage,
        checkpoints: Checkpoints,
        done: int,
        data: dict[str, Any] | None,
    ) -> None:
        recipe = self.recipe
        feed = self._feed(stage, data)
        metrics = metrics_of(
            stage,
            self.out,
            recipe.log.metrics,
            start=done,
            code_dim=self.config.code_dim,
            flops=3 * forward_flops(self.config),
        )
        try:
            with feed.opened():
                parts = Parts(
                    recipe=recipe,
                    config=self.config,
                    checkpoint=recipe.checkpoints,
                    pictures=recipe.log.pictures,
                    gradients=0,
                    tokenizer_folder=self.tokenizer.checkpoint.folder,
                    stage=stage,
                    loader=feed,
                    checkpoints=checkpoints,
                    stop=self.stop,
                    metrics=metrics,
                    show=self._pictures(stage, feed),
                )
                train_stage(parts, done, recipe.training.steps)
        finally:
            checkpoints.close()
            if metrics is not None:
                metrics.close()

    def _feed(self, stage: GeneratorStage, data: dict[str, Any] | None) -> Prepared:
        feed = make_feed(self.recipe, self.config, self.tokenizer, self.world, data)
        # Not with TensorFloat-32: while a step runs, the setting would also affect a thread that tokenizes
        # (`Precision.products`).
        ahead = self.world.device.type == "cuda" and not self.recipe.engine.tf32
        return Prepared(feed, stage.inputs, ahead=ahead)

    def _plan(self, dry: bool = False) -> GeneratorPlan | None:
        recipe, world = self.recipe, self.world
        found = planned_on(recipe.devices, recipe.engine, recipe.training, world, dry=dry)
        if found is None:
            return None
        devices, notes, rate = found
        plan = make_plan(recipe, self.config, world.device, devices, rate)
        start = recipe.start or "random"
        tokenizer = f"  tokenizer: {self.tokenizer.checkpoint.folder}"
        for line in (*plan.lines(), *notes, tokenizer, f"  weights: {start}"):
            self._say(line)
        return plan

    def _build(self) -> GeneratorStage:
        model = Generator(self.config)
        model.init_from(self._first_weights())
        model.to(self.world.device)
        return GeneratorStage(model, self.recipe, self.world, self.conditioner)

    def _first_weights(self) -> dict[str, np.ndarray]:
        start = self.recipe.start
        if not start:
            return init_weights(self.config, self.recipe.seed)
        weights = open_generator(start).tensors()
        shapes = {name: array.shape for name, array in weights.items()}
        if problems := diff_tensors(self.config, shapes):
            raise CheckpointError(f"start: {start} has other sizes than the recipe: {problems}")
        return weights

    def _pictures(self, stage: GeneratorStage, feed: Prepared) -> Callable[[int], None]:
        def show(done: int) -> None:
            feed.settle()
            weights = stage.weights()
            if self.world.is_first:
                path = self.out / "pictures" / f"step-{done:08d}.png"
                dtype = "bfloat16" if stage.precision.half else "float32"
                save_samples(
                    path,
                    self.config,
                    weights,
                    self.tokenizer,
                    self.conditioner,
                    self.recipe.log,
                    dtype,
                )
                save_curves(self.out / "curves.png", read_metrics(self.out))

        return show


def load_tokenizer(recipe: GeneratorRecipe, world: World) -> Model:
    """The frozen tokenizer on this rank's device; for a run's folder, its newest stage's model."""
    # Without any generator in its folder, which may have been made for an older tokenizer.
    checkpoint = open_checkpoint(model_behind(recipe.tokenizer) if recipe.tokenizer else None)
    network = get_backend("torch").network(
        checkpoint.config, checkpoint, device=str(world.device), dtype=recipe.tokenizer_dtype
    )
    return Model(checkpoint, network, "torch")


def make_conditioner(config: GeneratorConfig, tokenizer: Model, world: World) -> Conditioner:
    """The encoder of captions: the tokenizer's text tower, or T5 on this rank's device."""
    if config.conditioner == "t5":
        return T5Encoder(config.t5_model, config.prefix_length, str(world.device))
    checkpoint = tokenizer.checkpoint
    if checkpoint.tokenizer is None:
        raise RecipeError(
            f"{checkpoint.folder}: has no tokenizer files, and training reads captions"
        )
    states, text = tokenizer.network.text_states, checkpoint.config.text_config
    return TextTower(checkpoint.tokenizer, states, text, config.prefix_length)
