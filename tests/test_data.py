"""Reading sets of captioned pictures, and the training loader over them: order, splits, resuming, bounds."""

import functools
import gzip
import http.server
import io
import json
import os
import pickle
import re
import signal
import socketserver
import subprocess
import sys
import tarfile
import threading
import time
import types
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from qlip_cli.data import report_lines
from qlip_core.data import locations, parquet
from qlip_core.data.check import check
from qlip_core.data.draws import Draws
from qlip_core.data.emoji_names import CLASS_NAMES_100, all_glyphs
from qlip_core.data.parquet import ParquetSource
from qlip_core.data.permutation import permute
from qlip_core.data.samples import Bad, Limits, Sample, label_of
from qlip_core.data.shards import FolderSource, TarSource, iter_samples, open_source
from qlip_core.data.tars import split_name, tar_samples, write_tar
from qlip_core.errors import DataError, RecipeError
from qlip_core.evaluation.examples import Example, StoredExamples
from qlip_core.preprocessing import Preprocessing
from qlip_torch.train.checkpoints import Checkpoints
from qlip_torch.train.data import Batch, DataConfig, Loader, Source, make_loader, merge_states
from qlip_torch.train.distributed import World
from qlip_torch.train.lanes import ShuffledStream
from qlip_torch.train.order import Mixture, epoch_index
from qlip_torch.train.pictures import Augmentation, Normalizer
from qlip_torch.train.sources import EmojiSource

SIZE = 16


class FakeTokenizer:
    """First bytes of the text: enough to tell captions apart, and it goes to worker processes."""

    def __call__(self, texts) -> np.ndarray:
        out = np.zeros((len(texts), 12), np.int64)
        for row, text in zip(out, texts):
            ids = list(text.encode()[:12])
            row[: len(ids)] = ids
        return out


def png(level: int, width: int = 20, height: int = 18) -> bytes:
    """A picture that no other level or size equals."""
    ramp = np.arange(width * height * 3).reshape(height, width, 3)
    out = io.BytesIO()
    Image.fromarray(((ramp + level * 7) % 256).astype(np.uint8)).save(out, "png")
    return out.getvalue()


def good(number: int) -> tuple[str, dict[str, bytes]]:
    return f"{number:06d}", {
        "png": png(number),
        "txt": f"picture {number}".encode(),
        "json": json.dumps({"n": number}).encode(),
    }


def make_shards(folder: Path, shards: int, each: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        write_tar(folder / f"{shard:03d}.tar", (good(shard * each + i) for i in range(each)))
    return str(folder)


def loader_for(data: DataConfig, batch_size: int = 8, **places) -> Loader:
    return make_loader(
        data,
        image_size=SIZE,
        tokenizer=FakeTokenizer(),
        batch_size=batch_size,
        **places,
    )


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def assert_same(got: list[Batch], want: list[Batch]) -> None:
    assert [b.keys for b in got] == [b.keys for b in want]
    for a, b in zip(got, want):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.pixels, b.pixels)


# -- addresses -------------------------------------------------------------------------------------


def test_braces_and_globs(tmp_path):
    assert locations.expand_braces("s3://b/{00008..00011}.tar") == [
        f"s3://b/{n:05d}.tar" for n in (8, 9, 10, 11)
    ]
    assert locations.expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert locations.expand_braces("{9..10}") == ["9", "10"]
    assert locations.expand_braces("plain.tar") == ["plain.tar"]
    with pytest.raises(DataError, match="over the limit"):
        locations.expand_braces("{0..99999999}")
    with pytest.raises(DataError, match="over the limit"):
        locations.expand_braces("{0..999}{0..999}{0..999}")
    make_shards(tmp_path, 3, 1)
    source = open_source(f"{tmp_path}/00*.tar")
    assert isinstance(source, TarSource)
    assert [Path(s).name for s in source.shards] == ["000.tar", "001.tar", "002.tar"]
    assert open_source(f"{tmp_path}/{{000..002}}.tar").shards == source.shards  # type: ignore[union-attr]
    assert open_source(f"file://{tmp_path}/001.tar").kind == "tar"
    with pytest.raises(DataError, match=r"003\.tar: no such file"):
        open_source(f"{tmp_path}/{{000..004}}.tar")
    with pytest.raises(DataError, match="no file matches"):
        open_source(f"{tmp_path}/x*.tar")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "._000.tar").touch()  # as macOS adds on disks of other systems
    (tmp_path / "empty" / ".Trashes").mkdir()
    (tmp_path / "empty" / ".Trashes" / "000.tar").touch()
    with pytest.raises(DataError, match="no tars, parquet files or images"):
        open_source(str(tmp_path / "empty"))


def test_a_path_that_looks_like_a_pattern_is_a_path(tmp_path):
    folder = tmp_path / "a[1]{b,c}"
    make_shards(folder, 1, 2)
    assert len(list(iter_samples(open_source(str(folder))))) == 2


# -- tars ------------------------------------------------------------------------------------------


def read(data: bytes, **options) -> list[tuple[int, Sample | Bad]]:
    limits = options.pop("limits", Limits())
    return list(tar_samples(io.BytesIO(data), "t.tar", limits, **options))


