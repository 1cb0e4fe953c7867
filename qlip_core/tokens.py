"""Visual tokens of images, and the `.qlip` file that holds them.

A token file is a safetensors file, so any tool opens it: tensor `bits` uint8 [B, ceil(N*L/8)], each
image's bits patch by patch, most significant first, padded with zeros; metadata in strings.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qlip_core import bsq
from qlip_core.errors import CheckpointError, TokenFileError
from qlip_core.tensorfile import MAX_HEADER, TensorFile, to_json, write_tensors

FORMAT, VERSION = "qlip-tokens", "1"
_OTHERS = 4096  # bytes of the header reserved for everything but the names


@dataclass(frozen=True, eq=False, repr=False)
class VisualTokens:
    """Codes of B images on a grid of h x w patches (N = h*w), L bits per patch, packed in memory.

    `model` is the fingerprint of the tokenizer that made them (empty for tokens made in memory, which any
    tokenizer decodes); `names` has one name per image, or none.
    """

    packed: np.ndarray
    length: int
    grid: tuple[int, int]
    model: str = ""
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        h, w = self.grid
        if h < 1 or w < 1:
            raise ValueError(f"a grid of {h}x{w} patches is empty")
        if self.length < 1:
            raise ValueError(f"{self.length} bits per patch: expected at least 1")
        row = bsq.packed_bytes(h * w, self.length)
        if self.packed.dtype != np.uint8 or self.packed.ndim != 2 or self.packed.shape[1] != row:
            raise ValueError(
                f"packed bits are {self.packed.dtype} {list(self.packed.shape)}, expected uint8 "
                f"[B, {row}] for {h}x{w} patches of {self.length} bits"
            )
        if self.names and len(self.names) != len(self.packed):
            raise ValueError(f"{len(self.names)} names for {len(self.packed)} images")

    # -- made from ---------------------------------------------------------------------------

    @classmethod
    def from_bits(cls, bits: np.ndarray, grid: tuple[int, int]) -> VisualTokens:
        """From bits 0/1 (any integer or bool type) [B, N, L]."""
        if len(grid) != 2:
            raise ValueError(f"grid (={grid}) must be two numbers, rows and columns")
        bits = np.asarray(bits)
        if bits.ndim != 3 or bits.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"bits are {list(bits.shape)}, expected [B, {grid[0] * grid[1]}, L] "
                f"for a grid of {grid[0]}x{grid[1]}"
            )
        if bits.dtype.kind not in "biu" or not np.isin(bits, (0, 1)).all():
            raise ValueError(f"bits must be 0 or 1 as integers or booleans, got {bits.dtype}")
        return cls(bsq.pack(bits.astype(np.uint8)), bits.shape[2], (grid[0], grid[1]))

    @classmethod
    def from_indices(cls, indices: np.ndarray, length: int, grid: tuple[int, int]) -> VisualTokens:
        """From one integer of L = `length` bits per patch: [B, N]."""
        return cls.from_bits(bsq.integers_to_bits(np.asarray(indices)[..., None], length), grid)

    @classmethod
    def from_groups(cls, groups: np.ndarray, size: int, grid: tuple[int, int]) -> VisualTokens:
        """From sub-tokens of `size` bits: [B, N, L/size]."""
        return cls.from_bits(bsq.integers_to_bits(groups, size), grid)

    @classmethod
    def concatenate(cls, parts: Sequence[VisualTokens]) -> VisualTokens:
        """Join the images of several, in order. Raises ValueError if their tokenizers differ."""
        if not parts:
            raise ValueError("nothing to concatenate: an empty sequence has no grid")
        first = parts[0]
        for part in parts:
            if (part.length, part.grid) != (first.length, first.grid):
                raise ValueError(
                    f"cannot join {part.length} bits on {part.grid} to {first.length} bits on "
                    f"{first.grid}"
                )
        models = {part.model for part in parts if part.model}
        if len(models) > 1:
            raise ValueError(f"cannot join tokens of different tokenizers: {sorted(models)}")
        named = all(part.names or not len(part) for part in parts)
        return cls(
            np.concatenate([part.packed for part in parts]),
            first.length,
            first.grid,
            models.pop() if models else "",
            tuple(name for part in parts for name in part.names) if named else (),
        )

    def __add__(self, other: VisualTokens) -> VisualTokens:
        if not isinstance(other, VisualTokens):
            return NotImplemented
        return VisualTokens.concatenate([self, other])

    # -- seen as -----------------------------------------------------------------------------

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def bits(self) -> np.ndarray:
        """uint8 0/1 [B, N, L], unpacked again at each access."""
        return bsq.unpack(self.packed, self.num_patches, self.length)

    def indices(self) -> np.ndarray:
        """int64 [B, N], exact for L up to 62; ValueError above."""
        return bsq.bits_to_integers(self.bits, self.length)[..., 0]

    def groups(self, size: int | None = None) -> np.ndarray:
        """Sub-tokens of `size` bits, int64 [B, N, L/size]. Without `size`: 14 if that divides L, else L."""
        if size is None:
            size = 14 if self.length % 14 == 0 else self.length
        return bsq.bits_to_integers(self.bits, size)

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(
        self, key: int | np.integer | slice | Sequence[int] | np.ndarray
    ) -> VisualTokens:
        """Some of the images; an integer gives one image, still as a batch.

        A sequence holds integers, or one boolean per image. Raises IndexError for images that do not exist,
        TypeError for other keys.
        """
        if isinstance(key, slice):
            rows = np.arange(len(self))[key]
        else:
            picked = np.asarray(key)
            picked = picked if picked.size else picked.astype(np.int64)  # numpy makes [] float
            if picked.ndim > 1 or picked.dtype.kind not in ("iub" if picked.ndim else "iu"):
                raise TypeError(
                    f"images are picked by an integer, a slice, or a sequence of integers or booleans, not {key!r}"
                )
            rows = np.arange(len(self))[np.atleast_1d(picked)]
        names = tuple(self.names[i] for i in rows) if self.names else ()
        return replace(self, packed=self.packed[rows], names=names)

    def __repr__(self) -> str:
        return f"VisualTokens(images={len(self)}, grid={self.grid}, length={self.length})"

    def __iter__(self) -> Iterator[VisualTokens]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Same codes on the same grid; names and model do not count."""
        if not isinstance(other, VisualTokens):
            return NotImplemented
        same = (self.length, self.grid) == (other.length, other.grid)
        return same and np.array_equal(self.packed, other.packed)

    # -- on disk -----------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a `.qlip` file, whole or not at all. Raises TokenFileError if the names do not fit in it,
        OSError if it cannot be written."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "length": str(self.length),
            "grid": f"{self.grid[0]}x{self.grid[1]}",
            "model": self.model,
            "names": names_text(self.names),
        }
        write_tensors(path, {"bits": self.packed}, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> VisualTokens:
        """Read a `.qlip` file, or a pipe that delivers one.

        Raises TokenFileError if it is damaged, not a token file, or of another version.
        """
        if path == "":  # Path("") would be the current folder
            raise TokenFileError("the name of a token file is empty")
        path = Path(path)
        if os.path.exists(path) and path.is_fifo():
            return cls._from_pipe(path)
        if not os.path.isfile(path):
            problem = "not a regular file, which a token file must be: copy it to one first"
            raise TokenFileError(
                f"{path}: {problem if os.path.exists(path) else 'no such token file'}"
            )
        return cls._parse(path, open_format(path, "token file", FORMAT, VERSION))

    @classmethod
    def _from_pipe(cls, path: Path) -> VisualTokens:
        """Read a pipe through a temporary file, so that size and header can be checked."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "copy")
            with path.open("rb") as pipe, copy.open("wb") as file:
                shutil.copyfileobj(pipe, file)
            try:
                return cls.load(copy)
            except TokenFileError as error:
                raise TokenFileError(str(error).replace(str(copy), str(path))) from None

    @classmethod
    def _parse(cls, path: Path, file: TensorFile) -> VisualTokens:
        meta, entry = file.metadata, file.entries.get("bits")
        try:
            # Exactly the digits that are written; `int` alone is not strict.
            for key, form in (("length", "[0-9]{1,6}"), ("grid", "[0-9]{1,6}x[0-9]{1,6}")):
                if not re.fullmatch(form, meta.get(key, "")):
                    raise ValueError(f"{key} is {meta[key]!r}" if key in meta else f"no {key}")
            length = int(meta["length"])
            h, w = map(int, meta["grid"].split("x"))
            names = json.loads(meta.get("names", "[]"))
            if not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
                raise ValueError("names is not a list of strings")
            if entry is None or entry.dtype != "U8" or len(entry.shape) != 2:
                raise ValueError("no tensor bits, uint8 [B, ceil(N*L/8)]")
            packed = file.raw("bits").copy()
            tokens = cls(packed, length, (h, w), meta.get("model", ""), tuple(names))
            if padding := -tokens.num_patches * length % 8:
                packed[:, -1] &= 0xFF << padding & 0xFF  # zeros, as compared and written
            return tokens
        except (ValueError, RecursionError) as error:
            reason = f" ({error})" if str(error) else ""
            raise TokenFileError(f"{path}: the token file's header is damaged{reason}") from None


def open_format(path: Path, what: str, form: str, version: str) -> TensorFile:
    """A safetensors file whose metadata say that it is a `what` of this format and version.

    Raises TokenFileError if it is damaged or anything else.
    """
    try:
        file = TensorFile(path)
    except CheckpointError as error:
        raise TokenFileError(str(error).replace("safetensors file", what)) from None
    found, its_version = file.metadata.get("format"), file.metadata.get("version")
    if found != form:
        raise TokenFileError(
            f'{path}: a safetensors file, but not a {what} (format is {found!r}, expected "{form}")'
        )
    if its_version != version:
        raise TokenFileError(
            f"{path}: {what} version {its_version!r}, this qlip reads {version}: upgrade qlip"
        )
    return file


def names_text(names: Sequence[str]) -> str:
    """The names as a token file stores them. Raises TokenFileError if its header cannot hold them."""
    text = to_json(list(names))
    size = len(to_json(text).encode())
    if size > MAX_HEADER - _OTHERS:
        raise TokenFileError(
            f"the names of {len(names):,} images take {size / 1e6:,.1f} MB, and a token file holds "
            f"{MAX_HEADER / 1e6:.0f} MB of them: make several files of fewer images, or token shards "
            "(`qlip tokenize`)"
        )
    return text
