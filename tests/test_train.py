"""Training on one process: accumulation, both stages, stopping, resuming, recipes, plans."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from training import (
    TIMEOUT,
    curve,
    endless_run,
    finish,
    in_haste,
    metrics_in,
    settings,
    start_run,
    with_curves,
    write_data,
    write_recipe,
)

from qlip_core.architecture import architecture, init_weights
from qlip_core.checkpoint import open_checkpoint
from qlip_core.data.tars import write_tar
from qlip_core.errors import CheckpointError, DataError, RecipeError
from qlip_core.files import write_text
from qlip_torch.model import QLIP
from qlip_torch.train.accumulate import accumulated_backward
from qlip_torch.train.assemble import held_out
from qlip_torch.train.balance import balance
from qlip_torch.train.checkpoints import Checkpoints, latest_checkpoint
from qlip_torch.train.data import Source
from qlip_torch.train.distributed import World
from qlip_torch.train.export import export
from qlip_torch.train.figures import save_curves
from qlip_torch.train.lock import only_run_in
from qlip_torch.train.metrics import read_metrics
from qlip_torch.train.pictures import Batch
from qlip_torch.train.plan import activation_bytes, make_plan
from qlip_torch.train.precision import Precision
from qlip_torch.train.recipe import EngineRecipe, Recipe
from qlip_torch.train.recipe_file import recipe_names
from qlip_torch.train.run import Result, train
from qlip_torch.train.stage import (
    Bits,
    LayerProbe,
    NonFiniteError,
    StepReport,
    last_shared_layer,
)
from qlip_torch.train.stage1 import Stage1Losses, Stage1Network, build_stage1

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    with in_haste():
        yield


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_data(folder)
    return folder


def recipe_of(place: Path, **changes: Any) -> Recipe:
    return Recipe.from_dict(settings(place, **changes))


def quiet(line: str) -> None:
    pass


def run(
    place: Path, out: Path, *, stage: str = "1", resume: bool = False, **changes: Any
) -> Result:
    return train(recipe_of(place, **changes), stage=stage, out=out, resume=resume, say=quiet)


# -- accumulation ------------------------------------------------------------------------------


def model_and_batch(place: Path, count: int) -> tuple[QLIP, Batch, Recipe]:
    recipe = recipe_of(place)
    config = recipe.model.config(pad_token_id=529, bos_token_id=528, eos_token_id=529)
    model = QLIP(config)
    model.init_from(init_weights(config, 1))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    ids = torch.randint(0, 528, (count, 12), generator=generator)
    ids[:, -1] = 529
    return model, Batch(pixels, ids, [""] * count), recipe


def gradients(place: Path, parts: int, probe: bool = False) -> tuple[Any, dict, dict[str, float]]:
    """Terms, gradients and layer norms of 12 images in so many micro-batches, in float64."""
    model, batch, recipe = model_and_batch(place, 12)
    model.double()
    for block in model.blocks():
        if block.self_attn.rope is not None:
            block.self_attn.rope.double()
    network = Stage1Network(model, Precision(False, torch.device("cpu")))
    losses = Stage1Losses(network, model, recipe.stage1, ALONE)
    rows = 12 // parts
    batches = [
        Batch(batch.pixels[i : i + rows].double(), batch.ids[i : i + rows], [])
        for i in range(0, 12, rows)
    ]
    layer = LayerProbe(last_shared_layer(model)) if probe else None
    found = accumulated_backward(losses, batches, probe=layer)
    grads = {name: p.grad for name, p in model.named_parameters()}
    norms = layer.norms(dict(losses.weights), ALONE) if layer else {}
    return found, grads, norms


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulated_gradients_are_those_of_the_whole_batch(place: Path, parts: int) -> None:
    whole, expected, _ = gradients(place, 1)
    found, grads, _ = gradients(place, parts)
    assert found.terms.keys() == whole.terms.keys()
    for name, term in whole.terms.items():
        assert float(found.terms[name]) == pytest.approx(float(term), rel=1e-9), name
    for name, grad in expected.items():
        assert grad is not None and grad.abs().max() > 0, name
        scale = float(grad.abs().max())
        np.testing.assert_allclose(grads[name], grad, atol=1e-9 * scale + 1e-12, err_msg=name)


def test_a_probe_sees_the_same_layer_gradients_and_leaves_the_total_alone(place: Path) -> None:
    _, expected, norms = gradients(place, 1, probe=True)
    _, grads, accumulated = gradients(place, 3, probe=True)
    _, plain, _ = gradients(place, 1)
    assert norms.keys() == {"align", "bsq", "mse", "commitment"}
    for name, norm in norms.items():
        assert accumulated[name] == pytest.approx(norm, rel=1e-5)
    for name, grad in plain.items():
        scale = float(grad.abs().max())
        np.testing.assert_allclose(expected[name], grad, atol=1e-9 * scale + 1e-12)
        np.testing.assert_allclose(grads[name], grad, atol=1e-9 * scale + 1e-12)


def test_layer_norms_are_the_weighted_gradients_of_each_loss(place: Path) -> None:
    _, _, norms = gradients(place, 1, probe=True)
    model, batch, recipe = model_and_batch(place, 12)
    network = Stage1Network(model, Precision(False, torch.device("cpu")))
    weight = last_shared_layer(model).weight
    mse = network(batch.pixels, batch.ids, True).mse * recipe.stage1.mse
    (slope,) = torch.autograd.grad(mse, weight)
    assert norms["mse"] == pytest.approx(float(slope.norm()), rel=1e-4)


def test_checkpointed_blocks_give_the_same_gradients(place: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        model, batch, recipe = model_and_batch(place, 8)
        engine = EngineRecipe(device="cpu", activation_checkpointing=checkpointing)
        stage = build_stage1(model, recipe.stage1, engine, ALONE)
        layer = LayerProbe(stage.shared_layer)
        stage.backward([batch, batch], 0, layer)
        layer.close()
        assert layer.norms(stage.weights, ALONE)["mse"] > 0
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert set(grads[-1]) == set(architecture(model.config))
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


# Of torch's own tracing.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_give_the_same_gradients_and_can_be_looked_into(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without Inductor's code, which takes long to build.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    grads, norms = [], []
    for compiled in (False, True):
        model, batch, recipe = model_and_batch(place, 4)
        engine = EngineRecipe(device="cpu", compile=compiled)
        stage = build_stage1(model, replace(recipe.stage1, align=0.0), engine, ALONE)
        # A hook put on later, as every so many steps.
        stage.backward([batch], 0, None)
        layer = LayerProbe(stage.shared_layer)
        stage.backward([batch], 1, layer)
        layer.close()
        norms.append(layer.norms(stage.weights, ALONE))
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert norms[0].keys() == {"bsq", "mse", "commitment"}
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        scale = float(grad.abs().max())
        np.testing.assert_allclose(grads[1][name], grad, atol=1e-5 * scale + 1e-7, err_msg=name)


def test_bfloat16_keeps_code_and_losses_in_float32(place: Path) -> None:
    model, batch, _ = model_and_batch(place, 4)
    network = Stage1Network(model, Precision(True, torch.device("cpu")))
    out = network(batch.pixels, batch.ids, True)
    assert {t.dtype for t in out} == {torch.float32}
    exact = Stage1Network(model, Precision(False, torch.device("cpu")))
    assert torch.allclose(out.u, exact(batch.pixels, batch.ids, True).u, atol=0.05)
    # u is normalised in float32 from float32 products, so its length is 1 to float32's rounding.
    assert torch.allclose(out.u.norm(dim=-1), torch.ones(()), atol=1e-6)


# -- a whole run -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole_run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, the second with everything on, its batches accumulated."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        with_curves(patch)
        run(
            place,
            out,
            stage="all",
            stage2__perceptual="random",
            stage2__lpips=0.1,
            stage2__gan=0.1,
            stage2__ssim=0.1,
            stage2__micro_batch=4,
            stage2__ema=0.9,
            stage2__discriminator={"base_channels": 256, "r1_every": 3},
            stage2__steps=4,
            log__pictures=4,
        )
    return out


def test_stage_1_learns(whole_run: Path) -> None:
    lines = curve(whole_run)
    assert [step for step, _, _ in lines] == list(range(1, 9))
    assert lines[-1][1]["mse"] < 0.9 * lines[0][1]["mse"]


def test_metrics_say_what_was_seen_at_which_rates(place: Path, whole_run: Path) -> None:
    recipe = recipe_of(place)
    for line in read_metrics(whole_run / "stage1"):
        assert line["images"] == line["step"] * recipe.stage1.batch
        assert 0 <= line["data_wait"] <= 1 and 10 < line["logit_scale"] <= 100
        rates = recipe.stage1.learning_rate.by_group
        assert line["learning_rates"] == pytest.approx(
            {k: line["rate"] * v for k, v in rates.items()}
        )
    [first, *_] = read_metrics(whole_run / "stage2")
    assert "logit_scale" not in first and set(first["learning_rates"]) == {"rest", "decoder"}


def test_every_field_of_metrics_is_documented(whole_run: Path) -> None:
    table = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    fields = {
        name
        for stage in (1, 2)
        for line in read_metrics(whole_run / f"stage{stage}")
        for name in line
    }
    assert "layer_norms" in fields
    assert [name for name in fields if f"`{name}`" not in table] == []


def test_waiting_for_data_is_told(place: Path, tmp_path: Path) -> None:
    from qlip_torch.train import loop, metrics
    from qlip_torch.train.data import Loader
    from qlip_torch.train.stage import Stage

    seconds = [0.0]

    def slower(method: Callable[..., Any], by: float) -> Callable[..., Any]:
        def slow(*args: Any, **options: Any) -> Any:
            seconds[0] += by
            return method(*args, **options)

        return slow

    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(perf_counter=lambda: seconds[0])
        for module in (loop, metrics):
            patch.setattr(module, "time", clock)
        patch.setattr(Loader, "__next__", slower(Loader.__next__, 3.0))
        patch.setattr(Stage, "step", slower(Stage.step, 1.0))
        run(place, tmp_path, stage1__steps=3)
    assert [line["data_wait"] for line in read_metrics(tmp_path / "stage1")] == [0.75] * 3


def test_stage_2_keeps_text_tower_and_encoder_bit_for_bit(whole_run: Path) -> None:
    before = open_checkpoint(whole_run / "stage1" / "model")
    after = open_checkpoint(whole_run / "stage2" / "model")
    old, new = before.tensors(), after.tensors()
    for name, spec in architecture(before.config).items():
        same = np.array_equal(old[name].view(np.int32), new[name].view(np.int32))
        assert same == (spec.part in ("text", "encoder")), name
    assert after.tokenizer is not None
    np.testing.assert_array_equal(
        after.tokenizer(["dark red noise"]),
        before.tokenizer(["dark red noise"]),  # type: ignore[misc]
    )


def test_stage_2_reports_every_loss(whole_run: Path) -> None:
    lines = curve(whole_run, 2)
    assert {"mse", "bsq", "lpips", "ssim", "gan", "discriminator", "r1"} <= lines[0][1].keys()
    assert [("r1" in terms) for _, terms, _ in lines] == [True, False, False, True]


def test_a_run_leaves_curves_pictures_and_a_report(whole_run: Path) -> None:
    from PIL import Image

    report = (whole_run / "report.md").read_text()
    for stage in (1, 2):
        folder = whole_run / f"stage{stage}"
        with Image.open(folder / "curves.png") as curves:
            assert curves.size[0] > 500
        assert f"stage{stage}/curves.png" in report
    with Image.open(whole_run / "stage1" / "pictures" / "step-00000008.png") as picture:
        # Two pictures of 16 px, eight times enlarged, above their reconstructions, 2 px apart.
        assert picture.size == (2 * 128 + 2, 2 * 128 + 2)
    assert "pictures/step-00000008.png" in report
    assert "Fixed pictures (from the training data: log.held_out" in report


def test_a_held_out_set_is_watched_and_measured(place: Path, tmp_path: Path) -> None:
    from PIL import Image

    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for i in range(5):
        Image.new("RGB", (20, 20), (40 * i, 99, 0)).save(held_out / f"{i}.png")
        (held_out / f"{i}.txt").write_text(f"colour {i}")
    log = {"log__held_out": str(held_out), "log__held_out_count": 4, "log__pictures": 2}
    run(place, tmp_path / "out", stage1__steps=4, **log)
    lines = read_metrics(tmp_path / "out" / "stage1")
    watched = {line["step"]: line["pictures_psnr"] for line in lines if "pictures_psnr" in line}
    assert list(watched) == [2, 4] and all(0 < value < 60 for value in watched.values())
    with Image.open(tmp_path / "out/stage1/pictures/step-00000004.png") as picture:
        row = np.asarray(picture.convert("RGB"))[0, [0, 130]]
    assert row.tolist() == [[0, 99, 0], [40, 99, 0]]  # the set's first, in the first row
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"reconstruction of 4 held-out pictures of {held_out}: PSNR" in report
    assert f"retrieval among the captions of 4 pictures of {held_out}: R@1" in report
    assert f"Fixed pictures (from {held_out}) above" in report
    with pytest.raises(DataError, match="no such file or folder"):
        run(place, tmp_path / "none", stage1__steps=1, log__held_out="/nowhere/at/all")
    with pytest.raises(RecipeError, match="name a set stored in files"):
        recipe_of(place, log__held_out="emoji?seed=3")


def test_a_held_out_set_without_captions_or_gone_costs_no_report(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for i in range(2):
        Image.new("RGB", (20, 20), (40 * i, 99, 0)).save(held_out / f"{i}.png")
    run(place, tmp_path / "a", stage1__steps=1, log__held_out=str(held_out))
    report = (tmp_path / "a" / "report.md").read_text()
    assert "held-out pictures" in report and "retrieval was not measured" in report
    monkeypatch.setattr(
        "qlip_torch.train.run.save_curves", lambda *_: shutil.rmtree(held_out, ignore_errors=True)
    )
    run(place, tmp_path / "b", stage1__steps=1, log__held_out=str(held_out))
    report = (tmp_path / "b" / "report.md").read_text()
    assert "the held-out set was not measured: " in report


def test_a_run_without_pictures_has_curves(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_curves(monkeypatch)
    run(place, tmp_path, stage1__steps=2, log__pictures=0)
    assert (tmp_path / "stage1" / "curves.png").is_file()
    assert not (tmp_path / "stage1" / "pictures").exists()


def test_curves_have_titles_axes_and_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    lines = [
        {
            "step": step,
            "terms": {"mse": value, "per_sample_entropy": 1.0, "new_term": 2.0},
            "gradient_norm": 1.0,
            "images_per_second": 5.0,
            "layer_norms": {"mse": 1.0},
        }
        for step, value in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0), (3, 5.0))  # 2 and 3 done again
    ]
    assert save_curves(tmp_path / "curves.png", lines)
    axes = {axis.get_title(): axis for axis in drawn[0].axes}
    assert {"squared error of pixels", "entropy per sample (nats)", "new term"} <= axes.keys()
    assert {axis.get_xlabel() for axis in axes.values()} == {"step"}
    [curve] = axes["squared error of pixels"].lines
    assert curve.get_xydata().tolist() == [[1, 9], [2, 6], [3, 5]]


def test_export_is_the_newest_model(whole_run: Path, tmp_path: Path) -> None:
    exported = export(whole_run, tmp_path / "model", dtype="bfloat16")
    stored, model = open_checkpoint(exported), open_checkpoint(whole_run / "stage2" / "model")
    for name, values in model.tensors().items():
        np.testing.assert_allclose(stored.tensor(name), values, rtol=2**-8, atol=1e-30)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        export(tmp_path, tmp_path / "other")
    # What it was trained by comes along.
    assert Recipe.from_file(exported / "recipe.toml") == Recipe.from_file(whole_run / "recipe.toml")


LOCKED = {
    **{f"stage1__{name}": 0.0 for name in ("mse", "bsq", "commitment")},
    "stage1__learning_rate": {"rest": 0.0, "encoder": 0.0, "text": 3e-2, "decoder": 0.0},
}


def test_the_text_tower_alone_can_learn_on(place: Path, whole_run: Path, tmp_path: Path) -> None:
    """Locked-image tuning: what is frozen is kept, exported and resumed bit for bit."""
    start = whole_run / "stage2" / "model"
    changes = {**LOCKED, "start__checkpoint": str(start), "stage1__steps": 4}
    run(place, tmp_path / "whole", **changes)
    lines = curve(tmp_path / "whole")
    assert "mse" not in lines[0][1] and "align" in lines[0][1]
    before = open_checkpoint(start)
    old = before.tensors()
    new = open_checkpoint(tmp_path / "whole" / "stage1" / "model").tensors()
    for name, spec in architecture(before.config).items():
        learns = spec.part == "text" and name != "logit_scale"
        assert np.array_equal(old[name], new[name]) != learns, name

    out = tmp_path / "whole"
    shutil.rmtree(out / "stage1" / "model")
    train(None, stage="1", out=out, resume=True, say=quiet)
    again = open_checkpoint(out / "stage1" / "model").tensors()
    assert all(np.array_equal(new[name], again[name]) for name in new)


def test_a_random_encoder_is_not_frozen(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="encoder would stay random"):
        run(place, tmp_path, **LOCKED)


def test_without_alignment_the_text_side_is_left_alone(place: Path, tmp_path: Path) -> None:
    """As the probe of `qlip train balance` for reconstruction: not run, not decayed, not reported."""
    recipe = recipe_of(place, stage1__align=0.0)
    run(place, tmp_path / "out", stage1__align=0.0, stage1__steps=3, stage1__micro_batch=4)
    assert set(curve(tmp_path / "out")[0][1]) == {
        "mse", "commitment", "bsq", "per_sample_entropy", "codebook_entropy",
    }  # fmt: skip
    made = open_checkpoint(tmp_path / "out" / "stage1" / "model")
    first = init_weights(made.config, recipe.seed)
    aligning = ("logit_scale", "visual_projection.", "vision_model.post_layernorm.")
    for name, spec in architecture(made.config).items():
        idle = spec.part == "text" or name.startswith(aligning)
        assert np.array_equal(made.tensor(name), first[name]) == idle, name
    plan = make_plan(recipe, made.config, 1, torch.device("cpu"), 1)
    whole = make_plan(recipe_of(place), made.config, 1, torch.device("cpu"), 1)
    assert plan.flops < whole.flops and plan.trained < whole.trained


def test_reconstruction_alone_accumulates_without_any_loss_of_features(
    place: Path, tmp_path: Path
) -> None:
    alone = {"stage1__align": 0.0, "stage1__bsq": 0.0, "stage1__steps": 3}
    run(place, tmp_path / "whole", **alone)
    run(place, tmp_path / "parts", **alone, stage1__micro_batch=2)
    for (_, whole, norm), (_, parts, other) in zip(
        curve(tmp_path / "whole"), curve(tmp_path / "parts")
    ):
        assert parts == pytest.approx(whole, rel=1e-4) and other == pytest.approx(norm, rel=1e-3)


def test_a_checkpoint_that_normalises_otherwise_is_refused(
    place: Path, whole_run: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(whole_run / "stage2" / "model", tmp_path / "other")
    processor = json.loads((other / "preprocessor_config.json").read_text())
    processor["image_mean"] = [0.5, 0.5, 0.5]
    (other / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(RecipeError, match=r"normalises pixels by mean \(0\.5, 0\.5, 0\.5\)"):
        run(place, tmp_path / "out", start__checkpoint=str(other))


def test_pictures_to_watch_are_held_out_whatever_is_drawn() -> None:
    watched = {
        "emoji": "emoji?split=held-out",
        "emoji?plain=true&split=train": "emoji?split=held-out&plain=true",
        "emoji-photos/": "emoji-photos/",
    }
    assert {location: held_out(Source(location)).location for location in watched} == watched


def test_a_plan_counts_what_is_trained(place: Path) -> None:
    recipe = recipe_of(place, **LOCKED)
    config = recipe.model.config()
    locked = make_plan(recipe, config, 1, torch.device("cpu"), 1)
    whole = make_plan(recipe_of(place), config, 1, torch.device("cpu"), 1)
    assert locked.trained == locked.parameters["text"] < whole.trained
    assert locked.flops < 0.6 * whole.flops
    assert locked.activation_bytes < 0.5 * whole.activation_bytes


def test_a_finished_run_is_not_overwritten(place: Path, whole_run: Path) -> None:
    with pytest.raises(RecipeError, match="already holds a run"):
        run(place, whole_run)
    with pytest.raises(RecipeError, match=r"stage1\.batch was 8, now 4"):
        run(place, whole_run, resume=True, stage1__batch=4, stage1__micro_batch=4)


def test_a_run_that_never_began_may_be_started_again(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="absent"):
        run(place, out, data__sources=[{"location": "absent"}])
    assert (out / "recipe.toml").is_file()
    run(place, out, stage1__steps=1)
    with pytest.raises(RecipeError, match="already holds a run"):
        run(place, out, stage1__steps=1)


def test_sources_are_looked_for_before_anything_but_a_dry_runs_plans(
    place: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(place, data__sources=[{"location": "absent"}])
    for dry_run, planned in ((False, []), (True, ["stage 1", "stage 2"])):
        lines: list[str] = []
        with pytest.raises(DataError, match="absent"):
            train(recipe, out=tmp_path / "out", dry_run=dry_run, say=lines.append)
        assert [line[:7] for line in lines if line.startswith("stage")] == planned


def test_the_plan_says_where_commitment_cannot_be_computed(place: Path, tmp_path: Path) -> None:
    absent = {"data__sources": [{"location": "absent"}], "stage1__commitment": 1.0}
    width = recipe_of(place).model.config().vision_config.hidden_size
    for decoder in (width, 2 * width):
        recipe = recipe_of(place, **absent, model__decoder={"width": decoder})
        lines: list[str] = []
        with pytest.raises(DataError, match="absent"):
            train(recipe, stage="1", out=tmp_path / "out", dry_run=True, say=lines.append)
        assert any("commitment is 0" in line for line in lines) == (decoder != width)


def test_a_run_goes_on_with_the_stages_it_was_begun_with(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(place, out, stage="1", stage1__steps=2)
    assert list(train(None, out=out, resume=True, say=quiet).models) == [1]


def test_a_dry_run_leaves_a_run_alone_and_gives_its_plan(place: Path, whole_run: Path) -> None:
    plans = train(recipe_of(place), out=whole_run, dry_run=True, say=quiet).plans
    assert [plan.stage for plan in plans] == [1, 2]


def test_a_dry_run_of_stage_2_asks_for_the_stage_1_that_it_goes_on_from(
    place: Path, whole_run: Path, tmp_path: Path
) -> None:
    def weights_of(out: Path, stage: str) -> list[str]:
        lines: list[str] = []
        train(recipe_of(place), stage=stage, out=out, dry_run=True, say=lines.append)
        return [line for line in lines if "weights:" in line]

    of_this_run = "  weights: stage 1 of this run"
    assert weights_of(tmp_path, "all") == ["  weights: random, seed 3", of_this_run]
    assert weights_of(whole_run, "2") == [of_this_run]
    with pytest.raises(RecipeError, match="no finished stage 1 to start from"):
        weights_of(tmp_path, "2")


def test_a_recipe_keeps_any_text(place: Path, tmp_path: Path) -> None:
    name = 'emoji \U0001f600 "\\ \x7f\n'
    recipe = recipe_of(place, name=name)
    (tmp_path / "r.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_file(tmp_path / "r.toml").name == name


def _full(*_: Any, **__: Any) -> None:
    raise CheckpointException("no", {0: (OSError(28, "No space left on device"), None)})  # type: ignore[dict-item]


def test_a_disk_that_is_full_is_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.checkpoint.save", _full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*No space left") as caught:
        run(place, tmp_path / "out", stage="1", stage1__steps=1)
    assert "\n" not in str(caught.value) and "there is no earlier one: free" in str(caught.value)
    assert not list((tmp_path / "out" / "stage1" / "checkpoints").glob("step-*"))


def test_a_disk_that_is_full_is_told_with_the_file_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    path = tmp_path / "report.md"
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(path, "much")
    assert caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_later_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, background=False, world=ALONE)
    checkpoints.save(1, {"a": torch.ones(2)}, STATE, {"data": {}})
    monkeypatch.setattr("torch.distributed.checkpoint.save", _full)
    with pytest.raises(CheckpointError, match=r"step-00000001 is kept: .* from it with --resume"):
        checkpoints.save(2, {"a": torch.ones(2)}, STATE, {"data": {}})


def test_skipped_samples_are_told_and_counted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted((place / "data").glob("*.png"))[:8]
    samples = [(path.stem, {"png": path.read_bytes(), "txt": b"a cat"}) for path in good]
    write_tar(tmp_path / "a.tar", [*samples, ("broken", {"png": b"no image", "txt": b"a dog"})])
    sources = [{"location": str(tmp_path / "a.tar")}]
    out = tmp_path / "out"
    run(place, out, stage="1", stage1__steps=4, data__sources=sources)
    [*_, last] = read_metrics(out / "stage1")
    assert list(last["skipped"]) == ["broken image"]
    assert f"skipped: {tmp_path / 'a.tar'}: broken: broken image" in capsys.readouterr().err
    assert "Skipped samples (of the first process): broken image" in (out / "report.md").read_text()


def test_the_live_line_keeps_whole_what_matters_most(tmp_path: Path) -> None:
    metrics = metrics_in(tmp_path, steps=120_000, batch=65_536, code_dim=28)
    names = ("mse", "commitment", "bsq", "per_sample_entropy", "codebook_entropy", "align")
    bits = Bits((0.0, *(0.5,) * 26, 0.98))
    report = StepReport(dict.fromkeys(names, 1.0), 1003.5, 0.1, 1.0, bits)
    metrics._begin = (0, time.perf_counter() - 500 * 3600)
    metrics._rate = 12345.0
    metrics.close()
    whole = metrics.line(119_000 - 1, report)
    assert len(whole) <= 215 and whole == metrics.line(119_000 - 1, report, 215)
    assert whole.startswith("stage 1  118999/120000  ETA 4 h 12 min  12345 img/s  loss 1003.5")
    assert "  bits 0.00-0.98 (healthy 0.30-0.70), 4% dead, entropy " in whole
    assert whole.index("of peak") < whole.index("mse 1.0000") < whole.index("align 1.0000")
    early = metrics.line(800, report, 79)
    assert "  ETA 74,500 h  " in early and early.endswith("  bits 0.00-0.98")
    # Pieces are dropped whole, the last first.
    shorter = {metrics.line(118_999, report, width) for width in range(len(whole) + 1)}
    ordered = sorted(shorter, key=len)
    assert len(ordered) == 15 and all(b.startswith(a) for a, b in pairwise(ordered))


# -- stopping and going on ---------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_losses(place: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, twice, against a run that nobody stopped: equal bit for bit."""
    changes: dict[str, Any] = {"stage1__steps": 30, "stage1__ema": 0.9, "checkpoints__every": 3}
    changes |= {"stage1__micro_batch": 4, "data__workers": 1}
    recipe = write_recipe(tmp_path / "recipe.toml", settings(place, **changes))
    finish(start_run(recipe, tmp_path / "whole"))
    expected = curve(tmp_path / "whole")
    out = tmp_path / "killed"
    moments = random.Random(5)
    for _ in range(2):
        process = start_run(recipe, out, "--resume")
        metrics = out / "stage1" / "metrics.jsonl"
        seen = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        wanted, deadline = seen + moments.randrange(1, 9), time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.is_file() and len(metrics.read_text().splitlines()) >= wanted:
                break
            time.sleep(moments.random() * 0.02)
        process.kill()
        process.communicate()
    finish(start_run(recipe, out, "--resume"))
    assert curve(out) == expected
    whole, killed = (open_checkpoint(p / "stage1" / "model") for p in (tmp_path / "whole", out))
    for name, values in whole.tensors().items():
        np.testing.assert_array_equal(killed.tensor(name), values)


