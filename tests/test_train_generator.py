"""Training of the generator: the loss, dropped captions, resuming, both kinds of data, recipes, export."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import runner
from configurations import random_weights
from PIL import Image
from training import finish, in_haste, settings, start_run, with_curves, write_data

import qlip_core as qlip
from qlip_core.data.shards import open_source
from qlip_core.data.token_shards import is_token_set
from qlip_core.data.tokenizing import tokenize
from qlip_core.errors import CheckpointError, DataError, RecipeError, TokenFileError
from qlip_core.generator import reference
from qlip_core.generator.architecture import init_weights
from qlip_core.generator.checkpoint import open_generator
from qlip_core.generator.conditioning import encode_prompts
from qlip_core.text import Tokenizer
from qlip_torch.backend import TorchNetwork
from qlip_torch.generator import Generator
from qlip_torch.train.distributed import World
from qlip_torch.train.export import export
from qlip_torch.train.generator.feed import ImageFeed, Prepared, Rows, TokenFeed, dropped, make_feed
from qlip_torch.train.generator.plan import forward_flops, make_plan
from qlip_torch.train.generator.recipe import GeneratorRecipe
from qlip_torch.train.generator.run import make_conditioner, train_generator
from qlip_torch.train.generator.stage import GeneratorStage
from qlip_torch.train.lock import only_run_in
from qlip_torch.train.recipe import Recipe
from qlip_torch.train.recipe_file import GENERATOR, recipe_names
from qlip_torch.train.stage import NonFiniteError

CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    with in_haste():
        yield


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/` of 16 captioned pictures, `model/` a random tokenizer of 2x2 patches of 8 bits, `tokens/`
    its token shards with mirror images."""
    folder = tmp_path_factory.mktemp("generator")
    write_data(folder, 16)
    text = Recipe.from_dict(settings(folder)).model.config().text_config
    found = Tokenizer.from_folder(folder / "tokenizer", text)
    assert found is not None
    ids = {"pad_token_id": found.pad, "bos_token_id": found.start, "eos_token_id": found.end}
    config = Recipe.from_dict(settings(folder)).model.config(**ids)
    for name, seed in (("model", 1), ("other", 2)):
        weights = random_weights(config, seed)
        qlip.save_checkpoint(folder / name, config, weights, tokenizer_from=folder / "tokenizer")
    model = qlip.load(folder / "model", backend="torch", device="cpu")
    tokenize(model, open_source(str(folder / "data")), folder / "tokens", augmentation="flip")
    return folder


def recipe_of(place: Path, *changes: str) -> GeneratorRecipe:
    values: dict[str, Any] = {
        "kind": "generator",
        "name": "test",
        "seed": 3,
        "tokenizer": str(place / "model"),
        "model": {
            "preset": "emoji",
            "width": 32,
            "intermediate": 48,
            "layers": 2,
            "heads": 4,
            "group_size": 4,
        },
        "data": {"tokens": str(place / "tokens")},
        "training": {
            "steps": 6,
            "batch": 8,
            "micro_batch": 4,
            "warmup": 2,
            "learning_rate": 1e-2,
        },
        "engine": {"device": "cpu"},
        "log": {"metrics": 1, "pictures": 0},
        "checkpoints": {"every": 2},
    }
    return GeneratorRecipe.from_dict(values).changed(changes)


IMAGES = ('data.tokens=""', "data.images.workers=0")


def images_of(place: Path) -> tuple[str, ...]:
    location = json.dumps(str(place / "data"))
    return (*IMAGES, f"data.images.sources=[{{ location = {location} }}]")


def quiet(line: str) -> None:
    pass


def run(recipe: GeneratorRecipe, out: Path, **options: Any) -> Path:
    found = train_generator(recipe, out=out, say=quiet, **options).generator
    assert found is not None
    return found


def curve(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(v["step"], v["terms"]["cross_entropy"], v["gradient_norm"]) for v in lines]


def stage_of(recipe: GeneratorRecipe) -> tuple[GeneratorStage, qlip.Model]:
    model = qlip.load(recipe.tokenizer, backend="torch", device="cpu")
    config = recipe.model.config().fitted(
        model.config, model.fingerprint, model.checkpoint.text_fingerprint
    )
    generator = Generator(config)
    generator.init_from(init_weights(config, recipe.seed))
    conditioner = make_conditioner(config, model, CPU)
    return GeneratorStage(generator, recipe, CPU, conditioner), model


