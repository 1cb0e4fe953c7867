"""What every picture-and-caption source yields: good samples with their bytes, bad ones with a reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes above which a member is bad and never read into memory; and whether a sample needs a
    `caption`, as in training, or may have none ("")."""

    image_bytes: int = 64 * 2**20
    text_bytes: int = 2**20
    caption: bool = True


@dataclass(frozen=True)
class Sample:
    """One picture, still encoded, and its caption. `key` names it within its source, `where` the shard."""

    key: str
    image_bytes: bytes = field(repr=False)
    caption: str
    meta: dict[str, Any] = field(default_factory=dict, repr=False)
    where: str = field(default="", compare=False, repr=False)


def label_of(meta: dict[str, Any]) -> str:
    """The metadata's label, a name or a number; "" if there is none."""
    value = meta.get("label", "")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with missing values is stored as floats
    if not isinstance(value, str | int):
        return ""
    # JSON can contain a lone surrogate, which cannot be written to a file.
    return str(value).encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be used, and why.

    reason: one of a few short phrases, for counting; `detail` may add to it.
    """

    key: str
    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.reason}" + (self.detail and f" ({self.detail})")


TOO_LARGE = "too large"
NO_IMAGE = "no image"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"
NOT_UTF8 = "caption is not UTF-8"
NOT_JSON = "metadata is not a JSON object"
UNREADABLE = "unreadable file"
BROKEN_IMAGE = "broken image"
BROKEN_ARCHIVE = "broken archive"
UNREADABLE_SHARD = "unreadable shard"


def make_sample(
    key: str,
    where: str,
    image: bytes | None,
    caption: bytes | str | None,
    meta: bytes | dict[str, Any] | None,
    *,
    needs_caption: bool = True,
    label: bytes | str | None = None,
) -> Sample | Bad:
    """A sample from its parts, or what is wrong with them. The image is not decoded here.

    A missing caption is taken from the metadata's "caption", where img2dataset also writes it. If there is a
    caption, invalid metadata is ignored. `label` is added to the metadata if that has none.
    """
    if image is None:
        return Bad(key, where, NO_IMAGE)
    if not image:
        return Bad(key, where, BROKEN_IMAGE, "empty file")
    wrong = ""
    if isinstance(meta, bytes):
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError) as error:
            meta, wrong = None, str(error).split("\n", 1)[0]
    if meta is not None and not isinstance(meta, dict):
        meta, wrong = None, f"a {type(meta).__name__}"
    if wrong and caption is None:
        return Bad(key, where, NOT_JSON, wrong)
    meta = meta or {}
    if label is not None and not label_of(meta):
        text = label if isinstance(label, str) else label.decode("utf-8-sig", "replace")
        meta = {**meta, "label": text.strip()}
    if caption is None and isinstance(meta.get("caption"), str):
        caption = meta["caption"]
    if caption is None and not needs_caption:
        caption = ""
    if caption is None:
        return Bad(key, where, NO_CAPTION)
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Bad(key, where, NOT_UTF8, f"byte {error.start}")
    caption = caption.strip()
    if not caption and needs_caption:
        return Bad(key, where, EMPTY_CAPTION)
    try:
        caption.encode()
    except UnicodeEncodeError:
        # JSON can contain a lone surrogate, which no tokenizer accepts.
        return Bad(key, where, NOT_UTF8, "lone surrogate")
    return Sample(key, image, caption, meta, where)


class Tally:
    """Bad samples counted by reason, and the first `keep` of them named."""

    def __init__(self, keep: int = 100):
        self.keep = keep
        self.counts: dict[str, int] = {}
        self.named: list[str] = []

    def add(self, bad: Bad) -> None:
        self.counts[bad.reason] = self.counts.get(bad.reason, 0) + 1
        if len(self.named) < self.keep:
            self.named.append(str(bad))

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """{"counts": {reason: n}, "named": [...]}, in JSON types."""
        return {"counts": dict(sorted(self.counts.items())), "named": list(self.named)}

    def include(self, other: dict[str, Any]) -> None:
        """Add another tally, given as its `to_dict`."""
        for reason, count in other["counts"].items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        self.named += other["named"][: self.keep - len(self.named)]
