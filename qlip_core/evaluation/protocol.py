"""Results that say how they were measured, and refuse to be compared with those measured differently.

A figure without its protocol cannot be compared with anything: crop, resize, reference set, count and the weights
behind a metric each move rFID by more than most methods do. So every result carries them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

import qlip_core
from qlip_core.architecture import architecture
from qlip_core.errors import DataError, QlipError
from qlip_core.model import Model

# Fields that may differ between two comparable results: they are what is compared, not how it is measured.
# A set's name may differ too, if its pictures and labels are the same.
SUBJECT = (
    *("dataset", "model", "model_name", "weights_sha256", "recipe_sha256"),
    *("backend", "device", "dtype", "version", "drawn_by"),
)


@dataclass(frozen=True)
class Protocol:
    """How a result was measured."""

    task: str
    dataset: str
    count: int
    """Images measured, without broken ones."""
    preprocessing: str
    """Resize, crop and normalisation."""
    reference: str
    """SHA-256 of the images as the model sees them (uint8 [S, S, 3], in order) and of their labels."""
    model: str
    """Fingerprint of the towers that the task uses; for the visual ones alone, that of `qlip info`."""
    model_name: str
    backend: str
    device: str
    dtype: str
    version: str
    """The package's version."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Metric -> SHA-256 of its weights, or its definition if it has none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that changes the figures: templates, k, splits, the seed."""
    drawn_by: Mapping[str, Any] = field(default_factory=dict)
    """For drawn pictures: fingerprints of the generator and its tokenizer, and sampling settings."""
    weights_sha256: str | None = None
    """SHA-256 of all weights (`Checkpoint.weights_sha256`)."""
    recipe_sha256: str | None = None
    """SHA-256 of the recipe.toml in the model's folder."""

    def to_dict(self) -> dict[str, Any]:
        """The protocol in JSON types."""
        return asdict(self)

    def differences(self, other: Protocol) -> list[str]:
        """A line "field: ours / theirs" for everything that makes two results incomparable.

        A metric that only one of them has does not count.
        """
        out = []
        for each in fields(self):
            ours, theirs = getattr(self, each.name), getattr(other, each.name)
            if each.name in SUBJECT or ours == theirs:
                continue
            if each.name == "metrics":
                names = [n for n in ours if n in theirs and ours[n] != theirs[n]]
            elif isinstance(ours, Mapping):
                names = sorted(
                    n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)
                )
            else:
                out.append(f"{each.name}: {_short(ours)} / {_short(theirs)}")
                continue
            out += [
                f"{each.name}.{n}: {_short(ours.get(n))} / {_short(theirs.get(n))}" for n in names
            ]
        if self.reference != other.reference and self.dataset != other.dataset:
            out.append(f"dataset: {_short(self.dataset)} / {_short(other.dataset)}")
        return out


def make_protocol(
    model: Model,
    task: str,
    dataset: str,
    count: int,
    reference: str,
    *,
    uses_text: bool,
    metrics: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    drawn_by: Mapping[str, Any] | None = None,
) -> Protocol:
    """The protocol of a measurement of `model`."""
    checkpoint, size = model.checkpoint, model.config.image_size
    mean, std = model.preprocessing.mean, model.preprocessing.std
    return Protocol(
        task=task,
        dataset=dataset,
        count=count,
        preprocessing=(
            f"RGB, shortest edge to {size} (Pillow bicubic), centre crop {size}x{size}, "
            f"mean {list(mean)}, std {list(std)}"
        ),
        reference=reference,
        model=weights_fingerprint(model) if uses_text else checkpoint.fingerprint,
        model_name=str(checkpoint.folder),
        backend=model.backend,
        device=model.device,
        dtype=model.dtype,
        version=qlip_core.__version__,
        metrics=dict(metrics or {}),
        settings=dict(settings or {}),
        drawn_by=dict(drawn_by or {}),
        weights_sha256=checkpoint.weights_sha256,
        recipe_sha256=recipe_hash(checkpoint.folder),
    )


def weights_fingerprint(model: Model) -> str:
    """32 hex digits of the visual towers (as token files have it) and the whole text tower."""
    digest = hashlib.sha256(model.fingerprint.encode())
    for name, spec in sorted(architecture(model.config).items()):
        if spec.part == "text":
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(model.checkpoint.tensor(name), "<f4").data)
    return digest.hexdigest()[:32]


def recipe_hash(folder: Path) -> str | None:
    """SHA-256 of the recipe that training puts in a model's folder; None if there is none."""
    try:
        return hashlib.sha256((folder / "recipe.toml").read_bytes()).hexdigest()
    except OSError:
        return None


class ReferenceHash:
    """Running SHA-256 of images with their captions or labels."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, images: np.ndarray, texts: Sequence[str] = ()) -> None:
        """uint8 [B, S, S, 3], and a caption or label each. The split into batches does not matter."""
        for i, image in enumerate(images):
            self._digest.update(np.ascontiguousarray(image).data)
            if texts:
                # The length separates each text from the next.
                self._digest.update(f"{len(texts[i].encode())}:{texts[i]}".encode())

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def text_hash(texts: Iterable[str]) -> str:
    """SHA-256 of a sequence of texts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


# -- results -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Scores by name, each a finite number or None, with the protocol that gave them.

    `details` in JSON types: what is too long for a table. `grid` uint8 [H, W, 3], if there is one.
    """

    protocol: Protocol
    scores: Mapping[str, float | None]
    details: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[str, Any] = field(default_factory=dict)
    """Examples that could not be read, as from `Tally.to_dict`."""
    grid: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in self.scores.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}")

    def rows(self) -> list[tuple[str, str]]:
        """(score, its value as text), for a table."""
        return [(name, score_text(name, value)) for name, value in self.scores.items()]

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON types, without the picture."""
        return {
            "protocol": self.protocol.to_dict(),
            "scores": dict(self.scores),
            "details": dict(self.details),
            "failed": dict(self.failed),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Result:
        """From the output of `to_dict`. Raises DataError for anything else."""
        try:
            protocol = Protocol(**values["protocol"])
            return cls(protocol, values["scores"], values["details"], values["failed"])
        except (KeyError, TypeError, AttributeError, ValueError):
            raise DataError("not a result of `qlip eval` (its option --out writes them)") from None

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read a JSON file. Raises DataError if it is not a result."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({(error.strerror or '').lower()})") from None
        except (ValueError, RecursionError):
            raise DataError(f"{path}: not a JSON file") from None
        try:
            return cls.from_dict(values)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def score_text(name: str, value: float | None) -> str:
    """A score for people: its unit follows from its name."""
    if value is None:
        return "-"
    if "PSNR" in name:
        return f"{value:.2f} dB"
    if "top-" in name or "R@" in name or "accuracy" in name or "share" in name or name == "chance":
        return f"{100 * value:.1f} %"
    return f"{value:.4f}"


def compare(a: Result, b: Result) -> list[tuple[str, float | None, float | None]]:
    """(score, a's value, b's value) for all scores of either.

    Raises QlipError, naming the fields, if the two were not measured in the same way. Model, backend,
    device, dtype and package version may differ, since they are what is compared.
    """
    if found := a.protocol.differences(b.protocol):
        raise QlipError(
            f"these results were measured differently and cannot be compared: {'; '.join(found)}"
        )
    names = [*a.scores, *(n for n in b.scores if n not in a.scores)]
    return [(n, a.scores.get(n), b.scores.get(n)) for n in names]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:57]}..." if len(text) > 60 else text
