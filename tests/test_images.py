"""Images as a viewer shows them, preprocessing as CLIPImageProcessor does it, and files that are wrong."""

from __future__ import annotations

import io
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qlip_core import preprocessing
from qlip_core.errors import ConfigError, ImageError
from qlip_core.images import find_images, open_image
from qlip_core.loading import pixel_batches
from qlip_core.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    resize_and_crop,
    resized_size,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def colour(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    pixel = image.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return tuple(int(v) for v in pixel)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_transparency_is_over_white() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert colour(open_image(saved(half, "PNG"))) == (255, 127, 127)
    grey = Image.new("LA", (4, 4), (0, 128))
    for mode in ("LA", "La"):  # La: multiplied by alpha already
        assert colour(open_image(grey.convert(mode))) == (127, 127, 127)
    assert colour(open_image(saved(Image.new("LA", (4, 4), (0, 0)), "PNG"))) == WHITE
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 255, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    image = open_image(saved(palette, "PNG", transparency=0))
    assert colour(image) == WHITE and colour(image, 1, 1) == RED
    assert colour(open_image(saved(palette, "PNG"))) == (0, 255, 0)
    keyed = Image.new("RGB", (4, 4), RED)
    assert colour(open_image(saved(keyed, "PNG", transparency=RED))) == WHITE


def test_deep_and_grey_images_keep_their_brightness() -> None:
    ramp = (np.arange(256, dtype=np.uint32) * 257).astype(np.uint16)[None].repeat(2, 0)
    image = np.asarray(open_image(saved(Image.fromarray(ramp), "PNG")))
    np.testing.assert_array_equal(image[0, :, 0], np.arange(256))
    # A dark 16-bit picture stays dark: the scale does not follow its content.
    dark = open_image(saved(Image.fromarray(np.full((2, 2), 200, np.uint16)), "PNG"))
    assert colour(dark) == (0, 0, 0)
    assert colour(open_image(saved(Image.new("L", (2, 2), 77), "PNG"))) == (77, 77, 77)
    assert colour(open_image(saved(Image.new("1", (2, 2), 1), "PNG"))) == WHITE


def test_cmyk_animation_and_rotation() -> None:
    cmyk = open_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.array(colour(cmyk)) - RED).max() <= 3
    frames = [Image.new("P", (4, 4), 0) for _ in range(2)]
    for frame, rgb in zip(frames, (RED, (0, 0, 255))):
        frame.putpalette(rgb)
    gif = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colour(open_image(gif)) == RED
    wide = Image.new("RGB", (4, 2), "black")
    wide.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    upright = open_image(saved(wide, "PNG", exif=exif))
    assert upright.size == (2, 4) and colour(upright, 1, 0) == RED


