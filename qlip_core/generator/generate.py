"""Prompts to visual tokens: the part of `Model.generate` and similar methods that no backend changes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlip_core import bsq
from qlip_core.errors import GenerationError, TextError
from qlip_core.generator.conditioning import Conditioner, encode_prompts
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.network import Draw, GeneratorNetwork
from qlip_core.generator.sampling import Sampling, check_seed, guidance_scales, step_keys
from qlip_core.loading import Progress

MAX_IMAGES = 1 << 32  # the number of an image is hashed as 32 bits


class PromptCut(UserWarning):
    """A prompt was longer than the generator's prefix."""


@dataclass(frozen=True)
class Request:
    """What to draw: a prompt for every picture, and its number among the pictures of that prompt.

    The noise depends only on the seed and that number. So a picture is the same whatever else is drawn with
    it, and equal prompts (repeated, or with n above 1) give different pictures.
    """

    prompts: tuple[str, ...]
    numbers: tuple[int, ...]
    seed: int
    sampling: Sampling

    @classmethod
    def of(
        cls, prompts: str | Sequence[str], n: int, seed: int, sampling: Sampling, vocab: int
    ) -> Request:
        """n pictures of each prompt, in the prompts' order. Raises GenerationError or TextError."""
        sampling.check(vocab)
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n < MAX_IMAGES:
            raise GenerationError(f"n (={n!r}) must be a positive number of pictures per prompt")
        if not isinstance(prompts, Iterable):
            raise TextError(f"prompts must be strings, got {type(prompts).__name__}")
        each = [prompts] if isinstance(prompts, str) else list(prompts)
        for prompt in each:
            if not isinstance(prompt, str):
                raise TextError(f"prompts must be strings, got {type(prompt).__name__}")
        seen: Counter[str] = Counter()
        numbers = []
        for prompt in each:
            numbers += range(seen[prompt], seen[prompt] + n)
            seen[prompt] += n
        repeated = tuple(prompt for prompt in each for _ in range(n))
        return cls(repeated, tuple(numbers), check_seed(seed), sampling)

    def __len__(self) -> int:
        return len(self.prompts)


def merged(
    sampling: Sampling,
    *,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    cfg_scale: float | None,
    cfg_schedule: str | None,
    cfg_interval: tuple[float, float] | None,
) -> Sampling:
    """A generator's own settings, overridden by those that are given."""
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "cfg_scale": cfg_scale,
        "cfg_schedule": cfg_schedule,
        "cfg_interval": cfg_interval,
    }
    return replace(sampling, **{k: v for k, v in given.items() if v is not None})


@dataclass(frozen=True)
class TokenDrawer:
    """A generator with what encodes its captions."""

    config: GeneratorConfig
    network: GeneratorNetwork
    conditioner: Conditioner

    def draw(
        self, request: Request, batch_size: int, progress: Progress | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first picture, bits uint8 [b, N, L]) batch by batch; `progress` is called as sub-tokens are drawn."""
        self._warn_of_cuts(request.prompts)
        for start in range(0, len(request), batch_size):
            stop = min(start + batch_size, len(request))
            rows = []
            for chunk in self._rows(request, slice(start, stop)):
                rows.append(chunk)
                if progress is not None:
                    progress(chunk.size)
            yield start, self.bits(np.concatenate(rows, axis=1))

    def stream(self, request: Request) -> Iterator[np.ndarray]:
        """Draw all pictures at once and yield after each row of patches: bits uint8 [B, patches so far, L]."""
        self._warn_of_cuts(request.prompts)
        so_far = np.empty((len(request), 0), np.int64)
        for chunk in self._rows(request, slice(None)):
            so_far = np.concatenate([so_far, chunk], axis=1)
            yield self.bits(so_far)

    def bits(self, tokens: np.ndarray) -> np.ndarray:
        """Sub-tokens of whole patches, int64 [B, p*n] -> bits uint8 [B, p, L]."""
        by_patch = tokens.reshape(len(tokens), -1, self.config.sub_tokens)
        return bsq.integers_to_bits(by_patch, self.config.group_size)

    def _rows(self, request: Request, part: slice) -> Iterator[np.ndarray]:
        config, prompts = self.config, request.prompts[part]
        steps = config.tokens_per_image
        order = Draw(
            encode_prompts(prompts, self.conditioner, config),
            request.sampling,
            step_keys(request.seed, request.numbers[part], steps),
            guidance_scales(request.sampling, steps),
            config.tokens_per_row,
        )
        return self.network.draw(order)

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        limit = self.config.prefix_length
        distinct = [p for p in dict.fromkeys(prompts) if p.strip()]
        for prompt, count in zip(distinct, self.conditioner.count(distinct)):
            if count > limit:
                start = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
                warnings.warn(
                    f'prompt "{start}" has {count} tokens, over the limit of {limit}: its end is cut',
                    PromptCut,
                    stacklevel=2,
                )