def test_a_folder_holds_one_run_at_a_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlip_torch.train.lock._PATIENCE", 0.2)
    out = tmp_path / "out"
    with only_run_in(out), pytest.raises(RecipeError, match=r"out: process \d+ on .* is training"):
        run(place, out, stage1__steps=1)
    assert [path.name for path in out.iterdir()] == [".lock"]
    run(place, out, stage1__steps=1)


def test_sigterm_writes_a_checkpoint_and_exits_143(place: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.toml", settings(place))
    with endless_run(recipe, tmp_path / "out") as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 143, errors
    assert "--resume" in errors
    path = latest_checkpoint(tmp_path / "out" / "stage1" / "checkpoints")
    assert path is not None
    assert int(path.name.removeprefix("step-")) == curve(tmp_path / "out")[-1][0]


def test_stage_2_resumes_with_discriminator_and_average(
    place: Path, whole_run: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "stage2__start": str(whole_run),
        "stage2__steps": 4,
        "stage2__gan": 0.1,
        "stage2__ema": 0.9,
        "stage2__discriminator": {"base_channels": 256, "r1_every": 3},
    }
    run(place, tmp_path / "whole", stage="2", **changes)

    class Stop(Exception):
        pass

    from qlip_torch.train import loop

    def stop_at_4(parts: Any, done: int) -> None:
        if done > 2:
            raise Stop
        save(parts, done)

    save = loop.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "save", stop_at_4)
        run(place, tmp_path / "stopped", stage="2", **changes)
    run(place, tmp_path / "stopped", stage="2", resume=True, **changes)
    assert curve(tmp_path / "stopped", 2) == curve(tmp_path / "whole", 2)
    models = [open_checkpoint(tmp_path / p / "stage2" / "model") for p in ("whole", "stopped")]
    for name, values in models[0].tensors().items():
        np.testing.assert_array_equal(models[1].tensor(name), values)


