"""Sets of captioned pictures (WebDataset tars, a plain folder, parquet), with one way to read them all.

source = open_source("shards/{00000..00099}.tar")
for sample in iter_samples(source):     # Sample(key, image_bytes, caption, meta), or Bad(key, where, reason)
    ...

Tars and parquet are streams: `source.shards` names the shards, and `source.read_shard(i, skip=n)` reads one
from its n-th sample on. A folder is read by number: `source.count`, `source.read(i)`. Either way a sample has
a fixed place, and a bad one is yielded there as a `Bad`, never raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlip_core.data.locations import expand, local_path, opened, scheme, wait_to_retry
from qlip_core.data.parquet import ParquetSource
from qlip_core.data.samples import TOO_LARGE, UNREADABLE, Bad, Limits, Sample, make_sample
from qlip_core.data.tars import tar_samples
from qlip_core.errors import DataError
from qlip_core.images import SUFFIXES, find_images

# A missing shard is never skipped silently, since the rest would be another set; an empty one counts as broken.
_WITHOUT_A_SHARD = "; restore it, or put an empty file in its place to go on without it"


@dataclass(frozen=True)
class TarSource:
    """WebDataset tars, as img2dataset writes them: {key}.jpg|png|webp, {key}.txt and {key}.json."""

    location: str
    shards: tuple[str, ...]
    limits: Limits
    kind: str = "tar"

    def read_shard(
        self, shard: int, *, skip: int = 0, part: int = 0, parts: int = 1
    ) -> Iterator[tuple[int, Sample | Bad]]:
        """(number in the shard, sample) from number `skip` on, of those with number % parts == part.

        Raises DataError if the shard cannot be opened or its connection keeps breaking. A shard that can be
        read but is not a complete tar ends with a Bad.
        """
        address = self.shards[shard]
        failures = 0
        while True:
            try:
                with opened(address) as stream:
                    for number, item in tar_samples(
                        stream, address, self.limits, skip=skip, part=part, parts=parts
                    ):
                        yield number, item
                        skip, failures = number + 1, 0
                return
            except OSError as error:
                failures += 1
                wait_to_retry(address, failures, error, _WITHOUT_A_SHARD)


@dataclass(frozen=True)
class FolderSource:
    """A folder of images, at any depth, each with its caption in a .txt of the same name beside it."""

    location: str
    names: tuple[str, ...]
    limits: Limits
    kind: str = "folder"

    @property
    def count(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Sample | Bad:
        """Sample `index` of `count`, in the order of their paths."""
        name = self.names[index]
        path = local_path(self.location) / name
        key = str(Path(name).with_suffix("").as_posix())
        try:
            size = path.stat().st_size
            if size > self.limits.image_bytes:
                return Bad(key, self.location, TOO_LARGE, f"{size} bytes")
            image = path.read_bytes()
            beside = {}
            for suffix in (".txt", ".json"):
                file = path.with_suffix(suffix)
                if not file.is_file():
                    continue
                size = file.stat().st_size
                if size > self.limits.text_bytes:
                    if suffix == ".json" and (".txt" in beside or not self.limits.caption):
                        continue  # not needed; perhaps another program's annotations
                    return Bad(key, self.location, TOO_LARGE, f"{suffix} of {size} bytes")
                beside[suffix] = file.read_bytes()
        except OSError as error:
            return Bad(key, self.location, UNREADABLE, error.strerror or str(error))
        return make_sample(
            key,
            self.location,
            image,
            beside.get(".txt"),
            beside.get(".json"),
            needs_caption=self.limits.caption,
        )


AnySource = TarSource | FolderSource | ParquetSource


def open_source(location: str, limits: Limits | None = None) -> AnySource:
    """The set at `location`: a folder, a path, a URL; {00..99} and * stand for many.

    A folder is read as tars if it holds any, else as parquet, else as images with captions. Raises DataError
    if there is nothing, or nothing of these kinds.
    """
    limits = limits or Limits()
    if not location:
        raise DataError("the location of the data is empty")
    addresses = expand(location)
    folders = [a for a in addresses if not scheme(a) and local_path(a).is_dir()]
    if folders:
        if len(addresses) > 1:
            raise DataError(f"{location}: stands for several folders; give each as its own source")
        # The folder's own name, since a wildcard may stand for it.
        return _open_folder(folders[0], local_path(folders[0]), limits)
    for address in addresses:  # an image would be read as a tar
        if not scheme(address) and local_path(address).suffix.lower() in SUFFIXES:
            raise DataError(f"{address}: is an image: name the folder of the images")
    parquet = [a for a in addresses if a.split("?")[0].endswith(".parquet")]
    if parquet and len(parquet) < len(addresses):
        other = next(a for a in addresses if a not in parquet)
        raise DataError(
            f"{location}: {parquet[0]} and {other} are of different kinds; name one kind"
        )
    if parquet:
        return ParquetSource.open(location, addresses, limits)
    return TarSource(location, tuple(addresses), limits)


def _open_folder(location: str, folder: Path, limits: Limits) -> AnySource:
    # Tars first, because img2dataset writes a parquet file of metadata beside each tar.
    for pattern in ("*.tar", "*.tar.gz", "*.tgz"):
        if tars := _visible(folder, pattern):
            return TarSource(location, tuple(tars), limits)
    if files := _visible(folder, "*.parquet"):
        return ParquetSource.open(location, files, limits)
    names = tuple(path.relative_to(folder).as_posix() for path in find_images(folder))
    if not names:
        raise DataError(f"{location}: no tars, parquet files or images in this folder")
    return FolderSource(location, names, limits)


def _visible(folder: Path, pattern: str) -> list[str]:
    """The files below a folder that match, sorted. Those hidden or in hidden folders are left out, as among images:
    on disks of other systems macOS puts a file `._NAME` beside each one, and deleted ones into `.Trashes`."""
    return sorted(
        str(path)
        for path in folder.rglob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def iter_samples(source: AnySource) -> Iterator[Sample | Bad]:
    """Every sample of a set once, in the order in which it is stored."""
    if isinstance(source, FolderSource):
        for index in range(source.count):
            yield source.read(index)
        return
    for shard in range(len(source.shards)):
        for _, item in source.read_shard(shard):
            yield item
