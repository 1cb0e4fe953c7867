"""CLIPScore: how well a picture fits its prompt, by the embeddings of an image and a text tower.

CLIPScore here is the mean over pictures of max(cosine, 0): the plain cosine usually reported for
generators (QLIP's 0.316), not 2.5 times it as in CLIPScore's own paper (arXiv 2104.08718), and
prompts are embedded as they are, without "A photo depicts".
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from qlip_core.errors import DataError
from qlip_core.evaluation.protocol import weights_fingerprint
from qlip_core.hub import find_model
from qlip_core.model import Model
from qlip_core.strict import peek_json

DEFINITION = "mean over pictures of max(cosine, 0), prompts as they are"


class Towers(Protocol):
    """A CLIP-like model: QLIP's (`QlipTowers`), or one in Hugging Face's layout (`qlip_torch.clip`)."""

    @property
    def name(self) -> str:
        """Which checkpoint it is."""
        ...

    @property
    def protocol(self) -> str:
        """What it is, with the hash of its weights."""
        ...

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] to float32 [B, P], unit length."""
        ...

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """To float32 [B, P], unit length."""
        ...


class QlipTowers:
    """The image and text towers of a QLIP, not necessarily the one that draws."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.name = str(model.checkpoint.folder)
        weights = weights_fingerprint(model)
        self.protocol = f"QLIP's towers at {model.config.image_size} px, weights {weights}"

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        return self._model.embed_images(list(images))

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        return self._model.embed_texts(texts)


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """float64 [B]: max(cosine, 0) of unit vectors [B, P]. Raises DataError if they are not finite."""
    cosines = (images.astype(np.float64) * texts).sum(-1)
    if not np.isfinite(cosines).all():
        raise DataError("embeddings have NaN or infinite values: the model's weights are damaged")
    return np.maximum(cosines, 0)


def is_plain_clip(source: str | Path) -> bool:
    """Whether a folder or hub id is a CLIP in Hugging Face's layout and not a QLIP: it has no decoder.

    Raises CheckpointError if it does not exist.
    """
    found = find_model(source)
    # If a config cannot be read, opening it as a QLIP reports what is wrong.
    values = peek_json((found if found.is_dir() else found.parent) / "config.json")
    return values.get("model_type") == "clip" and "decoder_config" not in values
