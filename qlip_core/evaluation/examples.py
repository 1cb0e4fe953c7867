"""The data of an evaluation: pictures with captions or classes, read as a stream, as often as needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from qlip_core.data.draws import stable_hash
from qlip_core.data.samples import BROKEN_IMAGE, Bad, Limits, Sample, Tally, label_of
from qlip_core.data.shards import FolderSource, iter_samples, open_source
from qlip_core.errors import DataError, ImageError
from qlip_core.files import read_lines
from qlip_core.images import ImageLike
from qlip_core.model import Model

# Batches of images decoded ahead together: enough to keep the threads busy, in bounded memory.
_AHEAD = 8


@dataclass(frozen=True)
class Example:
    """A picture, its caption and its class (empty if there is none)."""

    key: str
    image: ImageLike = field(repr=False)
    caption: str = ""
    label: str = ""
    where: str = ""


class Examples(Protocol):
    """A set that can be read more than once, always in the same order."""

    @property
    def name(self) -> str:
        """The set's name in results."""
        ...

    def __iter__(self) -> Iterator[Example | Bad]: ...


@dataclass(frozen=True)
class ExampleList:
    """A set held in memory."""

    name: str
    examples: Sequence[Example]

    @classmethod
    def of_images(cls, images: Iterable[ImageLike], name: str = "images") -> ExampleList:
        """Images alone, called by their paths or their numbers."""
        named = (
            (str(im) if isinstance(im, str | Path) else str(i), im) for i, im in enumerate(images)
        )
        return cls(name, [Example(key, image) for key, image in named])

    def __iter__(self) -> Iterator[Example | Bad]:
        return iter(self.examples)


@dataclass(frozen=True)
class StoredExamples:
    """Tars, parquet, or a folder of images.

    Captions are optional and read as for training: in a folder from a `.txt` or
    `.json` beside an image. An image's class is the folder it lies in, else its label (metadata's "label",
    `.cls` in a tar, a column `label` in parquet), else its caption; `classes` renames them. `limit` ends the
    set early.
    """

    location: str
    limit: int | None = None
    classes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DataError(f"limit (={self.limit}) must be at least 1")

    @property
    def name(self) -> str:
        return self.location

    def __iter__(self) -> Iterator[Example | Bad]:
        return islice(self._all(), self.limit)

    def _all(self) -> Iterator[Example | Bad]:
        source = open_source(self.location, Limits(caption=False))
        if isinstance(source, FolderSource):
            for index, name in enumerate(source.names):
                inside = Path(name)
                folder = inside.parts[0] if len(inside.parts) > 1 else ""
                yield self._example(source.read(index), name, folder)
            return
        for item in iter_samples(source):
            yield self._example(item, item.key)

    def _example(self, item: Sample | Bad, key: str, folder: str = "") -> Example | Bad:
        if isinstance(item, Bad):
            return replace(item, key=key)
        label = folder or label_of(item.meta) or item.caption
        return Example(key, item.image_bytes, item.caption, self._renamed(label), item.where)

    def _renamed(self, label: str) -> str:
        return self.classes.get(label, label)


@dataclass(frozen=True)
class Part:
    """A fixed share of a set, drawn by the examples' keys: a fifth to test on, or the rest to train on."""

    whole: Examples
    test: bool

    @property
    def name(self) -> str:
        return f"{self.whole.name}, {'a fifth' if self.test else 'four fifths'} by key"

    def __iter__(self) -> Iterator[Example | Bad]:
        return (each for each in self.whole if (stable_hash(each.key) % 5 == 0) == self.test)


def read_classes(path: str | Path) -> dict[str, str]:
    """Class names from a file of lines "folder or label<TAB>name"; raises DataError for other lines."""
    out = {}
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            label, tab, name = line.partition("\t")
            if not tab or not name.strip():
                raise DataError(f"{path}, line {number}: expected label<TAB>name, got {line!r}")
            out[label.strip()] = name.strip()
    if not out:
        raise DataError(f"{path}: names no class")
    return out


def batches(
    model: Model, examples: Iterable[Example | Bad], batch_size: int, broken: Tally
) -> Iterator[tuple[list[Example], np.ndarray]]:
    """Yield (examples, pixels float32 [b, 3, S, S]); unreadable ones go to `broken`.

    At most eight batches of encoded images are in memory.
    """
    good = _good(examples, broken)
    while chunk := list(islice(good, _AHEAD * batch_size)):

        def report(position: int, error: ImageError, chunk: list[Example] = chunk) -> None:
            example = chunk[position]
            detail = str(error).removeprefix("image data: ").removeprefix(f"{example.key}: ")
            broken.add(Bad(example.key, example.where or "image", BROKEN_IMAGE, detail))

        images = [example.image for example in chunk]
        for positions, pixels in model.batches(images, batch_size, report):
            yield [chunk[position] for position in positions], pixels


def _good(examples: Iterable[Example | Bad], broken: Tally) -> Iterator[Example]:
    for example in examples:
        if isinstance(example, Bad):
            broken.add(example)
        else:
            yield example


def check_some(count: int, examples: Examples, broken: Tally) -> None:
    """Raises DataError if nothing could be measured."""
    if count:
        return
    why = f"; first of {broken.total} broken: {broken.named[0]}" if broken.total else ""
    raise DataError(f"{examples.name}: no usable image in it{why}")