def test_a_loss_that_is_not_finite_stops_the_run_by_name(place: Path, tmp_path: Path) -> None:
    from qlip_torch.train import objectives

    honest, calls = objectives.mse, []

    def broken(*arguments: torch.Tensor) -> torch.Tensor:
        calls.extend([1] * (len(arguments[0]) == 8))  # the plan measures with smaller ones
        return honest(*arguments) * (float("nan") if len(calls) == 6 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "mse", broken)
        with pytest.raises(NonFiniteError, match=r"loss term mse is not finite at step 6"):
            run(place, tmp_path / "out")
    path = latest_checkpoint(tmp_path / "out" / "stage1" / "checkpoints")
    assert path is not None and path.name == "step-00000004"
    # What the last good checkpoint holds goes on.
    run(place, tmp_path / "out", resume=True)
    run(place, tmp_path / "whole")
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")


# -- checkpoints -------------------------------------------------------------------------------


STATE: dict[str, Any] = dict.fromkeys(("stage", "recipe", "config", "tokenizer", "numbers"))


def test_checkpoints_rotate_and_latest_is_complete(tmp_path: Path) -> None:
    for background in (False, True):
        folder = tmp_path / str(background)
        checkpoints = Checkpoints(folder, keep=2, background=background, world=ALONE)
        value = torch.zeros(3)
        for step in (1, 2, 3, 4):
            value += 1
            checkpoints.save(step, {"a": value}, STATE, {"data": {}, "own": step})
        # Staged before save returned: what is written does not follow the weights.
        value += 100
        checkpoints.close()
        assert sorted(p.name for p in folder.iterdir()) == [
            "latest",
            "step-00000003",
            "step-00000004",
        ]
        target = {"a": torch.empty(3)}
        latest = checkpoints.latest()
        assert latest is not None
        resumed = checkpoints.load(latest, target)
        assert target["a"].tolist() == [4.0, 4.0, 4.0]
        assert resumed.state["step"] == 4 and resumed.ranks[0]["own"] == 4


