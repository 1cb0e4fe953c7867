"""The command line on bad input: one line that says what, where and what to do, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from command_line import Qlip, bomb, picture, runner
from PIL import Image
from safetensors.numpy import load_file, save_file

import qlip_core as qlip
from qlip_cli.inputs import ImageFile
from qlip_cli.main import main
from qlip_core.errors import ImageError, TokenFileError
from qlip_core.tensorfile import write_tensors


@pytest.fixture
def cli(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Qlip:
    """Runs qlip in a folder with good.png."""
    monkeypatch.chdir(tmp_path)
    picture(0).save("good.png")
    return runner(tiny_model, capsys)


def left() -> set[str]:
    """What is in the folder."""
    return {path.name for path in Path().iterdir()}


# -- images ------------------------------------------------------------------------------------


def test_bad_images_each_with_its_own_line(cli: Qlip) -> None:
    data = Path("good.png").read_bytes()
    bad = {
        "text.png": (b"I am text", "text.png: not an image"),
        "cut.png": (data[: len(data) // 2], "cut.png: truncated or damaged image"),
        "bomb.png": (bomb(), "bomb.png: over 178,956,970 pixels, too many to decode safely"),
        "empty.png": (b"", "empty.png: empty file"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "phone.heic: HEIC or a video"),
        "cut.avif": (b"\0\0\0\x18ftypavif" + bytes(99), "cut.avif: not an image"),
    }
    for name, (content, message) in bad.items():
        Path(name).write_bytes(content)
        assert message in cli("encode", name).error
    assert cli("encode", "absent.png").error == "absent.png: no such file"
    assert left() == {"good.png", *bad}


def test_good_images_are_done_and_bad_ones_listed(cli: Qlip, tiny_model: Path) -> None:
    os.mkdir("set")
    for seed in (1, 2, 3):
        picture(seed).save(f"set/{seed}.png")
    Path("set/2x.png").write_text("no image")
    Path("set/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    run = cli("encode", "set", "nothing.jpg", "--json")
    assert run.code == 1
    assert run.json["images"] == 3
    assert [f["image"] for f in run.json["failed"]] == [
        "set/2x.png",
        "set/phone.HEIC",
        "nothing.jpg",
    ]
    assert run.err.splitlines() == [
        "3 of 6 images could not be read:",
        f"  {Path('set/2x.png')}: not an image",
        f"  {Path('set/phone.HEIC')}: HEIC or a video, which Pillow does not read; convert it to JPEG or "
        "PNG first",
        "  nothing.jpg: no such file",
    ]
    tokens = qlip.VisualTokens.load("tokens.qlip")
    assert tokens.names == ("set/1.png", "set/2.png", "set/3.png")
    model = qlip.load(tiny_model, backend="numpy")
    assert tokens == model.encode([f"set/{seed}.png" for seed in (1, 2, 3)])
    for command in (["reconstruct"], ["classify", "-l", "a,b"], ["embed", "-o", "v.npy"]):
        assert cli(*command, "set").code == 1


def test_names_and_folders_that_cannot_be_read_do_not_stop_the_others(
    cli: Qlip, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("set/locked").mkdir(parents=True)
    picture(1).save("set/1.png")
    scandir = os.scandir

    def guarded(path: str) -> object:
        if Path(path).name == "locked":  # root, as which tests may run, reads everything
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    long = "x" * 300 + ".png"
    run = cli("encode", "good.png", long, "set", "--json")
    assert (run.code, run.json["images"]) == (1, 2)
    assert [f["image"] for f in run.json["failed"]] == [long, "set/locked"]
    assert run.err.splitlines() == [
        "2 of 4 images could not be read:",
        f"  {long}: cannot be read (File name too long)",
        f"  {Path('set/locked')}: this folder cannot be read (Permission denied)",
    ]
    assert qlip.VisualTokens.load("tokens.qlip").names == ("good.png", "set/1.png")
    assert cli("encode", "set/locked").error.startswith(f"{Path('set/locked')}: this folder cannot")
    assert long in cli("encode", long, "-f").error
    run = cli("decode", "tokens.qlip", long)
    assert run.code == 1 and f"  {long}: no such token file\n" in run.err


def test_all_bad_writes_nothing(cli: Qlip) -> None:
    run = cli("encode", "x.png", "y.png")
    assert (run.code, run.out) == (2, "")
    assert run.err.splitlines()[-1] == (
        "error: none of the 2 images could be read: nothing was done"
    )
    assert left() == {"good.png"}


def test_odd_images_are_shown_as_a_viewer_would(cli: Qlip, tiny_model: Path) -> None:
    model = qlip.load(tiny_model, backend="numpy")
    good = Image.open("good.png")
    deep = np.asarray(good.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save("deep.png")
    good.convert("CMYK").save("cmyk.tif")
    good.quantize(16).save("palette.png")
    alpha = good.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(good.size))
    alpha.save("alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is the right-hand side of what is stored
    good.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    good.save("moving.webp", save_all=True, append_images=[picture(5)], lossless=True)
    shown = {
        "deep.png": good.convert("L").convert("RGB"),
        "cmyk.tif": good,  # without black ink, CMYK is RGB inverted
        "palette.png": good.quantize(16).convert("RGB"),
        "alpha.png": Image.composite(good, Image.new("RGB", good.size, "white"), alpha.split()[3]),
        "turned.png": good,
        "moving.webp": good,
    }
    run = cli("encode", *shown)
    assert (run.code, run.err) == (0, "")
    tokens = qlip.VisualTokens.load("tokens.qlip")
    for i, (name, image) in enumerate(shown.items()):
        expected = model.encode(image).bits
        # Two ways to blend alpha round some values apart by one.
        allowed = 0.02 * expected.size if name == "alpha.png" else 0
        assert (tokens[i].bits != expected).sum() <= allowed, name


def test_the_smallest_and_the_thinnest(cli: Qlip) -> None:
    Image.new("RGB", (1, 1), "red").save("dot.png")
    Image.new("RGB", (20_000, 1), "red").save("sliver.png")
    Image.new("RGB", (1, 20_000), "red").save("upright.png")
    run = cli("encode", "dot.png", "sliver.png", "upright.png")
    assert (run.code, run.err) == (0, "")
    tokens = qlip.VisualTokens.load("tokens.qlip")
    assert tokens[0] == tokens[1] == tokens[2]


def test_empty_names_are_not_this_folder(cli: Qlip, tiny_model: Path) -> None:
    for command in (["encode"], ["reconstruct"], ["embed"], ["classify", "-l", "a"]):
        assert cli(*command, "good.png", "").error == "the name of an image is empty"
    assert cli("decode", "").error == "the name of a token file is empty"
    for command in (["info", ""], ["info", "-m", ""], ["encode", "good.png", "-m", ""]):
        assert cli(*command, plain=True).error.startswith("the name of the model is empty")
    with pytest.raises(ImageError, match="is empty"):
        qlip.load(tiny_model, backend="numpy").preprocess("")
    with pytest.raises(TokenFileError, match="is empty"):
        qlip.VisualTokens.load("")


def test_nothing_to_encode(cli: Qlip) -> None:
    os.mkdir("empty")
    Path("empty/notes.txt").write_text("no image")
    assert cli("encode", "empty").error.startswith("empty: no images in this folder")
    assert cli("encode", "*.jpg").error == "*.jpg: no image matches this pattern"
    os.mkdir("my photos")
    said = 'my photos: a name with spaces needs quotes around it: "my photos"'
    assert cli("encode", "my", "photos").error == said
    assert "missing argument" in cli("encode").error
    assert "nothing to embed" in cli("embed").error


def test_file_names_cannot_play_with_the_terminal(cli: Qlip) -> None:
    name = "a\n\x1b[31m.png"
    Path(name).write_text("no image")
    assert cli("encode", name).error == "a\\n\\x1b[31m.png: not an image"
    raw = os.fsdecode(b"\xff.png")  # not Unicode
    try:
        shutil.copy("good.png", raw)
    except OSError:  # a file system that takes Unicode only
        return
    assert cli("encode", raw, "-o", "raw.qlip", "--json").code == 0
    assert qlip.VisualTokens.load("raw.qlip").names == (raw,)
    assert cli("decode", "raw.qlip").code == 0


# -- outputs -----------------------------------------------------------------------------------


def test_existing_outputs_stay(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("encode", "good.png").code == 0
    assert cli("encode", "good.png", "good.png").code == 0
    for command, output in (
        (("encode", "good.png"), "good.qlip"),
        (("decode", "good.qlip"), "good-decoded.png"),
        (("decode", "tokens.qlip", "-o", "."), "good.png"),
        (("reconstruct", "good.png"), "good-reconstructed.png"),
        (("embed", "good.png", "-o", "v.npy"), "v.json"),
    ):
        if not Path(output).exists():
            Path(output).write_text("mine")
        before = Path(output).read_bytes()
        with monkeypatch.context() as patch:  # found before any work
            patch.setattr("qlip_core.load", None)
            assert f"{output}: already exists" in cli(*command).error
        assert Path(output).read_bytes() == before
        assert cli(*command, "--force").code == 0
        assert Path(output).read_bytes() != b"mine"
    assert "not written to standard output" in cli("encode", "good.png", "-o", "-").error
    assert "is one of the inputs" in cli("encode", "good.png", "-o", "good.png", "-f").error
    assert not list(Path().glob(".*"))


def test_more_names_than_a_token_file_holds(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [ImageFile("good.png", "n" * 1000)] * 100_000
    monkeypatch.setattr("qlip_cli.encode.collect_images", lambda arguments: many)
    expected = "make several files of fewer images, or token shards (`qlip tokenize`)"
    assert expected in cli("encode", "photos", "-m", "absent", plain=True).error
    prompt = "a" * 1000
    drawing = ("generate", prompt, "-n", "100000", "--save-tokens", "-m", "absent")
    assert expected in cli(*drawing, plain=True).error


def test_places_that_cannot_be_written_to(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("encode", "good.png", "good.png")
    monkeypatch.setattr("qlip_core.load", None)  # all of this is found before any work
    Path("file").write_text("")
    assert "file is not a folder" in cli("encode", "good.png", "-o", "file/x.qlip").error
    assert "nowhere does not exist" in cli("encode", "good.png", "-o", "nowhere/x.qlip").error
    for command in ("encode", "reconstruct"):  # not a file that is called like the folder
        assert "nowhere does not exist" in cli(command, "good.png", "-o", "nowhere/").error
    assert "file: exists and is not a folder" in cli("decode", "tokens.qlip", "-o", "file").error
    assert "not written to standard output" in cli("decode", "tokens.qlip", "-o", "-").error
    assert "not written to standard output" in cli("train", "-o", "-", plain=True).error
    assert "not written to standard output" in cli("data", "emoji", "-", plain=True).error
    assert "written as one of .png" in cli("reconstruct", "good.png", "-o", "x.txt").error
    assert "written as .npy or .safetensors" in cli("embed", "good.png", "-o", "x.pkl").error
    assert "x.npy: is a folder" in cli("embed", "good.png", "-o", "x.npy/").error
    assert ".: is a folder" in cli("embed", "good.png", "-o", "").error

    def refuse(**_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for command in (("encode", "good.png"), ("decode", "tokens.qlip"), ("reconstruct", "good.png")):
        assert "permission denied in the folder ." in cli(*command).error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_outputs_that_are_no_files_stay_and_links_are_followed(cli: Qlip) -> None:
    cli("encode", "good.png")
    os.mkfifo("pipe")  # as a device is, and this one can be made by anybody
    Path("link.png").symlink_to("pipe")
    for name in ("pipe", "link.png"):
        for force in ([], ["--force"]):
            error = cli("encode", "good.png", "-o", name, *force).error
            assert error == f"{name}: is a device or a pipe; name a file with -o"
    os.mkdir("out")
    os.mkfifo("out/good.png")
    error = cli("decode", "good.qlip", "-o", "out", "--force").error
    assert error.startswith(f"{Path('out/good.png')}: exists and is not a file")
    assert cli("decode", os.devnull).error.startswith(f"{os.devnull}: not a regular file")
    assert cli("info", "pipe", plain=True).error.startswith("pipe: a device or a pipe")
    with pytest.raises(OSError, match="is not a regular file"):
        qlip.VisualTokens.load("good.qlip").save("pipe")
    assert Path("pipe").is_fifo() and Path("out/good.png").is_fifo()

    Path("real.qlip").write_text("old")
    Path("link.qlip").symlink_to("real.qlip")
    assert "already exists" in cli("encode", "good.png", "-o", "link.qlip").error
    assert cli("encode", "good.png", "-o", "link.qlip", "--force").code == 0
    assert Path("link.qlip").is_symlink()
    assert Path("real.qlip").read_bytes() == Path("good.qlip").read_bytes()


def test_a_full_disk_leaves_nothing(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("encode", "good.png", "good.png")
    before = left()

    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for command in (
        ("encode", "good.png"),
        ("reconstruct", "good.png"),
        ("embed", "good.png", "-o", "v.npy"),
    ):
        assert "no space left on device): free some" in cli(*command).error
    # The last file of two that does not fit any more.
    done = []
    monkeypatch.setattr("os.fsync", lambda file: full() if done else done.append(file))
    assert "no space left" in cli("embed", "good.png", "-o", "v.npy").error
    assert left() == before
    monkeypatch.setattr("PIL.Image.Image.save", full)
    assert "no space left" in cli("decode", "tokens.qlip").error
    assert left() == before


# -- token files -------------------------------------------------------------------------------


def test_bad_token_files(cli: Qlip) -> None:
    cli("encode", "good.png")
    data = Path("good.qlip").read_bytes()
    os.mkdir("empty")
    Path("cut.qlip").write_bytes(data[:-50])
    Path("text.qlip").write_text("I am text, and long enough for a header")
    write_tensors("weights.qlip", {"w": np.zeros(3, np.float32)}, metadata={"format": "pt"})
    packed = {"bits": qlip.VisualTokens.load("good.qlip").packed}
    meta = {"format": "qlip-tokens", "version": "2", "length": "28", "grid": "8x8"}
    write_tensors("newer.qlip", packed, metadata=meta)
    write_tensors("odd.qlip", packed, metadata=meta | {"version": "1", "grid": "9x9"})
    for name, message in {
        "cut.qlip": "cut short or damaged",
        "text.qlip": "not a token file",
        "weights.qlip": "but not a token file",
        "newer.qlip": "upgrade qlip",
        "odd.qlip": "header is damaged",
        "absent.qlip": "no such token file",
        "empty": "no .qlip files in this folder",
        "*.tok": "no file matches",
    }.items():
        error = cli("decode", name).error
        assert error.startswith(name) and message in error
        if name.endswith(".qlip"):
            assert cli("info", name, plain=True).error == error


def test_standard_input_that_is_no_file(cli: Qlip) -> None:
    from socket import socketpair

    command = [sys.executable, "-m", "qlip_cli", "encode", "-", "-o", "x.qlip"]
    ours, theirs = socketpair()
    with ours, theirs:
        run = subprocess.run(command, stdin=theirs.fileno(), capture_output=True, text=True)
    assert run.returncode == 2 and "send it through `cat |`" in run.stderr
    shell = " ".join(command) + " <&-"
    run = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert run.returncode == 2 and "-: standard input is closed" in run.stderr


def test_one_bad_token_file_among_good_ones(cli: Qlip) -> None:
    cli("encode", "good.png")
    data = Path("good.qlip").read_bytes()
    for name in ("cut.qlip", "short.qlip"):
        Path(name).write_bytes(data[:-50])
    run = cli("decode", "cut.qlip", "good.qlip", "absent.qlip", "--json")
    assert (run.code, run.json["files"]) == (1, ["decoded/good.png"])
    assert [each["file"] for each in run.json["failed"]] == ["cut.qlip", "absent.qlip"]
    assert "2 of 3 token files could not be read:" in run.err
    assert cli("decode", "cut.qlip", "good.qlip", "-o", "one.png").code == 1
    assert Path("one.png").is_file()
    run = cli("decode", "cut.qlip", "short.qlip")
    assert run.code == 2 and "none of the 2 token files could be read" in run.err


def test_tokens_of_another_model(cli: Qlip) -> None:
    cli("encode", "good.png")
    tokens = qlip.VisualTokens.load("good.qlip")
    qlip.VisualTokens(tokens.packed, 28, (8, 8), "feedbeef").save("other.qlip")
    error = cli("decode", "other.qlip").error
    assert error.startswith("other.qlip: these tokens were made by another tokenizer (feedbeef")
    assert "--any-model" in error
    assert cli("decode", "other.qlip", "--any-model").code == 0
    qlip.VisualTokens(tokens.packed[:, :56], 28, (4, 4)).save("small.qlip")
    assert "do not fit this model" in cli("decode", "small.qlip", "--any-model").error
    qlip.VisualTokens(tokens.packed[:0], 28, (8, 8)).save("none.qlip")
    assert "holds no images" in cli("decode", "none.qlip").error


# -- models ------------------------------------------------------------------------------------

Change = Callable[[Path], None]


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def config(tower: str, **values: object) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (content[tower] if tower else content).update(values)
        (folder / "config.json").write_text(json.dumps(content))

    return apply


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0] * 100}))


NORM = "vision_model.post_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weights(lambda w: w.pop("vision_decoder.norm.bias")), "missing: vision_decoder.norm.bias"),
        (weights(lambda w: w.update(extra=np.zeros(2, np.float32))), "unexpected: extra"),
        (weights(lambda w: w.update({NORM: np.zeros(3, np.float32)})), f"misshapen: {NORM} is [3]"),
        (weights(lambda w: w[NORM].fill(np.nan)), f"tensor {NORM} has 64 values that are NaN"),
        (config("", colour=1), 'unknown key "colour"'),
        (config("vision_config", num_attention_heads=5), "num_attention_heads (=5) must divide"),
        (config("vision_config", patch_size=7), "patch_size (=7) must divide"),
        (
            config("vision_config", quantizer_cfg={"embed_dim": 28, "group_size": 9}),
            "group_size (=9)",
        ),
        (pickled, "this is a pickle"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_bad_checkpoints(cli: Qlip, tiny_model: Path, change: Change, message: str) -> None:
    shutil.copytree(tiny_model, "model")
    change(Path("model"))
    # NaN is found when the tensor is read, which needs an embedding to happen.
    error = cli("embed", "good.png", "--model", "model").error
    assert error.startswith("model") and message in error
    assert left() == {"good.png", "model"}


def test_models_that_are_not_there(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def unknown(*_: object, **__: object) -> NoReturn:
        raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)

    def offline(*_: object, **__: object) -> NoReturn:
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    assert "no such model on the hub" in cli("encode", "good.png", "-m", "nobody/nothing").error
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "check the network" in cli("encode", "good.png", "-m", "nobody/nothing").error
    assert "not a hub id" in cli("encode", "good.png", "-m", "no/such/folder").error
    Path("weights.pt").write_bytes(pickle.dumps({}))
    assert "pickled weights are never loaded" in cli("encode", "good.png", "-m", "weights.pt").error
    monkeypatch.setattr("qlip_core.hub.BUNDLED", Path("nowhere"))
    assert "name a folder or a hub id" in cli("encode", "good.png", plain=True).error


def test_backends_that_are_not_there(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 'no backend "jax"' in cli("encode", "good.png", "-b", "jax").error
    assert 'no backend "jax"' in cli("doctor", "-b", "jax", plain=True).error
    assert 'no device "tpu" here; it has: cpu' in cli("encode", "good.png", "--device", "tpu").error
    assert 'no dtype "int3"' in cli("encode", "good.png", "--dtype", "int3").error
    monkeypatch.setattr("qlip_core.backends.is_installed", lambda name: name == "numpy")
    assert "run `pip install 'qlip[mlx]'`" in cli("encode", "good.png", "-b", "mlx").error
    monkeypatch.setattr("qlip_core.training.is_installed", lambda name: False)
    assert "run `pip install 'qlip[train]'`" in cli("train", "emoji", plain=True).error


# -- the command itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encod", "x"], "no such command 'encod'"),
        (["encode", "x", "--bakend", "numpy"], "--bakend"),
        (["encode", "x", "--batch-size", "0"], "--batch-size"),
        (["encode", "x", "--batch-size", "many"], "--batch-size"),
        (["classify", "x"], "no labels"),
        (["classify", "x", "--labels", " , "], "no labels"),
        (["classify", "x", "--labels-file", "absent.txt"], "absent.txt: cannot be read"),
        (["embed", *["x"] * 17], "too many to print: name a file with -o"),
        (["info", "x", "--model", "y"], "two models named"),
        (["train", "export"], "missing argument 'RUN'"),
        (["train", "export", "run", "--resume"], "--resume"),
        (["train", "generator", "--stage", "1"], "--stage"),
        (["train", "--resume", "generator"], "before the options: qlip train generator"),
        (["train", "emoji", "emoji-ship"], "unexpected extra argument"),
        (["train", ""], "the recipe's name is empty"),
        (["train", "export", "run", "--dtype", "int8"], "models are stored in float32, bfloat16"),
    ],
)
def test_wrong_use(cli: Qlip, arguments: list[str], message: str) -> None:
    assert message in cli(*arguments, plain=True).error


def test_the_folder_that_is_exported_names_the_model(cli: Qlip) -> None:
    name = f"{Path.cwd().name}-model"
    os.mkdir(name)
    assert cli("train", "export", ".", plain=True).error.startswith(f"{name}: already exists")


def test_help_of_train_is_its_default_command_s_and_names_the_others(cli: Qlip) -> None:
    text = cli("train", "-h", plain=True).out
    # Older versions of typer put no brackets around a metavar.
    assert text.startswith(
        ("Usage: qlip train [OPTIONS] [RECIPE]\n", "Usage: qlip train [OPTIONS] RECIPE\n")
    )
    assert "--stage" in text and "balance    Find the weights" in text
    assert "--stage" not in cli("train", "export", "--help", plain=True).out
    assert "--stage" in cli("train", "tokenizer", "--help", plain=True).out


def test_templates_and_texts_that_do_not_fit(cli: Qlip, tiny_model: Path) -> None:
    assert "has no {}" in cli("classify", "good.png", "-l", "a", "-t", "a photo").error
    shutil.copytree(tiny_model, "mute")
    for name in ("vocab.json", "merges.txt"):
        Path("mute", name).unlink()
    assert "takes token ids only" in cli("embed", "--text", "a cat", "-m", "mute").error


def test_debug_and_bugs(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cli("encode", "absent.png", "--debug")
    assert (
        run.code == 2 and "Traceback" in run.err and run.err.splitlines()[-1].startswith("error: ")
    )

    def broken(*_: object, **__: object) -> NoReturn:
        raise KeyError("surprise")

    monkeypatch.setattr("qlip_core.load", broken)
    run = cli("encode", "good.png")
    assert (run.code, run.out) == (70, "")
    assert run.err.startswith("error: internal: KeyError: 'surprise'") and "--debug" in run.err
    assert run.err.count("\n") == 1

    for words in (
        "CUDA out of memory. Tried to allocate 20 GiB",
        "[METAL] Command buffer execution failed: Insufficient Memory",
        "[malloc] Unable to allocate 20000000000 bytes.",
    ):

        def hungry(*_: object, words: str = words, **__: object) -> NoReturn:
            raise RuntimeError(words)

        monkeypatch.setattr("qlip_core.load", hungry)
        assert "lower --batch-size" in cli("encode", "good.png").error


COMMAND = [sys.executable, "-m", "qlip_cli.main"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_interrupting_leaves_nothing(cli: Qlip, tiny_model: Path) -> None:
    os.mkfifo("slow.png")
    command = [*COMMAND, "encode", "good.png", "slow.png", "-m", str(tiny_model), "-b", "numpy"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests started in the background of a shell ignore SIGINT, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with open("slow.png", "wb"):  # opens when the command has begun to read it
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert left() == {"good.png", "slow.png"}


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_termination_leaves_nothing(cli: Qlip, tiny_model: Path) -> None:
    assert cli("encode", "good.png", "good.png").code == 0
    program = (
        "import os, signal, sys\n"
        "from qlip_cli.main import main\n"
        "from qlip_cli.outputs import PictureFolder\n"
        "add = PictureFolder.add\n"
        "def then_end(*what):\n"
        "    add(*what)\n"
        "    assert any(name.endswith('.tmp') for name in os.listdir())\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "PictureFolder.add = then_end\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", program, "decode", "tokens.qlip", "-m", str(tiny_model)]
    run = subprocess.run([*command, "-b", "numpy"], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (143, "", "terminated\n")
    assert left() == {"good.png", "tokens.qlip"}


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_interrupting_the_start_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(  # what main imports, and takes long
        "import time\nopen('begun', 'w').close()\ntime.sleep(60)\n"
    )
    (tmp_path / "begin.py").write_text(
        "from qlip_cli.__main__ import main\nraise SystemExit(main())"
    )
    for how in (["-m", "qlip_cli"], ["begin.py"]):
        process = subprocess.Popen(
            [sys.executable, *how],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (-signal.SIGINT, "")
        (tmp_path / "begun").unlink()


def test_nobody_reads_stdout(cli: Qlip, tiny_model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "info", str(tiny_model)]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a shell and /dev/full")
@pytest.mark.parametrize(
    ("arguments", "streams", "code"),
    [
        (["info", "{model}"], ">&-", 0),
        (["info", "{model}", "--json"], ">&-", 0),
        (["info", "nope"], "2>&-", 2),
        (["info", "nope"], "2>/dev/full", 2),
        (["info", "nope"], ">&- 2>&-", 2),
    ],
)
def test_streams_that_are_closed_or_full(
    cli: Qlip, tiny_model: Path, arguments: list[str], streams: str, code: int
) -> None:
    words = [argument.format(model=tiny_model) for argument in arguments]
    shell = ["sh", "-c", f'exec "$@" {streams}', "sh", *COMMAND, *words]
    run = subprocess.run(shell, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (code, "", "")


def test_help_imports_no_numpy() -> None:
    code = (
        "import sys\n"
        "for name in ('numpy', 'PIL', 'torch', 'mlx', 'rich', 'qlip_core'):\n"
        "    sys.modules[name] = None\n"  # importing it now fails
        "from qlip_cli.main import main\n"
        "assert main(['encode', '--help']) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_main_reads_the_arguments_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qlip", "nonsense"])
    assert main() == 2
    assert "no such command 'nonsense'" in capsys.readouterr().err
