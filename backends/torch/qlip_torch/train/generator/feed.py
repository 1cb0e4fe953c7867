"""Micro-batches for the generator: sub-tokens with captions, from token shards or from images.

Legend: b rows of this rank's micro-batch, M sub-tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip_core import bsq
from qlip_core.data.draws import stable_hash
from qlip_core.data.permutation import chances
from qlip_core.data.token_shards import TokenShards
from qlip_core.errors import DataError
from qlip_core.generator.config import GeneratorConfig
from qlip_core.model import Model
from qlip_torch.backend import TorchNetwork
from qlip_torch.train.data import Loader, make_loader
from qlip_torch.train.distributed import World
from qlip_torch.train.generator.recipe import GeneratorRecipe
from qlip_torch.train.pictures import Normalizer

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""`Generator.forward`'s arguments: caption features, which of them are valid, which captions are dropped,
sub-tokens."""


@dataclass(frozen=True)
class Rows:
    """Training pictures: `tokens` int64 [b, M] in raster order, b captions, and `places` int64 [b], the
    rows' numbers in the run, independent of the number of ranks and micro-batches."""

    tokens: np.ndarray
    captions: Sequence[str]
    places: np.ndarray


def dropped(seed: int, places: np.ndarray, probability: float) -> np.ndarray:
    """Which captions are replaced by the null prefix: places int64 [b] -> bool [b], without stored state."""
    return chances(places, stable_hash(f"null prefix seed {seed}"), probability)


def sub_tokens(bits: np.ndarray, config: GeneratorConfig) -> np.ndarray:
    """Bits uint8 [b, N, L] -> sub-tokens int64 [b, M], raster order."""
    return bsq.bits_to_integers(bits, config.group_size).reshape(len(bits), -1)


class TokenFeed:
    """From token shards. Raises TokenFileError for those of another tokenizer."""

    def __init__(
        self,
        recipe: GeneratorRecipe,
        config: GeneratorConfig,
        fingerprint: str,
        world: World,
        state: dict[str, Any] | None,
    ) -> None:
        self._shards = TokenShards(recipe.data.tokens, fingerprint)
        self._recipe, self._config, self._world = recipe, config, world
        self._rows = _rows_of_rank(recipe, world)
        self._samples = 0
        if state is not None:
            if "digest" not in state["data"]:
                raise DataError(
                    "the saved data position is from an older version; start a new run elsewhere"
                )
            if state["data"] != self._identity:
                raise DataError(
                    f"{recipe.data.tokens}: not the token shards that the run was started with, which had "
                    f"{state['data']['images']} images (these have {len(self._shards)}): restore those, or "
                    "start a new run elsewhere"
                )
            self._samples = state["samples"]

    def __next__(self) -> Rows:
        world, rows = self._world, self._rows
        number = self._samples // (rows * world.size)
        batch = self._shards.batch(
            number,
            rows,
            seed=self._recipe.seed,
            rank=world.rank,
            world_size=world.size,
            flip=self._recipe.data.flip,
        )
        places = self._samples + world.rank * rows + np.arange(rows, dtype=np.int64)
        self._samples += rows * world.size
        tokens = batch.tokens.groups(self._config.group_size).reshape(rows, -1)
        return Rows(tokens, batch.captions, places)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {"images": len(self._shards), "digest": self._shards.digest()}

    def state_dict(self) -> dict[str, Any]:
        return {"data": self._identity, "samples": self._samples}

    def opened(self) -> AbstractContextManager[Any]:
        return nullcontext()


class ImageFeed:
    """From captioned images, through the frozen tokenizer."""

    def __init__(
        self,
        recipe: GeneratorRecipe,
        config: GeneratorConfig,
        tokenizer: Model,
        world: World,
        state: dict[str, Any] | None,
    ) -> None:
        assert isinstance(tokenizer.network, TorchNetwork)
        self._config, self._network, self._world = config, tokenizer.network, world
        self._rows = _rows_of_rank(recipe, world)
        preprocessing = tokenizer.preprocessing
        self._normalize = Normalizer(world.device, preprocessing.mean, preprocessing.std)
        self._loader: Loader = make_loader(
            recipe.data.images,
            image_size=tokenizer.config.image_size,
            tokenizer=no_ids,
            batch_size=recipe.training.batch,
            micro_batches=recipe.training.micro_batches(world.size),
            rank=world.rank,
            world_size=world.size,
            state=state,
        )

    def __next__(self) -> Rows:
        first = self._loader.samples + self._world.rank * self._rows
        batch = next(self._loader)
        bits = self._network.encode(self._normalize(batch.pixels))
        places = first + np.arange(self._rows, dtype=np.int64)
        return Rows(sub_tokens(bits, self._config), batch.captions, places)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def opened(self) -> AbstractContextManager[Any]:
        return self._loader


class Prepared:
    """The feed's rows as a step's inputs. `ahead`: the next ones are made in a separate thread and CUDA
    stream while the GPU is busy with the last."""

    def __init__(
        self, feed: TokenFeed | ImageFeed, prepare: Callable[[Rows], Inputs], *, ahead: bool
    ) -> None:
        self._feed, self._prepare = feed, prepare
        self._state = feed.state_dict()
        self._thread = ThreadPoolExecutor(1, "feed") if ahead else None
        self._stream = torch.cuda.Stream() if ahead and torch.cuda.is_available() else None
        self._next: Future[tuple[Inputs, dict[str, Any]]] | None = None

    def __next__(self) -> Inputs:
        if self._thread is None:
            inputs, self._state = self._make()
            return inputs
        waiting = self._next or self._thread.submit(self._make)
        inputs, self._state = waiting.result()
        self._next = self._thread.submit(self._make)
        return inputs

    def _make(self) -> tuple[Inputs, dict[str, Any]]:
        with torch.cuda.stream(self._stream):  # no effect if None
            return self._prepare(next(self._feed)), self._feed.state_dict()

    def settle(self) -> None:
        """Wait until nothing is being made, before something else uses the conditioner, whose tokenizer has
        state, or the GPU. If making the rows fails, the error is raised when they are requested."""
        if self._next is not None:
            wait([self._next])

    def state_dict(self) -> dict[str, Any]:
        """The position after the rows handed out so far."""
        return self._state

    @contextmanager
    def opened(self) -> Iterator[None]:
        with self._feed.opened():
            try:
                yield
            finally:
                if self._thread is not None:
                    self._thread.shutdown(cancel_futures=True)


def make_feed(
    recipe: GeneratorRecipe,
    config: GeneratorConfig,
    tokenizer: Model,
    world: World,
    state: dict[str, Any] | None = None,
) -> TokenFeed | ImageFeed:
    """This rank's feed, from the beginning or from a saved state."""
    if recipe.data.tokens:
        return TokenFeed(recipe, config, tokenizer.fingerprint, world, state)
    return ImageFeed(recipe, config, tokenizer, world, state)


def no_ids(texts: Sequence[str]) -> np.ndarray:
    """A tokenizer for the loader that does nothing, since captions are passed on as text here."""
    return np.zeros((len(texts), 0), np.int64)


def _rows_of_rank(recipe: GeneratorRecipe, world: World) -> int:
    micro_batches = recipe.training.micro_batches(world.size)
    return recipe.training.batch // micro_batches // world.size
