"""A set split into units that each become one token shard: a tar, a parquet file, or a run of images."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from qlip_core.data.locations import local_path, scheme
from qlip_core.data.parquet import ParquetSource
from qlip_core.data.samples import Bad, Sample
from qlip_core.data.shards import AnySource, FolderSource
from qlip_core.data.token_format import Origin
from qlip_core.errors import DataError

# Images of a folder per token shard; img2dataset puts as many into a tar.
SHARD_SIZE = 10_000
# What may follow a shard's name in an address: a query, or the rest of a `pipe:` command.
_SUFFIX = re.compile(r"\.(tar\.gz|tar|tgz|parquet)(?![A-Za-z0-9]).*\Z", re.DOTALL)


@dataclass(frozen=True)
class Unit:
    """An input shard. `parts` are what the source numbers: tars, row groups, or images of a folder."""

    name: str
    """The token shard's name without its suffix."""
    parts: range
    origin: Origin


def units_of(source: AnySource, shard_size: int = SHARD_SIZE) -> list[Unit]:
    """All units of a set, in order. Raises DataError if two would have the same name."""
    if shard_size < 1:
        raise DataError(f"--shard-size {shard_size}: must be at least 1")
    if isinstance(source, FolderSource):
        return _runs(source, shard_size)
    if isinstance(source, ParquetSource):
        addresses = list(source.files)
        counts = Counter(file for file, _, _ in source.groups)
        groups = [counts[number] for number in range(len(addresses))]
    else:
        addresses = list(source.shards)
        groups = [1] * len(addresses)
    addresses = [_absolute(address) for address in addresses]
    names = shard_names(addresses)
    units, first = [], 0
    for number, (address, name, size) in enumerate(zip(addresses, names, groups)):
        origin = Origin(source.location, address, _stored(address), number, len(addresses))
        units.append(Unit(name, range(first, first + size), origin))
        first += size
    return units


def unit_samples(source: AnySource, unit: Unit) -> Iterator[Sample | Bad]:
    """The unit's samples in order. Raises DataError if it cannot be opened."""
    for part in unit.parts:
        if isinstance(source, FolderSource):
            yield source.read(part)
        else:
            for _, item in source.read_shard(part):
                yield item


def _runs(source: FolderSource, shard_size: int) -> list[Unit]:
    folder = os.path.abspath(local_path(source.location))
    starts = range(0, source.count, shard_size)
    units = []
    for number, start in enumerate(starts):
        stop = min(source.count, start + shard_size)
        # The first and last name show whether images have since been added to the folder.
        ends = f"{source.names[start]} to {source.names[stop - 1]}"
        shard = f"{folder}, images {start} to {stop - 1} of {source.count}: {ends}"
        origin = Origin(source.location, shard, None, number, len(starts))
        units.append(Unit(f"{number:05d}", range(start, stop), origin))
    return units


def shard_names(addresses: list[str]) -> list[str]:
    """A file name for each address: its stem, or, if two are equal, its path below the common folder."""
    paths = [PurePosixPath(_SUFFIX.sub("", address)) for address in addresses]
    names = [_safe(path.name) for path in paths]
    if _distinct(names):
        return names
    folder = os.path.commonpath([path.parent for path in paths])
    names = [_safe("_".join(path.relative_to(folder).parts)) for path in paths]
    if _distinct(names):
        return names
    (name, _), *_ = Counter(map(str.lower, names)).most_common(1)
    twins = [a for a, n in zip(addresses, names) if n.lower() == name][:2]
    raise DataError(
        f"{twins[0]} and {twins[1]}: both would become {name}: rename one, or tokenize them into "
        "different folders"
    )


def _distinct(names: list[str]) -> bool:
    return len({name.lower() for name in names}) == len(names)  # a Mac ignores case


def _safe(name: str) -> str:
    name = "".join(c if c.isalnum() or c in "-_. " else "_" for c in name)
    return name.lstrip(".") or "shard"


def _absolute(address: str) -> str:
    return address if scheme(address) else os.path.abspath(local_path(address))


def _stored(address: str) -> int | None:
    """Bytes of a local file."""
    if scheme(address):
        return None
    try:
        return os.stat(address).st_size
    except OSError as error:
        raise DataError(f"{address}: cannot be read ({error.strerror})") from None
