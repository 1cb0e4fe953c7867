"""Evaluation of text to image: figures against hand-worked cases, prompts, judges, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configurations import CONFIGURATIONS, random_weights
from PIL import Image

import qlip_core as qlip
from qlip_cli.main import main
from qlip_core.data.captions import captions, full_caption
from qlip_core.data.emoji_names import CLASS_NAMES_100, glyph_by_name
from qlip_core.data.palette import PALETTE
from qlip_core.data.scenes import (
    Background,
    PlacedGlyph,
    Scene,
    held_out_combinations,
    is_held_out_combination,
)
from qlip_core.errors import (
    BackendError,
    CheckpointError,
    DataError,
    GenerationError,
    QlipError,
    TextError,
)
from qlip_core.evaluation import (
    Example,
    ExampleList,
    Prompt,
    PromptSet,
    Result,
    compare,
    emoji,
    evaluate_generation,
    read_prompts,
    real_pictures,
)
from qlip_core.evaluation.clip_score import QlipTowers, clip_scores, is_plain_clip
from qlip_core.evaluation.fid import Gaussian, frechet_distance
from qlip_core.evaluation.generation import TOP1, TOP5
from qlip_core.evaluation.grid import _broken, _cut, draw_sheet
from qlip_core.evaluation.learned import learned_metrics
from qlip_core.evaluation.prompts import captions_of
from qlip_core.evaluation.protocol import text_hash, weights_fingerprint
from qlip_core.generator.architecture import init_weights
from qlip_core.generator.checkpoint import open_generator, save_generator
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.sampling import Sampling
from qlip_core.preprocessing import Preprocessing

NAMES = ("a cat", "a dog", "in a can", "a can", "a cab", "a dot")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A small QLIP of 16 patches with a generator, both of random weights."""
    config = CONFIGURATIONS["eva"]
    ids = {"vocab_size": 520, "bos_token_id": 518, "eos_token_id": 519, "pad_token_id": 519}
    config = replace(
        config, text_config=replace(config.text_config, **ids, max_position_embeddings=24)
    )
    out = tmp_path_factory.mktemp("drawing") / "small"
    weights = random_weights(config, seed=1)
    qlip.save_checkpoint(out, config, weights, tokenizer_from=tokenizer_folder)
    ours = GeneratorConfig(
        32, 1, 2, group_size=7, prefix_length=24, sampling=Sampling(cfg_scale=2.0)
    ).fitted(config, qlip.open_checkpoint(out).fingerprint)
    drawing = {name: 4 * values for name, values in init_weights(ours).items()}
    save_generator(out / "generator", ours, drawing)
    return out


@pytest.fixture
def model(folder: Path) -> qlip.Model:
    return qlip.load(folder, backend="numpy")


def named(names: tuple[str, ...] = NAMES) -> PromptSet:
    return PromptSet("named", tuple(Prompt(f"{name} on red", name) for name in names))


class Corners:
    """A stand-in for Inception: two pixels, which a Fréchet distance takes as well as 2048 features."""

    protocol = "two pixels"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images[:, 0, :2, 0].reshape(len(images), 2) / 255


def noise(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(count)]


# -- scores ------------------------------------------------------------------------------------


def test_clip_scores_by_hand() -> None:
    images = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], np.float32)
    texts = np.array([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]], np.float32)
    # The last is opposite to its text: 0, not -1.
    np.testing.assert_allclose(clip_scores(images, texts), [0.6, 0.96, 0.0], rtol=1e-6)
    with pytest.raises(DataError, match="NaN"):
        clip_scores(images * np.nan, texts)


def test_scores_are_those_of_the_pictures(model: qlip.Model) -> None:
    prompts = named()
    result = evaluate_generation(
        model, prompts, n=2, seed=3, sampling=Sampling(top_k=9), batch_size=5
    )
    texts = [prompt.text for prompt in prompts.prompts]
    pictures = model.generate(texts, n=2, seed=3, top_k=9, cfg_scale=1.0)
    seen = model.embed_images(list(pictures))
    cosines = (seen * model.embed_texts(texts).repeat(2, 0)).sum(1)
    each = result.details["pictures"]
    np.testing.assert_allclose([e["CLIPScore"] for e in each], np.maximum(cosines, 0), atol=1e-6)
    assert result.scores["CLIPScore"] == pytest.approx(np.maximum(cosines, 0).mean(), abs=1e-6)

    guesses = (seen @ model.embed_labels(NAMES).T).argmax(1)
    assert [e["found"] for e in each] == [NAMES[i] for i in guesses]
    right = guesses == np.arange(6).repeat(2)
    assert result.scores[TOP1] == right.mean()
    assert [e["rank"] == 1 for e in each] == right.tolist()
    assert [e["prompt"] for e in each] == [text for text in texts for _ in range(2)]
    assert result.scores["chance"] == pytest.approx(1 / 6) and result.scores["gFID"] is None
    assert set(result.details["left_out"]) == {"gFID"}
    assert "flatters itself" in result.details["judged_by"]["CLIPScore"]