def test_arrays_and_pil_images_are_taken_as_they_are() -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for image in (array, Image.fromarray(array)):
        np.testing.assert_array_equal(np.asarray(open_image(image)), array)
    for wrong in (array.astype(np.float32), array[..., :1], array[None], array[:0]):
        with pytest.raises(ImageError, match=r"expected uint8 \[H, W, 3\]"):
            open_image(wrong)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg, png = (saved(Image.fromarray(noise), kind) for kind in ("JPEG", "PNG"))
    cases = {
        "text.png": (b"hello, I am text", "not an image"),
        "empty.png": (b"", "empty file"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated or damaged"),
        "cut.png": (png[: len(png) // 2], "truncated or damaged"),
        "header.png": (png[:20], r"not an image|truncated or damaged"),
        "flipped.png": (png[:200] + bytes(50) + png[250:], "truncated or damaged"),
        "bomb.png": (bomb(), "over 178,956,970 pixels"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=message) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)


def test_pil_images_that_cannot_be_taken(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), "JPEG")
    with pytest.raises(ImageError, match=r"PIL image: truncated or damaged"):
        open_image(Image.open(io.BytesIO(data[: len(data) // 2])))
    with pytest.raises(ImageError, match="an image of 0x5 pixels"):
        open_image(Image.new("RGB", (0, 5)), "none")
    closed = Image.open(io.BytesIO(data))
    closed.close()
    with pytest.raises(ImageError, match="PIL image"):
        open_image(closed)


def test_one_image_several_times_is_read_once(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    path = tmp_path / "big.png"
    Image.fromarray(noise).save(path)
    with Image.open(path) as image:
        [(positions, pixels)] = pixel_batches([image] * 6, Preprocessing(32), workers=6)
    assert positions == list(range(6))
    assert (pixels == Preprocessing(32)(path)).all()


def test_threads_that_decode_leave_the_process_its_warnings() -> None:
    data = [saved(Image.new("RGB", (8, 8), (i, 0, 0)), "PNG") for i in range(200)]
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_image, data))
    assert list(warnings.filters) == before


def test_finding_images_in_a_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/c.webp", "notes.txt", ".hidden/d.png", ".e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(p.relative_to(tmp_path)) for p in find_images(tmp_path)]
    assert found == ["a.png", "b.JPG", "sub/c.webp"]


# -- preprocessing -----------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 512))
@settings(deadline=None)
def test_resized_sizes(width: int, height: int, size: int) -> None:
    w, h = resized_size(width, height, size)
    assert min(w, h) == size
    assert w <= size * width / height + 1e-9 or h <= size * height / width + 1e-9
    if width <= height:
        assert (w, h) == (size, int(size * height / width))
    else:
        assert (w, h) == (int(size * width / height), size)


@pytest.mark.parametrize("shape", [(31, 77), (77, 30), (64, 64), (1, 1), (65, 200)])
def test_preprocessing_is_resize_crop_and_normalise(shape: tuple[int, int]) -> None:
    height, width = shape
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    w, h = resized_size(width, height, 64)
    resized = np.asarray(Image.fromarray(array).resize((w, h), Image.Resampling.BICUBIC))
    top, left = (h - 64) // 2, (w - 64) // 2
    crop = resized[top : top + 64, left : left + 64]
    ours = Preprocessing(64)(array)
    assert ours.shape == (3, 64, 64) and ours.dtype == np.float32
    exact = (crop / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(ours, exact.transpose(2, 0, 1), atol=3e-7)


def test_slivers_need_no_giant_intermediate() -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (20_000, 1, 3), dtype=np.uint8)
    out = np.asarray(resize_and_crop(Image.fromarray(array), 256))  # 5 million rows if made whole
    assert out.shape == (256, 256, 3)
    # The centre of the picture, and every column the same.
    assert np.abs(out[128, 0].astype(int) - array[10_000, 0]).max() < 60
    assert (out == out[:, :1]).all()


def test_slivers_equal_the_crop_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in ((2, 3000), (3000, 2), (40, 4000))  # all enlarged, as slivers are
    ]
    whole = [np.asarray(resize_and_crop(image, 64)).astype(int) for image in images]
    monkeypatch.setattr(preprocessing, "_MAX_RESIZED", 0)
    for image, expected in zip(images, whole):
        # The place of a box is a float32 in Pillow, so a filter weight may round the other way.
        assert np.abs(np.asarray(resize_and_crop(image, 64)) - expected).max() <= 1


def test_pictures_survive_there_and_back() -> None:
    array = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    processing = Preprocessing(32)
    pixels = np.stack([processing(a) for a in array])
    np.testing.assert_array_equal(processing.to_images(pixels), array)
    beyond = processing.to_images(np.full((1, 3, 2, 2), 99, np.float32))
    assert (beyond == 255).all()


def test_preprocessor_config(official: Path, tmp_path: Path) -> None:
    path = official / "preprocessor_config.json"
    read = Preprocessing.from_file(path, 64)
    assert read == Preprocessing(64)
    assert read.to_dict() == json.loads(path.read_text())
    wrong = tmp_path / "preprocessor_config.json"
    for change, message in (
        ({"resample": 2}, "resample is 2, this model needs 3"),
        ({"size": {"shortest_edge": 224}}, "size is {'shortest_edge': 224}, this model needs 64"),
        ({"size": {"longest_edge": 64}}, "size is {'longest_edge': 64}, this model needs 64"),
        ({"crop_size": {"shortest_edge": 64}}, "crop_size is {'shortest_edge': 64}"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"image_std": [1, 0, 1]}, r"image_std must be three numbers above 0, got \[1, 0, 1\]"),
        ({"image_mean": [1, 0]}, r"image_mean must be three numbers, got \[1, 0\]"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
    ):
        wrong.write_text(json.dumps({**read.to_dict(), **change}))
        with pytest.raises(ConfigError, match=message):
            Preprocessing.from_file(wrong, 64)
