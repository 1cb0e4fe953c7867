"""FLAN-T5's encoder as a conditioner (SPEC section 4), loaded with `transformers` (the extra `t5`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlip_core.errors import BackendError
from qlip_core.hub import from_hub
from qlip_torch.pretrained import pretrained, read

_WANTED = ("*.json", "*.safetensors", "spiece.model")


class T5Encoder:
    """Captions -> the encoder's last hidden states, float32 [B, T, F], padded on the left.

    `name` is a folder or a hub id. Loaded when first used, in float32 because T5 overflows float16. Raises
    BackendError if transformers is not installed, CheckpointError if the model cannot be found or lacks
    weights.
    """

    def __init__(self, name: str, length: int, device: str) -> None:
        self._name, self._length, self._device = name, length, device
        self._loaded: tuple[Any, Any] | None = None

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(features float32 [B, T, F], valid bool [B, T])."""
        tokenizer, model = self._load()
        batch = tokenizer(
            list(prompts),
            max_length=self._length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = (batch[k].to(self._device) for k in ("input_ids", "attention_mask"))
        # Encoded with padding on the right, as T5 was trained; then moved to the left, to align the captions' ends.
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        states, valid = states.float().cpu().numpy(), mask.cpu().numpy().astype(bool)
        out = np.zeros_like(states)
        for row, state, places in zip(out, states, valid):
            row[self._length - places.sum() :] = state[places]
        return out, valid[:, ::-1].copy()

    def count(self, prompts: Sequence[str]) -> list[int]:
        if not prompts:
            return []
        tokenizer, _ = self._load()
        return [len(ids) for ids in tokenizer(list(prompts)).input_ids]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            try:
                from transformers import AutoTokenizer, T5EncoderModel
            except ImportError:
                raise BackendError(
                    "this generator encodes captions with FLAN-T5: run `pip install 'qlip[t5]'`"
                ) from None
            folder = Path(self._name).expanduser()
            if not folder.is_dir():
                # Not transformers' download, which takes a mistyped folder for a hub id and retries for long.
                folder = from_hub(self._name, wanted=_WANTED)
            tokenizer = read(
                folder,
                lambda: AutoTokenizer.from_pretrained(
                    folder, padding_side="right", local_files_only=True
                ),
            )
            model = pretrained(T5EncoderModel, folder).float()
            model.to(torch.device(self._device))
            self._loaded = tokenizer, model.eval()
        return self._loaded
