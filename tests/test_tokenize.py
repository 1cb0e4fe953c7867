"""`qlip tokenize` and the reader of its shards: nothing lost or doubled, nothing taken for what it is not."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import Qlip, picture, runner
from configurations import random_weights
from PIL import Image
from safetensors import safe_open

import qlip_core as qlip
from qlip_cli.main import main
from qlip_cli.tokenize import place
from qlip_core import bsq
from qlip_core.data import token_shards
from qlip_core.data.background import in_background
from qlip_core.data.draws import stable_hash
from qlip_core.data.permutation import mixed, permute, permuted
from qlip_core.data.samples import Bad, Limits
from qlip_core.data.shards import iter_samples, open_source
from qlip_core.data.tars import write_tar
from qlip_core.data.token_format import Settings
from qlip_core.data.token_shards import TokenShards
from qlip_core.data.token_units import shard_names, units_of
from qlip_core.data.tokenizing import Report, tokenize
from qlip_core.errors import DataError, QlipError, TokenFileError
from qlip_core.tensorfile import TensorFile, write_tensors

CAPTIONS = ["ein Kätzchen", "собака 🐶", "猫", "plain", "a\nb", "é" * 300]


def png(seed: int) -> bytes:
    out = io.BytesIO()
    picture(seed, (80, 70)).save(out, "png")
    return out.getvalue()


def samples(first: int, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for n in range(first, first + count):
        caption = f"{CAPTIONS[n % len(CAPTIONS)]} {n}"
        yield f"schlüssel/{n:03d}", {"png": png(n), "txt": caption.encode()}


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four tars of 7, 5, 1 and 6 samples."""
    folder = tmp_path_factory.mktemp("tars")
    first = 0
    for shard, count in enumerate((7, 5, 1, 6)):
        write_tar(folder / f"{shard:03d}.tar", samples(first, count))
        first += count
    return str(folder)


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> qlip.Model:
    return qlip.load(tiny_model, backend="numpy")


def run(model: qlip.Model, location: str, out: Path, batch_size: int = 3, **options) -> Report:
    return tokenize(model, open_source(location), out, batch_size=batch_size, **options)


