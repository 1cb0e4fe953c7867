"""Training on two processes (gloo): the same curve as on one, sharded or not, and a prompt end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training import (
    TIMEOUT,
    curve,
    endless_run,
    finish,
    in_haste,
    settings,
    start_run,
    write_data,
    write_recipe,
)

from qlip_torch.train.checkpoints import latest_checkpoint
from qlip_torch.train.recipe import Recipe
from qlip_torch.train.run import train

GAN = {"base_channels": 256, "r1_every": 3}
CHANGES: dict[str, Any] = {
    "stage1__steps": 7,
    "stage2__steps": 4,
    # Two processes take two micro-batches each where one takes four.
    "stage1__micro_batch": 2,
    "stage2__micro_batch": 4,
    "stage2__gan": 0.1,
    "stage2__discriminator": GAN,
    "stage2__ema": 0.9,
}


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    with in_haste():
        yield


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, `recipe.toml`, and `single/`, the run of one process."""
    folder = tmp_path_factory.mktemp("distributed")
    write_data(folder)
    recipe = write_recipe(folder / "recipe.toml", settings(folder, **CHANGES))
    train(Recipe.from_file(recipe), out=folder / "single", say=lambda line: None)
    return folder


def same_curve(run: Path, expected: Path, stage: int) -> None:
    found, wanted = curve(run, stage), curve(expected, stage)
    assert [step for step, _, _ in found] == [step for step, _, _ in wanted]
    for (step, terms, norm), (_, other, other_norm) in zip(found, wanted):
        assert terms == pytest.approx(other, rel=2e-4, abs=2e-5), step
        assert norm == pytest.approx(other_norm, rel=2e-3), step


def test_two_processes_follow_the_curve_of_one(single: Path, tmp_path: Path) -> None:
    """DDP, both stages, accumulation, discriminator and average."""
    finish(start_run(single / "recipe.toml", tmp_path / "ddp", "--stage", "all", ranks=2))
    for stage in (1, 2):
        same_curve(tmp_path / "ddp", single / "single", stage)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_no_loss_asks_for_is_not_waited_for(
    parallel: str, single: Path, tmp_path: Path
) -> None:
    """Alignment alone, as in `qlip train balance`: the decoder has no gradients to exchange."""
    alone = ["stage1.mse=0.0", "stage1.bsq=0.0", "stage1.commitment=0.0", "stage1.steps=3"]
    recipe = Recipe.from_file(single / "recipe.toml").changed(alone)
    train(recipe, stage="1", out=tmp_path / "one", say=lambda line: None)
    alone.append(f"engine.parallel={parallel}")
    changes = [word for change in alone for word in ("--set", change)]
    options = ["--stage", "1", *changes]
    finish(start_run(single / "recipe.toml", tmp_path / "two", *options, ranks=2))
    same_curve(tmp_path / "two", tmp_path / "one", 1)


def test_shards_follow_it_and_go_on_alone_after_a_death(single: Path, tmp_path: Path) -> None:
    """FSDP2: one process is killed, the job ends promptly and says so; one process finishes it."""
    out = tmp_path / "fsdp"
    sharded = ["--set", "engine.parallel=fsdp"]
    began = time.monotonic()
    process = start_run(
        single / "recipe.toml", out, "--stage", "1", *sharded, "--kill", "1", "5", ranks=2
    )
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    metrics = out / "stage1" / "metrics.jsonl"
    assert time.time() - metrics.stat().st_mtime < 60, time.monotonic() - began
    assert "process 0 of 2 stopped because another process of the job did" in errors
    sharded_steps = curve(out)
    assert len(sharded_steps) == 5
    for (step, terms, norm), (_, other, other_norm) in zip(sharded_steps, curve(single / "single")):
        assert terms == pytest.approx(other, rel=2e-4, abs=2e-5), step
        assert norm == pytest.approx(other_norm, rel=2e-3), step
    finish(start_run(single / "recipe.toml", out, "--stage", "1", "--resume"))
    same_curve(out, single / "single", 1)


def test_shards_train_stage_2(single: Path, tmp_path: Path) -> None:
    stage1 = f"stage2.start={single / 'single'}"
    options = ["--stage", "2", "--set", "engine.parallel=fsdp", "--set", stage1]
    written = finish(start_run(single / "recipe.toml", tmp_path / "fsdp", *options, ranks=2))
    # FSDP2's warning that gradients would be wrong.
    assert "returned a view" not in written, written
    same_curve(tmp_path / "fsdp", single / "single", 2)


def test_processes_end_with_their_launcher(single: Path, tmp_path: Path) -> None:
    """torchrun is killed: its processes write a checkpoint and stop, as after SIGTERM."""
    out = tmp_path / "out"
    with endless_run(single / "recipe.toml", out, ranks=2) as process:
        process.kill()
        # Both hold its stderr open until they have ended.
        _, errors = process.communicate(timeout=TIMEOUT)
    assert errors.count("with a checkpoint; continue with --resume") == 2, errors
    path = latest_checkpoint(out / "stage1" / "checkpoints")
    assert path is not None
    assert int(path.name.removeprefix("step-")) == curve(out)[-1][0]
