"""The public API on the numpy backend: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from configurations import CONFIGURATIONS, random_weights
from PIL import Image

import qlip_core as qlip
from qlip_core import Model, VisualTokens, backends, bsq
from qlip_core.errors import BackendError, ImageError, QlipError, TextError, TokenFileError
from qlip_core.metrics import psnr, ssim


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return qlip.load(tiny_model, backend="numpy")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(7):
        low = Image.fromarray(rng.integers(0, 256, (5, 4 + i, 3), dtype=np.uint8))
        paths.append(folder / f"{i}.png")
        low.resize((90, 100 + i)).save(paths[-1])
    return paths


def test_official_numbers_through_the_api(official: Path, expected: dict) -> None:
    model = qlip.load(official, backend="numpy")
    pixels = expected["pixel_values"]
    tokens = model.encode(pixels)
    np.testing.assert_array_equal(tokens.groups(14), expected["group_indices"])
    np.testing.assert_allclose(model.decode_pixels(tokens), expected["recon"], atol=1e-4)
    np.testing.assert_allclose(
        model.similarity(pixels, expected["input_ids"]), expected["logits_per_image"], atol=1e-4
    )
    np.testing.assert_allclose(model.hidden_states(pixels), expected["hidden_m2"], atol=1e-4)
    np.testing.assert_allclose(model.latents(pixels), expected["u"], atol=1e-4)


def test_a_session_shows_what_it_holds(model: Model, pictures: list[Path]) -> None:
    folder = str(model.checkpoint.folder)
    assert repr(model) == f"Model({folder!r}, numpy, cpu, float32)"
    assert repr(model.encode(pictures)) == "VisualTokens(images=7, grid=(8, 8), length=28)"


def test_every_kind_of_image_gives_the_same_tokens(model: Model, pictures: list[Path]) -> None:
    tokens = model.encode(pictures)
    assert tokens.names == tuple(map(str, pictures)) and tokens.grid == (8, 8)
    assert tokens.model == model.fingerprint
    as_pil = [Image.open(p) for p in pictures]
    as_arrays = [np.asarray(i.convert("RGB")) for i in as_pil]
    assert model.encode(as_pil) == model.encode(as_arrays) == tokens
    assert model.encode([p.read_bytes() for p in pictures]) == tokens
    assert model.encode(bytearray(pictures[2].read_bytes())) == tokens[2]
    assert model.encode(model.preprocess(pictures)) == tokens
    assert model.encode(str(pictures[2])) == tokens[2]
    assert len(model.encode([])) == 0


def test_batches_do_not_change_the_result(model: Model, pictures: list[Path]) -> None:
    tokens = model.encode(pictures)
    for batch_size in (1, 2, 3, 100):
        assert model.encode(pictures, batch_size=batch_size) == tokens
        np.testing.assert_allclose(
            model.decode_pixels(tokens, batch_size=batch_size),
            model.decode_pixels(tokens),
            atol=1e-5,
        )
    with pytest.raises(ValueError, match="batch_size"):
        model.encode(pictures, batch_size=0)


def test_batches_of_no_images_are_refused(model: Model, pictures: list[Path]) -> None:
    tokens = model.encode(pictures)
    for size in (0, -1):
        for call in (
            lambda: model.encode(pictures, batch_size=size),  # noqa: B023
            lambda: model.preprocess(pictures, batch_size=size),  # noqa: B023
            lambda: model.decode(tokens, batch_size=size),  # noqa: B023
            lambda: model.decode_pixels(tokens, batch_size=size),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="must be at least 1"):
                call()
    for wrong in (1.5, True, "2", None):
        with pytest.raises(ValueError, match=r"batch_size \(=.*\) must be a whole number"):
            model.decode(tokens, batch_size=wrong)  # type: ignore[arg-type]
    assert len(model.decode(tokens, batch_size=np.int64(2))) == len(tokens)  # type: ignore[arg-type]


def test_decoding_is_the_decoder_in_bytes(model: Model, pictures: list[Path]) -> None:
    tokens = model.encode(pictures)
    images = model.decode(tokens)
    assert images.dtype == np.uint8 and images.shape == (7, 64, 64, 3)
    processing = model.preprocessing
    pixels = model.decode_pixels(tokens).transpose(0, 2, 3, 1)
    levels = (pixels * processing.std + processing.mean).clip(0, 1) * 255
    assert np.abs(images - levels).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(model.reconstruct(pictures), images)


def test_tokens_of_another_tokenizer_are_refused(model: Model, official: Path) -> None:
    other = qlip.load(official, backend="numpy")
    tokens = other.encode(np.zeros((1, 3, 64, 64), np.float32))
    with pytest.raises(TokenFileError, match="made by another tokenizer"):
        model.decode(tokens)
    assert model.decode(tokens, any_model=True).shape == (1, 64, 64, 3)
    in_memory = VisualTokens.from_bits(tokens.bits, (8, 8))
    assert model.decode(in_memory).shape == (1, 64, 64, 3)
    for wrong in (
        VisualTokens.from_bits(tokens.bits[:, :, :14], (8, 8)),
        VisualTokens.from_bits(tokens.bits, (4, 16)),
    ):
        with pytest.raises(TokenFileError, match="do not fit this model: 28 bits on 8x8"):
            model.decode(wrong)


def test_one_bad_image_is_named_or_handed_over(
    model: Model, pictures: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("text")
    mixed = [*pictures[:3], bad, *pictures[3:]]
    with pytest.raises(ImageError, match=r"bad.png: not an image"):
        model.encode(mixed, batch_size=2)
    errors: list[tuple[int, str]] = []
    seen = []
    for positions, _ in model.encode_batches(
        mixed, batch_size=2, on_error=lambda i, e: errors.append((i, str(e)))
    ):
        seen += positions
    assert seen == [0, 1, 2, 4, 5, 6, 7]
    assert errors == [(3, f"{bad}: not an image")]


def test_embeddings_and_probabilities(model: Model, pictures: list[Path]) -> None:
    image, text = model.embed_images(pictures), model.embed_texts(["a cat", "a dog", "pizza"])
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-6)
    logits = model.similarity(pictures, ["a cat", "a dog", "pizza"])
    np.testing.assert_allclose(logits, np.exp(2.6592) * image @ text.T, rtol=1e-4)
    odds = model.classify(pictures, ["a cat", "a dog", "pizza"])
    assert odds.shape == (7, 3) and odds.dtype == np.float32
    np.testing.assert_allclose(odds.sum(1), 1, atol=1e-6)
    assert np.abs(text[0] - text[1]).max() > 0.01  # different texts are different vectors
    np.testing.assert_allclose(
        np.log(odds[:, 0] / odds[:, 1]), logits[:, 0] - logits[:, 1], atol=1e-3
    )
    # Several templates: the mean of the unit embeddings, brought to unit length.
    two = model.embed_labels(["cat"], ["a {}", "the {}"])
    mean = model.embed_texts(["a cat", "the cat"]).mean(0)
    np.testing.assert_allclose(two[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_texts_are_cut_to_batches(
    model: Model, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a cat", "a dog", "pizza", "in a can", "a cat"]
    whole, ids = model.similarity(pictures[:1], texts), model.tokenize(texts)
    sizes: list[int] = []
    embed, tokenizer = model.network.embed_texts, model.checkpoint.tokenizer
    assert tokenizer is not None

    def counted(rows):
        sizes.append(len(rows))
        return embed(rows) if isinstance(rows, np.ndarray) else tokenizer(rows)

    monkeypatch.setattr(model.network, "embed_texts", counted)
    monkeypatch.setattr(model.checkpoint, "tokenizer", counted)
    assert (model.tokenize(texts, batch_size=2) == ids).all() and sizes == [2, 2, 1]
    assert model.tokenize([]).shape == (0, ids.shape[1])
    np.testing.assert_allclose(
        model.similarity(pictures[:1], texts, batch_size=1), whole, atol=1e-4
    )
    model.classify(pictures[:1], texts[:3], templates=["{}", "a {}"], batch_size=1)
    assert max(sizes) == 4  # texts are short: four for each image


def test_texts_that_do_not_fit(model: Model, official: Path) -> None:
    with pytest.raises(TextError, match="no tokenizer files"):
        qlip.load(official, backend="numpy").embed_texts("a cat")
    with pytest.raises(TextError, match="template"):
        model.embed_labels(["cat"], ["a photo"])
    for labels, templates in ([], ["{}"]), ("cat", ["{}"]), (["cat"], []), (["cat"], "a {}"):
        with pytest.raises(TextError, match="must be a non-empty list of strings"):
            model.embed_labels(labels, templates)
    with pytest.raises(TextError, match="run from 520"):
        model.embed_texts(np.array([[520]]))


def test_what_is_no_image_and_no_tokens(model: Model, pictures: list[Path]) -> None:
    with pictures[0].open("rb") as file:
        for given, name in ((file, "BufferedReader"), ([None], "NoneType"), ([3], "int")):
            message = rf"expected a path, the bytes of a file, .*, got {name}"
            with pytest.raises(ImageError, match=message):
                model.encode(given)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"expected uint8 \[H, W, 3\], got uint8 \[100, 150\]"):
        model.encode(np.zeros((100, 150), np.uint8))
    for decode in (model.decode, model.decode_pixels):
        for given in ("x.qlip", np.zeros((1, 64, 28), np.uint8)):
            with pytest.raises(TokenFileError, match=r"expected VisualTokens, got (str|ndarray)"):
                decode(given)  # type: ignore[arg-type]


def test_pixels_that_do_not_fit(model: Model) -> None:
    with pytest.raises(QlipError, match=r"expected preprocessed float32 \[B, 3, 64, 64\]"):
        model.encode(np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(QlipError, match="NaN"):
        model.encode(np.full((1, 3, 64, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match="layer 3: the encoder has states -3 to 2"):
        model.hidden_states(np.zeros((1, 3, 64, 64), np.float32), 3)


def test_a_checkpoint_without_quantizer(tmp_path: Path) -> None:
    config = next(c for c in CONFIGURATIONS.values() if not c.quantizes)
    folder = qlip.save_checkpoint(tmp_path / "none", config, random_weights(config, 0))
    model = qlip.load(folder, backend="numpy")
    pixels = np.zeros((2, 3, config.image_size, config.image_size), np.float32)
    assert model.latents(pixels).shape == (2, config.num_patches, config.code_dim)
    assert model.reconstruct(pixels).shape == (2, config.image_size, config.image_size, 3)
    with pytest.raises(QlipError, match='quantizer "none", so its images have no bits'):
        model.encode(pixels)


def test_parts_are_read_when_needed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    part = qlip.Checkpoint.part

    def spy(self: qlip.Checkpoint, name: str) -> dict:
        read.append(name)
        return part(self, name)

    monkeypatch.setattr(qlip.Checkpoint, "part", spy)
    model = qlip.load(tiny_model, backend="numpy")
    assert read == []
    tokens = model.encode(np.zeros((1, 3, 64, 64), np.float32))
    assert sorted(read) == ["down", "encoder"]
    model.decode(tokens)
    assert sorted(read) == ["decoder", "down", "encoder", "up"]
    model.embed_texts("cat")
    assert sorted(read) == ["decoder", "down", "encoder", "text", "up"]


def test_backends_and_devices_that_are_not_there(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match=r'no backend "jax"; there are: auto, mlx, numpy, torch'):
        qlip.load(tiny_model, backend="jax")
    with pytest.raises(BackendError, match='has no device "cuda" here; it has: cpu'):
        qlip.load(tiny_model, backend="numpy", device="cuda")
    with pytest.raises(BackendError, match='has no dtype "int3"; it has: float32'):
        qlip.load(tiny_model, backend="numpy", dtype="int3")
    monkeypatch.setattr(backends, "is_installed", lambda name: name == "numpy")
    with pytest.raises(
        BackendError, match=r"mlx is not installed: run `pip install 'qlip\[mlx\]'`"
    ):
        qlip.load(tiny_model, backend="mlx")
    assert qlip.choose_backend() == "numpy"


@pytest.mark.parametrize(
    ("system", "machine", "installed", "chosen"),
    [
        ("Darwin", "arm64", {"mlx", "torch"}, "mlx"),
        ("Darwin", "arm64", {"torch"}, "torch"),
        ("Darwin", "x86_64", {"mlx", "torch"}, "torch"),
        ("Linux", "x86_64", {"mlx", "torch"}, "torch"),
        ("Linux", "x86_64", {"mlx"}, "mlx"),
        ("Linux", "x86_64", set(), "numpy"),
    ],
)
def test_what_auto_picks(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, installed: set, chosen: str
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(backends, "is_installed", lambda name: name in installed)
    assert qlip.choose_backend() == chosen


def test_importing_the_core_imports_no_framework() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'mlx', 'mlx.core', 'transformers', 'typer', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"  # importing it now fails
        "import qlip_core, qlip_core.reference\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_psnr_and_ssim() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 32, 24, 3), dtype=np.uint8)
    assert np.isinf(psnr(a, a)).all() and ssim(a, a) == pytest.approx(1)
    b = np.where(a > 127, a - 10, a + 10).astype(np.uint8)
    assert psnr(a, b) == pytest.approx(10 * np.log10(255**2 / 100))
    noise = rng.integers(0, 256, a.shape, dtype=np.uint8)
    assert np.abs(ssim(a, noise)).max() < 0.1
    # Constant images: only the luminance term is left, (2xy + c1) / (x^2 + y^2 + c1).
    x, y, c1 = 100.0, 120.0, (0.01 * 255) ** 2
    flat = [np.full((1, 16, 16, 3), v, np.uint8) for v in (x, y)]
    assert ssim(*flat)[0] == pytest.approx((2 * x * y + c1) / (x**2 + y**2 + c1))
    with pytest.raises(ValueError, match="two uint8"):
        psnr(a, a[:1])


def test_codes_are_corners_of_the_unit_sphere(model: Model, pictures: list[Path]) -> None:
    u = model.latents(pictures)
    codes = bsq.bits_to_codes(model.encode(pictures).bits)
    np.testing.assert_allclose(np.linalg.norm(u, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(codes, axis=-1), 1, atol=1e-6)
    assert ((u > 0) == (codes > 0)).all()


def test_a_config_may_be_changed_and_written(tiny_model: Path, tmp_path: Path) -> None:
    config = qlip.open_checkpoint(tiny_model).config
    deeper = replace(config, text_config=replace(config.text_config, num_hidden_layers=3))
    folder = qlip.save_checkpoint(tmp_path / "deeper", deeper, random_weights(deeper, 0))
    assert qlip.open_checkpoint(folder).config == deeper