@pytest.fixture(scope="session")
def whole(tars: str, model: qlip.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes, with mirror images."""
    out = tmp_path_factory.mktemp("tokens") / "whole"
    report = run(model, tars, out, augmentation="flip")
    assert (report.made, report.images, report.encoded, report.skipped.total) == (4, 19, 19, 0)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- what is written -------------------------------------------------------------------------------


def test_tokens_are_the_models_own(tars: str, whole: Path, model: qlip.Model) -> None:
    assert sorted(contents(whole)) == [f"{n:03d}.safetensors" for n in range(4)]
    shards = TokenShards(whole, model.fingerprint)
    assert len(shards) == 19
    found = [s for s in iter_samples(open_source(tars)) if not isinstance(s, Bad)]
    images = [sample.image_bytes for sample in found]
    pixels = model.preprocess(images)
    assert shards.tokens(slice(None)) == model.encode(images)
    mirrored = bsq.pack(model.network.encode(np.ascontiguousarray(pixels[..., ::-1])))
    assert np.array_equal(shards.tokens(slice(None), flipped=True).packed, mirrored)
    assert not np.array_equal(mirrored, shards.tokens(slice(None)).packed)


def test_a_download_that_was_cut_is_made_anew_when_whole(
    tars: str, model: qlip.Model, tmp_path: Path
) -> None:
    cut, out = tmp_path / "tars", tmp_path / "out"
    cut.mkdir()
    data = (Path(tars) / "000.tar").read_bytes()
    (cut / "000.tar").write_bytes(data[: len(data) // 2 + 100])
    first = run(model, str(cut), out)
    assert first.skipped.counts["broken archive"] == 1 and first.images < 7
    (cut / "000.tar").write_bytes(data)
    second = run(model, str(cut), out)
    assert (second.made, second.images, second.skipped.total) == (1, 7, 0)


def test_captions_and_keys_come_back(whole: Path) -> None:
    shards = TokenShards(whole)
    captions = [f"{CAPTIONS[n % 6]} {n}" for n in range(19)]
    keys = [f"schlüssel/{n:03d}" for n in range(19)]
    assert shards.captions(slice(None)) == captions
    assert shards.keys(slice(None)) == keys
    assert shards.captions([18, 0, -7, 12]) == [captions[n] for n in (18, 0, 12, 12)]
    tokens = shards.tokens([12, 3])
    assert tokens.names == (keys[12], keys[3])
    assert (tokens.length, tokens.grid) == (28, (8, 8))
    assert shards.tokens(5) == shards.tokens(slice(5, 6))
    assert len(shards.tokens([])) == 0
    with pytest.raises(IndexError, match="image 19 of 19"):
        shards.tokens(19)
    with pytest.raises(TypeError, match="integers"):
        shards.tokens(np.zeros(19, bool))


def test_any_tool_reads_a_shard(tars: str, whole: Path, model: qlip.Model) -> None:
    with safe_open(whole / "001.safetensors", "np") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: (str(t.dtype), t.shape[0]) for name, t in tensors.items()} == {
        "bits": ("uint8", 5),
        "bits_flipped": ("uint8", 5),
        "captions": ("uint8", tensors["caption_offsets"][-1]),
        "caption_offsets": ("int64", 6),
        "keys": ("uint8", 5 * len("schlüssel/000".encode())),
        "key_offsets": ("int64", 6),
    }
    assert tensors["bits"].shape == (5, 8 * 8 * 28 // 8)
    begin, end = tensors["caption_offsets"][1:3]
    assert tensors["captions"][begin:end].tobytes().decode() == f"{CAPTIONS[2]} 8"
    assert json.loads(meta.pop("preprocessing")) == model.preprocessing.to_dict()
    assert meta == {
        "format": "qlip-token-shard",
        "version": "1",
        "model": model.fingerprint,
        "length": "28",
        "grid": "8x8",
        "dtype": "float32",
        "augmentation": "flip",
        "source": tars,
        "shard": f"{tars}/001.tar",
        "shard_bytes": str(Path(tars, "001.tar").stat().st_size),
        "shard_number": "1 of 4",
        "count": "5",
        "skipped": '{"counts": {}, "named": []}',
        "backend": "numpy",
        "qlip": qlip.__version__,
    }


def test_a_key_that_is_not_unicode_keeps_its_bytes(tmp_path: Path, model: qlip.Model) -> None:
    write_tar(tmp_path / "a.tar", [(b"caf\xe9".decode("utf-8", "surrogateescape"), entry(1))])
    run(model, str(tmp_path / "a.tar"), tmp_path / "out")
    shards = TokenShards(tmp_path / "out")
    assert os.fsencode(shards.keys(0)[0]) == b"caf\xe9"
    with safe_open(tmp_path / "out" / "a.safetensors", "np") as file:
        assert file.get_tensor("keys").tobytes() == b"caf\xe9"


def entry(seed: int) -> dict[str, bytes]:
    return {"png": png(seed), "txt": b"caption"}


def test_labels_come_along_where_there_are_any(tmp_path: Path, model: qlip.Model) -> None:
    """As of a set of classes: a label each, and no caption."""
    write_tar(tmp_path / "0.tar", [("a", {"png": png(0), "cls": b"7\n"}), ("b", {"png": png(1)})])
    write_tar(tmp_path / "1.tar", [("c", {"png": png(2)})])
    labelled = [b'{"label": null}', b'{"label": "x"}', b'{"label": 3}', b'{"label": [1]}']
    entries = [(f"{i}", {"png": png(i), "json": label}) for i, label in enumerate(labelled)]
    write_tar(tmp_path / "2.tar", [*entries, ("4", {**entries[0][1], "cls": b"y"})])
    source = open_source(str(tmp_path), Limits(caption=False))
    tokenize(model, source, tmp_path / "out")
    shards = TokenShards(tmp_path / "out", model.fingerprint)
    assert shards.labels([2, 0, 1]) == ["", "7", ""] and shards.captions([0]) == [""]
    assert "labels" not in shards.headers[1].entries
    assert shards.labels(slice(3, 8)) == ["", "x", "3", "", "y"]


def test_folders_and_parquet_become_shards_too(
    tars: str, tmp_path: Path, model: qlip.Model
) -> None:
    found = [s for s in iter_samples(open_source(tars)) if not isinstance(s, Bad)][:7]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n, sample in enumerate(found):
        (folder / f"{n}.png").write_bytes(sample.image_bytes)
        (folder / f"{n}.txt").write_text(sample.caption, encoding="utf-8")
    columns = {
        "image": [s.image_bytes for s in found],
        "text": [s.caption for s in found],
    }
    for name, rows in (("a", slice(0, 5)), ("b", slice(5, 7))):
        table = pa.table({column: values[rows] for column, values in columns.items()})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    run(model, str(folder), tmp_path / "f", shard_size=3)
    run(model, f"{tmp_path}/{{a,b}}.parquet", tmp_path / "p")
    assert sorted(contents(tmp_path / "f")) == [f"0000{n}.safetensors" for n in range(3)]
    assert sorted(contents(tmp_path / "p")) == ["a.safetensors", "b.safetensors"]
    images = columns["image"]
    for out in ("f", "p"):
        shards = TokenShards(tmp_path / out)
        assert shards.captions(slice(None)) == columns["text"]
        assert shards.tokens(slice(None)) == model.encode(images)
    with pytest.raises(TokenFileError, match=r"00002\.safetensors: not a token shard of this set"):
        run(model, str(folder), tmp_path / "f", shard_size=5)
    # A picture more shifts all that follow.
    (folder / "00.png").write_bytes(images[0])
    (folder / "00.txt").write_text("x")
    with pytest.raises(TokenFileError, match="not what is to be tokenized now"):
        run(model, str(folder), tmp_path / "f", shard_size=3)


def test_names_of_shards() -> None:
    assert shard_names(["/x/a.tar", "/x/b.tar.gz", "http://h/c.tar?token=1/2"]) == ["a", "b", "c"]
    assert shard_names(["pipe:curl -s http://h/000.tar", "s3://b/.x y/001.tgz"]) == ["000", "001"]
    assert shard_names(["/s/a/0.tar", "/s/b/0.tar"]) == ["a_0", "b_0"]
    assert shard_names(["/s/v1.5.tar", "/s/ü:x.parquet"]) == ["v1.5", "ü_x"]
    with pytest.raises(DataError, match="both would become a_b_0"):
        shard_names(["/s/a/b/0.tar", "/s/a_b/0.tar"])


# -- many processes, and one that is killed --------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_all_without_overlap(
    world_size: int, tars: str, whole: Path, model: qlip.Model, tmp_path: Path
) -> None:
    seen: list[str] = []
    for rank in reversed(range(world_size)):
        before = set(contents(tmp_path))
        report = run(model, tars, tmp_path, augmentation="flip", rank=rank, world_size=world_size)
        new = sorted(set(contents(tmp_path)) - before)
        assert new == [f"{n:03d}.safetensors" for n in range(rank, 4, world_size)]
        assert report.made == report.mine == len(new)
        seen += new
        if rank:
            with pytest.raises(TokenFileError, match=r"of 4 token shards: finish"):
                TokenShards(tmp_path)
            assert TokenShards(tmp_path, partial=True).headers
    assert len(seen) == len(set(seen)) == 4
    assert contents(tmp_path) == contents(whole)


KILLED = """
import os, signal, sys
import qlip_core as qlip
from qlip_core.data.shards import open_source
from qlip_core.data.tokenizing import tokenize
model, tars, out, when, after = sys.argv[1:]
left = int(after)
def count(*ignored):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
if when == "written":
    os.fsync = count
tokenize(qlip.load(model, backend="numpy"), open_source(tars), out, batch_size=3,
         augmentation="flip", progress=count if when == "encoded" else None)
"""


@pytest.mark.parametrize(
    ("when", "after", "finished"),
    [("encoded", 2, 0), ("encoded", 4, 1), ("encoded", 7, 3), ("written", 2, 1), ("written", 4, 3)],
)
def test_killed_and_restarted_equals_uninterrupted(
    when: str,
    after: int,
    finished: int,
    tars: str,
    whole: Path,
    tiny_model: Path,
    model: qlip.Model,
    tmp_path: Path,
) -> None:
    arguments = [str(tiny_model), tars, str(tmp_path), when, str(after)]
    path = os.pathsep.join(p for p in sys.path if p)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=os.environ | {"PYTHONPATH": path}
    )
    assert ended.returncode == -signal.SIGKILL
    left = contents(tmp_path)
    hidden = [name for name in left if name.startswith(".")]
    assert len(hidden) == (when == "written")
    assert len(left) - len(hidden) == finished
    reached: list[int] = []
    report = run(model, tars, tmp_path, augmentation="flip", progress=reached.append)
    assert (report.made, report.images) == (4 - finished, 19)
    assert sum(reached) == report.encoded == 19 - sum((7, 5, 1, 6)[:finished])
    assert contents(tmp_path) == contents(whole)
    again = run(model, tars, tmp_path, augmentation="flip")
    assert (again.made, again.images, again.encoded) == (0, 19, 0)


def test_other_processes_half_written_files_stay(
    tars: str, tmp_path: Path, model: qlip.Model
) -> None:
    for name in (".000.safetensors.0.tmp", ".001.safetensors.0.tmp"):
        (tmp_path / name).write_bytes(b"half")
    run(model, tars, tmp_path, rank=1, world_size=2)
    assert sorted(contents(tmp_path)) == [
        ".000.safetensors.0.tmp",
        "001.safetensors",
        "003.safetensors",
    ]


def test_force_makes_anew(tars: str, tmp_path: Path, model: qlip.Model) -> None:
    run(model, tars, tmp_path)
    assert run(model, tars, tmp_path, augmentation="flip", force=True).made == 4
    assert TokenShards(tmp_path).settings.flips


def test_where_a_process_stands() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8"}
    assert place(None, None, torchrun) == (3, 8)
    assert place(1, 2, torchrun) == (1, 2)
    assert place(None, None, {}) == (0, 1)
    for rank, size, env in ((2, 2, {}), (0, None, {}), (None, 4, {}), (None, None, {"RANK": "x"})):
        with pytest.raises(QlipError, match=r"rank|RANK"):
            place(rank, size, env)
    with pytest.raises(QlipError, match="a world size of 0: at least 1 process"):
        place(0, 0, {})


# -- what is refused -------------------------------------------------------------------------------


def test_tokens_of_another_tokenizer_are_refused(
    tars: str, whole: Path, model: qlip.Model, tmp_path: Path
) -> None:
    with pytest.raises(
        TokenFileError, match=f"another tokenizer .{model.fingerprint}, this one is"
    ):
        TokenShards(whole, "0" * 32)
    other_folder = qlip.save_checkpoint(
        tmp_path / "other", model.config, random_weights(model.config, seed=2)
    )
    other = qlip.load(other_folder, backend="numpy")
    out = tmp_path / "out"
    run(other, tars, out)
    with pytest.raises(TokenFileError, match=r"000\.safetensors: already exists, and its model is"):
        run(model, tars, out)
    # One of each in a folder.
    (out / "002.safetensors").write_bytes((whole / "002.safetensors").read_bytes())
    with pytest.raises(
        TokenFileError, match=r"model is .* and not .*, augmentation is flip and not"
    ):
        TokenShards(out)


def test_shards_of_another_set_are_refused(tars: str, tmp_path: Path, model: qlip.Model) -> None:
    out = tmp_path / "out"
    write_tar(tmp_path / "000.tar", samples(50, 2))
    run(model, str(tmp_path / "000.tar"), out)
    with pytest.raises(TokenFileError, match="not what is to be tokenized now"):
        run(model, tars, out)
    write_tar(tmp_path / "000.tar", samples(50, 9))
    with pytest.raises(TokenFileError, match="not what is to be tokenized now"):
        run(model, str(tmp_path / "000.tar"), out)
    (out / "other.safetensors").write_bytes(b"")
    with pytest.raises(TokenFileError, match=r"other\.safetensors: not a token shard of this set"):
        run(model, str(tmp_path / "000.tar"), out)
    (out / "other.safetensors").write_bytes((out / "000.safetensors").read_bytes())
    with pytest.raises(TokenFileError, match="is shard 0 of its set, as is 000"):
        TokenShards(out)


def test_damaged_shards_are_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "000.safetensors"
    good = TensorFile(whole / "000.safetensors")
    tensors = {name: good.raw(name) for name in good.entries}

    def refused(match: str, changes: dict[str, np.ndarray], **metadata: str) -> None:
        write_tensors(path, tensors | changes, metadata=good.metadata | metadata)
        with pytest.raises(TokenFileError, match=match):
            TokenShards(tmp_path, partial=True).captions(slice(None))

    refused("format is 'x'", {}, format="x")
    refused("version '2'", {}, version="2")
    refused("header is damaged", {}, count="6")
    refused("header is damaged", {}, grid="8x-8")
    refused("header is damaged", {}, skipped="[]")
    refused("header is damaged", {}, augmentation="crop")
    refused("header is damaged", {"bits": tensors["bits"][:, :-1]})
    refused("header is damaged", {"keys": tensors["key_offsets"]})
    for wrong in (-1, 10**9):
        offsets = tensors["caption_offsets"].copy()
        offsets[3] = wrong
        refused("caption_offsets of image 2 are .* damaged", {"caption_offsets": offsets})
    path.write_bytes((whole / "000.safetensors").read_bytes()[:-1])
    with pytest.raises(TokenFileError, match="cut short or damaged"):
        TokenShards(path)
    with pytest.raises(TokenFileError, match="no token shards"):
        (tmp_path / "empty").mkdir()
        TokenShards(tmp_path / "empty")
    with pytest.raises(TokenFileError, match="no such file"):
        TokenShards(tmp_path / "absent")
    with pytest.raises(TokenFileError, match="copy them to this machine first"):
        TokenShards("s3://bucket/000.safetensors")


@pytest.mark.parametrize("length", [0x0278, 0x0280, 0x0380, 0x0480, 0x0580])
def test_headers_whose_length_begins_like_a_pickle_are_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"x": np.arange(3, dtype=np.uint8)}
    write_tensors(path, tensors, metadata={"pad": ""})
    short = int.from_bytes(path.read_bytes()[:8], "little")
    write_tensors(path, tensors, metadata={"pad": "x" * (length - short)})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert TensorFile(path).raw("x").tolist() == [0, 1, 2]


def test_a_model_without_bits_is_refused(model: qlip.Model) -> None:
    class Bare:
        config = replace(
            model.config, vision_config=replace(model.config.vision_config, quantizer="none")
        )
        checkpoint = model.checkpoint

    with pytest.raises(QlipError, match='has quantizer "none"'):
        Settings.of(Bare())  # type: ignore[arg-type]
    with pytest.raises(QlipError, match="augmentation 'crop': must be one of none, flip"):
        Settings.of(model, "crop")


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def cli(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Qlip:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return runner(tiny_model, capsys)


def test_bad_samples_are_left_out_counted_and_named(
    cli: Qlip, model: qlip.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(
        Path("s.tar"),
        [
            *samples(0, 3),
            ("cut", {"png": png(3)[:-80], "txt": b"cut"}),
            ("wordless", {"png": png(4)}),
            ("text", {"png": b"no image", "txt": b"text"}),
            *samples(6, 2),
        ],
    )
    ran = cli("tokenize", "s.tar", "-o", "out", "--batch-size", 4, "--json")
    assert ran.code == 1
    assert {k: ran.json[k] for k in ("images", "encoded_now", "made_now", "own_shards")} == {
        "images": 5,
        "encoded_now": 5,
        "made_now": 1,
        "own_shards": 1,
    }
    assert ran.json["skipped"]["counts"] == {"broken image": 2, "no caption": 1}
    named = ran.json["skipped"]["named"]
    assert [line.split(": ")[:2] for line in sorted(named)] == [
        ["s.tar", key] for key in ("cut", "text", "wordless")
    ]
    assert ran.err.startswith("3 of 8 samples left out (broken image: 2, no caption: 1):\n")
    captioned = cli("tokenize", "s.tar", "-o", "all", "--no-captions", "--json")
    assert captioned.json["images"] == 6
    kept = TokenShards("all", model.fingerprint)
    assert dict(zip(kept.keys(slice(None)), kept.captions(slice(None))))["wordless"] == ""
    shards = TokenShards("out", model.fingerprint)
    assert shards.keys(slice(None)) == [f"schlüssel/{n:03d}" for n in (0, 1, 2, 6, 7)]
    assert shards.skipped == ran.json["skipped"]
    # A run with nothing left to do says the same.
    again = cli("tokenize", "s.tar", "-o", "out", "--json")
    assert again.code == 1 and again.json["skipped"] == ran.json["skipped"]
    assert (again.json["encoded_now"], again.json["images"]) == (0, 5)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cli("tokenize", "s.tar", "-o", "out").code == 0


def test_what_the_command_prints(cli: Qlip, tars: str) -> None:
    ran = cli("tokenize", tars, "-o", "out", "--rank", 1, "--world-size", 2)
    assert (ran.code, ran.err) == (0, "")
    lines = [line.split(None, 1) for line in ran.out.splitlines()]
    assert lines[:3] == [
        ["output", "out"],
        ["shards", "2 shards made, of 4 in all (process 1 of 2)"],
        ["images", "11, each 8x8 patches of 28 bits, 224 bytes"],
    ]
    ran = cli("tokenize", tars, "-o", "out")
    assert "2 shards made, 2 already there" in ran.out


def test_info_tells_what_a_shard_holds(
    whole: Path, model: qlip.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sorted(whole.glob("*.safetensors"))[0]
    assert main(["info", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model"] == model.fingerprint and said["bytes_per_image"] == 224
    assert (said["number"], said["length"], said["grid"]) == (0, 28, [8, 8])
    assert said["images"] == len(TokenShards(path, partial=True))


def test_info_tells_what_a_folder_of_shards_holds(
    whole: Path, tmp_path: Path, model: qlip.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(whole), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    shards = TokenShards(whole)
    assert (said["images"], said["shards"], said["of"], said["complete"]) == (
        len(shards), 4, 4, True,
    )  # fmt: skip
    assert (said["model"], said["augmentation"]) == (model.fingerprint, "flip")
    assert said["skipped"] == shards.skipped and said["bytes_per_image"] == 224
    shutil.copytree(whole, tmp_path / "part")
    sorted((tmp_path / "part").iterdir())[0].unlink()
    assert main(["info", str(tmp_path / "part")]) == 0
    assert "3, of 4: `qlip tokenize` has not finished" in capsys.readouterr().out


def test_a_shard_that_cannot_be_read_is_left_for_the_next_run(cli: Qlip, tars: str) -> None:
    Path("t").mkdir()
    Path("t/b.tar").mkdir()
    Path("t/a.tar").write_bytes(Path(tars, "000.tar").read_bytes())
    ran = cli("tokenize", "t", "-o", "out")
    assert ran.code == 1
    assert "1 of 2 shards could not be read" in ran.err and "b.tar: cannot be read" in ran.err
    assert sorted(contents(Path("out"))) == ["a.safetensors"]
    Path("t/b.tar").rmdir()
    Path("t/b.tar").write_bytes(Path(tars, "002.tar").read_bytes())
    assert cli("tokenize", "t", "-o", "out").code == 0
    assert len(TokenShards("out")) == 8


def test_what_a_user_did_wrong(cli: Qlip, tars: str) -> None:
    write_tar(Path("wordless.tar"), [("a", {"png": png(1)})])
    Path("file").write_text("x")
    Path("file.PNG").write_bytes(png(1))
    Path("cut").mkdir()
    Path("cut/000.safetensors").write_bytes(b"x")
    for arguments, message in (
        (["wordless.tar", "-o", "out"], "(no caption: 1): --no-captions --force takes"),
        (["absent.tar", "-o", "out"], "absent.tar: no such file or folder"),
        ([tars, "-o", "file"], "file: exists and is not a folder"),
        (["file.PNG", "-o", "out"], "file.PNG: is an image: name the folder of the images"),
        ([tars, "-o", "cut"], "to make it again, delete it and run the same command again"),
        ([tars, "-o", "absent/out"], "absent does not exist"),
        ([tars], "missing option"),
        ([tars, "-o", "o", "--augmentation", "crop"], "must be one of none, flip"),
        ([tars, "-o", "o", "--rank", 2, "--world-size", 2], "rank 2 of 2: ranks run from 0 to 1"),
        ([tars, "-o", "o", "--rank", 2], "--world-size is missing"),
    ):
        ran = cli("tokenize", *arguments)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.count("error: ") == 1 and message in ran.err.splitlines()[-1], ran.err


# -- the reader's order ----------------------------------------------------------------------------


def test_permuted_is_permute() -> None:
    for count, key in ((1, 5), (2, 2**64 - 1), (19, 7), (1000, 12345), (2**33 + 5, 2**63)):
        positions = np.unique(np.linspace(0, count - 1, 50).astype(np.int64))
        want = [permute(int(p), count, key) for p in positions]
        assert permuted(positions, count, key).tolist() == want
    assert sorted(permuted(np.arange(1000), 1000, 3).tolist()) == list(range(1000))


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_epoch_visits_each_image_once(whole: Path, world_size: int) -> None:
    shards = TokenShards(whole)
    row: list[int] = []
    readers = [
        shards.batches(4, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    while len(row) < 3 * 19:
        for reader in readers:
            row += next(reader).indices.tolist()
    epochs = [row[19 * e : 19 * (e + 1)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        key = stable_hash(f"tokens seed 5 epoch {number}")
        assert epoch == [permute(offset, 19, key) for offset in range(19)]
        assert sorted(epoch) == list(range(19))
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_resume_at_any_step(whole: Path) -> None:
    def taken(shards: TokenShards, start: int, count: int, seed: int = 3) -> list[tuple]:
        reader = shards.batches(5, seed=seed, start=start, rank=1, world_size=2)
        return [
            (b.tokens.packed.tobytes(), b.captions, b.tokens.names, b.flipped.tolist())
            for b in itertools.islice(reader, count)
        ]

    shards = TokenShards(whole)
    unbroken = taken(shards, 0, 9)
    assert taken(TokenShards(whole), 0, 4) + taken(TokenShards(whole), 4, 5) == unbroken
    assert taken(pickle.loads(pickle.dumps(shards)), 2, 3) == unbroken[2:5]
    assert taken(shards, 0, 9, seed=4) != unbroken
    batch = shards.batch(6, 5, seed=3, rank=1, world_size=2)
    assert batch.captions == tuple(shards.captions(batch.indices))
    assert batch.tokens == shards.tokens(batch.indices, flipped=batch.flipped)


def test_mirror_images_are_drawn_for_each_place(whole: Path) -> None:
    shards = TokenShards(whole)
    drawn = np.concatenate([shards.batch(n, 64, seed=1).flipped for n in range(30)])
    places = np.arange(len(drawn), dtype=np.uint64)
    want = mixed(places, stable_hash("tokens seed 1 flip")) < np.uint64(2**63)
    assert np.array_equal(drawn, want)
    assert 0.45 < drawn.mean() < 0.55
    assert not shards.batch(0, 64, flip=0.0).flipped.any()
    assert shards.batch(0, 64, flip=1.0).flipped.all()


def test_more_shards_than_are_mapped_at_a_time(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = TokenShards(whole).batch(0, 19)
    monkeypatch.setattr(token_shards, "MAX_MAPPED", 1)
    got = TokenShards(whole).batch(0, 19)
    assert got.tokens == want.tokens and got.captions == want.captions


def test_a_file_that_changes_under_the_reader(tars: str, tmp_path: Path, model: qlip.Model) -> None:
    run(model, tars, tmp_path)
    shards = TokenShards(tmp_path)
    run(model, tars, tmp_path, augmentation="flip", force=True)
    with pytest.raises(TokenFileError, match="when the set was opened: open it again"):
        shards.tokens(0)


def test_sets_without_mirror_images_or_images(tars: str, tmp_path: Path, model: qlip.Model) -> None:
    run(model, tars, tmp_path / "plain")
    shards = TokenShards(tmp_path / "plain")
    assert not shards.batch(0, 64).flipped.any()
    with pytest.raises(ValueError, match="without mirror images"):
        shards.tokens([0], flipped=True)
    with pytest.raises(ValueError, match=r"rank \(=2\)"):
        shards.batch(0, 4, rank=2, world_size=2)
    write_tar(tmp_path / "empty.tar", [("a", {"png": png(1)})])
    run(model, str(tmp_path / "empty.tar"), tmp_path / "empty")
    empty = TokenShards(tmp_path / "empty")
    assert (len(empty), empty.captions(slice(None))) == (0, [])
    with pytest.raises(TokenFileError, match="holds no image"):
        empty.batch(0, 4)


# -- the thread that reads ahead -------------------------------------------------------------------


def test_in_background_keeps_order_errors_and_closes() -> None:
    closed: list[str] = []

    def numbers(stop: int | None, name: str) -> Generator[int, None, None]:
        try:
            for n in itertools.count():
                if n == stop:
                    raise DataError("broken")
                yield n
        finally:
            closed.append(name)

    source = in_background(numbers(5, "first"), 2)
    assert list(itertools.islice(source, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="broken"):
        next(source)
    source = in_background(numbers(None, "second"), 2)
    assert next(source) == 0
    source.close()
    assert closed == ["first", "second"]


def test_an_error_of_the_model_ends_a_run(tars: str, tmp_path: Path, tiny_model: Path) -> None:
    model = qlip.load(tiny_model, backend="numpy")

    def fail(pixels: np.ndarray) -> np.ndarray:
        raise MemoryError

    model.network.encode = fail  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        run(model, tars, tmp_path)
    assert contents(tmp_path) == {}


def test_units_follow_the_input(tars: str) -> None:
    units = units_of(open_source(tars))
    assert [(u.name, u.parts, u.origin.number, u.origin.of) for u in units] == [
        (f"{n:03d}", range(n, n + 1), n, 4) for n in range(4)
    ]


def test_pictures_are_pictures() -> None:
    """The fixtures' images differ, so that a mix-up of rows cannot pass unseen."""
    decoded = [np.asarray(Image.open(io.BytesIO(png(n)))).tobytes() for n in range(19)]
    assert len(set(decoded)) == 19
