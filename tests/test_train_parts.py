"""Parts of training without a run: export, frozen parts, logs and state."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import WORDS, metrics_in, settings

from qlip_core.architecture import architecture, init_weights
from qlip_core.checkpoint import open_checkpoint, save_checkpoint
from qlip_core.data.vocabulary import train_bpe
from qlip_core.errors import CheckpointError, RecipeError
from qlip_core.preprocessing import CLIP_MEAN, Preprocessing
from qlip_torch.model import QLIP
from qlip_torch.perceptual import clip_to_signed
from qlip_torch.train import distributed
from qlip_torch.train.assemble import write_tokenizer
from qlip_torch.train.checkpoints import Checkpoints
from qlip_torch.train.distributed import StopRequest, World, joined
from qlip_torch.train.export import export
from qlip_torch.train.generator.recipe import GeneratorRecipe
from qlip_torch.train.pictures import Batch
from qlip_torch.train.recipe import EngineRecipe, Recipe
from qlip_torch.train.run import train
from qlip_torch.train.stage import NonFiniteError, Stage, StepReport
from qlip_torch.train.stage1 import build_stage1
from qlip_torch.train.stage2 import PARTS, Adversary, build_stage2

ALONE = World(0, 1, torch.device("cpu"))
IDS = {"pad_token_id": 529, "bos_token_id": 528, "eos_token_id": 529}
REST = {"rest": 1e-3, "encoder": 0.0, "text": 0.0, "decoder": 0.0}


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return Recipe.from_dict(settings(folder, **changes))


def stage_of(recipe: Recipe, number: int) -> Stage:
    config = recipe.model.config(**IDS)
    model = QLIP(config) if number == 1 else QLIP(config, PARTS)
    model.init_from(init_weights(config, 1))
    if number == 1:
        return build_stage1(model, recipe.stage1, recipe.engine, ALONE)
    return build_stage2(model, recipe.stage2, recipe.engine, ALONE, 0)


def batch_of(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    ids = torch.randint(0, 528, (count, 12), generator=generator)
    ids[:, -1] = 529
    return Batch(pixels, ids, [""] * count)


def keep(stage: Stage, recipe: Recipe, folder: Path, tokenizer: Path | str) -> None:
    """A checkpoint after one step, as the loop writes it."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, background=False, world=ALONE)
    state = {
        "stage": stage.number,
        "recipe": recipe.to_dict(),
        "config": stage.model.config.to_dict(),
        "tokenizer": str(tokenizer),
        "numbers": stage.state.numbers(),
    }
    checkpoints.save(1, stage.state.tensors(), state, {"data": {}})


# -- export ------------------------------------------------------------------------------------


def test_what_is_frozen_beside_a_moving_average_is_exported_as_it_is(tmp_path: Path) -> None:
    train_bpe(WORDS * 4, 530, tmp_path / "run" / "tokenizer", context_length=12)
    recipe = recipe_of(tmp_path, stage1__ema=0.5, stage1__learning_rate__encoder=0.0)
    stage = stage_of(recipe, 1)
    stage.step([batch_of(4)], 0)
    keep(stage, recipe, tmp_path / "run" / "stage1", "tokenizer")
    made = open_checkpoint(export(tmp_path / "run", tmp_path / "out"))
    first = init_weights(made.config, 1)
    assert stage.state.ema is not None
    for name, spec in architecture(made.config).items():
        if spec.part == "encoder" and not name.startswith("visual_projection"):
            assert np.array_equal(made.tensor(name), first[name]), name
        else:
            assert np.array_equal(made.tensor(name), stage.state.ema.shadow[name].numpy()), name


