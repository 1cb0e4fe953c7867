"""Safetensors files, memory-mapped; the header is checked in full before any tensor is read.

The `safetensors` package does not support bfloat16 for numpy, and its low-level writer changes between
versions. The format is simple enough to be read and written here, tested against the package.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qlip_core.errors import CheckpointError
from qlip_core.files import atomic_file

# Stored type -> numpy type of the bytes. bfloat16 is the upper half of a float32.
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    # Never computed with, but a file may contain such tensors.
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
# The `safetensors` package refuses files with a longer header.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """An entry of the header: stored type, shape, and where the bytes are in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """One `.safetensors` file. Raises CheckpointError if it is incomplete or not safetensors."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.entries, self.metadata = _read_header(file.read(8), file, size, self.path)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None

    def raw(self, name: str) -> np.ndarray:
        """The stored values, without a copy (bfloat16 as uint16)."""
        entry = self.entries[name]
        flat = np.frombuffer(
            self._map, DTYPES[entry.dtype], math.prod(entry.shape), offset=entry.start
        )
        return flat.reshape(entry.shape)

    def float32(self, name: str) -> np.ndarray:
        """The values as float32; a read-only view if they are stored as float32."""
        entry = self.entries[name]
        return as_float32(self.raw(name), entry.dtype, f"{self.path}: tensor {name}")


class TensorFiles:
    """The tensors of a model's files by name, read on demand and checked as they are read.

    Raises CheckpointError for an incomplete file, and for a tensor that is in two files.
    """

    def __init__(self, paths: Iterable[Path], folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, TensorFile] = {}
        for file in map(TensorFile, paths):
            for name in file.entries:
                if name in self._where:
                    raise CheckpointError(
                        f"{folder}: tensor {name} is in two files, {self._where[name].path.name} "
                        f"and {file.path.name}"
                    )
                self._where[name] = file

    @property
    def names(self) -> list[str]:
        return list(self._where)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.entries[name].shape for name, file in self._where.items()}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in {file.path for file in self._where.values()})

    def check_fit(self, problem: str, names: Iterable[str]) -> None:
        """Raises CheckpointError for a `problem` with names and shapes, if not empty, and for tensors among
        `names` that are not stored as floating point."""
        if problem:
            raise CheckpointError(f"{self.folder}: the weights do not fit the config: {problem}")
        if wrong := [
            f"{name} as {kind}" for name in names if (kind := self.dtype(name)) not in FLOATS
        ]:
            raise CheckpointError(
                f"{self.folder}: weights must be stored as one of {', '.join(FLOATS)}, but are: {listed(wrong)}"
            )

    def dtype(self, name: str) -> str:
        """How a tensor is stored, in safetensors' names."""
        return self._where[name].entries[name].dtype

    def values(self, name: str, start: int, stop: int) -> np.ndarray:
        """Values `start` to `stop` of a tensor laid flat, as float32, unchecked."""
        flat = self._where[name].raw(name).reshape(-1)
        return as_float32(flat[start:stop], self.dtype(name), name)

    def float32(self, name: str) -> np.ndarray:
        """One tensor as float32. Raises CheckpointError if it has NaN or infinite values."""
        values = self._where[name].float32(name)
        if not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            raise CheckpointError(
                f"{self._where[name].path}: tensor {name} has {bad} values that are NaN or infinite"
            )
        return values


LISTED = 100


def listed(names: Sequence[str]) -> str:
    """Names for a message: the first `LISTED`, and how many more there are."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def as_float32(raw: np.ndarray, dtype: str, where: str) -> np.ndarray:
    if dtype not in FLOATS:
        raise CheckpointError(f"{where} is stored as {dtype}, expected floating point")
    if dtype == "BF16":
        # Shifting a 0-d array gives a scalar, but the caller expects an array.
        return np.asarray(raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32, copy=False)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper halves as uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all (temporary file, then rename).

    `dtype` stores all tensors as float32, float16 or bfloat16; None keeps each array's own type.
    One tensor is converted at a time, so a large model needs no second copy in memory. Raises CheckpointError
    if the header would be too long for readers.
    """
    stored = {name: _stored_as(name, values, dtype) for name, values in tensors.items()}
    # Putting wide types first keeps every tensor aligned to its own size; the format has no padding.
    order = sorted(stored, key=lambda name: (-DTYPES[stored[name]].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].size * DTYPES[stored[name]].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": stored[name], "shape": shape, "data_offsets": [start, end]}
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(
            f"{path}: not written: its header would have {len(text):,} bytes, and readers of safetensors take "
            f"{MAX_HEADER:,}"
        )
    with atomic_file(Path(path)) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            values = tensors[name]
            if stored[name] == "BF16":
                raw = to_bfloat16(values)
            else:
                raw = np.ascontiguousarray(values, DTYPES[stored[name]])
            file.write(raw.data)


def to_json(value: object) -> str:
    """Compact JSON: only characters without a UTF-8 form, in names that are not valid Unicode, are escaped."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _stored_as(name: str, values: np.ndarray, dtype: str | None) -> str:
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int64": "I64"}
    kind = dtype or values.dtype.name
    if kind not in names:
        raise CheckpointError(f"tensor {name}: type {kind} cannot be written")
    return names[kind]


# -- the header --------------------------------------------------------------------------------


def _read_header(
    prefix: bytes, file: BinaryIO, size: int, path: Path
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    length = int.from_bytes(prefix, "little") if len(prefix) == 8 else size
    text = file.read(length) if length <= min(MAX_HEADER, size - 8) else b""
    # Some lengths look like a pickle's first bytes; only the brace after them tells them apart.
    if looks_like_pickle(prefix) and not text.startswith(b"{"):
        raise CheckpointError(
            f"{path}: this is a pickle or a torch archive, not safetensors; pickles are never loaded"
        )
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: only {size} bytes long, not a safetensors file")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path}: not a safetensors file")
    if length > size - 8:
        raise CheckpointError(
            f"{path}: not a safetensors file, or cut short (header of {length} bytes, file of {size})"
        )
    try:
        header = json.loads(text)
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        entries = {name: _entry(value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: the safetensors header is damaged") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has the unsupported type {entry.dtype}")
        bytes_needed = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if entry.start != end or entry.end - entry.start != bytes_needed:
            raise CheckpointError(
                f"{path}: tensor {name} claims bytes {entry.start} to {entry.end}, "
                f"which its shape {list(entry.shape)} does not fill: damaged header"
            )
        end = entry.end
    if end != size:
        raise CheckpointError(
            f"{path}: the header describes {end} bytes, the file has {size}: cut short or damaged; "
            "fetch or copy it again"
        )
    return entries, metadata


def _entry(value: dict, base: int) -> TensorEntry:
    shape, (start, end) = value["shape"], value["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError
    return TensorEntry(str(value["dtype"]), tuple(shape), base + start, base + end)


def looks_like_pickle(prefix: bytes) -> bool:
    """A raw pickle (protocol 2 and later) or a zip, which is what torch.save writes."""
    return (prefix[:1] == b"\x80" and prefix[1:2] in b"\x02\x03\x04\x05") or prefix[
        :4
    ] == b"PK\x03\x04"