def tar_of(entries: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5  # img2dataset's writer leaves fractions, which makes pax headers
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_grouped_by_key_in_every_tar_dialect(kind):
    long = "d/" * 60 + "ключ"
    if kind == tarfile.USTAR_FORMAT:
        long = "d/" * 40 + "kljutsch"
    data = tar_of(
        [
            ("a.jpg", png(1)),
            ("a.txt", b"\xef\xbb\xbf one \n"),
            ("a.json", b'{"w": 3}'),
            (f"{long}.webp", png(2)),
            (f"{long}.txt", b"two"),
            ("x/b.c.png", png(3)),  # the extension is "c.png": no image for WebDataset
            ("x/b.txt", b"three"),
            ("__meta__.json", b"{}"),
        ],
        kind,
    )
    for packed in (data, gzip.compress(data)):
        (_, a), (_, b), (_, c) = read(packed)
        assert a == Sample("a", png(1), "one", {"w": 3})
        assert b == Sample(long, png(2), "two", {})
        assert isinstance(c, Bad) and (c.key, c.reason) == ("x/b", "no image")


def test_split_name_is_webdatasets_rule():
    assert split_name("a/b.c.JPG") == ("a/b", "c.jpg")
    assert split_name("a.b/c.txt") == ("a.b/c", "txt")
    assert split_name("plain") is None
    assert split_name(".hidden") is None


def broken_entries() -> list[tuple[str, bytes]]:
    return [
        ("ok1.png", png(1)),
        ("ok1.txt", b"one"),
        ("nocaption.png", png(2)),
        ("empty.png", png(3)),
        ("empty.txt", b" \n"),
        ("noimage.txt", b"words"),
        ("latin.png", png(4)),
        ("latin.txt", b"caf\xe9"),
        ("badjson.png", png(5)),
        ("badjson.json", b"{"),
        ("big.png", png(6) + bytes(20_000)),
        ("big.txt", b"big"),
        ("cut.png", png(7)[:-60]),
        ("cut.txt", b"cut"),
        ("text.jpg", b"this is not an image"),
        ("text.txt", b"text"),
        ("jsoncaption.png", png(8)),
        ("jsoncaption.json", b'{"caption": "from json"}'),
        ("ok1.png", png(9)),  # a key that comes again
        ("ok1.txt", b"again"),
    ]


REASONS = {
    "no caption": 1,
    "empty caption": 1,
    "no image": 1,
    "caption is not UTF-8": 1,
    "metadata is not a JSON object": 1,
    "too large": 1,
    "broken image": 2,
}


def test_check_counts_and_names_what_is_broken(tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_of(broken_entries()))
    ticks = []
    report = check(str(path), limits=Limits(image_bytes=10_000), progress=ticks.append)
    assert ticks == [1] * 11
    assert (report.samples, report.good, report.duplicates) == (11, 3, 1)
    assert report.broken.counts == REASONS
    assert report.duplicate_examples == ["ok1"]
    found = report.to_dict()
    assert found == json.loads(json.dumps(found))
    assert found["formats"] == {"png": 3}
    assert found["width"] == {"min": 20, "median": 20, "max": 20}
    assert found["height"] == {"min": 18, "median": 18, "max": 18}
    assert found["caption_characters"] == {"min": 3, "median": 5, "max": 9}
    assert found["caption_words"] == {"min": 1, "median": 1, "max": 2}
    assert found["image_bytes"] == len(png(1)) + len(png(8)) + len(png(9))
    text = "\n".join(report_lines(report))
    assert "cut: broken image (truncated" in text
    assert "text: broken image (not an image)" in text
    assert f"big: too large (.png of {len(png(6)) + 20_000} bytes, over 10000)" in text


def test_names_and_labels_that_are_not_unicode(tmp_path):
    """A tar's names are bytes, and JSON can hold half of a surrogate pair."""
    odd = [("\udcff.png", png(1)), ("\udcff.txt", b"one"), ("\udcff.json", b'{"label": "\\ud83d"}')]
    path = tmp_path / "s.tar"
    path.write_bytes(tar_of([*odd, *odd]))
    report = check(str(path))
    assert (report.good, report.duplicates) == (2, 1)
    sample, _ = iter_samples(open_source(str(path)))
    assert isinstance(sample, Sample)
    assert sample.key == "\udcff" and label_of(sample.meta) == "?"


def test_a_sample_without_an_image_says_what_it_has(tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_of([("a.gif", png(1)), ("a.txt", b"one"), ("b.png", b""), ("b.txt", b"")]))
    gif, empty = map(str, iter_samples(open_source(str(path))))
    assert gif == f"{path}: a: no image (only .gif, .txt)"
    assert empty == f"{path}: b: broken image (empty file)"
    whole = tar_of([("a.txt", b"one"), ("a.png", png(1))])
    path.write_bytes(whole[: 3 * 512 + 10])  # ends inside the image
    assert str(next(iter_samples(open_source(str(path))))) == f"{path}: a: no image"


def test_the_loader_skips_what_check_names(tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_of(broken_entries()))
    data = DataConfig((Source(str(path)),), workers=0, streams=1, image_megabytes=1)
    loader = loader_for(data, batch_size=4)
    captions = []
    for _ in range(3):  # three passes over four usable pictures: `big` is within a megabyte
        ids = next(loader).ids
        captions.append(sorted(bytes(row[row > 0].tolist()).decode() for row in ids))
    assert captions == [["again", "big", "from json", "one"]] * 3
    loader.close()
    # Those after a pass's last good sample are met in the next one.
    expected = {reason: 3 * n for reason, n in REASONS.items() if reason != "too large"}
    counted = loader.bad.counts
    assert set(counted) == set(expected)
    assert all(expected[r] - REASONS[r] <= counted[r] <= expected[r] for r in expected)
    assert any("latin: caption is not UTF-8 (byte 3)" in name for name in loader.bad.named)


@pytest.mark.parametrize("text", [b'{"label": ', b"[1]", b'"caption"', b'{"x": "' + bytes(2000)])
def test_metadata_beside_a_caption_spoil_nothing(text: bytes, tmp_path: Path) -> None:
    limits = Limits(text_bytes=1000)
    named = [("a.json", text), ("a.png", png(1)), ("a.txt", b"one"), ("a.cls", b"7")]
    (tmp_path / "s.tar").write_bytes(tar_of([*named, ("b.png", png(2)), ("b.json", text)]))
    good, bad = iter_samples(open_source(str(tmp_path / "s.tar"), limits))
    assert good == Sample("a", png(1), "one", {"label": "7"})
    assert isinstance(bad, Bad) and bad.reason in ("too large", "metadata is not a JSON object")
    (tmp_path / "f").mkdir()
    for name, data in (*named, ("b.png", png(2)), ("b.json", text)):
        (tmp_path / "f" / name).write_bytes(data)
    good, bad = iter_samples(open_source(str(tmp_path / "f"), limits))
    assert good == Sample("a", png(1), "one", {})
    assert isinstance(bad, Bad) and bad.reason in ("too large", "metadata is not a JSON object")


def test_member_over_the_limit_is_passed_over_unread(tmp_path):
    """A sparse file that claims 2 GB: it would take minutes and gigabytes if its bytes were wanted."""
    head = tarfile.TarInfo("huge.png")
    head.size = 2**31
    path = tmp_path / "huge.tar"
    with path.open("wb") as file:
        file.write(head.tobuf())
        file.seek(512 + 2**31)
        file.write(tar_of([("ok.png", png(1)), ("ok.txt", b"ok")]))
    huge, ok = iter_samples(open_source(str(path)))
    assert isinstance(huge, Bad) and huge.reason == "too large"
    assert isinstance(ok, Sample) and ok.caption == "ok"


def test_broken_archives_give_what_is_whole_and_one_bad():
    whole = tar_of([(f"{n}.{s}", d) for n in range(3) for s, d in good(n)[1].items()])
    assert [n for n, _ in read(whole)] == [0, 1, 2]
    for cut in range(1, len(whole) - 1024, 97):
        items = read(whole[:cut])
        assert [n for n, _ in items] == list(range(len(items)))
        samples = [item for _, item in items if isinstance(item, Sample)]
        assert all(s.image_bytes == png(i) for i, s in enumerate(samples))
        reasons = [item.reason for _, item in items if isinstance(item, Bad)]
        # On a block's boundary nothing tells a cut from an end, but a sample may lack its caption.
        assert reasons[-1:] == ["broken archive"] or cut % 512 == 0
        assert set(reasons) <= {"broken archive", "no image", "no caption"}
        assert len(reasons) <= 2
    cases = {
        b"": "is empty",
        b"<html>not found</html>" * 100: "no tar header at byte 0",
        whole[:3000] + b"\xff" * 1024 + whole[3000:]: "no tar header",
        gzip.compress(whole)[:-50]: "damaged gzip data",
        b"BZh91AY&SY": "is compressed with bzip2",
    }
    for data, message in cases.items():
        last = read(data)[-1][1]
        assert isinstance(last, Bad) and last.reason == "broken archive"
        assert message in last.detail
    packed = gzip.compress(whole, 0)
    for cut in range(20, len(whole.rstrip(b"\0")), 97):
        last = read(packed[:cut])[-1][1]
        assert isinstance(last, Bad) and "damaged gzip data" in last.detail
    for cut in (2000, 4200, 7000):
        every = read(whole[:cut])
        for n in range(len(every) + 1):
            assert read(whole[:cut], skip=n) == every[n:]
            assert read(whole[:cut], skip=n, part=1, parts=2) == [
                item for item in every[n:] if item[0] % 2 == 1
            ]


def test_headers_that_ask_for_memory_are_refused():
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2**33 - 1
        ((_, bad),) = read(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        assert isinstance(bad, Bad) and "extended header" in bad.detail
    raw = bytearray(tarfile.TarInfo("x.png").tobuf())
    raw[124:136] = b"\xff" * 12  # a size of -1
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    ((_, bad),) = read(bytes(raw))
    assert isinstance(bad, Bad) and "-1 bytes" in bad.detail


def test_names_that_climb_and_links_do_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (
            ("../../evil.png", png(1)),
            ("../../evil.txt", b"climbs"),
            ("/etc/absolute.png", png(2)),
            ("/etc/absolute.txt", b"absolute"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("link.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"link"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "s.tar").write_bytes(out.getvalue())
    before = sorted(p for p in tmp_path.parent.rglob("*"))
    samples = list(iter_samples(open_source("in")))
    take(loader_for(DataConfig((Source("in"),), workers=0, streams=1), 2), 2)
    assert sorted(p for p in tmp_path.parent.rglob("*")) == before
    assert [(s.key, getattr(s, "reason", "")) for s in samples] == [
        ("../../evil", ""),
        ("/etc/absolute", ""),
        ("link", "no image"),
    ]


def test_write_tar_is_deterministic_and_whole_or_absent(tmp_path):
    for name in ("a", "b"):
        assert write_tar(tmp_path / f"{name}.tar", map(good, range(3))) == 3
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()

    def fails():
        yield good(0)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_tar(tmp_path / "c.tar", fails())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_skip_and_parts_address_the_same_samples(tmp_path):
    make_shards(tmp_path, 1, 10)
    source = open_source(str(tmp_path))
    assert isinstance(source, TarSource)
    every = list(source.read_shard(0))
    assert [n for n, _ in every] == list(range(10))
    assert list(source.read_shard(0, skip=7)) == every[7:]
    assert list(source.read_shard(0, skip=4, part=1, parts=3)) == [every[4], every[7]]


# -- other sources ---------------------------------------------------------------------------------


def tars(location: str | Path) -> TarSource:
    source = open_source(str(location))
    assert isinstance(source, TarSource)
    return source


def make_folder(folder: Path, count: int) -> str:
    folder.mkdir(parents=True)
    for number in range(count):
        place = folder / ("sub" if number % 2 else "")
        place.mkdir(exist_ok=True)
        (place / f"{number:03d}.png").write_bytes(png(number))
        (place / f"{number:03d}.txt").write_text(f"picture {number}")
    return str(folder)


def test_folder_source(tmp_path):
    location = make_folder(tmp_path / "f", 4)
    (tmp_path / "f" / "lonely.jpg").write_bytes(png(9))
    (tmp_path / "f" / "big.jpg").write_bytes(bytes(5000))
    source = open_source(location, Limits(image_bytes=4000))
    assert isinstance(source, FolderSource) and source.count == 6
    items = list(iter_samples(source))
    assert [i.key for i in items] == ["000", "002", "big", "lonely", "sub/001", "sub/003"]
    assert items[0] == Sample("000", png(0), "picture 0", {})
    assert [i.reason for i in items if isinstance(i, Bad)] == ["too large", "no caption"]
    report = check(location)
    assert (report.kind, report.shards, report.samples, report.good) == ("folder", None, 6, 4)
    wild = open_source(str(tmp_path / "[f]*"))  # which stands for one folder
    assert next(iter_samples(wild)) == items[0]


def make_parquet(path: Path, rows: int, *, nested: bool = True, start: int = 0) -> str:
    numbers = range(start, start + rows)
    images = [png(n) for n in numbers]
    column = [{"bytes": i, "path": "../../etc/passwd"} for i in images] if nested else images
    captions = [f"picture {n}" for n in numbers]
    table = pa.table({"image": column, ("caption" if nested else "text"): captions})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return str(path)


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_source(tmp_path, nested):
    source = open_source(make_parquet(tmp_path / "p.parquet", 10, nested=nested))
    items = list(iter_samples(source))
    assert items == [Sample(f"p-{n:08d}", png(n), f"picture {n}", {}) for n in range(10)]
    assert len(source.shards) == 3  # type: ignore[union-attr]
    part = list(source.read_shard(1, skip=1, part=1, parts=2))  # type: ignore[union-attr]
    assert part == [(1, items[5]), (3, items[7])]


def test_evaluation_needs_no_captions_and_reads_labels(tmp_path):
    names = ["tench", "a cat"]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table(
        {"image": [{"bytes": png(n)} for n in range(3)], "label": pa.array([1, 0, 1], pa.int64())}
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "p.parquet")
    write_tar(tmp_path / "a.tar", [("x", {"png": png(0), "cls": b"7"}), ("y", {"png": png(1)})])

    def labels_read(name: str, **classes: str) -> list[tuple[str, str]]:
        found = StoredExamples(str(tmp_path / name), classes=classes)
        return [(each.label, each.caption) for each in found if isinstance(each, Example)]

    assert labels_read("p.parquet") == [("a cat", ""), ("tench", ""), ("a cat", "")]
    named = pa.table({"image": [png(0)], "label": pa.array(["hen"], pa.large_string())})
    pq.write_table(named, tmp_path / "named.parquet")
    assert labels_read("named.parquet") == [("hen", "")]
    assert labels_read("a.tar", **{"7": "hen"}) == [("hen", ""), ("", "")]
    with pytest.raises(DataError, match="no column `caption`"):
        open_source(str(tmp_path / "p.parquet"))  # training does need them


def test_parquet_is_read_on_where_a_connection_broke(tmp_path, monkeypatch):
    """Nothing lost, nothing doubled, in any part."""
    import fsspec

    monkeypatch.setattr("qlip_core.data.locations._FIRST_PAUSE", 0.0)
    monkeypatch.setattr("qlip_core.data.parquet._ROWS_AT_ONCE", 2)
    path = make_parquet(tmp_path / "p.parquet", 10)
    items = list(iter_samples(open_source(path)))
    enter, broken = parquet._File.__enter__, []

    def breaking(self):
        file = enter(self)
        batches = file.iter_batches

        def some(*args, **kwargs):
            for number, batch in enumerate(batches(*args, **kwargs)):
                if number == 1 and len(broken) < 3:
                    broken.append("while reading")
                    raise OSError("connection reset")
                yield batch

        if len(broken) == 1:
            broken.append("when opened again")
            raise OSError("network unreachable")
        return types.SimpleNamespace(iter_batches=some)

    fsspec.filesystem("memory").pipe("/p.parquet", Path(path).read_bytes())
    source = open_source("memory://p.parquet")
    assert isinstance(source, ParquetSource)
    monkeypatch.setattr(parquet._File, "__enter__", breaking)
    got = [list(source.read_shard(0, part=p, parts=2)) for p in (0, 1)]
    assert broken == ["while reading", "when opened again", "while reading"]
    assert got == [[(0, items[0]), (2, items[2])], [(1, items[1]), (3, items[3])]]


def test_parquet_faults_are_named(tmp_path):
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(DataError, match=r"no\.parquet: not a readable parquet file"):
        open_source(str(tmp_path / "no.parquet"))
    pq.write_table(pa.table({"picture": [b"x"], "url": ["u"]}), tmp_path / "img.parquet")
    with pytest.raises(DataError, match="no column `image`; columns: picture, url"):
        open_source(str(tmp_path / "img.parquet"))
    pq.write_table(
        pa.table(
            {
                "image": [None, {"bytes": None}, {"bytes": bytes(9000)}, {"bytes": png(1)}],
                "caption": ["a", "b", "c", None],
            }
        ),
        tmp_path / "holes.parquet",
    )
    items = list(iter_samples(open_source(str(tmp_path / "holes.parquet"), Limits(8000))))
    reasons = [item.reason for item in items if isinstance(item, Bad)]
    assert reasons == ["no image", "no image", "too large", "no caption"]


def test_tars_win_over_the_parquet_that_img2dataset_leaves(tmp_path):
    make_shards(tmp_path, 2, 2)
    pq.write_table(pa.table({"url": ["u"]}), tmp_path / "000.parquet")
    assert open_source(str(tmp_path)).kind == "tar"


@pytest.fixture
def server(tmp_path):
    """(address, folder, a list of statuses to answer with before serving)."""
    faults: list[int] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if not faults:
                return super().do_GET()
            kind = faults.pop(0)
            if kind > 0:
                return self.send_error(kind)
            # A transfer that breaks off after -kind bytes.
            data = (tmp_path / "web" / self.path.strip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:-kind])
            return None

        def log_message(self, format, *args):
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    with socketserver.ThreadingTCPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", folder, faults
        httpd.shutdown()
        thread.join()


def test_http_source_equals_the_local_one(server, monkeypatch):
    monkeypatch.setattr("qlip_core.data.locations._FIRST_PAUSE", 0.0)
    address, folder, faults = server
    make_shards(folder, 3, 5)
    local = list(iter_samples(open_source(str(folder))))
    assert list(iter_samples(open_source(f"{address}/{{000..002}}.tar"))) == local
    # A connection that breaks twice within a shard: nothing lost, nothing doubled, no bad sample.
    faults += [503, -3000, -7000, 500]
    assert list(iter_samples(open_source(f"{address}/000.tar"))) == local[:5]
    data = DataConfig((Source(f"{address}/{{000..002}}.tar"),), workers=0, streams=1)
    here = DataConfig((Source(f"{folder}/{{000..002}}.tar"),), workers=0, streams=1)
    assert_same(take(loader_for(data, 4), 5), take(loader_for(here, 4), 5))


def test_http_faults_are_named(server, monkeypatch):
    monkeypatch.setattr("qlip_core.data.locations._FIRST_PAUSE", 0.0)
    address, folder, _ = server
    make_shards(folder, 1, 2)
    with pytest.raises(DataError, match=r"009\.tar: cannot be read \(HTTP Error 404"):
        list(iter_samples(open_source(f"{address}/009.tar")))
    # A check goes on past it, as long as there is anything to check.
    report = check(f"{address}/{{000..001}}.tar")
    assert (report.good, report.broken.counts) == (2, {"unreadable shard": 1})
    assert (
        "001.tar: shard 1: unreadable shard (cannot be read (HTTP Error 404"
        in report.broken.named[0]
    )
    with pytest.raises(DataError, match=r"008\.tar: cannot be read"):
        check(f"{address}/{{008..009}}.tar")


def test_pipe_source(tmp_path):
    make_shards(tmp_path, 1, 3)
    items = list(iter_samples(open_source(f"pipe:cat {tmp_path}/000.tar")))
    assert [i.key for i in items] == ["000000", "000001", "000002"]


def test_fsspec_source(tmp_path):
    import fsspec

    make_shards(tmp_path, 2, 2)
    for name in ("000.tar", "001.tar"):
        with fsspec.open(f"memory://set/{name}", "wb") as file:
            file.write((tmp_path / name).read_bytes())  # type: ignore[attr-defined]
    assert len(list(iter_samples(open_source("memory://set/*.tar")))) == 4
    with pytest.raises(DataError, match="nosuch"):
        list(iter_samples(open_source("nosuch://set/000.tar")))


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_permute_is_a_permutation_that_the_key_decides(count):
    first = [permute(i, count, 1) for i in range(count)]
    assert sorted(first) == list(range(count))
    if count >= 64:
        assert first != [permute(i, count, 2) for i in range(count)]
        # About one fixed point is expected of a random permutation.
        assert sum(i == p for i, p in enumerate(first)) < 8


def test_permute_is_pinned():
    """A run resumed after an upgrade must find the same order."""
    assert [permute(i, 10, 12345) for i in range(10)] == [7, 2, 4, 9, 8, 3, 1, 5, 6, 0]


def test_epochs_visit_each_index_once():
    rows = [epoch_index(p, 50, "s") for p in range(150)]
    for epoch in range(3):
        assert sorted(rows[epoch * 50 : epoch * 50 + 50]) == list(range(50))
    assert rows[:50] != rows[50:100]


def test_mixture_keeps_proportions_and_counts_each_source():
    mixture = Mixture([1.0, 2.5, 0.333], "m")
    seen = [mixture.locate(n) for n in range(3000)]
    counts = Counter(source for source, _ in seen)
    assert counts == {0: 3 * 261, 1: 3 * 652, 2: 3 * 87}  # of 1000: 260.9, 652.2, 86.9
    for source in range(3):
        places = [k for s, k in seen if s == source]
        assert places == list(range(len(places)))
    assert [mixture.locate(n) for n in (2999, 5, 1500)] == [seen[2999], seen[5], seen[1500]]
    # Well mixed: no run of one source as long as blocks would make.
    assert all(len({s for s, _ in seen[i : i + 60]}) >= 2 for i in range(0, 2940, 60))
    with pytest.raises(DataError, match="never be read"):
        Mixture([1.0, 1e-9], "m")


# -- the loader ------------------------------------------------------------------------------------


def test_pixels_and_ids_are_the_pictures(tmp_path):
    """Without augmentation a row is what preprocessing gives at inference."""
    location = make_folder(tmp_path / "f", 8)
    batch = take(loader_for(DataConfig((Source(location),), workers=0, scale=(1.0, 1.0))), 1)[0]
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (8, 3, SIZE, SIZE)
    assert batch.ids.dtype == torch.int64
    assert sorted(batch.keys) == sorted(f"{'sub/' if n % 2 else ''}{n:03d}" for n in range(8))
    preprocess = Preprocessing(SIZE)
    normalized = Normalizer(torch.device("cpu"))(batch.pixels)
    for key, pixels, ids in zip(batch.keys, normalized, batch.ids):
        number = int(key[-3:])
        np.testing.assert_array_equal(pixels.numpy(), preprocess(png(number)))
        assert bytes(ids[ids > 0].tolist()).decode() == f"picture {number}"[:12]


def test_random_resized_crop_stays_within_its_bounds():
    crop = Augmentation((0.5, 0.9), (3 / 4, 4 / 3), 0.0)
    areas = []
    for n in range(500):
        left, top, right, bottom = crop.crop_box(120, 100, Draws(1, n))
        assert 0 <= left < right <= 120 and 0 <= top < bottom <= 100
        assert 0.72 < (right - left) / (bottom - top) < 1.38
        areas.append((right - left) * (bottom - top) / 12_000)
    assert 0.49 < min(areas) < 0.53 and 0.82 < max(areas) < 0.92
    # What no crop fits: the middle of a strip, at the nearest ratio allowed.
    assert crop.crop_box(400, 10, Draws(1, 0)) == (193, 0, 206, 10)
    assert crop.crop_box(10, 400, Draws(1, 0)) == (0, 193, 10, 206)
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    flipped = Augmentation((1.0, 1.0), (1.0, 1.0), 1.0)(image, 4, Draws(1, 0))
    np.testing.assert_array_equal(np.asarray(flipped), np.asarray(image)[:, ::-1])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two tar sets, a folder with one broken image, and a parquet file."""
    root = tmp_path_factory.mktemp("sets")
    folder = make_folder(root / "folder", 21)
    (root / "folder" / "004.png").write_bytes(png(4)[:80])
    return {
        "tars": make_shards(root / "tars", 6, 9),
        "few": make_shards(root / "few", 1, 40),
        "folder": folder,
        "parquet": make_parquet(root / "p" / "q.parquet", 30),
    }


CONFIGS = {
    "emoji": lambda sets: (Source("emoji?seed=3"),),
    "folder": lambda sets: (Source(sets["folder"]),),
    "tars": lambda sets: (Source(sets["tars"]),),
    "few": lambda sets: (Source(sets["few"]),),
    "indexed mix": lambda sets: (Source("emoji"), Source(sets["folder"], 2.0)),
    "stream mix": lambda sets: (
        Source(sets["tars"], 2.0),
        Source(sets["parquet"]),
        Source("emoji", 0.5),
        Source(sets["folder"], 0.5),
    ),
}


@pytest.fixture(params=list(CONFIGS))
def sources(request, sets):
    return CONFIGS[request.param](sets)


@functools.cache
def unbroken(sources: tuple[Source, ...], count: int = 14) -> tuple[list[Batch], dict]:
    loader = loader_for(DataConfig(sources, workers=0, shuffle_buffer=5, seed=7))
    batches = [next(loader) for _ in range(count)]
    state = loader.state_dict()
    loader.close()
    return batches, state


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(sources, workers):
    want, end = unbroken(sources)
    loader = loader_for(DataConfig(sources, workers=workers, shuffle_buffer=5, seed=7))
    assert_same([next(loader) for _ in range(14)], want)
    assert loader.state_dict() == end
    loader.close()


@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (2, 0)])
def test_interrupted_equals_uninterrupted(sources, workers):
    """Cut at several places, each time through JSON, as a checkpoint would store it."""
    want, end = unbroken(sources)
    got: list[Batch] = []
    state = None
    for turn, stop in enumerate((1, 4, 9, 14)):
        data = DataConfig(sources, workers=workers[turn % 2], shuffle_buffer=5, seed=7)
        loader = loader_for(data, state=state)
        assert state is None or loader.state_dict() == state
        got += [next(loader) for _ in range(stop - len(got))]
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
    assert_same(got, want)
    assert state == end


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_global_batch(sources, world_size):
    """Also across a restart on another number of processes."""
    want, _ = unbroken(sources)
    data = DataConfig(sources, workers=0, shuffle_buffer=5, seed=7)
    loaders = [loader_for(data, rank=r, world_size=world_size) for r in range(world_size)]
    got = []
    for _ in range(6):
        shares = [next(loader) for loader in loaders]
        assert all(len(share.keys) == 8 // world_size for share in shares)
        got.append(joined(shares))
    merged = merge_states([loader.state_dict() for loader in loaders])
    got += take(loader_for(data, state=json.loads(json.dumps(merged))), 8)
    assert_same(got, want)


@pytest.mark.parametrize("workers", [0, 3])
def test_accumulation_goes_on_with_other_processes_and_workers(sources, workers):
    """Global batches of 24 rows: by one process, by four with micro-batches of 2, again by one with 3."""
    data = DataConfig(sources, workers=0, streams=8, shuffle_buffer=5, seed=7)
    want = take(loader_for(data, 24), 5)
    data = replace(data, workers=workers)
    loaders = [loader_for(data, 24, micro_batches=3, rank=r, world_size=4) for r in range(4)]
    got = [joined([next(loader) for loader in loaders for _ in range(3)]) for _ in range(2)]
    after_two = [loader.state_dict() for loader in loaders]
    # In the midst of a global batch the position is the last one's end.
    assert all(len(next(loader).keys) == 2 for loader in loaders)
    assert [loader.state_dict() for loader in loaders] == after_two
    for loader in loaders:
        loader.close()
    state = json.loads(json.dumps(merge_states(after_two)))
    with loader_for(data, 24, micro_batches=8, state=state) as loader:
        got += [joined([next(loader) for _ in range(8)]) for _ in range(3)]
    assert [rows_of(batch) for batch in got] == [rows_of(batch) for batch in want]


def rows_of(batch: Batch) -> list[tuple[str, bytes]]:
    """In no order."""
    pixels = (row.numpy().tobytes() for row in batch.pixels)
    return sorted(zip(batch.keys, pixels, strict=True))


def joined(shares: list[Batch]) -> Batch:
    return Batch(
        torch.cat([s.pixels for s in shares]),
        torch.cat([s.ids for s in shares]),
        [key for s in shares for key in s.keys],
    )


@pytest.mark.parametrize("ranks_workers", [(1, 0), (1, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("name", ["tars", "few"])
def test_a_pass_over_tars_sees_everything_once(sets, name, ranks_workers):
    """Over ranks and workers: each sample of a pass once, none left out, none twice."""
    ranks, workers = ranks_workers
    count = {"tars": 54, "few": 40}[name]
    data = DataConfig((Source(sets[name]),), workers=workers, streams=8, shuffle_buffer=4)
    seen: Counter[str] = Counter()
    for rank in range(ranks):
        loader = loader_for(data, rank=rank, world_size=ranks)
        done: dict[str, list[str]] = {}
        while len(done) < 8 // ranks or min(map(len, done.values())) < 19:
            batch = next(loader)
            for lane, key in zip(loader.state_dict()["lanes"], batch.keys):
                done.setdefault(lane, []).append(key)
        loader.close()
        for lane, keys in done.items():
            share = lane_share(sets[name], int(lane))
            assert Counter(keys[: len(share)]) == Counter(share)
            seen.update(share)
    assert len(seen) == count and set(seen.values()) == {1}


def lane_share(location: str, lane: int) -> list[str]:
    """What lane `lane` of 8 reads in its first pass."""
    stream = ShuffledStream(
        tars(location), stream="0 source 0", lane=lane, lanes=8, buffer=4, buffer_bytes=2**20
    )
    keys = []
    while stream.state()["pass"] == 0:
        keys.append(stream.pop().key)
    return keys[:-1] if keys else keys


def test_a_pass_over_a_folder_sees_everything_once(sets, tmp_path):
    location = make_folder(tmp_path / "f", 24)
    batches = take(loader_for(DataConfig((Source(location),), workers=2)), 6)
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys[:24])) == len(set(keys[24:])) == 24
    assert keys[:24] != keys[24:]


def test_a_picture_that_does_not_decode_is_named_with_its_shard(tmp_path):
    write_tar(tmp_path / "a.tar", [("good", {"png": png(0), "txt": b"x"})])
    write_tar(tmp_path / "b.tar", [("bad", {"png": png(1)[:40], "txt": b"x"})])
    with loader_for(DataConfig((Source(f"{tmp_path}/*.tar"),), workers=0, streams=1)) as loader:
        next(loader)
    assert loader.bad.named and all(
        name.startswith(f"{tmp_path}/b.tar: bad: broken image") for name in loader.bad.named
    )


def test_a_bad_sample_in_a_folder_is_replaced_and_counted(sets):
    loader = loader_for(DataConfig((Source(sets["folder"]),), workers=0), 21)
    keys = next(loader).keys
    loader.close()
    assert loader.bad.counts == {"broken image": 1}
    assert "004" not in keys and len(set(keys)) == 20


def test_weights_are_kept(sets, tmp_path):
    make_folder(tmp_path / "f" / "other", 12)
    sources = (Source(str(tmp_path / "f"), 3.0), Source(sets["folder"], 1.0))
    batches = take(loader_for(DataConfig(sources, workers=0), 100), 10)
    kinds = Counter(key.startswith("other") for batch in batches for key in batch.keys)
    assert kinds == {True: 750, False: 250}


def test_the_shuffle_buffer_is_bounded_and_shuffles(tmp_path):
    """By number, and by bytes where pictures are large."""
    make_shards(tmp_path, 4, 25)
    source = tars(tmp_path)
    size = max(len(png(n)) + 20 for n in range(100))
    for buffer, limit in ((10, 2**20), (1000, 6 * size)):
        stream = ShuffledStream(
            source,
            stream="x",
            lane=0,
            lanes=1,
            buffer=buffer,
            buffer_bytes=limit,
        )
        keys = []
        for _ in range(100):
            keys.append(stream.pop().key)
            assert len(stream._out) + len(stream._next) <= buffer
            assert stream._out_bytes + stream._next_bytes < limit + size
        assert len(set(keys)) == 100
        assert sum(a > b for a, b in pairwise(keys)) > 25


def test_memory_does_not_grow_with_the_set(tmp_path):
    """300 pictures of 200 kB through a buffer of 1 MB: the process gains far less than the 60 MB read."""
    noise = np.random.default_rng(0).integers(0, 256, 200_000, np.uint8).tobytes()
    write_tar(tmp_path / "a.tar", ((f"{n}", {"png": noise, "txt": b"x"}) for n in range(300)))
    source = tars(tmp_path)
    stream = ShuffledStream(
        source,
        stream="x",
        lane=0,
        lanes=1,
        buffer=10_000,
        buffer_bytes=10**6,
    )
    import tracemalloc

    tracemalloc.start()
    for _ in range(300):
        stream.pop()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 10**6


def test_resuming_decodes_nothing_that_was_seen(sets, monkeypatch):
    data = DataConfig((Source(sets["tars"]),), workers=0, shuffle_buffer=5)
    loader = loader_for(data)
    for _ in range(10):
        next(loader)
    state = loader.state_dict()
    loader.close()
    decoded = []
    from qlip_torch.train import pictures

    real = pictures.open_image
    monkeypatch.setattr(
        pictures, "open_image", lambda image, name: decoded.append(name) or real(image, name)
    )
    batch = take(loader_for(data, state=state), 1)[0]
    assert decoded == batch.keys


# -- faults ----------------------------------------------------------------------------------------


def test_wrong_requests_are_refused(sets):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sources": ()}, "sources is empty"),
        ({"workers": -1}, r"workers \(=-1\)"),
        ({"scale": (0.0, 1.0)}, r"scale \("),
        ({"ratio": (2.0, 1.0)}, r"ratio \("),
        ({"flip": 1.5}, r"flip \("),
    ]
    for fields, message in wrong:
        with pytest.raises(RecipeError, match=f"^{message}"):
            DataConfig(**fields)
    with pytest.raises(RecipeError, match=r"^weight \(=-1\) of emoji"):
        Source("emoji", -1)
    for location, message in (
        ("emoji?colour=red", "unknown option 'colour'"),
        ("emoji?seed=x", "'x' is not a value for seed"),
        ("emoji?split=all", "split must be one of"),
        ("emoji?seed", "key=value"),
        ("emoji?names=rare", "'rare' is not a value for names"),
        ("emoji?wording=long", "'long' is not a value for wording"),
        ("/nowhere/at/all", "no such file or folder"),
    ):
        with pytest.raises(DataError, match=message):
            loader_for(DataConfig((Source(location),), workers=0))
    data = DataConfig((Source(sets["tars"]),), workers=0)
    with pytest.raises(DataError, match="batch size 9: must divide by the 2"):
        loader_for(data, 9, rank=0, world_size=2)
    with pytest.raises(DataError, match="rank 2"):
        loader_for(data, rank=2, world_size=2)
    with pytest.raises(DataError, match="3 streams: must be a multiple of"):
        loader_for(DataConfig((Source(sets["tars"]),), streams=3), 8)


def test_the_emoji_set_keeps_to_the_names_it_is_told():
    classes = EmojiSource.from_location("emoji?names=classes&plain=true", 64, 0)
    drawn = [classes.read(i).caption for i in range(100)]
    assert sorted(drawn) == sorted(CLASS_NAMES_100)
    source = EmojiSource.from_location("emoji?names=classes&plain=true&wording=scene", 64, 0)
    assert any(" background" in source.read(i).caption for i in range(20))
    common = {glyph.name for glyph in all_glyphs() if glyph.common}
    some = EmojiSource.from_location("emoji?names=common&plain=true", 64, 0)
    assert {some.read(i).caption for i in range(len(common))} == common


def test_a_position_of_other_data_is_refused(sets):
    loader = loader_for(DataConfig((Source(sets["tars"]),), workers=0))
    state = loader.state_dict()
    loader.close()
    for data in (
        DataConfig((Source(sets["few"]),), workers=0),
        DataConfig((Source(sets["tars"]),), workers=0, seed=1),
        DataConfig((Source(sets["tars"]),), workers=0, shuffle_buffer=9),
        DataConfig((Source("emoji"),), workers=0),
    ):
        with pytest.raises(DataError, match="belongs to other data"):
            loader_for(data, state=state)
    with pytest.raises(DataError, match="from another version"):
        loader_for(DataConfig((Source(sets["tars"]),), workers=0), state={"samples": 3})


def test_a_set_without_one_usable_sample_stops(tmp_path):
    write_tar(tmp_path / "a.tar", ((f"{n}", {"png": b"no", "txt": b"x"}) for n in range(50)))
    loader = loader_for(DataConfig((Source(str(tmp_path)),), workers=0, streams=1))
    with pytest.raises(DataError, match="1000 samples in a row cannot be used"):
        next(loader)
    empty = tmp_path / "b"
    empty.mkdir()
    write_tar(empty / "a.tar", ())
    loader = loader_for(DataConfig((Source(str(empty)),), workers=0, streams=1))
    with pytest.raises(DataError, match="finds no sample"):
        next(loader)


def test_a_run_goes_on_where_an_empty_file_takes_a_shards_place(tmp_path, sets):
    """As the message says: the position stays good, and the missing shard is counted."""
    location = make_shards(tmp_path / "t", 3, 10)
    data = DataConfig((Source(location),), workers=0, streams=1, shuffle_buffer=2)
    loader = loader_for(data)
    next(loader)
    gone = tmp_path / "t" / "001.tar"
    gone.unlink()
    gone.touch()
    resumed = loader_for(data, state=loader.state_dict())
    for _ in range(20):
        next(resumed)
    assert resumed.bad.counts["broken archive"] > 0 and "is empty" in "".join(resumed.bad.named)


def test_a_workers_error_arrives_with_its_name(tmp_path, sets):
    location = make_shards(tmp_path / "t", 2, 10)
    loader = loader_for(DataConfig((Source(location),), workers=2, streams=2, shuffle_buffer=2))
    for shard in (tmp_path / "t").iterdir():
        shard.unlink()
    message = r"^data worker \d: .*\.tar: cannot be read .*put an empty file in its place to go on"
    with pytest.raises(DataError, match=message):
        for _ in range(20):
            next(loader)
    with pytest.raises(DataError, match="closed"):
        next(loader)


def test_too_little_shared_memory_is_said_before_it_kills(monkeypatch):
    from qlip_torch.train import data as module

    class Usage:
        free = 1000

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage)
    if sys.platform == "linux":
        with pytest.raises(DataError, match="shm-size"):
            loader_for(DataConfig(workers=1))
    loader_for(DataConfig(workers=0)).close()


def test_more_workers_than_cores_are_told_once(monkeypatch, caplog, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    loader_for(DataConfig(workers=2)).close()
    assert not caplog.messages
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with loader_for(DataConfig(workers=2)) as loader:
            next(loader)
    (message,) = caplog.messages
    assert "8 data processes on 2 cores" in message
    assert not [w for w in recwarn if "DataLoader" in str(w.message)]


SCRIPT = """
import signal, sys, time
import numpy as np
from qlip_torch.train.data import DataConfig, make_loader
def tokens(texts):
    return np.zeros((len(texts), 4), np.int64)
def main():
    stop = []
    signal.signal(signal.SIGTERM, lambda *a: stop.append("TERM"))
    signal.signal(signal.SIGINT, lambda *a: stop.append("INT"))
    with make_loader(DataConfig(workers=2), image_size=16,
                     tokenizer=tokens, batch_size=4) as loader:
        next(loader)
        print("ready", flush=True)
        while not stop:
            next(loader)
        for _ in range(20):
            next(loader)
    print("stopped by", *stop, flush=True)
if __name__ == "__main__":
    main()
"""


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    """In a process group of its own; from a file, which workers that are not forked read again."""
    program = folder / "program.py"
    program.write_text(script, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "PYTHONWARNINGS": "ignore:This DataLoader will create",  # more workers than cores
        },
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_the_trainer_its_workers(number, tmp_path):
    """As a scheduler or Ctrl-C sends it: the trainer goes on to a clean end, and no process is left."""
    process = start(SCRIPT, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == f"stopped by {'TERM' if number == signal.SIGTERM else 'INT'}\n"
    assert group_is_gone(process.pid)


SPAWNING = """
import multiprocessing, signal, time
from qlip_torch.train.workers import starting_workers
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    with starting_workers():
        multiprocessing.Process(target=time.sleep, args=(0,)).start()
        print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
"""


def test_signals_stay_blocked_while_workers_are_spawned(tmp_path):
    """As on macOS, where a worker takes seconds to start; Ctrl-C in between would end it."""
    out, err = start(SPAWNING, tmp_path).communicate(timeout=60)
    assert out == "2 15\n", err


def test_a_worker_that_is_killed_ends_the_run_in_words(tmp_path):
    """By a system that is out of memory, say. In a process of its own: torch raises wherever that is."""
    ready = '        print("ready", flush=True)\n'
    killing = (
        "        import multiprocessing\n        multiprocessing.active_children()[0].kill()\n"
    )
    assert ready in SCRIPT
    process = start(SCRIPT.replace(ready, killing), tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert re.search(r"DataError: a data process has died \(.*fewer data\.workers", err), err
    assert group_is_gone(process.pid)


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "Connection reset"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_ends_the_run_in_words(broken, monkeypatch):
    """Its connection breaks first; that it is gone is then told wherever the trainer is: while it closes."""
    closed = []

    class Items:
        def __next__(self):
            raise broken

        def _shutdown_workers(self):
            closed.append(True)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with (
        pytest.raises(DataError, match=f"has died.*{type(broken).__name__}.*fewer data.workers"),
        loader_for(DataConfig(workers=1)) as loader,
    ):
        monkeypatch.setattr(loader, "_items", Items())
        next(loader)
    assert closed == [True]


def broken_tokenizer(texts: Sequence[str]) -> NoReturn:
    raise EOFError("from the tokenizer")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_same_kind_is_not_taken_for_a_death(workers):
    data = DataConfig(workers=workers)
    with (
        pytest.raises(EOFError, match="from the tokenizer"),
        make_loader(data, image_size=16, tokenizer=broken_tokenizer, batch_size=4) as loader,
    ):
        next(loader)


def test_a_worker_that_dies_while_a_checkpoint_is_awaited_is_not_taken_for_a_full_disk(
    tmp_path, monkeypatch
):
    def told(*_: object, **__: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("torch.distributed.checkpoint.save", told)
    alone = World(0, 1, torch.device("cpu"))
    checkpoints = Checkpoints(tmp_path, keep=1, background=True, world=alone)
    with (
        pytest.raises(DataError, match=r"a data process has died \(.*killed.*fewer data\.workers"),
        loader_for(DataConfig(workers=0)),
    ):
        checkpoints.save(1, {"a": torch.ones(2)}, {}, {})
        checkpoints.wait()
    checkpoints.close()


# Slow to start, so that they are killed before they know their trainer.
SLOW_WORKERS = """
import multiprocessing, os, time
multiprocessing.set_start_method("fork")
os.register_at_fork(after_in_child=lambda: time.sleep(1),
                    after_in_parent=lambda: print("forked", flush=True))
"""


@pytest.mark.parametrize(
    ("script", "lines"),
    [(SCRIPT, ["ready\n"]), (SLOW_WORKERS + SCRIPT, ["forked\n", "forked\n"])],
    ids=["running", "starting"],
)
def test_workers_end_with_a_trainer_that_is_killed(script, lines, tmp_path):
    process = start(script, tmp_path)
    assert process.stdout is not None and process.stderr is not None
    assert [process.stdout.readline() for _ in lines] == lines
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    assert group_is_gone(process.pid)


def group_is_gone(group: int) -> bool:
    """Whether its processes end. Zombies have: not every container's first process collects its orphans."""
    for _ in range(300):
        if not any(runs_in(process, group) for process in psutil.process_iter()):
            return True
        time.sleep(0.1)
    return False


def runs_in(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.NoSuchProcess):
        return False


def test_feeds_travel_to_spawned_workers(sources):
    """Where workers are not forked (macOS, Windows) all that they need goes through pickle."""
    data = DataConfig(sources, workers=0, shuffle_buffer=5, seed=7)
    feed = pickle.loads(pickle.dumps(loader_for(data)._loader.dataset))
    first = unbroken(sources)[0][0]
    pieces: list[Batch] = []
    for part in feed:
        pieces.append(part.batch)
        if sum(len(piece.keys) for piece in pieces) == len(first.keys):
            break
    assert_same([joined(pieces)], [first])


def test_loaders_leave_the_runs_random_state_alone(sets):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(loader_for(DataConfig((Source(sets["tars"]),), workers=1)), 2)
    assert torch.equal(torch.get_rng_state(), before)
