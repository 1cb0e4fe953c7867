"""Training with the interface of qlip_core.training, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlip_core.training import Trainer
from qlip_torch.train.balance import balance
from qlip_torch.train.export import export
from qlip_torch.train.generator.recipe import GeneratorRecipe
from qlip_torch.train.generator.run import train_generator
from qlip_torch.train.recipe import Recipe
from qlip_torch.train.run import train


class TorchTrainer:
    def train(
        self,
        recipe: str | None,
        changes: Sequence[str],
        *,
        stage: str | None,
        out: Path,
        resume: bool,
        steps: int | None,
        dry_run: bool,
    ) -> dict[str, Any]:
        """Raises what `qlip_torch.train.run.train` does."""
        chosen = None if recipe is None else Recipe.load(recipe, changes)
        result = train(chosen, stage=stage, out=out, resume=resume, steps=steps, dry_run=dry_run)
        return {
            "out": str(result.out),
            "models": {str(number): str(path) for number, path in result.models.items()},
            "report": None if result.report is None else str(result.report),
            "plans": [asdict(plan) | {"bytes": plan.bytes} for plan in result.plans],
        }

    def train_generator(
        self,
        recipe: str | None,
        changes: Sequence[str],
        *,
        out: Path,
        resume: bool,
        steps: int | None,
        dry_run: bool,
    ) -> dict[str, Any]:
        """Raises what `qlip_torch.train.generator.run.train_generator` does."""
        chosen = None if recipe is None else GeneratorRecipe.load(recipe, changes)
        result = train_generator(chosen, out=out, resume=resume, steps=steps, dry_run=dry_run)
        return {
            "out": str(result.out),
            "generator": None if result.generator is None else str(result.generator),
            "report": None if result.report is None else str(result.report),
            "plan": result.plan and {**asdict(result.plan), "bytes": result.plan.bytes},
        }

    def balance(
        self,
        recipe: str,
        changes: Sequence[str],
        *,
        out: Path,
        resume: bool,
        steps: int | None,
        dry_run: bool,
    ) -> dict[str, Any] | None:
        """Raises what `qlip_torch.train.balance.balance` does."""
        found = balance(
            Recipe.load(recipe, changes), out=out, steps=steps, resume=resume, dry_run=dry_run
        )
        if found is None:
            return None
        return {
            "mse": found.mse,
            "align": found.align,
            "a_r": found.weight_mse,
            "a_a": found.weight_align,
            "ratio": found.ratio,
            "recipe": str(found.recipe),
        }

    def export(self, run: Path, out: Path, *, dtype: str) -> Path:
        return export(run, out, dtype=dtype)


TRAINER: Trainer = TorchTrainer()