def test_what_a_kill_left_half_written_is_never_latest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, background=False, world=ALONE)
    checkpoints.save(1, {"a": torch.ones(2)}, STATE, {"data": {}})
    # Killed while it wrote step 2, and after it renamed step 3 but before `latest` said so.
    (tmp_path / ".step-00000002.part").mkdir()
    assert checkpoints.latest() == tmp_path / "step-00000001"
    checkpoints.save(2, {"a": torch.ones(2)}, STATE, {"data": {}})
    assert [p.name for p in tmp_path.glob(".step*")] == []
    (tmp_path / "latest").unlink()
    assert checkpoints.latest() == tmp_path / "step-00000002"


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, background=False, world=ALONE)
    checkpoints.save(1, {"a": torch.ones(2)}, STATE, {"data": {}})
    path = checkpoints.latest()
    assert path is not None
    for target in ({"b": torch.ones(2)}, {"a": torch.ones(3)}):
        with pytest.raises(CheckpointError, match="another recipe"):
            checkpoints.load(path, target)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (".metadata", None, "cannot be read .*No such file"),
        (".metadata", b"\x80\x02garbage", "cannot be read"),
        ("__0_0.distcp", b"garbage", "the tensors cannot be read"),
        ("__0_0.distcp", None, "the tensors cannot be read"),
        ("state.json", b"{}", "is damaged, without stage"),
        ("state.json", b"[]", "is damaged, without stage"),
        ("rank-00000.json", None, "cannot be read"),
        ("rank-00000.json", b"{}", "is damaged, without data, random"),
        ("rank-00000.json", b'{"data": {}, "random": {"cpu": "AAAA"}}', "random numbers"),
    ],
)
def test_a_damaged_checkpoint_says_what_and_how_to_go_on(
    name: str, content: bytes | None, message: str, tmp_path: Path, capfd: Any
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, background=False, world=ALONE)
    for step in (1, 2):
        checkpoints.save(step, {"a": torch.ones(2)}, STATE, {"data": {}})
    path = tmp_path / "step-00000002"
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.load(path, {"a": torch.ones(2)})
    shown = "*.distcp" if name.endswith("distcp") else name
    assert str(caught.value).startswith(f"{path / shown}: ") and "\n" not in str(caught.value)
    assert f"remove {path} to continue from the one before it, step-00000001" in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    shutil.rmtree(path)
    assert checkpoints.latest() == tmp_path / "step-00000001"
    (tmp_path / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no earlier checkpoint"):
        checkpoints.load(tmp_path / "step-00000001", {"a": torch.ones(2)})


def test_a_damaged_latest_is_not_followed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, background=False, world=ALONE)
    checkpoints.save(1, {"a": torch.ones(2)}, STATE, {"data": {}})
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert checkpoints.latest() == tmp_path / "step-00000001"


