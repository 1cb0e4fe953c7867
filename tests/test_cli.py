"""The command line on good input: what each command prints and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import Qlip, picture, runner
from configurations import random_weights
from PIL import Image
from safetensors import safe_open

import qlip_core as qlip
from qlip_cli import terminal
from qlip_cli.main import main
from qlip_cli.outputs import safe_names
from qlip_cli.reconstruct import picture_of
from qlip_cli.terminal import print_picture
from qlip_core.metrics import psnr, ssim


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The tiny preset with the ids of its tokenizer's special tokens, so that texts differ."""
    tiny = qlip.PRESETS["tiny"]
    ids = {"bos_token_id": 518, "eos_token_id": 519, "pad_token_id": 519}
    config = replace(tiny, text_config=replace(tiny.text_config, **ids))
    return qlip.save_checkpoint(
        tmp_path_factory.mktemp("talking") / "tiny",
        config,
        random_weights(config, seed=1),
        tokenizer_from=tokenizer_folder,
        card="---\nlicense: cc-by-4.0\nnote: random weights, for tests\n---\n",
    )


@pytest.fixture
def cli(
    talking: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Qlip:
    """Runs qlip in a folder with a.png, and photos/ with 1.png, 2.jpg and more/3.png."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    picture(0).save("a.png")
    for seed, name in ((1, "1.png"), (2, "2.jpg"), (3, "more/3.png")):
        picture(seed).save(f"photos/{name}")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return runner(talking, capsys)


@pytest.fixture(scope="session")
def model(talking: Path) -> qlip.Model:
    return qlip.load(talking, backend="numpy")


# -- encode and decode -------------------------------------------------------------------------


def test_one_image_there_and_back(cli: Qlip, model: qlip.Model) -> None:
    run = cli("encode", "a.png")
    assert (run.code, run.err) == (0, "")
    assert run.out == "a.qlip: 1 image, each 8x8 patches of 28 bits, 224 bytes\n"
    tokens = qlip.VisualTokens.load("a.qlip")
    assert tokens == model.encode("a.png")
    assert (tokens.names, tokens.model) == (("a.png",), model.fingerprint)

    run = cli("decode", "a.qlip")
    assert (run.code, run.err) == (0, "")
    assert run.out == "a-decoded.png: 1 image, 64x64 pixels\n"
    np.testing.assert_array_equal(np.asarray(Image.open("a-decoded.png")), model.decode(tokens)[0])


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_other_backends_write_the_same_tokens(cli: Qlip, model: qlip.Model, backend: str) -> None:
    assert cli("encode", "photos", "--backend", backend).code == 0
    u = model.latents(["photos/1.png", "photos/2.jpg", "photos/more/3.png"])
    bits = qlip.VisualTokens.load("photos.qlip").bits
    np.testing.assert_array_equal(bits[np.abs(u) > 1e-5], (u > 0)[np.abs(u) > 1e-5])


def test_a_folder_goes_to_one_file_with_names(cli: Qlip, model: qlip.Model) -> None:
    run = cli("encode", "photos", "--batch-size", "2", "--json")
    assert (run.code, run.err) == (0, "")
    assert run.json == {
        "output": "photos.qlip",
        "images": 3,
        "grid": [8, 8],
        "length": 28,
        "bytes_per_image": 224,
        "model": model.fingerprint,
        "failed": [],
    }
    tokens = qlip.VisualTokens.load("photos.qlip")
    assert tokens.names == ("1.png", "2.jpg", "more/3.png")
    assert tokens[2] == model.encode("photos/more/3.png")

    run = cli("decode", "photos.qlip", "-o", "out", "--batch-size", "2", "--json")
    expected = ["out/1.png", "out/2.png", "out/more/3.png"]
    facts = {"output": "out", "images": 3, "size": 64, "files": expected, "failed": []}
    assert run.json == facts
    for name, pixels in zip(expected, model.decode(tokens)):
        np.testing.assert_array_equal(np.asarray(Image.open(name)), pixels)
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "output", "names"),
    [
        (["a.png", "photos/2.jpg"], "tokens.qlip", ("a.png", "photos/2.jpg")),
        (["photos/*.*g"], "tokens.qlip", ("photos/1.png", "photos/2.jpg")),
        (
            ["photos/**"],
            "tokens.qlip",
            ("photos/1.png", "photos/2.jpg", "photos/more/3.png"),
        ),
        (
            ["photos", "a.png"],
            "tokens.qlip",
            ("photos/1.png", "photos/2.jpg", "photos/more/3.png", "a.png"),
        ),
        (["photos/more", "-o", "photos"], "photos/more.qlip", ("3.png",)),
        (["photos/../a.png", "-o", "x.bin"], "x.bin", ("a.png",)),
    ],
)
def test_what_arguments_stand_for(
    cli: Qlip, arguments: list[str], output: str, names: tuple[str, ...]
) -> None:
    run = cli("encode", *arguments, "--json")
    assert (run.code, run.json["output"]) == (0, output)
    assert qlip.VisualTokens.load(output).names == names


def test_several_token_files_and_other_formats(cli: Qlip, model: qlip.Model) -> None:
    cli("encode", "a.png")
    cli("encode", "photos")
    run = cli("decode", "*.qlip", "--json")
    assert run.json["files"] == [f"decoded/{n}.png" for n in ("a", "1", "2", "more/3")]
    assert cli("encode", "a.png", "-o", "photos/more/x.qlip").code == 0
    run = cli("decode", "photos", "a.qlip", "-o", "both", "--json")
    assert run.json["files"] == [str(Path("both") / n) for n in ("a.png", "a-2.png")]
    assert cli("decode", "a.qlip", "-o", "b.webp").code == 0
    decoded = np.asarray(Image.open("b.webp").convert("RGB"))
    np.testing.assert_array_equal(decoded, model.decode(model.encode("a.png"))[0])
    assert cli("decode", "a.qlip", "-o", "c").out.startswith("c.png: ")
    # A slash at the end is a folder, though there is none yet.
    assert cli("decode", "a.qlip", "-o", "d/", "--json").json["files"] == [str(Path("d", "a.png"))]
    # Into a folder that is there: beside what it holds.
    assert cli("decode", "a.qlip", "-o", "photos", "--json").json["files"] == ["photos/a.png"]


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="needs /dev/stdin")
def test_standard_input(cli: Qlip, model: qlip.Model, talking: Path) -> None:
    def piped(file: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "qlip_cli", *arguments, "-m", str(talking), "-b", "numpy"]
        return subprocess.run(command, input=Path(file).read_bytes(), capture_output=True)

    assert piped("a.png", "encode", "-", "-o", "x.qlip").returncode == 0
    tokens = qlip.VisualTokens.load("x.qlip")
    assert tokens == model.encode("a.png") and tokens.names == ("stdin",)
    assert piped("x.qlip", "decode", "-", "-o", "x.png").returncode == 0
    np.testing.assert_array_equal(np.asarray(Image.open("x.png")), model.decode(tokens)[0])
    for command in ("encode", "decode"):
        run = piped("photos/notes.txt", command, "-")
        assert run.returncode == 2 and run.stderr.startswith(b"error: /dev/stdin: ")


def test_names_never_lead_out_of_the_folder(cli: Qlip, model: qlip.Model, tmp_path: Path) -> None:
    names = (
        "../../evil.png",
        "/etc/passwd",
        "",
        "..",
        "s\\x.png",
        "a.png",
        "A.jpg",
        "s",
        "s.png/y",
    )
    safe = ["evil", "etc/passwd", "image-00003", "image-00004", "s/x", "a", "A-2", "s-2", "s.png/y"]
    # "s.png" is a folder of the last name's, so it must not be a file of the one before.
    made = safe_names(names)
    assert made[:7] == [f"{name}.png" for name in safe[:7]]
    assert len({name.lower() for name in made}) == len(names)
    files = {Path(name) for name in made}
    assert not files & {parent for file in files for parent in file.parents}

    tokens = model.encode(["a.png"] * len(names))
    packed = qlip.VisualTokens(tokens.packed, tokens.length, tokens.grid, tokens.model, names)
    packed.save("hostile.qlip")
    before = {p for p in tmp_path.rglob("*") if "out" not in p.parts}
    assert cli("decode", "hostile.qlip", "-o", "out").code == 0
    assert {p for p in tmp_path.rglob("*") if "out" not in p.relative_to(tmp_path).parts} == before
    found = {p.relative_to("out").as_posix() for p in Path("out").rglob("*.png") if p.is_file()}
    assert found == set(made)


def test_thousands_of_one_name_are_numbered_at_once() -> None:
    names = ["a cat.png", "a-2.png", *["A cat"] * 20_000, *["a.png"] * 2]
    made = safe_names(names)  # minutes, where each began to count anew
    assert made[:4] == ["a cat.png", "a-2.png", "A cat-2.png", "A cat-3.png"]
    assert made[-3:] == ["A cat-20001.png", "a.png", "a-3.png"]


def test_a_link_in_the_folder_is_not_followed(cli: Qlip, model: qlip.Model, tmp_path: Path) -> None:
    tokens = model.encode(["a.png"] * 2)
    names = ("link/x.png", "y.png")
    qlip.VisualTokens(tokens.packed, 28, tokens.grid, tokens.model, names).save("t.qlip")
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    assert "leads out of out by a link" in cli("decode", "t.qlip", "-o", "out").error
    assert not list((tmp_path / "elsewhere").iterdir())


# -- looking -----------------------------------------------------------------------------------


def test_reconstruct(cli: Qlip, model: qlip.Model) -> None:
    run = cli("reconstruct", "a.png", "--json")
    before = model.preprocessing.to_images(model.preprocess("a.png"))
    after = model.reconstruct("a.png")
    score = {"psnr": psnr(before, after)[0], "ssim": ssim(before, after)[0]}
    document = run.json
    assert document["output"] == "a-reconstructed.png" and document["failed"] == []
    assert document["images"] == [{"image": "a.png", **score}] and document["mean"] == score
    sheet = np.asarray(Image.open("a-reconstructed.png"))
    assert sheet.shape == (64, 132, 3)
    np.testing.assert_array_equal(sheet[:, :64], before[0])
    np.testing.assert_array_equal(sheet[:, -64:], after[0])

    run = cli("reconstruct", "photos", "a.png")
    lines = run.out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [
        "photos/1.png",
        "photos/2.jpg",
        "photos/more/3.png",
        "a.png",
    ]
    assert lines[4].split()[1:] == [f"{score['psnr']:.2f}", "dB", f"{score['ssim']:.4f}"]
    sheet = np.asarray(Image.open("reconstructed.png"))
    assert sheet.shape == (4 * (2 * 15 + 64 + 4) - 4, 132, 3)
    np.testing.assert_array_equal(sheet[-64:, -64:], after[0])


def test_labels_are_drawn_without_boxes() -> None:
    """A letter that the font does not have would be drawn as one."""
    half = np.zeros((64, 64, 3), np.uint8)

    def labelled(name: str) -> np.ndarray:
        return np.asarray(picture_of([(name, "30 dB", half, half)] * 2))

    for name, plain in (("caf\u00e9", "cafe"), ("cafe\u0301", "cafe"), ("\u732b.png", "?.png")):
        np.testing.assert_array_equal(labelled(name), labelled(plain))
    assert (labelled("cafe") != labelled("?.png")).any()


def test_show_draws_two_pixels_a_character(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERM_PROGRAM", raising=False)
    lines = cli("reconstruct", "a.png", "--show").out.splitlines()
    drawn = [line for line in lines if "▀" in line]
    assert [line.count("▀") for line in drawn] == [80] * 19  # 132 x 64 pixels in 80 columns
    small = Image.open("a-reconstructed.png").convert("RGB").resize((80, 38))
    upper, lower = (";".join(map(str, np.asarray(small)[y, 0])) for y in (0, 1))
    assert drawn[0].startswith(f"\x1b[38;2;{upper};48;2;{lower}m▀")


def test_apples_terminal_gets_the_nearest_of_256_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM_PROGRAM", "Apple_Terminal")
    monkeypatch.delenv("COLORTERM", raising=False)
    print_picture(Image.new("RGB", (1, 2), (250, 3, 100)))  # nearest is (255, 0, 95)
    assert capsys.readouterr().out == "\x1b[38;5;197;48;5;197m▀\x1b[0m\n"


def test_classify(cli: Qlip, model: qlip.Model, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a cat\nin, and out\n\n", encoding="utf-8")
    arguments = ["--labels", "a cat, a dog", "--labels-file", "labels.txt"]
    arguments += ["-t", "{}", "-t", "an {} in"]
    labels = ["a cat", "a dog", "in, and out"]
    shares = model.classify("a.png", labels, templates=["{}", "an {} in"])[0]
    assert np.ptp(shares) > 0.01
    document = cli("classify", "a.png", *arguments, "--json").json
    assert document["labels"] == labels
    [found] = document["images"]
    assert found["image"] == "a.png" and found["label"] == labels[int(shares.argmax())]
    assert found["probabilities"] == pytest.approx(dict(zip(labels, shares.tolist())), abs=1e-6)

    lines = cli("classify", "a.png", *arguments, "--top", "2").out.splitlines()
    assert lines[0] == "a.png" and len(lines) == 3
    assert lines[1].split()[-2:] == [f"{100 * shares.max():.1f}", "%"]
    assert lines[1].startswith(f"  {labels[int(shares.argmax())]}") and "█" in lines[1]


def test_embed(cli: Qlip, model: qlip.Model, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a dog\n", encoding="utf-8")
    wanted = np.concatenate([model.embed_images(["a.png"]), model.embed_texts(["a cat", "a dog"])])
    arguments = ["a.png", "--text", "a cat", "--texts-file", "texts.txt"]
    document = cli("embed", *arguments).json
    assert document["model"] == model.fingerprint
    names = [(item["name"], item["kind"]) for item in document["embeddings"]]
    assert names == [("a.png", "image"), ("a cat", "text"), ("a dog", "text")]
    vectors = np.array([item["embedding"] for item in document["embeddings"]], np.float32)
    np.testing.assert_array_equal(vectors, wanted)

    assert cli("embed", *arguments, "-o", "v.safetensors").code == 0
    with safe_open("v.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("embeddings"), wanted)
        assert json.loads(file.metadata()["names"]) == ["a.png", "a cat", "a dog"]
    assert cli("embed", *arguments, "-o", "v.npy", "--json").json["vectors"] == 3
    np.testing.assert_array_equal(np.load("v.npy", allow_pickle=False), wanted)
    assert json.loads(Path("v.json").read_text())["kinds"] == ["image", "text", "text"]


def test_info_of_a_model(cli: Qlip, model: qlip.Model, talking: Path) -> None:
    document = cli("info", talking, "--json", plain=True).json
    assert document["code"] == {
        "quantizer": "bsq",
        "bits_per_patch": 28,
        "bits_per_token": 14,
        "tokens_per_patch": 2,
        "tokens_per_image": 128,
        "bytes_per_image": 224,
        "compression_ratio": 24 / 28 * 64,
    }
    assert document["parameters"] == sum(w.size for w in model.checkpoint.tensors().values())
    assert document["license"] == "cc-by-4.0" and document["tokenizer"] is True
    assert document["stored_dtypes"] == ["float32"] and "runs" not in document
    text = cli("info", "--dtype", "float64").out
    for line in ("54.9 times less", "random weights, for tests", "numpy, cpu, float64"):
        assert line in text
    document = cli(
        "info", talking, "--backend", "mlx", "--dtype", "int4", "--json", plain=True
    ).json
    # 28 bits are no whole group of weights, so the projection up stays as it was.
    assert "vision_model.quant_embed_post.c_fc" in document["runs"]["unquantized"]


def test_info_of_the_published_size(cli: Qlip, tmp_path: Path) -> None:
    from qlip_cli.info import count_short, towers_of

    towers = towers_of(qlip.PRESETS["qlip-b-16-256"])
    assert count_short(sum(tower["parameters"] for tower in towers)) == "239.4 M"
    assert [tower["layers"] for tower in towers] == [12, 12, None, 12]


def test_info_of_tokens(cli: Qlip, model: qlip.Model) -> None:
    cli("encode", "photos", "-o", "renamed.bin")
    document = cli("info", "renamed.bin", "--json", plain=True).json
    assert document["names"] == ["1.png", "2.jpg", "more/3.png"]
    assert (document["images"], document["grid"], document["length"]) == (3, [8, 8], 28)
    assert document["model"] == model.fingerprint
    assert "224 bytes per image" in cli("info", "renamed.bin", plain=True).out


# -- doctor ------------------------------------------------------------------------------------


class Wrong:
    """The reference, but for a brighter decoder."""

    name, dtypes = "numpy", ("float32",)

    def version(self) -> str:
        return "0"

    def devices(self) -> list[str]:
        return ["cpu"]

    def network(self, config, weights, *, device, dtype):  # type: ignore[no-untyped-def]
        from qlip_core.reference import ReferenceNetwork

        class Network(ReferenceNetwork):
            def decode(self, codes: np.ndarray) -> np.ndarray:
                return super().decode(codes) + np.float32(1e-3)

        return Network(config, weights, dtype)


def test_doctor_finds_every_backend_healthy(cli: Qlip) -> None:
    document = cli("doctor", "--json", plain=True).json
    assert document["ok"] is True
    assert [report["name"] for report in document["backends"]] == ["mlx", "numpy", "torch"]
    for report in document["backends"]:
        for test in report["tests"]:
            assert test["bits"] == 4 * 64 * 28 and test["bits_wrong"] == 0
            assert 0 < test["u_difference"] < 1e-5 and 0 < test["pixel_difference"] < 1e-4


def test_doctor_fails_a_backend_that_is_wrong(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlip_core.get_backend", lambda name: Wrong())
    run = cli("doctor", "--backend", "numpy", plain=True)
    assert run.code == 1 and "FAILED" in run.out and "1e-03" in run.out


def test_doctor_does_not_mind_what_is_absent(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlip_core.backends.is_installed", lambda name: name == "numpy")
    document = cli("doctor", "--json", plain=True).json
    assert (document["ok"], document["auto"]) == (True, "numpy")
    assert [r["installed"] for r in document["backends"]] == [False, True, False]
    assert document["backends"][0]["hint"] == "pip install 'qlip[mlx]'"


# -- the command itself ------------------------------------------------------------------------


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for command in ("encode", "decode", "reconstruct", "classify", "embed", "info", "doctor"):
        assert f"\n  {command} " in text
        assert main([command, "--help"]) == 0
        assert "Example: qlip" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qlip {qlip.__version__}\n"


def test_bars_leave_room_for_the_percentages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_WIDE", 40)
    terminal.print_bars([("a cat", 1.0), ("a long label for a photograph", 0.0)])
    assert [line[-7:] for line in capsys.readouterr().out.splitlines()] == ["100.0 %", "  0.0 %"]
