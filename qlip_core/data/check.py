"""Read a whole set as training would, decode every image, and report what is in it and what is broken."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from qlip_core.data.draws import stable_hash
from qlip_core.data.samples import (
    BROKEN_ARCHIVE,
    BROKEN_IMAGE,
    UNREADABLE_SHARD,
    Bad,
    Limits,
    Sample,
    Tally,
)
from qlip_core.data.shards import AnySource, FolderSource, iter_samples, open_source
from qlip_core.errors import DataError, ImageError
from qlip_core.images import open_image
from qlip_core.loading import Progress

# Keys are remembered as 64-bit hashes, at most 100 MB of them; later keys are compared with these.
MAX_KEYS = 1_000_000
_EXAMPLES = 10


@dataclass
class Histogram:
    """Integers counted by value, which gives exact order statistics in memory bounded by their range."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, value: int) -> None:
        self.counts[value] += 1

    def to_dict(self) -> dict[str, int] | None:
        """{"min", "median", "max"}, with the lower of two medians; None if there are no numbers."""
        if not self.counts:
            return None
        left = (self.counts.total() + 1) // 2
        values = sorted(self.counts)
        for median in values:
            left -= self.counts[median]
            if left <= 0:
                return {"min": values[0], "median": median, "max": values[-1]}
        raise AssertionError("counts are positive")


@dataclass
class Report:
    """What `check` found. Sizes in pixels, lengths in characters and words, bytes as stored."""

    location: str
    kind: str
    shards: int | None
    samples: int = 0
    image_bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    width: Histogram = field(default_factory=Histogram)
    height: Histogram = field(default_factory=Histogram)
    caption_characters: Histogram = field(default_factory=Histogram)
    caption_words: Histogram = field(default_factory=Histogram)
    broken: Tally = field(default_factory=lambda: Tally(keep=1000))
    duplicates: int = 0
    duplicate_examples: list[str] = field(default_factory=list)
    keys_checked: int = 0

    @property
    def good(self) -> int:
        """Samples that training will use."""
        return self.samples - self.broken.total

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON types."""
        return {
            "location": self.location,
            "kind": self.kind,
            "shards": self.shards,
            "samples": self.samples,
            "good": self.good,
            "image_bytes": self.image_bytes,
            "formats": dict(sorted(self.formats.items())),
            "width": self.width.to_dict(),
            "height": self.height.to_dict(),
            "caption_characters": self.caption_characters.to_dict(),
            "caption_words": self.caption_words.to_dict(),
            "broken": self.broken.to_dict(),
            "duplicate_keys": {
                "count": self.duplicates,
                "examples": list(self.duplicate_examples),
                "keys_remembered": self.keys_checked,
            },
        }


def check(
    source: AnySource | str,
    *,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read all of `source` (a location, or one that is open) and decode every image.

    `progress` is called for every sample. Only the keys' hashes grow with the set (see `MAX_KEYS`). Raises
    DataError if the set does not exist or none of it can be read.
    """
    if isinstance(source, str):
        source = open_source(source, limits)
    shards = None if isinstance(source, FolderSource) else len(source.shards)
    report = Report(source.location, source.kind, shards)
    seen: set[int] = set()
    for item in _items(source):
        report.samples += 1
        if not isinstance(item, Bad) or item.reason not in (BROKEN_ARCHIVE, UNREADABLE_SHARD):
            _note_key(report, seen, item.key)
        if isinstance(item, Bad):
            report.broken.add(item)
        else:
            _note_sample(report, item, source.location)
        if progress is not None:
            progress(1)
    return report


def _items(source: AnySource) -> Iterator[Sample | Bad]:
    """`iter_samples`, with a Bad for each shard that cannot be opened. Raises DataError if none can."""
    if isinstance(source, FolderSource):
        yield from iter_samples(source)
        return
    failures: list[str] = []  # texts, because error objects would keep their connections open
    for shard, address in enumerate(source.shards):
        try:
            for _, item in source.read_shard(shard):
                yield item
        except DataError as error:
            failures.append(str(error))
            if len(failures) == len(source.shards):
                raise DataError(failures[0]) from None
            detail = failures[-1].removeprefix(f"{address}: ")
            yield Bad(f"shard {shard}", address, UNREADABLE_SHARD, detail)


def _note_sample(report: Report, sample: Sample, location: str) -> None:
    try:
        image = open_image(sample.image_bytes, sample.key)
    except ImageError as error:
        detail = str(error).removeprefix(f"{sample.key}: ")
        report.broken.add(Bad(sample.key, sample.where or location, BROKEN_IMAGE, detail))
        return
    with Image.open(io.BytesIO(sample.image_bytes)) as header:
        report.formats[(header.format or "unknown").lower()] += 1
    report.image_bytes += len(sample.image_bytes)
    report.width.add(image.width)
    report.height.add(image.height)
    report.caption_characters.add(len(sample.caption))
    report.caption_words.add(len(sample.caption.split()))


def _note_key(report: Report, seen: set[int], key: str) -> None:
    mark = stable_hash(key)
    if mark in seen:
        report.duplicates += 1
        if len(report.duplicate_examples) < _EXAMPLES:
            report.duplicate_examples.append(key)
    elif len(seen) < MAX_KEYS:
        seen.add(mark)
        report.keys_checked = len(seen)