# -- the step --------------------------------------------------------------------------------------


def test_the_loss_is_the_references_cross_entropy(place: Path) -> None:
    recipe = recipe_of(place, "model.dropout=0.0", "training.learning_rate=0.0")
    stage, model = stage_of(recipe)
    config = stage.model.config
    feed = make_feed(recipe, config, model, CPU)
    batches = [next(feed), next(feed)]

    weights = init_weights(config, recipe.seed)
    tensors = {name: w.astype(np.float64) for name, w in weights.items()}
    conditioner = make_conditioner(config, model, CPU)
    found = []
    for rows in batches:
        drop = dropped(3, rows.places, 0.1)
        kept = ["" if gone else caption for caption, gone in zip(rows.captions, drop)]
        captions = encode_prompts(kept, conditioner, config)
        captions = captions.astype(np.dtype(np.float64))
        logits = reference.image_logits(tensors, config, captions, rows.tokens)
        likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found.append(-np.take_along_axis(likely, rows.tokens[..., None], -1).mean())
    report = stage.step([stage.inputs(rows) for rows in batches], 0)
    assert report.terms["cross_entropy"] == pytest.approx(np.mean(found), rel=1e-5)
    assert report.total == report.terms["cross_entropy"]
    assert abs(report.total - np.log(16)) < 0.05  # 4 bits, nothing learnt


