"""WebDataset tars as streams: members grouped into samples by key, nothing written, nothing unpacked.

The format is read here and not with `tarfile`, which allocates whatever an extended header claims and cannot
skip members of a seekable file without reading them. Names are keys, never paths.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qlip_core.data.locations import ByteStream
from qlip_core.data.samples import (
    BROKEN_ARCHIVE,
    NO_IMAGE,
    TOO_LARGE,
    Bad,
    Limits,
    Sample,
    make_sample,
)
from qlip_core.files import atomic_file

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
_BLOCK = 512
_MAX_NAME = 2**16
_CHUNK = 2**18
_FOREIGN = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Types that may state a size although no data follows.
_WITHOUT_DATA = frozenset(
    {
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.DIRTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
    }
)


class ArchiveError(Exception):
    """The archive's bytes are not a tar, or end too soon. Members before that are good."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar. It can be read only until the next member is requested."""

    name: str
    size: int
    stream: _Reader

    def read(self) -> bytes:
        return self.stream.exactly(self.size)


class _Reader:
    """Reads exact sizes, and skips data, by seeking if possible."""

    def __init__(self, stream: ByteStream):
        self._stream = stream
        # Local files only; elsewhere seeking costs more than it saves or is impossible.
        self._seekable = isinstance(stream, io.BufferedReader) and stream.seekable()
        self.position = 0

    def exactly(self, size: int) -> bytes:
        data = self._up_to(size)
        if len(data) < size:
            raise ArchiveError(f"ends at byte {self.position}, {size - len(data)} too soon")
        return data

    def _up_to(self, size: int) -> bytes:
        # In pieces, so that memory grows with the data received, not with what a header claims.
        pieces, left = [], size
        while left:
            try:
                piece = self._stream.read(min(left, _CHUNK))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ArchiveError(f"damaged gzip data ({error})") from None
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        self.position += size - left
        return b"".join(pieces)

    def block(self) -> bytes:
        """The next 512 bytes, or b"" at the end of the stream."""
        data = self._up_to(_BLOCK)
        if data and len(data) < _BLOCK:
            raise ArchiveError(f"ends at byte {self.position}, within a header")
        return data

    def skip(self, size: int) -> None:
        if self._seekable and size > _CHUNK:
            # Read the last byte, to notice a file that was cut short.
            self._stream.seek(size - 1, io.SEEK_CUR)  # type: ignore[attr-defined]
            self.position += size - 1
            self.exactly(1)
            return
        while size:
            piece = min(size, _CHUNK)
            self.exactly(piece)
            size -= piece


def members(stream: ByteStream) -> Iterator[Member]:
    """The regular files of a tar, gzipped or plain. Links, devices and folders are skipped.

    Raises ArchiveError where the bytes stop being a tar; the stream's own errors pass through.
    """
    head = stream.read(_BLOCK)
    for magic, name in _FOREIGN.items():
        if head.startswith(magic):
            raise ArchiveError(f"is compressed with {name}; only plain tar and gzip are read")
    whole = _rejoined(head, stream)
    if head.startswith(b"\x1f\x8b"):
        whole = gzip.GzipFile(fileobj=whole)  # type: ignore[arg-type]
    yield from _members(_Reader(whole))


def _rejoined(head: bytes, stream: ByteStream) -> ByteStream:
    """The stream with `head` put back in front."""
    if isinstance(stream, io.BufferedReader) and stream.seekable():
        stream.seek(-len(head), io.SEEK_CUR)
        return stream
    return _Rejoined(head, stream)


class _Rejoined:
    """A stream whose first bytes have already been read."""

    def __init__(self, head: bytes, stream: ByteStream):
        self._head, self._stream = head, stream

    def read(self, size: int = -1, /) -> bytes:
        if not self._head:
            return self._stream.read(size)
        if size < 0:
            head, self._head = self._head, b""
            return head + self._stream.read(size)
        head, self._head = self._head[:size], self._head[size:]
        return head


