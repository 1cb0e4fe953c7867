"""CLIPScore's CLIP model, in Hugging Face's layout, loaded with `transformers` (the extra `t5`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlip_core.config import TextConfig
from qlip_core.errors import BackendError, TextError
from qlip_core.files import sha256_of
from qlip_core.hub import find_model, hub_id
from qlip_core.preprocessing import Preprocessing
from qlip_core.text import Tokenizer
from qlip_torch.evaluation import exact_inference
from qlip_torch.pretrained import pretrained
from qlip_torch.weight_files import weight_files

# A ViT-L/14 needs about 100 MB of activations per image.
_IMAGES_AT_ONCE = 32


class ClipTowers:
    """CLIP's two towers in float32; a `qlip_core.evaluation.clip_score.Towers`.

    Pictures and texts are prepared by this project's own code, with the same results as CLIPImageProcessor
    and CLIP's tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        name: str,
        weights: str,
        device: str,
    ) -> None:
        self._model = model.to(device).eval()
        self._tokenizer, self._preprocessing = tokenizer, preprocessing
        self._device = device
        self.name = name
        self.protocol = f"CLIP at {preprocessing.size} px, weights {weights}"

    @exact_inference()
    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] to float32 [B, P], unit length."""
        out = []
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            batch = images[start : start + _IMAGES_AT_ONCE]
            pixels = torch.from_numpy(np.stack([self._preprocessing(image) for image in batch]))
            pooled = self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
            out.append(_unit(self._model.visual_projection(pooled)))
        return np.concatenate(out)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """To float32 [B, P], unit length; a text that is too long is cut."""
        # Attention is causal and padding follows the end token, so it needs no mask.
        ids = torch.from_numpy(self._tokenizer(texts)).to(self._device)
        pooled = self._model.text_model(input_ids=ids).pooler_output
        return _unit(self._model.text_projection(pooled))


def clip_towers(source: str, device: str = "cpu") -> ClipTowers:
    """The CLIP in a folder or at a hub id. Reads safetensors only and runs no code from it.

    Raises BackendError if transformers is not installed, CheckpointError for weights that are missing
    (all or some), of the wrong shape or not finite, TextError for a folder without a tokenizer.
    """
    files = weight_files(source, "CLIP's weights")
    folder = find_model(source)
    folder = folder if folder.is_dir() else folder.parent
    model = _load(folder)
    text, vision = model.config.text_config, model.config.vision_config
    ids = TextConfig(
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        pad_token_id=text.pad_token_id or 0,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    tokenizer = Tokenizer.from_folder(folder, ids)
    if tokenizer is None:
        raise TextError(
            f"{source}: no tokenizer files (tokenizer.json, or vocab.json and merges.txt)"
        )
    preprocessing = Preprocessing.of_folder(folder, vision.image_size)
    name = hub_id(folder) or str(source)
    return ClipTowers(model, tokenizer, preprocessing, name, sha256_of(files), device)


def _load(folder: Path) -> Any:
    try:
        from transformers import CLIPModel
    except ImportError:
        raise BackendError(
            "reading a CLIP other than a QLIP needs transformers: run `pip install 'qlip[t5]'`"
        ) from None
    return pretrained(CLIPModel, folder).float()


def _unit(x: Tensor) -> np.ndarray:
    return F.normalize(x.float(), dim=-1).cpu().numpy()
