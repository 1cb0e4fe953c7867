"""From prompts to caption features: QLIP's own text tower, or FLAN-T5 (SPEC section 4).

Both give `Captions` padded on the left, so that the last position of the prefix, which predicts the first
sub-token, is always a caption's last token. An empty prompt is the null prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qlip_core.backends import get_backend
from qlip_core.errors import GenerationError, TextError
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.network import Captions
from qlip_core.text import pooled_position

if TYPE_CHECKING:
    from qlip_core.config import TextConfig
    from qlip_core.text import Tokenizer


class Conditioner(Protocol):
    """Non-empty prompts -> features of at most T tokens each."""

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(features float32 [B, T, F], valid bool [B, T]), padded on the left."""
        ...

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before any cut, special ones included."""
        ...


class TextTower:
    """QLIP's text encoder: its hidden states after the last norm, for all tokens up to the end token.

    `states` maps token ids int64 [B, S] to float32 [B, S, F]. A prompt of over T tokens loses its last words
    but keeps the end token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        states: Callable[[np.ndarray], np.ndarray],
        config: TextConfig,
        length: int,
    ) -> None:
        self._tokenizer, self._states = tokenizer, states
        self._end = config.eos_token_id
        self._length = length

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._tokenizer is None:
            raise TextError(
                "this checkpoint has no tokenizer files, so it cannot take prompts; an empty prompt draws "
                "without one"
            )
        return self.features(self._tokenizer(prompts))

    def features(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [B, S], as the tokenizer gives them -> (features, valid)."""
        ids = ids.copy()
        ends = pooled_position(ids, self._end)
        over = ends >= self._length
        ids[over, self._length - 1] = ids[over, ends[over]]
        ends = np.minimum(ends, self._length - 1)
        # Attention is causal, so positions after the last end token are not needed.
        states = self._states(ids[:, : ends.max(initial=0) + 1])
        out = np.zeros((len(ids), self._length, states.shape[-1]), np.float32)
        for row, state, end in zip(out, states, ends):
            row[self._length - end - 1 :] = state[: end + 1]
        places = np.arange(self._length)
        return out, places >= self._length - 1 - ends[:, None]

    def count(self, prompts: Sequence[str]) -> list[int]:
        return [] if self._tokenizer is None else self._tokenizer.count(prompts)


class _CaptionBackend(Protocol):
    def devices(self) -> list[str]: ...

    def t5(self, name: str, length: int, device: str) -> Conditioner: ...


def t5(config: GeneratorConfig, folder: Path | None = None, device: str = "auto") -> Conditioner:
    """FLAN-T5's encoder, which only the torch backend has; raises BackendError without torch.

    A T5 named by a path is looked for first in `folder`, the generator's. A `device` that torch does not have
    (another backend's) means "auto".
    """
    torch: _CaptionBackend = get_backend("torch")  # type: ignore[assignment]
    name = config.t5_model
    if folder is not None and (folder / name).is_dir():
        name = str(folder / name)
    return torch.t5(name, config.prefix_length, device if device in torch.devices() else "auto")


def encode_prompts(
    prompts: Sequence[str], conditioner: Conditioner, config: GeneratorConfig
) -> Captions:
    """Prompts to Captions; an empty or blank one is the null prefix. Equal ones are encoded once.

    Raises GenerationError if the conditioner's features do not fit the generator.
    """
    shape = (len(prompts), config.prefix_length, config.condition_size)
    features, valid = np.zeros(shape, np.float32), np.ones(shape[:2], bool)
    null = np.array([not prompt.strip() for prompt in prompts], bool)
    distinct = list(dict.fromkeys(p for p, absent in zip(prompts, null) if not absent))
    if distinct:
        values, places = conditioner(distinct)
        if values.shape[1:] != shape[1:]:
            raise GenerationError(
                f"the conditioner gives {list(values.shape[1:])} per caption, the generator takes "
                f"{list(shape[1:])} (prefix_length, condition_size): it was made for another conditioner"
            )
        row = {prompt: i for i, prompt in enumerate(distinct)}
        for i, prompt in enumerate(prompts):
            if prompt in row:
                features[i], valid[i] = values[row[prompt]], places[row[prompt]]
    return Captions(features, valid, null)
