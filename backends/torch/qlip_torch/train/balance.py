"""Loss balancing: the ratio of the two objectives from what each reaches alone (SPEC section 3).

Gradient norms of reconstruction and alignment differ by two orders of magnitude, so the weights are set
afterwards: train once with each objective alone, then `a_r / a_a = L_align(inf) / L_mse(inf)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from qlip_core.errors import RecipeError
from qlip_core.files import write_text
from qlip_torch.train.metrics import read_metrics
from qlip_torch.train.recipe import Recipe
from qlip_torch.train.run import train
from qlip_torch.train.run_folder import to_stderr

BALANCED = "balanced.toml"
PROBES = {
    "reconstruction": ("stage1.align=0.0",),
    "alignment": ("stage1.mse=0.0", "stage1.commitment=0.0", "stage1.bsq=0.0"),
}
_ABOUT = "A probe of `qlip train balance`: what this objective reaches by itself."
# The end value is the mean over the last tenth of the curve.
_TAIL = 0.1


@dataclass(frozen=True)
class Balance:
    """The probes' final losses, and the weights that follow; `recipe` is the file they are written to."""

    mse: float
    align: float
    weight_mse: float
    """a_r, for the recipe's a_a."""
    weight_align: float
    recipe: Path

    @property
    def ratio(self) -> float:
        """a_r / a_a."""
        return self.weight_mse / self.weight_align


def balance(
    recipe: Recipe,
    *,
    out: str | Path,
    steps: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Balance | None:
    """Run both probes in `out` and write the recipe with the weights they suggest to balanced.toml.

    steps: of each probe; by default those of the recipe's stage 1. dry_run: print the probes' plans and
    build them, but train nothing and return None. Raises RecipeError if either weight is 0, or if a probe
    ends at a loss of 0.
    """
    out = Path(out)
    for name in ("mse", "align"):
        if getattr(recipe.stage1, name) <= 0:
            raise RecipeError(f"stage1.{name} is 0: there is nothing to balance")
    for name, changes in PROBES.items():
        which = f"{name} alone"
        called = f"{recipe.name}, {which}" if recipe.name else which
        probe = replace(recipe, name=called, description=_ABOUT)

        def say(line: str, which: str = which) -> None:
            to_stderr(f"{which}: {line.strip()}")

        train(
            probe.changed(changes),
            stage="1",
            out=out / f"probe-{name}",
            steps=steps,
            resume=resume,
            dry_run=dry_run,
            measure=False,
            say=say,
        )
    if dry_run:
        return None
    mse = _end_value(out / "probe-reconstruction", "mse")
    align = _end_value(out / "probe-alignment", "align")
    if not (mse > 0 and align > 0):
        raise RecipeError(f"the probes ended at mse {mse} and align {align}: no ratio follows")
    weight = float(f"{recipe.stage1.align * align / mse:.3g}")
    balanced = recipe.changed([f"stage1.mse={weight}"])
    path = out / BALANCED
    write_text(path, balanced.to_toml())
    return Balance(mse, align, weight, recipe.stage1.align, path)


def _end_value(run: Path, term: str) -> float:
    values = [line["terms"][term] for line in read_metrics(run / "stage1")]
    tail = values[-max(1, math.ceil(len(values) * _TAIL)) :]
    return sum(tail) / len(tail)