def test_micro_batches_are_one_batch(place: Path) -> None:
    norms = []
    for micro in (8, 2):
        recipe = recipe_of(place, "model.dropout=0.0", f"training.micro_batch={micro}")
        stage, model = stage_of(recipe)
        feed = make_feed(recipe, stage.model.config, model, CPU)
        report = stage.step([stage.inputs(next(feed)) for _ in range(8 // micro)], 0)
        norms.append((report.total, report.gradient_norm))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_loss_that_is_not_finite_is_named_with_its_step(place: Path) -> None:
    """Steps count from 1, as in metrics.jsonl."""
    recipe = recipe_of(place)
    stage, model = stage_of(recipe)
    inputs = stage.inputs(next(make_feed(recipe, stage.model.config, model, CPU)))
    for parameter in stage.model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(
        NonFiniteError, match="cross_entropy, gradient norm is not finite at step 1:"
    ):
        stage.step([inputs], 0)


def test_it_learns(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_curves(monkeypatch)
    changes = ["training.steps=60", "training.batch=16", "training.micro_batch=16", "data.flip=0"]
    run(recipe_of(place, "model.dropout=0.0", *changes), tmp_path / "run")
    losses = [loss for _, loss, _ in curve(tmp_path / "run")]
    assert losses[0] > 2.7 and losses[-1] < 0.35 * losses[0]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["images"] == 60 * 16 and list(last["learning_rates"]) == ["generator"]
    assert (tmp_path / "run" / "curves.png").is_file()  # also without pictures
    report = (tmp_path / "run" / "report.md").read_text()
    assert "60 steps in" in report and "![curves](curves.png)" in report
    assert f"| cross_entropy | {losses[0]:.4f} | {losses[-1]:.4f} |" in report


def test_rows_made_ahead_are_the_same_rows(place: Path) -> None:
    recipe = recipe_of(place)
    stage, model = stage_of(recipe)
    found, states = [], []
    for ahead in (False, True):
        feed = Prepared(
            make_feed(recipe, stage.model.config, model, CPU), stage.inputs, ahead=ahead
        )
        with feed.opened():
            found.append([next(feed) for _ in range(3)])
        states.append(feed.state_dict())
    for one, other in zip(*found):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert states[0] == states[1]  # of what was handed out, not of what lies ready


def test_settled_rows_are_made_by_nobody(place: Path) -> None:
    """While pictures are drawn no thread tokenizes captions or asks for the GPU."""
    recipe = recipe_of(place)
    stage, model = stage_of(recipe)
    busy = threading.Event()

    def slow(rows: Rows) -> Any:
        busy.set()
        time.sleep(0.05)
        inputs = stage.inputs(rows)
        busy.clear()
        return inputs

    feed = Prepared(make_feed(recipe, stage.model.config, model, CPU), slow, ahead=True)
    with feed.opened():
        feed.settle()
        next(feed)
        busy.wait(5)
        feed.settle()
        assert not busy.is_set()


def test_dropped_captions_follow_from_seed_and_row() -> None:
    places = np.arange(20_000)
    whole = dropped(7, places, 0.1)
    assert np.array_equal(whole[500:900], dropped(7, places[500:900], 0.1))
    assert abs(whole.mean() - 0.1) < 0.01
    assert not np.array_equal(whole, dropped(8, places, 0.1))
    assert not dropped(7, places, 0.0).any()


def test_a_dropped_caption_is_the_null_prefix(place: Path) -> None:
    stage, _ = stage_of(recipe_of(place, "seed=0"))
    places = np.arange(64)
    rows = Rows(np.zeros((64, 8), np.int64), ["red square"] * 63 + [" "], places)
    _, _, null, tokens = stage.inputs(rows)
    expected = dropped(0, places, 0.1)
    assert 0 < expected.sum() < 20
    expected[63] = True
    assert np.array_equal(null.numpy(), expected) and tokens.shape == (64, 8)


def test_checkpointing_of_activations_repeats_the_dropout(place: Path, tmp_path: Path) -> None:
    for name, change in (("plain", "false"), ("again", "true")):
        recipe = recipe_of(place, "model.dropout=0.5", f"engine.activation_checkpointing={change}")
        run(recipe, tmp_path / name, steps=3)
    assert curve(tmp_path / "plain") == curve(tmp_path / "again")


# -- data ------------------------------------------------------------------------------------------


def test_shards_and_images_give_the_same_tokens(place: Path) -> None:
    recipe = recipe_of(place, "data.flip=0", "training.batch=16", "training.micro_batch=16")
    stage, model = stage_of(recipe)
    config = stage.model.config
    from_shards = next(make_feed(recipe, config, model, CPU))
    images = recipe.changed([*images_of(place), "data.images.scale=[1.0, 1.0]"])
    feed = make_feed(images, config, model, CPU)
    assert isinstance(feed, ImageFeed)
    from_images = next(feed)
    assert from_shards.tokens.shape == (16, 8) and config.tokens_per_image == 8
    both = [dict(zip(r.captions, r.tokens.tolist())) for r in (from_shards, from_images)]
    assert both[0] == both[1] and len(both[0]) == 16
    assert from_shards.places.tolist() == from_images.places.tolist() == list(range(16))


def test_only_the_steps_take_products_in_tf32(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, set[str]] = {"step": set(), "encode": set()}
    for name, owner in (("step", GeneratorStage), ("encode", TorchNetwork)):
        real = getattr(owner, name)

        def noting(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            found[name].add(torch.get_float32_matmul_precision())
            return real(*args, **options)

        monkeypatch.setattr(owner, name, noting)
    run(recipe_of(place, *images_of(place), "engine.tf32=true"), tmp_path / "run", steps=2)
    assert found == {"step": {"high"}, "encode": {"highest"}}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_ranks_share_the_rows_of_one(place: Path, kind: str) -> None:
    recipe = recipe_of(
        place, "training.micro_batch=8", *(images_of(place) if kind == "images" else ())
    )
    stage, model = stage_of(recipe)
    config = stage.model.config
    alone = next(make_feed(recipe, config, model, CPU))
    parts = [
        next(make_feed(recipe, config, model, World(rank, 2, torch.device("cpu"))))
        for rank in range(2)
    ]
    assert [c for part in parts for c in part.captions] == list(alone.captions)
    assert np.array_equal(np.concatenate([part.places for part in parts]), alone.places)
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), alone.tokens)


def test_tokens_of_another_tokenizer_are_refused(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, f"tokenizer={place / 'other'}")
    with pytest.raises(TokenFileError, match="made by another tokenizer"):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize("changed", ["augmentation", "content", "count"])
def test_a_position_in_other_shards_is_refused(changed: str, place: Path, tmp_path: Path) -> None:
    stage, model = stage_of(recipe_of(place))

    def feed(name: str, augmentation: str, state: dict[str, Any] | None) -> TokenFeed:
        source = open_source(str(tmp_path / "data"))
        tokenize(model, source, tmp_path / name, augmentation=augmentation)
        recipe = recipe_of(place, f"data.tokens={tmp_path / name}")
        return TokenFeed(recipe, stage.model.config, model.fingerprint, CPU, state)

    shutil.copytree(place / "data", tmp_path / "data")
    state = feed("tokens", "flip", None).state_dict()
    feed("again", "flip", state)
    first, second = sorted((tmp_path / "data").glob("*.txt"))[:2]
    texts = first.read_text(), second.read_text()
    if changed == "content":
        first.write_text(texts[1])
        second.write_text(texts[0])
    if changed == "count":
        first.unlink()
    count = 15 if changed == "count" else 16
    with pytest.raises(
        DataError, match=rf"started with, which had 16 images \(these have {count}\)"
    ):
        feed("others", "none" if changed == "augmentation" else "flip", state)


def test_token_sets_are_told_from_images(place: Path) -> None:
    assert is_token_set(str(place / "tokens")) and not is_token_set(str(place / "data"))
    assert not is_token_set("emoji") and not is_token_set(str(place / "x-{000..002}.tar"))


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_a_resumed_run_is_the_unbroken_one(kind: str, place: Path, tmp_path: Path) -> None:
    changes = ["training.ema=0.9", *(images_of(place) if kind == "images" else ())]
    recipe = recipe_of(place, *changes)
    whole = run(recipe, tmp_path / "whole")
    torch.manual_seed(99)
    partly = tmp_path / "partly"
    run(recipe, partly)
    # As if killed after the checkpoint of step 4: what came after it is not there.
    for path in (partly / "checkpoints").glob("step-00000006"):
        path.rename(tmp_path / "gone")
    (partly / "checkpoints" / "latest").write_text("step-00000004\n")
    (partly / "generator").rename(tmp_path / "model-gone")
    torch.manual_seed(5)
    resumed = train_generator(None, out=partly, resume=True, say=quiet).generator
    assert resumed is not None
    assert curve(partly) == curve(tmp_path / "whole") and len(curve(partly)) == 6
    ours, theirs = open_generator(resumed).tensors(), open_generator(whole).tensors()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_an_exported_generator_draws(place: Path, tmp_path: Path) -> None:
    folder = run(recipe_of(place), tmp_path / "run")
    model = qlip.load(place / "model", backend="torch", device="cpu", generator=folder)
    assert model.generator_config.tokenizer == model.fingerprint
    assert model.generator_config.text_tower == model.checkpoint.text_fingerprint
    tokens = model.generate_tokens(["red square", ""], seed=1)
    assert tokens.names == ("red square", "") and tokens.grid == (2, 2) and tokens.length == 8
    numpy = qlip.load(place / "model", backend="numpy", generator=folder)
    assert numpy.generate_tokens(["red square", ""], seed=1) == tokens
    with pytest.raises(CheckpointError, match="another tokenizer"):
        qlip.load(place / "other", generator=folder)
    again = export(tmp_path / "run", tmp_path / "out")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert GeneratorRecipe.from_file(again / "recipe.toml") == recipe_of(place)
    assert model.fingerprint in (again / "README.md").read_text()


def test_a_run_continues_from_the_weights_of_another(place: Path, tmp_path: Path) -> None:
    """Also for another tokenizer, whose folder holds a generator that does not fit it."""
    first = run(recipe_of(place), tmp_path / "first")
    other = tmp_path / "other"
    shutil.copytree(place / "other", other)
    shutil.copytree(first, other / "generator")
    changes = [f"start={first}", f"tokenizer={other}", *images_of(place)]
    recipe = recipe_of(place, *changes, "training.learning_rate=0", "training.steps=1")
    second = run(recipe, tmp_path / "second")
    old, new = open_generator(first), open_generator(second)
    assert new.config.tokenizer != old.config.tokenizer
    weights = old.tensors()
    assert all(np.array_equal(values, weights[name]) for name, values in new.tensors().items())
    with pytest.raises(CheckpointError, match=r"start: .* has other sizes"):
        run(recipe.changed(["model.layers=1"]), tmp_path / "third")


def test_pictures_are_what_the_generator_draws(place: Path, tmp_path: Path) -> None:
    changes = ["log.pictures=6", 'log.prompts=["red square", "dark"]', "log.seed=4"]
    folder = run(recipe_of(place, *changes), tmp_path / "run")
    with Image.open(tmp_path / "run" / "pictures" / "step-00000006.png") as sheet:
        assert sheet.info["prompts"] == "red square\ndark" and sheet.info["seed"] == "4"
        pixels = np.asarray(sheet)
    model = qlip.load(place / "model", backend="torch", device="cpu", generator=folder)
    drawn = model.generate(["red square", "dark"], seed=4)
    assert np.array_equal(pixels[:128:8, :128:8], drawn[0])
    assert np.array_equal(pixels[:128:8, 130::8], drawn[1])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(parallel: str, place: Path, tmp_path: Path) -> None:
    changes = ["model.dropout=0.0", "training.micro_batch=8"]
    run(recipe_of(place, *changes), tmp_path / "one", steps=3)
    recipe = recipe_of(place, *changes, "training.steps=3", f'engine.parallel="{parallel}"')
    recipe = recipe.changed(["log.pictures=3", "training.ema=0.5"])
    path = tmp_path / f"{parallel}.toml"
    path.write_text(recipe.to_toml())
    finish(start_run(path, tmp_path / parallel, "--generator", ranks=2))
    one, two = np.array(curve(tmp_path / "one")), np.array(curve(tmp_path / parallel))
    assert np.allclose(one, two, rtol=2e-4)
    assert open_generator(tmp_path / parallel / "generator").config.hidden_size == 32
    assert (tmp_path / parallel / "pictures" / "step-00000003.png").is_file()


def test_a_run_is_not_begun_twice_or_with_another_recipe(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place)
    run(recipe, tmp_path, steps=1)
    with pytest.raises(RecipeError, match="already holds a run"):
        run(recipe, tmp_path, steps=1)
    with pytest.raises(RecipeError, match=r"model\.width was 32, now 64"):
        run(recipe.changed(["model.width=64"]), tmp_path, steps=1, resume=True)
    with pytest.raises(RecipeError, match="no run to resume"):
        train_generator(None, out=tmp_path / "none", resume=True)


def test_a_folder_holds_one_run_at_a_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlip_torch.train.lock._PATIENCE", 0.2)
    with only_run_in(tmp_path), pytest.raises(RecipeError, match="is training there"):
        run(recipe_of(place), tmp_path, steps=1)


def test_a_dry_run_leaves_nothing(place: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = recipe_of(place, "training.warmup=6", "devices=2")
    result = train_generator(recipe, out=tmp_path / "x", dry_run=True, say=lines.append)
    assert result.generator is None and not (tmp_path / "x").exists()
    plan = result.plan
    assert plan is not None and plan.devices == 2
    assert any("this is the plan for the 2 devices" in line for line in lines)
    config = plan.config
    assert plan.parameters == sum(w.size for w in init_weights(config).values())
    assert plan.images == 48 and plan.state_bytes == 16 * plan.parameters
    assert "set training.warmup" in "".join(lines)
    assert "48 images, 384 sub-tokens" in lines[1] and "memory per device" in lines[3]


def test_images_are_looked_for_before_anything_but_a_dry_runs_plan(
    place: Path, tmp_path: Path
) -> None:
    absent = [*IMAGES, 'data.images.sources=[{ location = "absent" }]']
    recipe = recipe_of(place, *absent)
    for dry_run in (False, True):
        lines: list[str] = []
        with pytest.raises(DataError, match="absent"):
            train_generator(recipe, out=tmp_path / "x", dry_run=dry_run, say=lines.append)
        assert bool(lines) == dry_run


def test_flops_of_llamagens_size() -> None:
    config = GeneratorRecipe.load("generator-b").model.config()
    plan = make_plan(
        GeneratorRecipe.load("generator-b"),
        replace(config, num_hidden_layers=2, grid=(4, 4)),
        torch.device("cpu"),
        8,
    )
    assert (plan.micro_batches, plan.micro_batch, plan.activation_bytes > 0) == (1, 32, True)
    # Two FLOPs for each weight of the 12 layers and each of 588 positions, and attention's products.
    blocks = 12 * (4 * 768**2 + 3 * 768 * 2048)
    expected = 2 * (588 * (blocks + 12 * 2 * 588 * 768) + 512 * 768 * 2**14)
    expected += 2 * 77 * 768 * (512 + 768)
    assert forward_flops(config) == expected


# -- recipes ---------------------------------------------------------------------------------------


def test_shipped_recipes_read_and_survive_a_round_trip(tmp_path: Path) -> None:
    names = recipe_names(GENERATOR)
    assert {"generator-emoji", "generator-b", "generator-laptop"} <= set(names)
    assert not set(names) & set(recipe_names())
    for name in names:
        recipe = GeneratorRecipe.load(name)
        (tmp_path / "copy.toml").write_text(recipe.to_toml())
        assert GeneratorRecipe.from_file(tmp_path / "copy.toml") == recipe


def test_llamagens_settings() -> None:
    recipe = GeneratorRecipe.load("generator-b")
    config, training = recipe.model.config(), recipe.training
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (
        12,
        12,
        768,
    )
    assert (config.dropout, config.null_probability) == (0.1, 0.1)
    assert (training.learning_rate, training.betas, training.weight_decay, training.clip) == (
        1e-4,
        (0.9, 0.95),
        0.05,
        1.0,
    )


def test_a_prefix_longer_than_the_text_tower_takes_is_refused(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, "model.prefix_length=1000")
    with pytest.raises(RecipeError, match=r"prefix_length \(=1000\): .* takes at most"):
        run(recipe, tmp_path, steps=1)


def test_recipes_of_the_other_kind_are_refused() -> None:
    with pytest.raises(
        RecipeError, match="recipe of a tokenizer, not of a generator: run it as `qlip train"
    ):
        GeneratorRecipe.load("emoji")
    with pytest.raises(
        RecipeError, match=r"of a generator, not of a tokenizer: .*`qlip train generator"
    ):
        Recipe.load("generator-emoji")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.widht=3", 'unknown key "model.widht" in the recipe; did you mean "model.width"'),
        ("model.preset=Z", "preset 'Z': there are B, L"),
        ("model.heads=7", "must divide hidden_size"),
        ("model.conditioner=none", "expected one of qlip-text, t5"),
        ("model.sampling={ cfg_scale = 200 }", "cfg_scale"),
        ("training.micro_batch=3", "must divide batch"),
        ("training.learning_rate=-1", "must be at least 0"),
        ("data.flip=2", "must be a chance"),
        ("log.prompts=[]", "prompts is empty"),
        ("kind=other", "kind is 'other', expected one of generator"),
    ],
)
def test_a_wrong_recipe_says_what_and_where(place: Path, change: str, message: str) -> None:
    changes = ["log.pictures=5", change] if "prompts" in change else [change]
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        recipe_of(place, *changes)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_trains_and_exports(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qlip_command = runner(place, capsys)
    path, out = tmp_path / "recipe.toml", tmp_path / "run"
    path.write_text(recipe_of(place).to_toml())
    made = qlip_command("train", "generator", path, "-o", out, "--steps", "2", "--json", plain=True)
    assert made.json["generator"] == str(out / "generator") and made.json["out"] == str(out)
    assert (made.json["plan"]["steps"], made.json["plan"]["batch"]) == (2, 8)
    exported = tmp_path / "generator"
    qlip_command("train", "export", out, "-o", exported, "--dtype", "bfloat16", plain=True)
    assert open_generator(exported).config.sub_tokens == 2
    dry = ["generator", path, "-o", tmp_path / "dry", "--data", place / "tokens", "--dry-run"]
    said = qlip_command("train", *dry, plain=True)
    assert said.code == 0 and "sub-tokens" in said.err and not (tmp_path / "dry").exists()
    wrong = qlip_command("train", path, "-o", tmp_path / "no", plain=True)
    assert "run it as `qlip train generator RECIPE`" in wrong.error
    wrong = qlip_command("train", "--resume", "--out", out, plain=True)
    assert f"run it as `qlip train generator --resume --out {out}`" in wrong.error