def test_a_checkpoint_runs_nothing_of_what_it_holds(tmp_path: Path) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoints = Checkpoints(tmp_path, keep=2, background=False, world=ALONE)
    checkpoints.save(1, {"a": torch.ones(2)}, STATE, {"data": {}})
    path = checkpoints.latest()
    assert path is not None
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="mkdir"):
        checkpoints.load(path, {"a": torch.ones(2)})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [b"pathlib._local\nPosixPath", b"pathlib\nWindowsPath"])
def test_a_checkpoint_of_another_python_or_system_is_read(kind: bytes) -> None:
    """Its table names its folder; Python 3.13 has its own module for that class."""
    import io

    from qlip_torch.train.checkpoints import _Unpickler

    pickled = b"c" + kind + b"\n(S'runs'\ntR."
    assert _Unpickler(io.BytesIO(pickled)).load() == PurePath("runs")


# -- recipes and plans -------------------------------------------------------------------------


def test_every_shipped_recipe_reads_and_survives_a_round_trip(tmp_path: Path) -> None:
    assert {"emoji", "qlip-b-16-256", "qlip-b-8-256", "qlip-l-14-392"} <= set(recipe_names())
    for name in recipe_names():
        recipe = Recipe.load(name)
        (tmp_path / "copy.toml").write_text(recipe.to_toml())
        assert Recipe.from_file(tmp_path / "copy.toml") == recipe
        assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", ["qlip-b-16-256", "qlip-b-8-256", "qlip-l-14-392"])
