"""`qlip generate`, and what `qlip info` reads back from its pictures."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import Qlip, runner
from configurations import random_weights
from PIL import Image

import qlip_core as qlip
from qlip_cli.generate import check_sheet, picture_names, sheet_of, token_path
from qlip_cli.inputs import read_entries
from qlip_cli.outputs import save_picture
from qlip_cli.provenance import text_chunks
from qlip_core.evaluation import read_prompts
from qlip_core.evaluation.examples import read_classes
from qlip_core.generator.architecture import init_weights
from qlip_core.generator.checkpoint import save_generator
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.generate import TokenDrawer
from qlip_core.generator.sampling import Sampling
from qlip_core.hub import find_model, model_name


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The tiny preset with a generator of random weights."""
    tiny = qlip.PRESETS["tiny"]
    ids = {"bos_token_id": 518, "eos_token_id": 519, "pad_token_id": 519}
    config = replace(tiny, text_config=replace(tiny.text_config, **ids))
    folder = tmp_path_factory.mktemp("drawing") / "tiny"
    qlip.save_checkpoint(
        folder, config, random_weights(config, seed=1), tokenizer_from=tokenizer_folder
    )
    ours = GeneratorConfig(
        32, 1, 2, group_size=7, prefix_length=8, sampling=Sampling(cfg_scale=2.0)
    ).fitted(config, qlip.open_checkpoint(folder).fingerprint)
    weights = {name: 4 * values for name, values in init_weights(ours).items()}
    save_generator(folder / "generator", ours, weights)
    return folder