def test_prompt_accuracy_by_hand(model: qlip.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six classes along six axes: what a picture finds follows from its largest coordinate."""
    seen = np.eye(6, dtype=np.float32)
    seen[1] = [0.9, 0.5, 0, 0, 0, 0]  # second after "a cat"
    seen[2] = [5, 4, 0.1, 3, 2, 1]  # sixth
    seen[3] = 1  # all equal: a tie with five others counts as sixth
    seen[4] = [0, 1, 1, 1, 0.5, 1]  # fifth
    rows = iter(seen)
    monkeypatch.setattr(model, "embed_labels", lambda *_: np.eye(6, dtype=np.float32))
    monkeypatch.setattr(
        model, "embed_images", lambda images: np.stack([next(rows) for _ in images])
    )
    monkeypatch.setattr(model, "embed_texts", lambda texts: np.full((len(texts), 6), 0.5))
    result = evaluate_generation(model, named(), batch_size=4)
    assert [e["rank"] for e in result.details["pictures"]] == [1, 2, 6, 6, 5, 1]
    assert result.scores[TOP1] == 2 / 6 and result.scores[TOP5] == 4 / 6
    assert result.details["pictures"][1]["found"] == "a cat"
    assert result.scores["CLIPScore"] == pytest.approx(
        0.5 * (1 + 1.4 + 15.1 + 6 + 4.5 + 1) / 6, rel=1e-6
    )


def test_how_pictures_are_batched_changes_nothing(model: qlip.Model) -> None:
    one, other = (evaluate_generation(model, named(), batch_size=b, shown=4) for b in (1, 4))
    assert one.protocol == other.protocol
    for name, value in one.scores.items():
        assert value == pytest.approx(other.scores[name], abs=1e-6)
    assert one.grid is not None and other.grid is not None
    np.testing.assert_array_equal(one.grid, other.grid)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_backends_agree(folder: Path, model: qlip.Model, backend: str) -> None:
    expected = evaluate_generation(model, named(), seed=5)
    found = evaluate_generation(qlip.load(folder, backend=backend), named(), seed=5)
    assert found.scores["CLIPScore"] == pytest.approx(expected.scores["CLIPScore"], abs=2e-3)
    for ours, theirs in zip(found.details["pictures"], expected.details["pictures"]):
        assert ours["CLIPScore"] == pytest.approx(theirs["CLIPScore"], abs=2e-3)
        assert (ours["found"], ours["rank"]) == (theirs["found"], theirs["rank"])
    assert compare(found, expected)[1][0] == TOP1
    assert found.protocol.drawn_by == expected.protocol.drawn_by


def test_gfid_is_the_distance_to_real_pictures(model: qlip.Model) -> None:
    images = [*noise(5), b"not a picture"]
    examples = ExampleList("real", [Example(str(i), image) for i, image in enumerate(images)])
    heard: list[int] = []
    real = real_pictures(model, examples, Corners(), batch_size=2, progress=heard.append)
    assert (real.count, sum(heard), real.failed["counts"]) == (5, 5, {"broken image": 1})
    result = evaluate_generation(model, named(), real=real, progress=heard.append, batch_size=4)
    drawn = model.generate([f"{name} on red" for name in NAMES])
    sides = [Corners()(np.stack(images[:5])), Corners()(drawn)]  # type: ignore[arg-type]
    gaussians = [Gaussian(x.mean(0), np.cov(x, rowvar=False)) for x in sides]
    assert result.scores["gFID"] == pytest.approx(frechet_distance(*gaussians), rel=1e-6)
    assert heard[-2:] == [4, 2]
    assert result.failed == real.failed and result.details["left_out"] == {}
    assert result.protocol.metrics["gFID"] == (
        f"two pixels; real: 5 pictures, SHA-256 {real.reference}"
    )
    with pytest.raises(DataError, match="gFID needs 2 drawn pictures or more, got 1"):
        evaluate_generation(model, named().first(1), real=real)
    with pytest.raises(DataError, match="gFID needs 2 real pictures or more, got 1"):
        real_pictures(model, ExampleList.of_images(noise(1)), Corners())


def test_batches_are_the_tokens(model: qlip.Model) -> None:
    prompts = ["a cat", "a dog", "a cat"]
    whole = model.generate_tokens(prompts, seed=2, n=2, top_k=5)
    sampling = replace(model.generator_config.sampling, top_k=5)
    parts = list(model.generate_batches(prompts, sampling, seed=2, n=2, batch_size=4))
    assert [start for start, _ in parts] == [0, 4]
    assert qlip.VisualTokens.concatenate([tokens for _, tokens in parts]) == whole
    assert whole.names == ("a cat", "a cat", "a dog", "a dog", "a cat", "a cat")
    assert not np.array_equal(whole.packed[0], whole.packed[4])  # asked twice, drawn twice


# -- protocols ---------------------------------------------------------------------------------


def test_protocol_says_who_drew_and_who_judged(
    folder: Path, model: qlip.Model, tmp_path: Path
) -> None:
    result = evaluate_generation(model, named(), seed=4, n=2, templates=("{}", "a {}"))
    protocol = result.protocol
    assert (protocol.task, protocol.dataset, protocol.count) == ("text to image", "named", 12)
    assert protocol.model == weights_fingerprint(model)
    assert protocol.settings == {
        "seed": 4,
        "pictures_of_each_prompt": 2,
        "classes": 6,
        "classes_sha256": text_hash(NAMES),
        "templates": ["{}", "a {}"],
    }
    assert protocol.drawn_by == {
        "generator": open_generator(folder / "generator").fingerprint,
        "generator_name": str(folder / "generator"),
        "tokenizer": model.fingerprint,
        "conditioner": "qlip-text",
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "cfg_scale": 2.0,
        "cfg_schedule": "constant",
        "cfg_interval": [0.0, 1.0],
    }
    assert protocol.metrics == {
        "CLIPScore": "mean over pictures of max(cosine, 0), prompts as they are; QLIP's towers at 32 "
        f"px, weights {protocol.model}",
        "prompt accuracy": f"classification by QLIP's towers at 32 px, weights {protocol.model}",
    }
    file = tmp_path / "a.json"
    file.write_text(json.dumps(result.to_dict()))
    assert Result.load(file) == result


def test_what_compares(model: qlip.Model) -> None:
    prompts = named(NAMES[:3])
    result = evaluate_generation(model, prompts)
    # Other settings of the generator are what one compares; gFID may be there or not.
    real = real_pictures(model, ExampleList.of_images(noise(4)), Corners())
    cold = evaluate_generation(model, prompts, sampling=Sampling(temperature=0), real=real)
    assert ("gFID", None, cold.scores["gFID"]) in compare(result, cold)
    for other, why in (
        (evaluate_generation(model, prompts, seed=1), "settings.seed: 0 / 1"),
        (evaluate_generation(model, prompts.first(2)), "count: 3 / 2; reference: "),
        (evaluate_generation(model, prompts, templates=("a {}",)), r"settings\.templates"),
    ):
        with pytest.raises(QlipError, match=why):
            compare(result, other)
    fewer = real_pictures(model, ExampleList.of_images(noise(3)), Corners())
    with pytest.raises(QlipError, match=r"metrics\.gFID: "):
        compare(cold, evaluate_generation(model, prompts, real=fewer))


def test_another_judge_is_another_protocol(model: qlip.Model, official: Path) -> None:
    class Other:
        name, protocol = "elsewhere", "towers of straw"

        def embed_images(self, images: np.ndarray) -> np.ndarray:
            return np.tile([1.0, 0.0], (len(images), 1))

        def embed_texts(self, texts: list[str]) -> np.ndarray:
            return np.tile([0.8, 0.6], (len(texts), 1))

    own, other = (evaluate_generation(model, named(), towers=t) for t in (None, Other()))
    assert other.scores["CLIPScore"] == pytest.approx(0.8)
    assert other.scores[TOP1] == own.scores[TOP1]  # the classifier stays the model's own
    assert other.details["judged_by"]["CLIPScore"] == "elsewhere (towers of straw)"
    with pytest.raises(QlipError, match=r"metrics\.CLIPScore"):
        compare(own, other)
    # The model's own weights under another name are still its own.
    again = evaluate_generation(model, named(), towers=QlipTowers(model))
    assert again.details["judged_by"] == own.details["judged_by"] and again == own
    weights = weights_fingerprint(qlip.load(official, backend="numpy"))
    assert QlipTowers(qlip.load(official, backend="numpy")).protocol.endswith(weights)


def test_generators_are_told_apart(folder: Path, tmp_path: Path) -> None:
    found = open_generator(folder / "generator")
    weights = found.tensors()
    sampled = replace(found.config, sampling=Sampling(top_k=3))
    same = open_generator(save_generator(tmp_path / "same", sampled, weights))
    assert same.fingerprint == found.fingerprint
    name = sorted(weights)[-1]
    weights[name] = weights[name] + np.float32(1e-3)
    other = open_generator(save_generator(tmp_path / "other", found.config, weights))
    assert other.fingerprint != found.fingerprint


def test_bad_input_of_the_library(model: qlip.Model, official: Path) -> None:
    with pytest.raises(GenerationError, match="has no generator"):
        evaluate_generation(qlip.load(official, backend="numpy"), named())
    with pytest.raises(GenerationError, match="top_k"):
        evaluate_generation(model, named(), sampling=Sampling(top_k=129))
    with pytest.raises(GenerationError, match=r"n \(=0\)"):
        evaluate_generation(model, named(), n=0)


# -- prompts -----------------------------------------------------------------------------------


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat on red\ta cat\n\n a dog \t a dog \na cat\ta cat\n")
    found = read_prompts(file)
    assert found.prompts == (
        Prompt("a cat on red", "a cat"),
        Prompt("a dog", "a dog"),
        Prompt("a cat", "a cat"),
    )
    assert found.classes == ("a cat", "a dog") and found.names_things
    assert read_prompts(file, NAMES).classes == NAMES
    assert found.first(2).prompts == found.prompts[:2] and found.first(None) is found
    assert found.first(1).classes == found.classes
    file.write_text("a cat\n")
    assert read_prompts(file).classes == () and not read_prompts(file).names_things


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        ("", (), "no prompt in it"),
        ("\n \n", (), "no prompt in it"),
        ("a cat\ta cat\n\ta dog\n", (), r"line 2: expected prompt or prompt<TAB>name"),
        ("a cat\t\n", (), "line 1: expected prompt"),
        ("a\tb\tc\n", (), "line 1: expected prompt"),
        ("a cat\ta cat\na dog\n", (), r"prompt 2 \('a dog'\) names no thing, the first names one"),
        ("a dog\na cat\ta cat\n", (), r"prompt 2 \('a cat'\) names a thing, the first names none"),
        ("a cat\ta cat\n", (), "1 names to choose among; need 2 or more"),
        ("a cat\ta cat\n", ("a cat", "a cat"), "all different"),
        ("a cat\ta cat\n", ("a dog", "a cow"), "'a cat' is not among the 2 names"),
        ("a cat\n", ("a dog", "a cow"), "its prompts name nothing"),
    ],
)
def test_bad_prompt_files(
    tmp_path: Path, text: str, classes: tuple[str, ...], message: str
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(file, classes)


def test_prompt_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: cannot be read \(no such file"):
        read_prompts(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"\xe4")
    with pytest.raises(DataError, match="not a text file in UTF-8"):
        read_prompts(tmp_path / "latin")


def test_captions_are_prompts() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    said = captions_of(ExampleList("x", [Example("0", image, "a cat"), Example("1", image, "b")]))
    assert (said.name, said.prompts) == ("captions of x", (Prompt("a cat"), Prompt("b")))
    with pytest.raises(DataError, match=r"x: 1 has no caption; give prompts in a file"):
        captions_of(ExampleList("x", [Example("0", image, "a cat"), Example("1", image)]))


def test_emoji_prompts_say_what_was_trained() -> None:
    seen, bare, other = emoji.seen_prompts(), emoji.seen_name_prompts(), emoji.combination_prompts()
    assert [prompt.name for prompt in seen.prompts] == list(CLASS_NAMES_100)
    assert [prompt.text for prompt in bare.prompts] == list(CLASS_NAMES_100)
    assert len(other.prompts) == len({prompt.name for prompt in other.prompts}) == 90
    without = set(CLASS_NAMES_100) - {prompt.name for prompt in other.prompts}
    for name in without:
        glyph = glyph_by_name()[name]
        held = {c for c in PALETTE if is_held_out_combination(glyph.code, c, "centre")}
        assert held <= set(glyph.clashes)
    colours = set()
    for prompts, held_out in ((seen, 0), (other, 1)):
        assert prompts.classes == CLASS_NAMES_100
        for prompt in prompts.prompts:
            glyph = glyph_by_name()[prompt.name]
            _, words = prompt.text.removesuffix(" background").split(prompt.name + " on ")
            colour = words.removeprefix("an ").removeprefix("a ")
            assert colour in PALETTE and colour not in glyph.clashes
            # A picture that the prompt asks for, judged by what keeps pictures out of training.
            ground = Background("plain", (colour,), ((0, 0, 0),))
            scene = Scene((PlacedGlyph(glyph.code, "centre", 0.5, 0.5, 0.7, 0.0),), ground, 0)
            assert held_out_combinations(scene) == held_out
            assert prompt.text in captions(scene) and prompt.text != full_caption(scene)
            colours.add(colour)
    assert len(colours) > 15
    assert emoji.seen_prompts() == seen
    titles = [each.name for each in (seen, bare, other)]
    assert ["never trained" in title for title in titles] == [False, False, True]
    assert ["100 seen names" in title for title in titles] == [True, True, False]
    assert "seed 0" in seen.name and "90" in other.name


def test_captions_break_between_words() -> None:
    def fits(text: str) -> bool:
        return len(text) <= 6

    assert _broken("a cat on  a\nredder mat", fits) == ["a cat", "on a", "redder", "mat"]
    assert _broken("unbreakable x", fits) == ["unbre…", "x"]
    assert [_cut(text, fits) for text in ("a b", "on a red", "on  a x")] == [
        "a b",
        "on a…",
        "on  a…",
    ]
    assert _cut("anything", lambda text: False) == ""
    assert _broken("", fits) == [""]


def test_a_sheet_holds_pictures_in_order() -> None:
    pictures = [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(5)]
    sheet = draw_sheet("title", pictures, ["a\nb", "x" * 500, "", "ü", "猫"], 2, scale=4)
    assert sheet.shape == (16 + 3 * (32 + 32 + 4), 2 * (32 + 4), 3)
    for i in range(5):
        top, left = 16 + i // 2 * 68, i % 2 * 36
        assert (sheet[top : top + 32, left : left + 32] == 10 * i).all()
    assert (sheet[16:, 32:36] == 255).all()  # a long caption stays under its picture
    plain = draw_sheet("title", pictures, ["a b", "x" * 500, "", "u", "?"], 2, scale=4)
    np.testing.assert_array_equal(sheet, plain)  # no boxes for what the font does not have
    few = draw_sheet("x" * 500, pictures[:1], ["a b c d e f g"], 2, scale=4)
    assert few.shape == (16 + 68, 36, 3) and (few[:, 34:] == 255)[:16].all()
    # An ellipsis at the end of the second line marks a third.
    cut = draw_sheet("x", pictures[:1], ["aaaa bbbb"], 2, scale=4)
    more = draw_sheet("x", pictures[:1], ["aaaa bbbb cccc"], 2, scale=4)
    assert (cut[:-20] == more[:-20]).all() and (cut != more).any()


# -- a CLIP that is no QLIP --------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_clip(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    import shutil

    import torch
    from transformers import CLIPConfig, CLIPModel

    out = tmp_path_factory.mktemp("clip") / "clip"
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "projection_dim": 12}
    text = {"vocab_size": 520, "bos_token_id": 518, "eos_token_id": 519, "pad_token_id": 519}
    text |= {"max_position_embeddings": 12}
    vision = {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=12)
    CLIPModel(config).save_pretrained(out)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, out)
    return out


def test_plain_clip_is_transformers(plain_clip: Path, folder: Path, tokenizer_folder: Path) -> None:
    import torch
    from transformers import CLIPModel

    from qlip_core.files import sha256_of
    from qlip_torch.clip import clip_towers

    assert is_plain_clip(plain_clip) and not is_plain_clip(folder)
    towers = clip_towers(str(plain_clip))
    sha = sha256_of([plain_clip / "model.safetensors"])
    assert towers.protocol == f"CLIP at 16 px, weights {sha}" and towers.name == str(plain_clip)
    model = CLIPModel.from_pretrained(plain_clip).eval()
    images, texts = np.stack(noise(3)), ["a cat", "in a can", "dog " * 30]
    preprocessing = Preprocessing(16)
    pixels = torch.from_numpy(np.stack([preprocessing(image) for image in images]))
    # "cat" is token 256 * 2 + 1: after the bytes, their ends of words and "ca".
    ids = torch.tensor([[518, ord("a") - 33 + 256, 513, 519] + [519] * 8])
    with torch.inference_mode():
        seen: Any = model(pixel_values=pixels, input_ids=ids)
    np.testing.assert_allclose(towers.embed_images(images), seen.image_embeds, atol=1e-6)
    said = towers.embed_texts(texts)
    np.testing.assert_allclose(said[:1], seen.text_embeds, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(said, axis=1), 1, atol=1e-6)


def test_a_damaged_clip_is_refused(plain_clip: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    from qlip_torch.clip import clip_towers

    bad = tmp_path / "bad"
    shutil.copytree(plain_clip, bad)
    weights = load_file(bad / "model.safetensors")
    dropped = {n: w for n, w in weights.items() if n != "visual_projection.weight"}
    save_file(dropped, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing: visual_projection\.weight"):
        clip_towers(str(bad))
    weights["visual_projection.weight"][0, 0] = np.nan
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        clip_towers(str(bad))
    (bad / "model.safetensors").rename(bad / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors in it"):
        clip_towers(str(bad))
    shutil.copy(plain_clip / "model.safetensors", bad)
    (bad / "merges.txt").unlink()
    with pytest.raises(TextError, match="no tokenizer files"):
        clip_towers(str(bad))


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["eval", "generate", str(folder), "--backend", "numpy"]


def test_eval_generate_of_a_file(
    command: list[str], model: qlip.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = named(NAMES[:3])
    lines = [f"{prompt.text}\t{prompt.name}" for prompt in prompts.prompts]
    Path("prompts.txt").write_text("\n".join(lines))
    given = ["--prompts", "prompts.txt", "-n", "2", "--seed", "3", "--top-k", "9"]
    outputs = ["--out", "results", "--grid", "results/drawn.png"]  # a folder that is not there yet
    assert main([*command, *given, *outputs, "--json"]) == 0
    captured = capsys.readouterr()
    (found,) = json.loads(captured.out)["results"]
    assert (found["name"], captured.err) == ("generation", "")
    sampling = replace(model.generator_config.sampling, top_k=9)
    expected = evaluate_generation(model, prompts, n=2, seed=3, sampling=sampling)
    assert found["scores"] == expected.scores and found["details"] == expected.details
    assert Result.load("results/generation.json").scores == expected.scores

    with Image.open("results/drawn.png") as sheet:
        assert sheet.size == (2 * (128 + 4), 16 + 3 * (128 + 32 + 4))
        first = np.asarray(sheet)[16 : 16 + 128 : 4, :128:4]
    [picture] = model.generate([prompts.prompts[0].text], seed=3, top_k=9)
    np.testing.assert_array_equal(first, picture)
    assert main(["info", "results/drawn.png", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompts"] == [line.split("\t")[0] for line in lines for _ in range(2)]
    assert (
        record["generator"] == record["model"] == Path(command[2]).name
    )  # as in a picture that `qlip generate` drew
    assert record["generator_fingerprint"] == expected.protocol.drawn_by["generator"]

    for option, path in zip(outputs[::2], ("results/generation.json", "results/drawn.png")):
        assert main([*command, *given, option, outputs[outputs.index(option) + 1]]) == 2
        assert f"{path}: already exists" in capsys.readouterr().err
    assert main([*command, *given, *outputs, "--force"]) == 0
    text = capsys.readouterr().out
    assert "text to image: prompts.txt" in text and "results/drawn.png\n" in text
    assert "a model that grades itself flatters itself" in text
    assert "gFID: no weights of FID's Inception-V3 were given" in text
    assert "conditioner qlip-text, temperature 1.0, top_k 9" in text and "seed 3, of each" in text


def test_eval_generate_of_emoji(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--limit", "3", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["name"] for result in results] == [
        "generation-seen",
        "generation-seen-names",
        "generation-combinations",
    ]
    for result in results:
        assert result["protocol"]["count"] == 3 and result["protocol"]["settings"]["classes"] == 100
        assert result["scores"]["chance"] == 0.01
    assert "never trained" in results[2]["protocol"]["dataset"]


def test_eval_generate_of_captioned_pictures(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their captions are drawn, and gFID is against them."""
    monkeypatch.setattr("qlip_torch.evaluation.inception_features", lambda *_: Corners())
    Path("data").mkdir()
    for i, image in enumerate(noise(3)):
        Image.fromarray(image).save(f"data/{i}.png")
        Path(f"data/{i}.txt").write_text(NAMES[i])
    assert main([*command, "data", "--inception", "random", "--limit", "2", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert [each["prompt"] for each in result["details"]["pictures"]] == list(NAMES[:2])
    assert result["scores"]["gFID"] > 0 and result["scores"][TOP1] is None
    assert "two pixels; real: 2 pictures" in result["protocol"]["metrics"]["gFID"]
    assert set(result["details"]["left_out"]) == {"prompt accuracy"}
    Path("data/1.png").write_bytes(b"no picture")
    assert main([*command, "data", "--inception", "random"]) == 1
    captured = capsys.readouterr()
    assert "1.png" in captured.err and "1 examples could not be used" in captured.err


def test_eval_generate_by_another_judge(
    command: list[str], folder: Path, plain_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text("a cat\na dog\n")
    command = [*command, "--prompts", "prompts.txt", "--json"]
    judged = {}
    for name, clip in (("own", folder), ("plain", plain_clip)):
        assert main([*command, "--clip", str(clip)]) == 0
        (result,) = json.loads(capsys.readouterr().out)["results"]
        judged[name] = result["details"]["judged_by"]["CLIPScore"]
        assert -1e-9 <= result["scores"]["CLIPScore"] <= 1
    assert "flatters itself" in judged["own"]
    assert judged["plain"].startswith(f"{plain_clip} (CLIP at 16 px, weights ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "absent.txt"], "absent.txt: cannot be read (no such file"),
        (["--prompts", "empty.txt"], "empty.txt: no prompt in it"),
        (["--prompts", "one.txt"], "1 names to choose among; need 2 or more"),
        (["--prompts", "one.txt", "--names", "empty.txt"], "empty.txt: no names in it"),
        (["--names", "one.txt"], "--names goes with --prompts"),
        (["--generator", "absent"], "absent: no such folder"),
        (["--clip", "absent"], "absent: no such folder or file"),
        (["--inception", "absent"], "Inception weights: absent: no such folder or file"),
        (["--seed", "-1"], "seed (=-1) must be 0 to 2^64 - 1"),
        (["--top-k", "129"], "top_k (=129) must be 0 (all) to 128"),
        (["--grid", "there.png"], "there.png: already exists"),
        (["--grid", "there/"], "there/sheet-0.png: cannot be written, there does not exist"),
        (["--grid", "a.gif"], "a.gif: pictures are written as one of"),
        (["--out", "there.png"], "there.png: exists and is not a folder"),
        (["absent"], "absent"),
        (["absent", "--out", "made/here"], "absent"),
        (
            ["--out", "one.txt/results"],
            "one.txt/results: cannot be written, one.txt is not a folder",
        ),
    ],
)
def test_bad_input_is_one_line(
    command: list[str],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("empty.txt").write_text("\n")
    Path("one.txt").write_text("a cat\ta cat\n")
    Path("there.png").write_bytes(b"")
    assert main([*command, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and message in captured.err
    assert not Path("made").exists()


def test_what_needs_torch_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlip_core.evaluation.learned.is_installed", lambda name: False)
    with pytest.raises(BackendError, match=r"^FID needs torch: pip install 'qlip\[torch\]'$"):
        learned_metrics("FID needs torch")


def test_a_model_without_a_generator(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "generate", str(official), "--backend", "numpy"]) == 2
    assert "this model has no generator" in capsys.readouterr().err