def test_the_papers_recipes_have_the_papers_numbers(name: str) -> None:
    recipe = Recipe.load(name)
    one, two = recipe.stage1, recipe.stage2
    assert (one.steps, one.warmup, one.betas, one.weight_decay) == (
        120_000,
        2000,
        (0.9, 0.95),
        0.05,
    )
    rates = one.learning_rate
    assert (rates.rest, rates.encoder, rates.text, rates.decoder) == (5e-4, 2e-4, 2e-5, 2e-3)
    assert (one.clip, one.batch, one.mse, one.align, one.bsq, one.commitment) == (
        5.0,
        65_536,
        1e3,
        1.0,
        1.0,
        1.0,
    )
    rates = two.learning_rate
    assert (rates.rest, rates.encoder, rates.text, rates.decoder) == (5e-4, 0, 0, 1e-4)
    assert (two.clip, two.batch, two.mse, two.bsq, two.commitment) == (1.0, 16_384, 1.0, 1.0, 0.0)
    assert (two.lpips, two.gan, two.discriminator.learning_rate) == (0.1, 0.1, 1e-4)
    assert (two.discriminator.r1_every, two.discriminator.r1_weight) == (16, 10.0)
    assert one.micro_batches(recipe.devices) * one.micro_batch * recipe.devices == one.batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage1.stepz=3", r'unknown key "stage1\.stepz".*did you mean "stage1\.steps"'),
        ("model.pach_size=8", r'unknown key "model\.pach_size".*did you mean "model\.patch_size"'),
        ("stage1.steps=many", r"stage1\.steps must be an integer, got 'many'"),
        ("stage1.learning_rate={ rest=0, encoder=0, text=0, decoder=0 }", "every rate is 0"),
        ("stage1={ align=0, mse=0, bsq=0, commitment=0 }", "nothing is minimised"),
        ("stage1={ align=0, learning_rate={ rest=0, encoder=0, decoder=0 } }", "no loss asks for"),
        ("stage1.steps=0", r"stage1\.steps \(=0\) must be at least 1"),
        ("stage1.betas=[0.9]", r"stage1\.betas must have 2 values"),
        ("stage1.betas=[0.9, 1.5]", r"stage1\.betas \(=\(0\.9, 1\.5\)\) are decays"),
        ("engine.parallel=zero", r"engine\.parallel is 'zero', expected one of ddp, fsdp"),
        ("model.preset=qlip-c", r"model\.preset 'qlip-c': there are"),
        ("model.patch_size=7", r"model\.patch_size \(=7\) must divide"),
        ("stage2.learning_rate.text=1e-4", r"stage2\.learning_rate\.encoder and \.text must be 0"),
        ("data.workers=-1", r"data\.workers \(=-1\) must be at least 0"),
        ("stage1", r"expected key=value"),
    ],
)
def test_a_wrong_recipe_says_what_and_where(place: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(place).changed([change])


def test_stage_2_alone_needs_to_know_its_weights(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path / "out", stage2__lpips=0.1, stage1__steps=1)
    with pytest.raises(
        RecipeError, match=r"stage2\.lpips is not 0 and stage2\.perceptual names no"
    ):
        run(place, tmp_path / "other", stage="all", stage2__lpips=0.1)


def test_weights_of_stage_2_are_read_before_stage_1(place: Path, tmp_path: Path) -> None:
    absent: dict[str, Any] = {"stage2__lpips": 0.1, "stage2__perceptual": "absent.safetensors"}
    with pytest.raises(RecipeError, match=r"stage2\.perceptual: .*absent\.safetensors: no such"):
        run(place, tmp_path / "out", stage="all", **absent)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such"):
        train(recipe_of(place, **absent), out=tmp_path / "out", dry_run=True, say=quiet)


def test_stage_2_may_change_until_it_has_begun(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    short: dict[str, Any] = {"stage1__steps": 1, "stage2__steps": 1}
    with pytest.raises(RecipeError, match=r"stage2\.start: .*absent: no such folder"):
        run(place, out, stage="all", **short, stage2__start=str(tmp_path / "absent"))
    assert not out.exists()
    run(place, out, stage="1", **short, stage2__start=str(tmp_path / "absent"))
    # What an earlier attempt took as its start is not what the recipe names now.
    (out / "stage2" / "start").mkdir(parents=True)
    (out / "stage2" / "start" / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"stage1\.warmup was 2, now 1"):
        run(place, out, stage="all", resume=True, **short, stage1__warmup=1)
    models = run(place, out, stage="all", resume=True, **short, stage2__mse=2.0).models
    assert list(models) == [1, 2] and Recipe.from_file(out / "recipe.toml").stage2.mse == 2.0
    with pytest.raises(RecipeError, match=r"stage2\.mse was 2\.0, now 1\.0"):
        run(place, out, stage="all", resume=True, **short)


def test_changes_reach_every_level(place: Path) -> None:
    changes = ["stage1.steps=7", "stage1.learning_rate.rest=1e-3", "model.encoder.width=64"]
    recipe = recipe_of(place).changed([*changes, "stage2.start=/a/b c", "stage1.betas=[0.8, 0.9]"])
    assert recipe.stage1.steps == 7 and recipe.stage1.learning_rate.rest == 1e-3
    assert recipe.model.config().vision_config.hidden_size == 64
    assert recipe.stage2.start == "/a/b c" and recipe.stage1.betas == (0.8, 0.9)


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"one of .*emoji.*did you mean"):
        Recipe.load("emojis")


def test_a_dry_run_builds_everything_and_touches_nothing(place: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = recipe_of(place, stage1__batch=24, stage1__micro_batch=6, stage2__gan=0.1)
    result = train(recipe, out=tmp_path / "out", dry_run=True, say=lines.append)
    assert not (tmp_path / "out").exists() and result.models == {}
    one, two = result.plans
    table = architecture(recipe.model.config())
    assert sum(one.parameters.values()) == one.trained == sum(s.size for s in table.values())
    assert two.trained == sum(s.size for s in table.values() if s.part in ("down", "up", "decoder"))
    assert "text" not in two.parameters and two.discriminator > 0
    assert (one.images, one.micro_batches, one.micro_batch) == (8 * 24, 4, 6)
    # Weights, gradients and LAMB's two moments, float32.
    assert one.state_bytes == 16 * one.trained
    text = "\n".join(lines)
    assert "8 steps of 24 images = 192 images" in text and "memory per device about" in text


def test_a_dry_run_plans_for_the_devices_that_the_recipe_is_meant_for(
    place: Path, tmp_path: Path
) -> None:
    sizes = {"stage1__batch": 24, "stage1__micro_batch": 3, "stage2__batch": 18}
    recipe = recipe_of(place, devices=4, **sizes, stage2__micro_batch=18)
    lines: list[str] = []
    one, two = train(recipe, out=tmp_path / "out", dry_run=True, say=lines.append).plans
    assert (one.devices, one.micro_batches, one.micro_batch) == (4, 2, 3)
    # A batch that does not divide over them: as for a run here.
    assert (two.devices, two.micro_batches, two.micro_batch) == (1, 1, 18)
    [note] = [line for line in lines if "this is the plan for the 4 devices" in line]
    assert "built now is for 1 device" in note and any(
        "meant for 4 devices: on 1 the mathematics" in line for line in lines
    )


def test_checkpointing_and_bfloat16_need_less_memory(place: Path) -> None:
    recipe = recipe_of(place)
    config = recipe.model.config()

    def needed(half: bool, checkpointing: bool) -> int:
        engine = EngineRecipe(activation_checkpointing=checkpointing)
        return activation_bytes(config, recipe.stage1, half=half, engine=engine)

    assert needed(False, True) < 0.8 * needed(False, False)
    assert needed(True, False) < 0.9 * needed(False, False)


def test_the_papers_recipe_needs_less_memory_than_the_paper() -> None:
    recipe = Recipe.load("qlip-b-16-256")
    device, devices = torch.device("cuda"), recipe.devices
    config = recipe.model.config()
    one, two = (make_plan(recipe, config, stage, device, devices) for stage in (1, 2))
    assert one.batch // devices == 2048 and one.bytes < 51e9
    assert two.batch // devices >= 256 and two.bytes < 42e9
    # The same forward on an H100, not compiled, 128 images at once: 46.3 GB at its peak.
    plain = replace(recipe.engine, compile=False)
    measured = (46.3e9 - one.state_bytes) / 128
    found = activation_bytes(config, recipe.stage1, half=True, engine=plain)
    assert abs(found / measured - 1) < 0.1


def test_a_plan_for_more_devices_divides_the_batch(place: Path) -> None:
    recipe = recipe_of(place, stage1__batch=48, stage1__micro_batch=6, engine__parallel="fsdp")
    plan = make_plan(recipe, recipe.model.config(), 1, torch.device("cpu"), 4)
    assert (plan.micro_batches, plan.micro_batch) == (2, 6)
    assert plan.state_bytes == 16 * plan.trained // 4
    with pytest.raises(RecipeError, match="5 processes"):
        make_plan(recipe, recipe.model.config(), 1, torch.device("cpu"), 5)


def test_a_plan_tells_of_a_warm_up_that_leaves_no_steps(place: Path) -> None:
    recipe = recipe_of(place, stage1__warmup=2000)
    config, cpu = recipe.model.config(), torch.device("cpu")
    warning = "  the warm-up of 2,000 steps leaves none after it: learning rates end at 0.004 of the recipe's"
    assert f"{warning}; set stage1.warmup" in make_plan(recipe, config, 1, cpu, 1).lines()
    assert "warm-up" not in "".join(make_plan(recipe, config, 2, cpu, 1).lines())


def test_balance_takes_the_ratio_of_what_each_objective_reaches_alone(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert balance(recipe_of(place), out=tmp_path, dry_run=True) is None
    assert not list(tmp_path.iterdir())
    # Half a tokenizer is not tried on pictures.
    monkeypatch.setattr("qlip_torch.train.run.validate_on", None)
    recipe = recipe_of(place, log__held_out=str(place / "data"))
    found = balance(recipe, out=tmp_path, steps=4)
    assert found is not None
    written = capsys.readouterr().err
    for name in ("reconstruction", "alignment"):
        assert f"{name} alone: stage 1: " in written
        assert (
            (tmp_path / f"probe-{name}/report.md").read_text().startswith(f"# test, {name} alone")
        )
    mse = curve(tmp_path / "probe-reconstruction")[-1][1]["mse"]
    align = curve(tmp_path / "probe-alignment")[-1][1]["align"]
    assert found.mse == mse and found.align == align
    assert found.ratio == pytest.approx(align / mse, rel=5e-3)
    assert Recipe.from_file(found.recipe).stage1.mse == found.weight_mse


def test_the_probes_of_a_recipe_without_a_name_have_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(
        "qlip_torch.train.balance.train", lambda recipe, **_: names.append(recipe.name)
    )
    balance(recipe_of(place, name=""), out=tmp_path, dry_run=True)
    assert names == ["reconstruction alone", "alignment alone"]