def _members(reader: _Reader) -> Iterator[Member]:
    long_name: str | None = None
    while True:
        block = reader.block()
        if not block:
            # Some writers omit the two empty blocks at the end.
            if reader.position == 0:
                raise ArchiveError("is empty")
            return
        if not block.strip(b"\0"):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ArchiveError(
                f"no tar header at byte {reader.position - _BLOCK} ({error})"
            ) from None
        if info.size < 0:
            raise ArchiveError(f"a member of {info.size} bytes at byte {reader.position - _BLOCK}")
        size = 0 if info.type in _WITHOUT_DATA else info.size
        end = reader.position + -(-size // _BLOCK) * _BLOCK
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise ArchiveError(f"{info.name!r} is a sparse member, which is not read")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if size > _MAX_NAME:
                raise ArchiveError(f"an extended header of {size} bytes, over {_MAX_NAME}")
            data = reader.exactly(size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                long_name = _pax_path(data) or long_name
        elif info.type in tarfile.REGULAR_TYPES:
            yield Member(long_name or info.name, size, reader)
            long_name = None
        elif info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            long_name = None
        reader.skip(end - reader.position)


def _pax_path(data: bytes) -> str | None:
    """The "path" of a pax header's records, each "length key=value\\n"."""
    path, position = None, 0
    while position < len(data):
        length, _, _ = data[position:].partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data) - position:
            raise ArchiveError("a damaged pax header")
        record = data[position + len(length) + 1 : position + int(length)].rstrip(b"\n")
        key, _, value = record.partition(b"=")
        if key == b"path":
            path = value.decode("utf-8", "surrogateescape")
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            raise ArchiveError("a pax header that changes a member's size, which is not read")
        position += int(length)
    return path


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: "a/b.c.jpg" -> ("a/b", "c.jpg"), the extension from the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or not suffix:
        return None
    return folder + slash + stem, suffix.lower()


def tar_samples(
    stream: ByteStream,
    where: str,
    limits: Limits,
    *,
    skip: int = 0,
    part: int = 0,
    parts: int = 1,
) -> Iterator[tuple[int, Sample | Bad]]:
    """(number, sample) for the archive's samples from `skip` on whose number % parts == part.

    A sample is consecutive members with one key: an image, `txt`, `json`, `cls` (a label). Other members are not
    kept. A broken archive ends with one more Bad. Numbers depend only on the names, not on the contents.
    """
    number, key = -1, None
    found: dict[str, bytes] = {}
    seen: set[str] = set()
    oversize: dict[str, str] = {}
    broken: Bad | None = None

    def wanted() -> bool:
        return number >= skip and number % parts == part

    def finish() -> Sample | Bad:
        assert key is not None
        if "txt" in found:
            oversize.pop("json", None)  # not needed for the caption
        if oversize:
            return Bad(key, where, TOO_LARGE, next(iter(oversize.values())))
        if "image" not in found and not seen & IMAGE_SUFFIXES:
            # Such as a .gif, which is not read. An image that was seen is cut off by the archive's end.
            return Bad(key, where, NO_IMAGE, f"only .{', .'.join(sorted(seen)[:5])}")
        return make_sample(
            key,
            where,
            found.get("image"),
            found.get("txt"),
            found.get("json"),
            needs_caption=limits.caption,
            label=found.get("cls"),
        )

    try:
        for member in members(stream):
            named = split_name(member.name.removeprefix("./"))
            if named is None or member.name.startswith("__"):
                continue
            # A repeated suffix starts another sample with the same key.
            if named[0] != key or named[1] in seen:
                if key is not None and wanted():
                    yield number, finish()
                number, key, found, seen, oversize = number + 1, named[0], {}, set(), {}
            seen.add(named[1])
            kind = "image" if named[1] in IMAGE_SUFFIXES else named[1]
            if kind not in ("image", "txt", "json", "cls") or kind in found or not wanted():
                continue
            limit = limits.image_bytes if kind == "image" else limits.text_bytes
            if member.size > limit:
                oversize[kind] = f".{named[1]} of {member.size} bytes, over {limit}"
                continue
            found[kind] = member.read()
    except ArchiveError as error:
        broken = Bad(f"after {key}" if key else "(start)", where, BROKEN_ARCHIVE, str(error))
    if key is not None and wanted():
        yield number, finish()
    number += 1
    if broken and wanted():
        yield number, broken


def write_tar(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write samples (key, {suffix: bytes}) as a tar whose bytes depend only on them; returns their number.

    The file appears whole or not at all.
    """
    count = 0
    with atomic_file(Path(path)) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for key, files in samples:
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mtime, info.mode = len(data), 0, 0o644
                tar.addfile(info, io.BytesIO(data))
            count += 1
    return count
