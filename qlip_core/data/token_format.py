"""The token shard: tokens, captions, keys and labels of one input shard in one safetensors file.

Tensors: `bits` uint8 [n, ceil(N*L/8)], packed as in a `.qlip` file; with augmentation "flip" also
`bits_flipped`, of the mirrored pictures; `captions` and `keys`, concatenated UTF-8, uint8 [bytes], with
`caption_offsets` and `key_offsets` int64 [n+1] (text i is from offset i to offset i+1); if the input has
labels, `labels` and `label_offsets` likewise.
The metadata says how they were made; docs/formats.md lists it.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import qlip_core
from qlip_core.bsq import packed_bytes
from qlip_core.errors import QlipError, TokenFileError
from qlip_core.tensorfile import TensorEntry, TensorFile, write_tensors
from qlip_core.tokens import open_format

if TYPE_CHECKING:
    from qlip_core.model import Model

FORMAT, VERSION = "qlip-token-shard", "1"
SUFFIX = ".safetensors"
AUGMENTATIONS = ("none", "flip")
# Bad samples named in a header, and characters for each; all of them are counted.
MAX_NAMED, MAX_NAME = 1000, 300


@dataclass(frozen=True)
class Settings:
    """Everything that an image's tokens depend on; the same in every shard of a set."""

    model: str
    """Fingerprint of the tokenizer."""
    length: int
    """L, bits per patch."""
    grid: tuple[int, int]
    """Rows and columns of patches; N is their product."""
    dtype: str
    """The encoder's precision; a lower one changes bits."""
    preprocessing: str
    """JSON, as in `preprocessor_config.json`."""
    augmentation: str
    """ "none", or "flip": every picture and its mirror image."""

    @classmethod
    def of(cls, model: Model, augmentation: str = "none") -> Settings:
        """Raises QlipError for a model without bits or an unknown augmentation."""
        config = model.config
        if not config.quantizes:
            raise QlipError(
                f'{model.checkpoint.folder}: has quantizer "none", so images have no bits; '
                "tokenize with a model that quantizes"
            )
        if augmentation not in AUGMENTATIONS:
            raise QlipError(
                f"augmentation {augmentation!r}: must be one of {', '.join(AUGMENTATIONS)}"
            )
        return cls(
            model.fingerprint,
            config.code_dim,
            config.grid,
            model.dtype,
            json.dumps(model.preprocessing.to_dict(), sort_keys=True),
            augmentation,
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of an image: ceil(N*L/8)."""
        return packed_bytes(self.grid[0] * self.grid[1], self.length)

    @property
    def flips(self) -> bool:
        return self.augmentation == "flip"

    def differences(self, other: Settings) -> str:
        """ "dtype is bfloat16 and not float32, …", `other`'s values first; "" if they agree."""
        return ", ".join(
            f"{f.name} is {getattr(other, f.name)} and not {getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        )


@dataclass(frozen=True)
class Origin:
    """Where a shard's samples came from."""

    source: str
    """The set, as it was named."""
    shard: str
    """The input shard's address, absolute if local."""
    shard_bytes: int | None
    """Its size, if it is a local file."""
    number: int
    """Its number among the set's shards, from 0."""
    of: int
    """How many shards the set has."""

    def same_input(self, other: Origin) -> bool:
        mine = self.shard, self.shard_bytes, self.number, self.of
        return mine == (other.shard, other.shard_bytes, other.number, other.of)


@dataclass(frozen=True)
class Header:
    """The metadata of a token shard, and where its tensors lie."""

    settings: Settings
    origin: Origin
    backend: str
    skipped: dict[str, Any]
    """Bad samples, as `Tally.to_dict` gives them; the first MAX_NAMED named."""
    count: int
    """n, images."""
    size: int
    """The file's size in bytes."""
    entries: dict[str, TensorEntry] = field(repr=False)


class ShardWriter:
    """Collects one shard in memory (each image's packed bits, caption, key and label) and writes it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bits: list[np.ndarray] = []
        self._flipped: list[np.ndarray] = []
        self._captions, self._keys, self._labels = _Texts(), _Texts(), _Texts()

    def add(
        self,
        packed: np.ndarray,
        flipped: np.ndarray | None,
        captions: Sequence[str],
        keys: Sequence[str],
        labels: Sequence[str],
    ) -> None:
        """Packed bits uint8 [b, row_bytes] of b images; `flipped` of their mirror images; a label may be ""."""
        assert len(packed) == len(captions) == len(keys) == len(labels)
        assert (flipped is not None) == self._settings.flips
        self._bits.append(packed)
        if flipped is not None:
            self._flipped.append(flipped)
        self._captions.extend(captions)
        self._keys.extend(keys)
        self._labels.extend(labels)

    def write(self, path: Path, origin: Origin, backend: str, skipped: dict[str, Any]) -> None:
        """Write it whole or not at all. The bytes depend only on what was added and on these arguments."""
        settings = self._settings
        empty = np.empty((0, settings.row_bytes), np.uint8)
        tensors = {"bits": np.concatenate([*self._bits, empty])}
        if settings.flips:
            tensors["bits_flipped"] = np.concatenate([*self._flipped, empty])
        tensors["captions"], tensors["caption_offsets"] = self._captions.arrays()
        tensors["keys"], tensors["key_offsets"] = self._keys.arrays()
        labels, offsets = self._labels.arrays()
        if len(labels):
            tensors |= {"labels": labels, "label_offsets": offsets}
        named = [text[:MAX_NAME] for text in skipped["named"][:MAX_NAMED]]
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": settings.model,
            "length": str(settings.length),
            "grid": f"{settings.grid[0]}x{settings.grid[1]}",
            "dtype": settings.dtype,
            "preprocessing": settings.preprocessing,
            "augmentation": settings.augmentation,
            "source": origin.source,
            "shard": origin.shard,
            "shard_bytes": "" if origin.shard_bytes is None else str(origin.shard_bytes),
            "shard_number": f"{origin.number} of {origin.of}",
            "count": str(len(tensors["bits"])),
            "skipped": json.dumps({"counts": skipped["counts"], "named": named}),
            "backend": backend,
            "qlip": qlip_core.__version__,
        }
        # File names need not be valid Unicode, but readers of safetensors require it.
        clean = {k: v.encode("utf-8", "backslashreplace").decode() for k, v in metadata.items()}
        write_tensors(path, tensors, metadata=clean)


class _Texts:
    """Strings as concatenated bytes, and where each begins."""

    def __init__(self) -> None:
        self._blob, self._offsets = bytearray(), array("q", [0])

    def extend(self, texts: Sequence[str]) -> None:
        for text in texts:
            self._blob += encode_text(text)
            self._offsets.append(len(self._blob))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [bytes], int64 [n+1]."""
        return np.frombuffer(self._blob, np.uint8), np.asarray(self._offsets, np.int64)


def encode_text(text: str) -> bytes:
    """UTF-8; a name that is not valid Unicode keeps its bytes."""
    return text.encode("utf-8", "surrogateescape")


def decode_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def read_header(path: Path) -> Header:
    """Check a token shard's header against its tensors. Raises TokenFileError."""
    file = open_format(path, "token shard", FORMAT, VERSION)
    try:
        return _parse(file.metadata, file)
    except (KeyError, ValueError, TypeError) as error:
        raise TokenFileError(f"{path}: the token shard's header is damaged ({error!r})") from None


def _parse(meta: dict[str, str], file: TensorFile) -> Header:
    def numbers(key: str, pattern: str) -> tuple[int, int]:
        match = re.fullmatch(pattern, meta[key])
        if match is None:
            raise ValueError(f"{key} is {meta[key]!r}")
        return int(match[1]), int(match[2])

    grid = numbers("grid", r"([1-9]\d{0,5})x([1-9]\d{0,5})")
    number, of = numbers("shard_number", r"(\d{1,9}) of (\d{1,9})")
    settings = Settings(
        meta["model"],
        int(meta["length"]),
        grid,
        meta["dtype"],
        meta["preprocessing"],
        meta["augmentation"],
    )
    if settings.augmentation not in AUGMENTATIONS or not 1 <= settings.length <= 2**20:
        raise ValueError(f"augmentation {settings.augmentation!r}, length {settings.length}")
    shard_bytes = int(meta["shard_bytes"]) if meta["shard_bytes"] else None
    origin = Origin(meta["source"], meta["shard"], shard_bytes, number, of)
    skipped = json.loads(meta["skipped"])
    if not all(type(n) is int for n in skipped["counts"].values()) or not all(
        isinstance(text, str) for text in skipped["named"]
    ):
        raise ValueError("skipped is not a tally")
    count = int(meta["count"])
    shapes = {"bits": (count, settings.row_bytes)}
    if settings.flips:
        shapes["bits_flipped"] = shapes["bits"]
    for name, shape in shapes.items():
        _expect(file, name, "U8", shape)
    texts = [("captions", "caption_offsets"), ("keys", "key_offsets")]
    if "labels" in file.entries:
        texts.append(("labels", "label_offsets"))
    for blob, offsets in texts:
        _expect(file, blob, "U8", file.entries[blob].shape[:1])
        _expect(file, offsets, "I64", (count + 1,))
    size = max(entry.end for entry in file.entries.values())
    return Header(settings, origin, meta["backend"], skipped, count, size, file.entries)


def _expect(file: TensorFile, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    entry = file.entries[name]
    if (entry.dtype, entry.shape) != (dtype, shape):
        raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}, not {dtype} {list(shape)}")
