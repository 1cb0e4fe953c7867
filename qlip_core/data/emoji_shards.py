"""The emoji set as WebDataset tars, byte for byte reproducible."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

import qlip_core
from qlip_core.data.emoji_set import EmojiSet, Split
from qlip_core.data.tars import write_tar
from qlip_core.errors import DataError
from qlip_core.files import write_text
from qlip_core.loading import Progress


def write_shards(
    out: str | Path,
    count: int,
    *,
    size: int = 64,
    seed: int = 0,
    split: Split = "train",
    plain: bool = False,
    shard_size: int = 1000,
    font: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write samples 0 to count - 1 as `out`/00000.tar … and `out`/dataset.json; returns the latter.

    A sample is three files in a tar, `{key}.png`, `{key}.txt` (the caption) and `{key}.json`
    (`EmojiSet.describe`). PNG, not JPEG, whose halved colour resolution would blur, at 64 px, the targets
    that reconstructions are measured against. Every file is written under a temporary name and renamed
    when complete; `dataset.json` comes last, so a folder without it is incomplete. `progress` is called for
    every sample.

    Raises DataError if `count` or `shard_size` is below 1, or if `out` holds a set and not `force`.
    """
    if count < 1 or shard_size < 1:
        raise DataError(f"count {count}, shard size {shard_size}: both must be at least 1")
    out = Path(out)
    old = _set_files(out)
    if old and not force:
        raise DataError(f"{out}: already holds {old[0].name}; choose another folder, or use force")
    emoji = EmojiSet(size, seed, split, plain=plain, font=font)
    out.mkdir(parents=True, exist_ok=True)
    for file in old:
        file.unlink()
    names = []
    for number, start in enumerate(range(0, count, shard_size)):
        names.append(f"{number:05d}.tar")
        indices = range(start, min(start + shard_size, count))
        write_tar(out / names[-1], _samples(emoji, indices, progress))
    about = {
        "format": "webdataset",
        "set": "emoji",
        "qlip_version": qlip_core.__version__,
        "split": split,
        "plain": plain,
        "seed": seed,
        "size": size,
        "count": count,
        "shards": names,
        "font": {
            "file": emoji.font.path.name,
            "sha256": emoji.font.sha256(),
            "licence": emoji.font.licence,
        },
    }
    text = json.dumps(about, indent=2) + "\n"
    write_text(out / "dataset.json", text)
    return about


def _set_files(folder: Path) -> list[Path]:
    """The files of a set in `folder`, dataset.json first, because while it exists the set counts as complete."""
    shards = sorted(folder.glob("[0-9]" * 5 + ".tar"))
    return [path for path in (folder / "dataset.json", *shards) if path.exists()]


def _samples(
    emoji: EmojiSet, indices: range, progress: Progress | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index in indices:
        image, caption, about = emoji.sample(index)
        picture = io.BytesIO()
        Image.fromarray(image).save(picture, "png", optimize=True)
        metadata = json.dumps(about, separators=(",", ":")).encode()
        # No dot in a key: WebDataset takes everything after the first dot as the extension.
        key = f"emoji-{emoji.split}-{emoji.seed}-{index:08d}"
        yield key, {"png": picture.getvalue(), "txt": caption.encode(), "json": metadata}
        if progress is not None:
            progress(1)
