"""The emoji set on disk, and what is refused."""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip_core.data import emoji_font
from qlip_core.data.emoji_font import EmojiFont
from qlip_core.data.emoji_set import EmojiSet
from qlip_core.data.emoji_shards import write_shards
from qlip_core.errors import DataError

SHIPPED = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def train() -> EmojiSet:
    return EmojiSet(64, 0, "train")


def test_shards_are_the_same_bytes_every_time(tmp_path: Path):
    done = []
    about = write_shards(
        tmp_path / "a", 5, size=32, seed=4, split="held-out", shard_size=2, progress=done.append
    )
    write_shards(tmp_path / "b", 5, size=32, seed=4, split="held-out", shard_size=2)
    assert done == [1] * 5
    names = ["00000.tar", "00001.tar", "00002.tar", "dataset.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "dataset.json").read_text()) == about
    assert (about["count"], about["split"], about["seed"]) == (5, "held-out", 4)
    assert about["shards"] == names[:3] and len(about["font"]["sha256"]) == 64


def test_a_shard_holds_its_samples(tmp_path: Path):
    write_shards(tmp_path, 3, size=32, seed=4, split="held-out")
    emoji = EmojiSet(32, 4, "held-out")
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = tar.getmembers()
        content = {member.name: tar.extractfile(member).read() for member in members}  # pyright: ignore
    assert {member.mtime for member in members} == {0}
    keys = [f"emoji-held-out-4-{i:08d}" for i in range(3)]
    assert list(content) == [f"{key}.{kind}" for key in keys for kind in ("png", "txt", "json")]
    for i, key in enumerate(keys):
        image, caption, about = emoji.sample(i)
        assert (np.asarray(Image.open(io.BytesIO(content[f"{key}.png"]))) == image).all()
        assert content[f"{key}.txt"].decode() == caption
        assert json.loads(content[f"{key}.json"]) == about


def test_a_set_is_not_overwritten_unasked(tmp_path: Path):
    write_shards(tmp_path, 3, size=32, shard_size=1)
    with pytest.raises(DataError, match=r"already holds dataset\.json"):
        write_shards(tmp_path, 1, size=32)
    write_shards(tmp_path, 1, size=32, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "dataset.json"]


def test_an_interrupted_set_is_not_taken_for_a_whole_one(tmp_path: Path):
    done: list[int] = []

    def stop(more: int) -> None:
        done.append(more)
        if sum(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, 4, size=32, shard_size=2, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_the_shipped_shard_is_what_this_code_makes():
    about = json.loads((SHIPPED / "emoji-96.json").read_text())
    emoji = EmojiSet(about["size"], about["seed"], about["split"])
    same_font = emoji.font.sha256() == about["font"]["sha256"]
    with tarfile.open(SHIPPED / "emoji-96.tar") as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # pyright: ignore
    assert len(content) == 3 * about["count"] == 144
    for i in range(about["count"]):
        key = f"emoji-held-out-0-{i:08d}"
        scene = emoji.scene(i)
        assert json.loads(content[f"{key}.json"])["scene"] == scene.to_dict()
        assert content[f"{key}.txt"].decode() == emoji.caption(scene)
        shipped = np.asarray(Image.open(io.BytesIO(content[f"{key}.png"])), int)
        # Another font draws the same scene in other shapes, on the same background.
        limit = 0 if same_font else 90
        assert np.abs(shipped - emoji.render(scene)).mean() <= limit


def test_no_font_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(emoji_font, "font_folders", lambda: [tmp_path])
    with pytest.raises(DataError, match="no colour-emoji font on this machine"):
        EmojiSet()
    (tmp_path / "NotoColorEmoji.ttf").write_bytes(b"not a font")
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(DataError, match=r"put NotoColorEmoji\.ttf .* into ~/Library/Fonts"):
        EmojiSet()
    with pytest.raises(DataError, match="not a font file with colour-bitmap emoji"):
        EmojiSet(font=tmp_path / "NotoColorEmoji.ttf")


def test_a_font_without_a_glyph_says_so():
    with pytest.raises(DataError, match=r"no picture for U\+4E00"):
        EmojiFont.find().draw(0x4E00)


def test_font_hash_is_the_files(train: EmojiSet):
    assert train.font.sha256() == hashlib.sha256(train.font.path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split 'test'"),
        ({"size": 4}, "size 4"),
        ({"seed": -1}, "seed -1"),
        ({"names": ["a cat", "a dog"]}, "2 names"),
        ({"names": [], "plain": True}, "no names"),
        ({"names": ["a flying cat"], "plain": True}, "no glyph named 'a flying cat' in the table"),
        ({"names": ["a skunk"], "plain": True}, "'a skunk' in the split 'train'"),
    ],
)
def test_impossible_sets_are_refused(arguments: dict, message: str):
    with pytest.raises(DataError, match=re.escape(message)):
        EmojiSet(**arguments)


def test_impossible_samples_and_shards_are_refused(train: EmojiSet, tmp_path: Path):
    with pytest.raises(DataError, match="sample -1"):
        train.sample(-1)
    with pytest.raises(DataError, match="count 0"):
        write_shards(tmp_path, 0)