def test_a_moved_run_is_exported_with_its_own_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint names the folder as it was, relative to where the run was begun."""
    train_bpe(WORDS * 4, 530, tmp_path / "run" / "tokenizer", context_length=12)
    recipe = recipe_of(tmp_path)
    keep(stage_of(recipe, 1), recipe, tmp_path / "run" / "stage1", "run/tokenizer")
    moved = shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    made = open_checkpoint(export("elsewhere", "out"))
    assert made.tokenizer is not None
    shutil.rmtree(Path(moved) / "tokenizer")
    with pytest.raises(CheckpointError, match="is no longer in run/tokenizer"):
        export("elsewhere", "again")
    assert not Path("again").exists()


def test_after_stage_2_a_model_has_the_tokenizer_and_the_licence_of_its_start(
    tmp_path: Path,
) -> None:
    train_bpe(WORDS * 4, 530, tmp_path / "tokenizer", context_length=12)
    recipe = recipe_of(tmp_path, stage2__learning_rate=REST, stage2__ema=0.5)
    stage, folder = stage_of(recipe, 2), tmp_path / "run" / "stage2"
    first = init_weights(stage.model.config, 2)
    save_checkpoint(
        folder / "start",
        stage.model.config,
        first,
        tokenizer_from=tmp_path / "tokenizer",
        card="---\nlicense: mit\n---\n",
    )
    stage.step([batch_of(4)], 0)
    keep(stage, recipe, folder, "gone/start")
    made = open_checkpoint(export(tmp_path / "run", tmp_path / "out"))
    assert made.tokenizer is not None and made.license == "mit"
    assert stage.state.ema is not None
    for name, spec in architecture(made.config).items():
        expected = (
            stage.state.ema.shadow[name].numpy() if spec.part in ("down", "up") else first[name]
        )
        assert np.array_equal(made.tensor(name), expected), name


# -- stages ------------------------------------------------------------------------------------


def test_a_rate_of_0_freezes_in_stage_2_too(tmp_path: Path) -> None:
    """Else its gradients would add up from step to step, and count in the norm that is clipped."""
    recipe = recipe_of(tmp_path, stage2__learning_rate=REST)
    stage = stage_of(recipe, 2)
    norms = [stage.step([batch_of(4)], 0).gradient_norm for _ in range(2)]
    table = architecture(stage.model.config)
    learning = {table[n].part for n, p in stage.model.named_parameters() if p.requires_grad}
    assert learning == {"down", "up"} and norms[1] < 2 * norms[0]
    assert all(p.grad is None for p in stage.model.parameters())
    with pytest.raises(RecipeError, match=r"stage2\.learning_rate: every rate is 0"):
        recipe.changed(["stage2.learning_rate.rest=0"])


def test_the_discriminator_follows_the_schedule_and_stops_at_nan(tmp_path: Path) -> None:
    gan = {"base_channels": 256, "learning_rate": 1e-3}
    recipe = recipe_of(tmp_path, stage2__gan=0.1, stage2__discriminator=gan)
    stage = stage_of(recipe, 2)
    assert stage.companion is not None
    module, rates = stage.companion.module, []
    for step in (0, 1, 5):
        report = stage.step([batch_of(4)], step)
        rates.append(stage.companion.optimizer.param_groups[0]["lr"] / 1e-3)
        assert rates[-1] == pytest.approx(report.rate)
    assert rates == pytest.approx([0.5, 1.0, 0.5])
    # A gradient that is not finite where every loss and the model's own gradients are.
    module.get_parameter("out.weight").register_hook(lambda grad: grad * float("nan"))
    before = [p.detach().clone() for m in (module, stage.model) for p in m.parameters()]
    with pytest.raises(NonFiniteError, match="loss term discriminator gradient norm is not finite"):
        stage.step([batch_of(4)], 6)
    after = [p for m in (module, stage.model) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_one_micro_batch_of_pictures_is_kept_for_the_discriminator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gan = {"base_channels": 256, "learning_rate": 1e-3}
    recipe = recipe_of(tmp_path, stage2__gan=0.1, stage2__discriminator=gan)
    stage = stage_of(recipe, 2)
    adversary = stage.companion
    assert isinstance(adversary, Adversary)
    hear, learn = adversary.generator_loss, adversary.backward
    seen: list[weakref.ref[torch.Tensor]] = []

    def heard(made: torch.Tensor) -> torch.Tensor:
        assert all(pictures() is None for pictures in seen)
        return hear(made)

    def learnt(real: torch.Tensor, made: torch.Tensor, step: int, share: float) -> dict[str, Any]:
        assert not made.requires_grad and share == 1 / 3
        seen.extend((weakref.ref(real), weakref.ref(made)))
        return learn(real, made, step, share)

    monkeypatch.setattr(adversary, "generator_loss", heard)
    monkeypatch.setattr(adversary, "backward", learnt)
    batch = batch_of(6)
    parts = [Batch(batch.pixels[i : i + 2], batch.ids[i : i + 2], []) for i in (0, 2, 4)]
    stage.backward(parts, 0, None)
    assert len(seen) == 6
    monkeypatch.undo()
    found = [p.grad for p in adversary.module.parameters() if p.grad is not None]
    adversary.optimizer.zero_grad()
    for part in parts:
        real = clip_to_signed(part.pixels)
        adversary.backward(real, clip_to_signed(stage.reconstruct(part.pixels)), 0, 1 / 3)
    expected = [p.grad for p in adversary.module.parameters() if p.grad is not None]
    assert found and len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# -- recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.workers=-1", r"data\.workers \(=-1\) must be at least 0"),
        ("data.images.workers=-1", r"data\.images\.workers \(=-1\) must be at least 0"),
        ('data.sources=[{ location = "" }]', r"data\.sources\[0\]\.location is empty"),
        (
            'data.sources=[{ location = "a", weight = 0 }]',
            r"data\.sources\[0\]\.weight \(=0\.0\) of a must be above 0",
        ),
        ("data.images.flip=2", r"data\.images\.flip \(=2\.0\) must be a chance"),
        ("log.seed=-1", r"log\.seed"),
    ],
)
def test_a_wrong_value_is_told_with_its_place_once(change: str, message: str) -> None:
    kind = GeneratorRecipe if change.startswith(("data.images", "log.seed")) else Recipe
    with pytest.raises(RecipeError, match=f"^{message}"):
        kind().changed([change])


def test_a_start_that_training_does_not_know_is_refused_before_stage_1(tmp_path: Path) -> None:
    train_bpe(WORDS * 4, 530, tmp_path / "tokenizer", context_length=12)
    recipe = recipe_of(tmp_path)
    config = recipe.model.config(**IDS)
    vision = config.vision_config
    harder = replace(vision, quantizer_cfg=replace(vision.quantizer_cfg, soft_entropy=False))
    for name, made, mean, message in (
        ("a", config, (0.5, 0.5, 0.5), "normalises pixels by"),
        ("b", replace(config, vision_config=harder), CLIP_MEAN, "soft_entropy=false"),
    ):
        save_checkpoint(
            tmp_path / name,
            made,
            init_weights(config, 1),
            tokenizer_from=tmp_path / "tokenizer",
            preprocessing=Preprocessing(16, mean=mean),
        )
        changed = recipe.changed([f"stage2.start={tmp_path / name}"])
        for stage in ("all", "2"):
            with pytest.raises(RecipeError, match=rf"^stage2\.start: .*{name}: {message}"):
                train(changed, stage=stage, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


# -- files -------------------------------------------------------------------------------------


def test_a_tokenizer_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(texts: Any, size: int, folder: Path, **_: Any) -> int:
        folder.mkdir()
        (folder / "vocab.json").write_text("{}")
        raise KeyboardInterrupt

    recipe = recipe_of(tmp_path, model__tokenizer="emoji")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("qlip_torch.train.assemble.train_bpe", killed)
        write_tokenizer(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_tokenizer(recipe, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_a_kill_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, background=False, world=ALONE)
    for left in (".step-00000001.part", ".step-00000001.old"):
        (tmp_path / left).mkdir()
    keys = ("stage", "recipe", "config", "tokenizer", "numbers")
    state: dict[str, Any] = dict.fromkeys(keys)
    checkpoints.save(2, {"a": torch.ones(2)}, state, {"data": {}})
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step-00000002"}


def test_each_value_is_plotted_once(tmp_path: Path) -> None:
    class Board:
        def __init__(self) -> None:
            self.written: list[str] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.written.append(f"{name} {step}")

        def close(self) -> None:
            pass

    metrics = metrics_in(tmp_path)
    board = metrics._board = Board()
    for done in (1, 2):
        metrics.record(done, StepReport({"mse": 1.0}, 1.0, 0.1, 1.0, None))
        metrics.amend({"pictures_psnr": 20.0})
    metrics.close()
    assert len(board.written) == len(set(board.written))
    assert {"stage1/terms/mse 2", "stage1/pictures_psnr 1"} <= set(board.written)


# -- the end of a job --------------------------------------------------------------------------


@pytest.fixture
def ended() -> Iterator[list[int]]:
    """Signals that would have ended this process."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_a_signal_does_not_end_a_process_that_is_leaving_its_job(
    ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun sends it when another process has died: this one still has to tell why it stops."""
    leave = torch.distributed.destroy_process_group

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        leave()

    monkeypatch.setattr("torch.distributed.destroy_process_group", interrupted)
    stop = StopRequest(20)
    with (
        pytest.raises(RecipeError, match="why"),
        joined(EngineRecipe(device="cpu", parallel="fsdp"), stop),
    ):
        raise RecipeError("why")
    assert (ended, stop.signal) == ([], signal.SIGTERM)


def test_a_process_that_stops_with_another_one_exits_as_after_the_signal() -> None:
    stop = StopRequest(20)
    assert stop.exit_code == 143  # the signal reached another process of the job
    stop.signal = signal.SIGINT
    assert stop.exit_code == 130


@pytest.mark.parametrize("fails", [True, False])
def test_a_launchers_end_does_not_end_a_process_that_has_failed(
    fails: bool, ended: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it could not tell why; one that goes on alone, to write the report, is ended."""
    monkeypatch.setattr(distributed, "_LOOK_UP", 0.01)
    threads = set(threading.enumerate())
    init = torch.distributed.init_process_group
    # Alone, though it believes to be one of two.
    alone = partial(init, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr("torch.distributed.init_process_group", alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with suppress(RecipeError), joined(EngineRecipe(device="cpu")):
        if fails:
            raise RecipeError("why")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    for watch in set(threading.enumerate()) - threads:
        watch.join(60)
    assert set(threading.enumerate()) <= threads
    assert ended == ([] if fails else [signal.SIGTERM])
