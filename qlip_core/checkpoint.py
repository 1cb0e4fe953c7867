"""Checkpoints in the published layout: found, checked against the architecture, read part by part.

SPEC section 2. Only safetensors and JSON are read. NVIDIA's code can load what this module writes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qlip_core.architecture import PARTS, architecture, diff_tensors
from qlip_core.config import QLIPConfig, unshown
from qlip_core.errors import CheckpointError
from qlip_core.hub import find_model
from qlip_core.preprocessing import Preprocessing
from qlip_core.tensorfile import TensorFiles, as_float32, to_bfloat16, write_tensors
from qlip_core.text import FILES as TOKENIZER_FILES
from qlip_core.text import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """A model's config and weights. Tensors are read when asked for, and checked as they are read."""

    def __init__(self, config: QLIPConfig, files: TensorFiles) -> None:
        self.config = config
        self.folder = files.folder
        self._files = files
        files.check_fit(diff_tensors(config, files.shapes), architecture(config))

    @property
    def stored_dtypes(self) -> set[str]:
        """How the weights are stored, in safetensors' names."""
        return {self._files.dtype(name) for name in architecture(self.config)}

    @property
    def stored_bytes(self) -> int:
        return self._files.size

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32. Raises CheckpointError if it has NaN or infinite values."""
        return self._files.float32(name)

    def part(self, part: str) -> dict[str, np.ndarray]:
        """All tensors of one part of PARTS, as float32."""
        table = architecture(self.config)
        return {name: self.tensor(name) for name, spec in table.items() if spec.part == part}

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors, as float32."""
        return {name: self.tensor(name) for name in architecture(self.config)}

    @cached_property
    def fingerprint(self) -> str:
        """Identifies this tokenizer: 32 hex digits of its config and its weights.

        Covers what tokens and pictures depend on: the visual towers' settings, the names, shapes and values
        of their and the bottleneck's tensors (16 samples of each large tensor, so that it takes milliseconds
        at any size), and the normalisation of pixels. Training changes all values, hence the fingerprint; a
        few values edited by hand may not.
        """
        config, pixels = self.config, self.preprocessing
        encoder = unshown(config.vision_config, bottleneck=True)
        settings = [encoder, unshown(config.decoder_config)]
        return self._digest(
            [part for part in PARTS if part != "text"], [*settings, pixels.mean, pixels.std]
        )

    @cached_property
    def text_fingerprint(self) -> str:
        """The same for the text tower, on which generators that encode captions with it depend."""
        text = self.config.text_config
        return self._digest(["text"], [unshown(text), text.eos_token_id])

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of all values of all tensors, by which results identify weights. Reads all of them, which takes
        1.5 seconds for B-16."""
        digest = hashlib.sha256()
        for name, spec in sorted(architecture(self.config).items()):
            digest.update(name.encode())
            values = self._files.values(name, 0, spec.size)
            digest.update(np.ascontiguousarray(values, "<f4").data)
        return digest.hexdigest()

    def _digest(self, parts: list[str], settings: list[Any]) -> str:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, spec in sorted(architecture(self.config).items()):
            if spec.part not in parts:
                continue
            digest.update(f"{name}{list(spec.shape)}".encode())
            for start, stop in _sampled(spec.size):
                values = self._files.values(name, start, stop)
                digest.update(values.astype("<f4").tobytes())
        return digest.hexdigest()[:32]

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.of_folder(self.folder, self.config.image_size)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The text tokenizer, or None if the checkpoint has no files for one."""
        return Tokenizer.from_folder(self.folder, self.config.text_config)

    @cached_property
    def license(self) -> str | None:
        """The licence in the folder's model card (`license:` in README.md), else None."""
        return self._card("license_name") or self._card("license")

    @cached_property
    def note(self) -> str | None:
        """One line about this model from the model card (`note:` in README.md), else None."""
        return self._card("note")

    def _card(self, key: str) -> str | None:
        return card_value(self.folder, key)


