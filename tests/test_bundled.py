"""What ships: the tokenizer that `qlip.load()` gives and its generator, the same on every backend."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qlip_core as qlip
from qlip_core import bsq
from qlip_core.data.emoji_names import CLASS_NAMES_100
from qlip_core.data.emoji_set import EmojiSet
from qlip_core.errors import CheckpointError
from qlip_core.hub import BUNDLED, find_model
from qlip_core.metrics import psnr

SHARD = Path(__file__).parent / "data" / "emoji-96.tar"


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """8 held-out emoji scenes, uint8 [96, 96, 3]."""
    found = []
    with tarfile.open(SHARD) as tar:
        for member in tar:
            if member.name.endswith(".png") and len(found) < 8:
                file = tar.extractfile(member)
                assert file is not None
                found.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
    return found


@pytest.fixture(scope="module")
def reference() -> qlip.Model:
    return qlip.load(backend="numpy")


def test_it_reconstructs_what_training_never_saw(
    reference: qlip.Model, pictures: list[np.ndarray]
) -> None:
    near = psnr(np.stack(pictures), reference.reconstruct(pictures))
    flat = np.stack([np.broadcast_to(p.mean((0, 1)), p.shape) for p in pictures])
    mean_colour = psnr(np.stack(pictures), flat.round().astype(np.uint8))
    assert near.mean() > 26 and near.mean() > mean_colour.mean() + 9


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_every_backend_gives_the_same_on_trained_weights(
    reference: qlip.Model, pictures: list[np.ndarray], backend: str
) -> None:
    model = qlip.load(backend=backend)
    u, theirs = reference.latents(pictures), model.latents(pictures)
    np.testing.assert_allclose(theirs, u, atol=1e-4)
    clear = np.abs(u) > 1e-5
    tokens = reference.encode(pictures)
    np.testing.assert_array_equal(model.encode(pictures).bits[clear], bsq.quantize(u)[clear])
    np.testing.assert_allclose(
        model.decode_pixels(tokens), reference.decode_pixels(tokens), atol=1e-4
    )
    texts = ["a cat", "a red apple on a blue background"]
    np.testing.assert_allclose(
        model.similarity(pictures, texts),
        reference.similarity(pictures, texts),
        rtol=1e-4,
        atol=1e-4,
    )


def test_every_bit_is_in_use(reference: qlip.Model, pictures: list[np.ndarray]) -> None:
    usage = reference.encode(pictures).bits.mean((0, 1))
    assert usage.shape == (28,) and usage.min() > 0.3 and usage.max() < 0.7


def test_it_says_what_it_is() -> None:
    checkpoint = qlip.open_checkpoint()
    assert checkpoint.license == "apache-2.0" and checkpoint.note and checkpoint.tokenizer
    assert sum(p.stat().st_size for p in BUNDLED.iterdir() if p.is_file()) < 20e6
    assert sum(p.stat().st_size for p in BUNDLED.rglob("*") if p.is_file()) < 45e6


def test_its_recipes_lie_beside_it_as_beside_any_exported_model() -> None:
    pytest.importorskip("torch")
    from qlip_torch.train.generator.recipe import GeneratorRecipe
    from qlip_torch.train.recipe import Recipe

    tokenizer = Recipe.from_file(BUNDLED / "recipe.toml")
    generator = GeneratorRecipe.from_file(BUNDLED / "generator" / "recipe.toml")
    assert (tokenizer.name, generator.name) == ("emoji-ship", "generator-emoji")
    assert tokenizer == Recipe.load("emoji-ship")
    # Compiled, over what is now the bundled tokenizer; how it draws was chosen afterwards.
    later = ["engine.compile=true", "model.sampling.cfg_scale=3.0"]
    assert generator == GeneratorRecipe.load("generator-emoji", later)


def test_it_knows_the_names_that_training_saw() -> None:
    emoji = EmojiSet(96, seed=1, split="held-out", plain=True, names=CLASS_NAMES_100)
    drawn = [emoji.sample(i)[0] for i in range(100)]
    found = qlip.load(backend="torch").classify(drawn, CLASS_NAMES_100, templates=("{}",)).argmax(1)
    assert (found == np.arange(100)).mean() > 0.95


def test_one_seed_is_one_picture_on_every_backend_and_heeds_its_prompt() -> None:
    prompts = ["a cat", "a red apple on a blue background"]
    model = qlip.load(backend="torch")
    tokens = model.generate_tokens(prompts, seed=0)
    # One at a time: what else is drawn does not matter.
    for backend, i in (("numpy", 0), ("mlx", 1)):
        alone = qlip.load(backend=backend).generate_tokens(prompts[i], seed=0)
        np.testing.assert_array_equal(alone.bits[0], tokens.bits[i])
    pictures = model.decode(tokens)
    # By its own classifier each is the nearest of a hundred names to what was asked for.
    found = model.similarity(pictures, CLASS_NAMES_100).argmax(1)
    assert [CLASS_NAMES_100[i] for i in found] == ["a cat", "a red apple"]
    apple = pictures[1].astype(int)
    corners = apple[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
    middle = apple[40:56, 40:56].mean((0, 1))
    assert corners[2] > corners[0] + 50 and middle[0] > middle[2] + 50


def test_it_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless something of that name exists here."""
    monkeypatch.chdir(tmp_path)
    assert find_model("bundled") == find_model(None) == BUNDLED
    for name in (None, "bundled"):
        with pytest.raises(CheckpointError, match="a revision is only for hub ids"):
            find_model(name, "main")
    (tmp_path / "bundled").mkdir()
    assert find_model("bundled") == Path("bundled")


def test_a_runs_report_says_what_the_model_does(reference: qlip.Model) -> None:
    torch = pytest.importorskip("torch")
    from qlip_torch.train.validation import validate_emoji

    lines = validate_emoji(BUNDLED, torch.device("cpu"), scenes=8, renderings=20)
    held_out = EmojiSet(96, split="held-out")
    scenes = np.stack([held_out.sample(i)[0] for i in range(8)])
    expected = psnr(scenes, reference.reconstruct(list(scenes))).mean()
    assert f"of 8 held-out scenes: PSNR {expected:.2f} dB" in lines[0] and "bit usage" in lines[0]
    assert "seen names in unseen renderings: 100.0% top-1 (chance 1.0%), 100.0% top-5" in lines[1]
    assert "unseen names (zero-shot)" in lines[2] and "top-5 (chance 5.0%)" in lines[2]