@pytest.fixture
def cli(
    drawing: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Qlip:
    monkeypatch.chdir(tmp_path)
    return runner(drawing, capsys)


@pytest.fixture(scope="module")
def model(drawing: Path) -> qlip.Model:
    return qlip.load(drawing, backend="numpy")


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_one_picture_with_its_history(cli: Qlip, model: qlip.Model) -> None:
    run = cli("generate", "a cät", "--seed", "3", "--top-k", "9", "--save-tokens")
    assert (run.code, run.err) == (0, "")
    assert run.out == "a-cät-3.png: 1 picture, 64x64 pixels, seed 3\na-cät-3.qlip: their tokens\n"
    expected = model.generate("a cät", seed=3, top_k=9)
    np.testing.assert_array_equal(pixels("a-cät-3.png"), expected[0])
    tokens = qlip.VisualTokens.load("a-cät-3.qlip")
    assert tokens == model.generate_tokens("a cät", seed=3, top_k=9)
    record = cli("info", "a-cät-3.png", "--json", plain=True).json
    assert record == {
        "picture": "a-cät-3.png",
        "prompt": "a cät",
        "number": 0,
        "seed": 3,
        "settings": {
            "temperature": 1.0,
            "top_k": 9,
            "top_p": 1.0,
            "cfg_scale": 2.0,
            "cfg_schedule": "constant",
            "cfg_interval": [0.0, 1.0],
        },
        "model": "tiny",
        "fingerprint": model.fingerprint,
        "generator": "tiny",
        "generator_fingerprint": model.generator and model.generator.fingerprint,
        "backend": "numpy",
        "device": "cpu",
        "dtype": "float32",
        "qlip": qlip.__version__,
    }
    assert Image.open("a-cät-3.png").text["Description"] == "a cät"  # type: ignore[attr-defined]
    text = cli("info", "a-cät-3.png", plain=True).out
    said = [line.split() for line in text.splitlines()]
    assert ["prompt", "a", "cät"] in said and ["top_k", "9"] in said


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_other_backends_draw_the_same(cli: Qlip, model: qlip.Model, backend: str) -> None:
    assert cli("generate", "a cat", "--backend", backend, "-o", "x").code == 0
    difference = pixels("x.png").astype(int) - model.generate("a cat")[0]
    assert np.abs(difference).max() <= 1


def test_several_go_to_a_folder(cli: Qlip, model: qlip.Model) -> None:
    Path("prompts.txt").write_bytes(b"a dog\r\n\r a cat \n")
    run = cli("generate", "", "--prompts-file", "prompts.txt", "-n", "2", "--json")
    assert (run.code, run.err) == (0, "")
    names = ["picture-0-1", "picture-0-2", "a-dog-0-1", "a-dog-0-2", "a-cat-0-1", "a-cat-0-2"]
    assert run.json["files"] == [f"generated/{name}.png" for name in names]
    assert [d["prompt"] for d in run.json["drawn"]] == ["", "", "a dog", "a dog", "a cat", "a cat"]
    expected = model.generate(["", "a dog", "a cat"], n=2)
    for name, picture in zip(run.json["files"], expected):
        np.testing.assert_array_equal(pixels(name), picture)
    record = cli("info", "generated/a-dog-0-2.png", "--json", plain=True).json
    assert (record["prompt"], record["number"]) == ("a dog", 1)
    assert sorted(p.name for p in Path().iterdir()) == ["generated", "prompts.txt"]


def test_prompts_from_stdin(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("a cät\n\na dog\r\n".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    run = cli("generate", "--prompts-file", "-", "--json")
    assert [each["prompt"] for each in run.json["drawn"]] == ["a cät", "a dog"]


def test_a_prompt_ends_with_its_line(tmp_path: Path) -> None:
    said = ["a\u2028b", "c\x85d\x0be\x1cf", "g"]
    (tmp_path / "prompts.txt").write_bytes("\r\n".join(said).encode())
    assert read_entries(tmp_path / "prompts.txt") == said
    assert [p.text for p in read_prompts(tmp_path / "prompts.txt").prompts] == said
    (tmp_path / "classes.tsv").write_text("0\ta\u2028b\n", encoding="utf-8")
    assert read_classes(tmp_path / "classes.tsv") == {"0": "a\u2028b"}


def test_the_bundled_model_is_called_what_is_asked_for() -> None:
    bundled = find_model(None)
    assert (model_name(bundled), model_name(bundled / "generator")) == ("bundled", "bundled")
    assert model_name(Path("x/models--a--b/snapshots/c/generator")) == "a/b"
    assert model_name(Path("runs/generator")) == "generator"
    assert model_name(Path()) == Path.cwd().name


def test_a_sheet(cli: Qlip, model: qlip.Model) -> None:
    run = cli("generate", "a dog", "a cat", "-n", "3", "--grid", "-o", "sheet.png")
    assert run.code == 0
    sheet = pixels("sheet.png")
    assert sheet.shape == (2 * 64 + 2, 3 * 64 + 4, 3)
    expected = model.generate(["a dog", "a cat"], n=3)
    np.testing.assert_array_equal(sheet[66:, 132:], expected[5])
    assert (sheet[64:66] == 255).all()
    record = cli("info", "sheet.png", "--json", plain=True).json
    assert record["prompts"] == ["a dog"] * 3 + ["a cat"] * 3


def test_a_sheet_and_tokens_beside_and_in_a_folder(cli: Qlip) -> None:
    Path("v1.2").mkdir()
    drawn = cli("generate", "a cat", "-n", "2", "--grid", "-o", "v1.2")
    assert (drawn.code, drawn.out.split(":")[0]) == (0, "v1.2/a-cat-0.png")
    assert pixels("v1.2/a-cat-0.png").shape == (64, 130, 3)
    # As a variable of the shell that is not set: this folder, not the root.
    drawn = cli("generate", "a cat", "-n", "2", "--grid", "-o", "")
    assert (drawn.code, drawn.out.split(":")[0]) == (0, "a-cat-0.png")
    assert cli("generate", "b", "c", "-o", "v1.2", "--save-tokens").code == 0
    assert Path("v1.2.qlip").is_file()
    with pytest.raises(qlip.QlipError, match="has no place beside it"):
        token_path(Path("/"), False)
    assert cli("generate", "a cat", "-o", "new/").code == 0
    assert Path("new/a-cat-0.png").is_file() and not Path("new.png").exists()
    jpeg = cli("generate", "a cat", "-o", "x.jpg")
    assert jpeg.code == 0 and "only a PNG keeps the prompt" in jpeg.err
    assert "x.jpg: not a PNG" in cli("info", "x.jpg", plain=True).err


def test_a_damaged_generator_stops_drawing_alone(
    cli: Qlip, model: qlip.Model, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model.checkpoint.folder, folder)
    (folder / "generator" / "model.safetensors").unlink()
    Image.new("RGB", (64, 64)).save("a.png")
    given = ["--model", str(folder), "--backend", "numpy"]
    assert cli("encode", "a.png", *given, plain=True).code == 0
    assert "unusable" in cli("info", str(folder), plain=True).out
    drawn = cli("generate", "a cat", *given, plain=True)
    assert drawn.code == 2 and "generator" in drawn.err


def test_a_generators_folder_is_described(cli: Qlip, model: qlip.Model) -> None:
    folder = model.checkpoint.folder / "generator"
    said = cli("info", folder, "--json", plain=True).json
    assert said["generator"] == str(folder) and said["tokenizer"] == model.fingerprint
    assert (said["layers"], said["width"], said["conditioner"]) == (1, 32, "qlip-text")
    assert said["sampling"]["cfg_scale"] == 2.0
    text = cli("info", folder, plain=True).out
    lines = [line.split() for line in text.splitlines()]
    assert ["tokenizer", model.fingerprint] in lines and ["cfg_scale", "2.0"] in lines


def test_sheets_are_near_to_square() -> None:
    for count, number, shape in ((5, 1, (2, 3)), (4, 4, (2, 2)), (6, 2, (3, 2)), (1, 1, (1, 1))):
        rows, columns = shape
        sheet = sheet_of(np.zeros((count, 8, 8, 3), np.uint8), number)
        assert sheet.shape == (rows * 10 - 2, columns * 10 - 2, 3)


def test_sheets_end_where_programs_stop_opening_them(
    cli: Qlip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 130 * 130)
    assert cli("generate", "a", "-n", "4", "--grid", "-o", "x.png").code == 0
    run = cli("generate", "a", "-n", "1000000", "--grid", "-o", "y.png")
    assert "1,000,000 pictures make a sheet of 65,998x65,998 pixels" in run.error
    assert not Path("y.png").exists()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    check_sheet(10**6, 1, 64)


def test_a_record_is_read_from_pictures_of_any_size(
    cli: Qlip, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_picture(Path("x.png"), np.zeros((9, 9, 3), np.uint8), text_chunks({"a": 1, "qlip": "0"}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert cli("info", "x.png", "--json", plain=True).json == {
        "picture": "x.png",
        "a": 1,
        "qlip": "0",
    }
    whole = Path("x.png").read_bytes()
    at = whole.index(b"qlip\0")
    Path("x.png").write_bytes(whole[:at] + b"Q" + whole[at + 1 :])
    assert "x.png: damaged picture (broken PNG file" in cli("info", "x.png", plain=True).error
    Path("x.png").write_bytes(whole[:40])
    assert "x.png: damaged picture" in cli("info", "x.png", plain=True).error


def test_names_follow_prompts() -> None:
    assert picture_names(["A cat!", "a dog", "a cat", "…"], 5) == [
        "a-cat-5-1.png",
        "a-dog-5.png",
        "a-cat-5-2.png",
        "picture-5.png",
    ]
    # What one prompt is called may be what another's second picture would be.
    assert picture_names(["a", "a", "a 5 1", "a"], 5) == [f"a-5-{n}.png" for n in (1, 2)] + [
        "a-5-1-5.png",
        "a-5-3.png",
    ]
    assert len(set(picture_names(["a cat", "a cat", "a cat 1"], 1))) == 3
    [long] = picture_names(["x" * 500], 0)
    assert len(long) == 66


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], 'no prompts: give some, as in `qlip generate "a cat"`'),
        (["a", "--seed", "x"], "invalid value for '--seed'"),
        (["a", "--seed"], "requires an argument; see the command's --help"),
        (["a", "--seed", "-1"], "seed (=-1) must be 0 to 2^64 - 1"),
        (["a", "--top-k", "129"], "top_k (=129) must be 0 (all) to 128"),
        (["a", "--top-p", "0"], "top_p (=0.0) must be above 0"),
        (["a", "--cfg-scale", "nan"], "cfg_scale (=nan) must be a number from 0 to 100"),
        (["a", "--cfg-schedule", "cosine"], 'cfg_schedule is "cosine"'),
        (["a", "--prompts-file", "absent.txt"], "absent.txt: cannot be read"),
        (["--prompts-file", "/dev/null"], "/dev/null: no prompts in it"),
        (["a", "--generator", "absent"], "absent: no such folder"),
        (["a", "-o", "a.gif"], "a.gif: pictures are written as one of"),
        (["a", "-o", "/dev/null"], "/dev/null: is a device or a pipe"),
        (["a", "-o", "there.png"], "there.png: already exists"),
        (["a", "b", "-o", "two.png"], "two.png: is the name of one picture, and these are 2"),
        (["a", "-n", "4294967295"], "one command draws at most 1,000,000"),
        (["a", "--temperature", "1e-40"], "temperature (=1e-40) must be 0 (the likeliest) or"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    cli: Qlip, arguments: list[str], message: str
) -> None:
    Path("there.png").write_bytes(b"")
    run = cli("generate", *arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ") and message in run.err and run.err.count("\n") == 1
    assert [p.name for p in Path().iterdir()] == ["there.png"]


def test_cut_prompts_are_told(cli: Qlip) -> None:
    run = cli("generate", "cat " * 10, "-o", "x.png")
    assert run.code == 0 and Path("x.png").exists()
    assert run.err.startswith("warning: prompt ") and run.err.endswith("its end is cut\n")


def test_words_that_the_bundled_model_never_saw_are_told(
    cli: Qlip, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", "a cat", "a zorse", "-o", "x")
    assert cli(*command).err == ""
    monkeypatch.setattr("qlip_core.hub.BUNDLED", drawing)
    assert cli(*command, "--force").err.startswith(
        "warning: the bundled model was never trained on zorse:"
    )


def test_cut_prompts_are_told_before_the_work(
    cli: Qlip, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    monkeypatch.setattr(
        TokenDrawer, "_rows", lambda *_: written.append(capsys.readouterr().err) or 1 / 0
    )
    assert cli("generate", "cat " * 10, "-o", "x.png").code == 70
    assert written[0].endswith("its end is cut\n")


def test_an_interrupted_run_leaves_nothing(cli: Qlip, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qlip.Model, "decode", interrupted)
    assert cli("generate", "a", "b", "--save-tokens").code == 130
    assert not list(Path().iterdir())


def test_pictures_of_other_origin(cli: Qlip) -> None:
    Image.new("RGB", (4, 4)).save("plain.png")
    run = cli("info", "plain.png", plain=True)
    assert run.code == 2 and "no record of how it was drawn" in run.err
    assert cli("info", "--json").json["generator"]["tokens_per_image"] == 256