def card_value(folder: Path, key: str) -> str | None:
    """The value of `key` in the front matter of a folder's README.md, else None."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    found = re.search(rf"^{key}:\s*(.+?)\s*$", front[1], re.MULTILINE) if front else None
    return found[1].strip("\"'") if found else None


def _sampled(size: int) -> Iterator[tuple[int, int]]:
    blocks, width = 16, 256
    if size <= blocks * width:
        yield 0, size
        return
    for i in range(blocks):
        start = i * (size - width) // (blocks - 1)
        yield start, start + width


# -- reading -----------------------------------------------------------------------------------


def open_checkpoint(model: str | Path | None = None, revision: str | None = None) -> Checkpoint:
    """Open a folder, a `.safetensors` file beside its config.json, a hub id, or the bundled model.

    Reads headers only. Raises ConfigError or CheckpointError; the latter lists tensors that are missing,
    unexpected or of the wrong shape, up to 100 of each kind.
    """
    path = find_model(model, revision)
    folder = path if path.is_dir() else path.parent
    files = TensorFiles([path] if path.is_file() else weight_files(folder), folder)
    return Checkpoint(QLIPConfig.from_file(folder / "config.json"), files)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises CheckpointError if there are none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        return _sharded(index)
    if not (folder / "config.json").is_file():
        made = sorted(folder.glob("stage*/model"))  # what training leaves in its run folder
        hint = f"; the model that this run made is {made[-1]}" if made else ""
        raise CheckpointError(f"{folder}: not a model folder (no config.json, no {WEIGHTS}){hint}")
    pickles = [p.name for p in sorted(folder.glob("pytorch_model*.bin"))]
    hint = f"; {pickles[0]} is a pickle, which is never loaded" if pickles else ""
    raise CheckpointError(f"{folder}: no {WEIGHTS} in it{hint}")


def _sharded(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        # Names only: an index must not lead out of its folder.
        if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: not a readable index of weight files") from None
    for name in names:
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not there")
    return [index.parent / name for name in names]


# -- writing -----------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    config: QLIPConfig,
    weights: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    tokenizer_from: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    card: str | None = None,
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint folder in the published layout, whole or not at all.

    `weights`: all tensors, float32 by published name; `dtype`: how they are stored (float32, float16,
    bfloat16); `tokenizer_from`: a folder whose tokenizer files are copied; `card`: the README.md, whose
    front matter states the licence; `beside`: other text files by name. In an existing folder the model is
    replaced and other files stay. Raises CheckpointError if the weights do not fit the config or are not
    finite, even if only in `dtype`.
    """
    pixels = preprocessing or Preprocessing(config.image_size)
    texts = {
        **(beside or {}),
        **({} if card is None else {"README.md": card}),
        "config.json": config.to_json(),
        "preprocessor_config.json": json.dumps(pixels.to_dict(), indent=2) + "\n",
    }
    named = [] if tokenizer_from is None else [Path(tokenizer_from) / n for n in TOKENIZER_FILES]
    return write_folder(
        Path(folder),
        {name: weights[name] for name in architecture(config) if name in weights},
        texts,
        dtype=dtype,
        problem=diff_tensors(config, {name: w.shape for name, w in weights.items()}),
        copies=[path for path in named if path.is_file()],
    )


def write_folder(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    texts: Mapping[str, str],
    *,
    dtype: str,
    problem: str,
    copies: Sequence[Path] = (),
) -> Path:
    """Write a model's folder, whole or not at all: its weights, text files by name, and copies of files.

    `problem`: how the weights do not fit the config; empty if they do. Raises CheckpointError for a problem,
    and for values that are not finite, or would not be in the type they are stored in.
    """
    if problem:
        raise CheckpointError(f"{folder}: not written, the weights do not fit: {problem}")
    for name, values in weights.items():
        if not np.isfinite(values).all():
            raise CheckpointError(f"{folder}: not written, {name} has NaN or infinite values")
        if not np.isfinite(_as_stored(values, dtype)).all():
            raise CheckpointError(
                f"{folder}: not written, {name} has values up to {np.abs(values).max():g}, which are "
                f"infinite in {dtype}: store it in a wider type"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        # transformers only reads safetensors files that state a framework's layout.
        write_tensors(temporary / WEIGHTS, weights, dtype=dtype, metadata={"format": "pt"})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for source in copies:
            shutil.copyfile(source, temporary / source.name)
        replace_folder(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """The values as they would be read back from a file of that type."""
    if dtype == "bfloat16":
        return as_float32(to_bfloat16(values), "BF16", "")
    with np.errstate(over="ignore"):  # the caller checks for infinities
        return values.astype(dtype, copy=False) if dtype == "float16" else values


def replace_folder(folder: Path, temporary: Path) -> None:
    """Move the complete folder `temporary` to `folder`; other files of an older one are kept.

    If killed halfway, the older one is left beside it as `.NAME.*.old`.
    """
    if folder.is_symlink():
        folder = folder.resolve()
    if not folder.exists():
        temporary.rename(folder)
        return
    old = temporary.with_suffix(".old")
    folder.rename(old)
    temporary.rename(folder)
    ours = (
        *("config.json", "preprocessor_config.json", "recipe.toml", "README.md"),
        *("model*.safetensors", INDEX, *TOKENIZER_FILES),
    )
    for entry in old.iterdir():
        if not (folder / entry.name).exists() and not any(map(entry.match, ours)):
            entry.rename(folder / entry.name)
    shutil.rmtree(old)
