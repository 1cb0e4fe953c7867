"""Drawing with a generator in MLX: the cache, the noise, the filters, the loop over sub-tokens.

It follows the rule of qlip_core.generator.sampling, in MLX's arrays. Steps are queued with `async_eval`
while earlier ones run; the host waits only when it hands sub-tokens out, every `Draw.every` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.network import Draw
from qlip_core.generator.sampling import GOLDEN, MULTIPLIERS, Sampling, largest_odds, share_of
from qlip_mlx.generator import Generator, LayerCache

# -- noise -------------------------------------------------------------------------------------


def mix(x: mx.array) -> mx.array:
    """`sampling.mix`, in uint32."""
    first, second = (mx.array(m, mx.uint32) for m in MULTIPLIERS)
    x = (x ^ (x >> 16)) * first
    x = (x ^ (x >> 15)) * second
    return x ^ (x >> 16)


def hash_values(keys: mx.array, count: int) -> mx.array:
    """Keys uint32 [..., 2] -> hashes of the values 0 to `count` - 1, uint32 [..., count]."""
    values = mx.arange(count, dtype=mx.uint32)
    x = mix(values * mx.array(GOLDEN, mx.uint32) + keys[..., :1])
    return mix(x ^ keys[..., 1:])


def gumbel(hashed: mx.array) -> mx.array:
    """`sampling.gumbel`: uint32 -> float32 of the same shape."""
    u = (hashed >> 1).astype(mx.int32).astype(mx.float32) * 2**-31 + 2**-32
    return -mx.log(-mx.log1p(-mx.minimum(u, 1 - 2**-24)))


# -- a step's choice ---------------------------------------------------------------------------


def keep(logits: mx.array, top_k: int, top_p: float) -> mx.array:
    """`sampling.keep`: logits float32 [B, V] with -inf for what the filters drop."""
    V = logits.shape[-1]
    k = min(top_k, V) if top_k else V
    if k == V and top_p >= 1:
        return logits
    largest = mx.topk(logits, k, axis=-1)  # unsorted: sorting all would take eight times as long
    threshold = largest.min(-1, keepdims=True)
    if top_p < 1:
        largest = mx.sort(largest, axis=-1)[:, ::-1]
        odds = (mx.exp(largest - largest[:, :1]) * largest_odds(k)).astype(mx.int64)
        upto = mx.cumsum(odds, axis=-1)
        limit = share_of(upto[:, -1:], top_p)
        count = mx.maximum((upto - odds < limit).sum(-1, keepdims=True), 1)
        threshold = mx.take_along_axis(largest, count - 1, axis=-1)
    return mx.where(logits < threshold, -mx.inf, logits)


def choose(logits: mx.array, noise: mx.array | None, sampling: Sampling) -> mx.array:
    """Guided logits float32 [B, V] and a step's noise [B, V] (None: greedy) -> values uint32 [B]."""
    if noise is None:
        return mx.argmax(logits, axis=-1)
    kept = keep(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return mx.argmax(kept + noise, axis=-1)


def guide(logits: mx.array, scale: float) -> mx.array:
    """l_null + s (l_text - l_null): [2B, V] -> [B, V]."""
    text, null = mx.split(logits, 2)
    return null + scale * (text - null)


# -- the cache ---------------------------------------------------------------------------------


class Cache:
    """Keys and values of all positions, [B, K, S, d] per layer, allocated once; `at` says where the next
    ones go."""

    def __init__(self, config: GeneratorConfig, batch: int, dtype: mx.Dtype) -> None:
        shape = (batch, config.num_key_value_heads, config.sequence_length, config.head_dim)
        self.at = slice(0, 0)
        self.layers: list[LayerCache] = [
            _Layer(self, mx.zeros(shape, dtype), mx.zeros(shape, dtype))
            for _ in range(config.num_hidden_layers)
        ]


@dataclass
class _Layer:
    cache: Cache
    keys: mx.array
    values: mx.array

    def put(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        at = self.cache.at
        self.keys[:, :, at] = keys
        self.values[:, :, at] = values
        return self.keys[:, :, : at.stop], self.values[:, :, : at.stop]


# -- the network -------------------------------------------------------------------------------


@dataclass
class MlxGenerator:
    """A generator on a device, behind the interface of qlip_core.generator.network.

    `scope` is a context that sets the device and the cache limit. `aside` is a CPU stream that makes noise
    while a step is computed, since much of a step keeps only one core busy; None: the same stream.
    """

    model: Generator
    device: str
    dtype: str
    type: mx.Dtype
    scope: Callable[[], AbstractContextManager[None]]
    aside: mx.ThreadLocalStream | None = None

    def draw(self, order: Draw) -> Iterator[np.ndarray]:
        """Sub-tokens in raster order, int64 [B, `order.every`] each time."""
        steps = self._steps(order)
        for start in range(0, order.steps, order.every):
            # Not around the yield, so that the caller's device is set between two chunks.
            with self.scope():
                chunk = [next(steps) for _ in range(min(order.every, order.steps - start))]
                drawn = np.array(mx.stack(chunk, axis=1))
            yield drawn.astype(np.int64)

    def _steps(self, order: Draw) -> Iterator[mx.array]:
        """Each step's values in turn, uint32 [B], queued but not waited for."""
        model, config = self.model, self.model.config
        captions = order.rows
        B, T = captions.valid.shape
        padded = not captions.seen().all()
        seen = mx.array(captions.seen())
        cos, sin = model.rope()
        keys = mx.array(order.keys)
        cache = Cache(config, B, self.type)
        cache.at = slice(0, T)
        x = model.embed_prefix(mx.array(captions.features, self.type), mx.array(captions.null))
        mask = causal_mask(T, seen) if padded else None
        room = [(0, 0), (0, config.sequence_length - T)]
        after = mx.pad(seen, room, constant_values=True)[:, None, None]
        for step in range(order.steps):
            noise = self._noise(order, keys[step])
            states = model.model(x, (cos[cache.at], sin[cache.at]), mask, cache.layers)[:, -1]
            logits = model.visual_logits(states, step % config.sub_tokens).astype(mx.float32)
            if order.guided:
                logits = guide(logits, float(order.scales[step]))
            values = choose(logits, noise, order.sampling)
            mx.async_eval(values)
            yield values
            repeated = mx.concatenate([values, values]) if order.guided else values
            x = model.embed_sub_tokens(repeated[:, None], step)
            cache.at = slice(T + step, T + step + 1)
            mask = after[..., : cache.at.stop] if padded else None

    def _noise(self, order: Draw, keys: mx.array) -> mx.array | None:
        """A step's keys uint32 [B, 2] -> noise [B, V], started at once if `aside`; None at temperature 0."""
        if order.sampling.temperature == 0:
            return None
        if self.aside is None:
            return gumbel(hash_values(keys, self.model.config.visual_vocab_size))
        with mx.stream(self.aside):
            noise = gumbel(hash_values(keys, self.model.config.visual_vocab_size))
            mx.async_eval(noise)
        return noise


def causal_mask(length: int, seen: mx.array) -> mx.array:
    """Where each of the prefix's positions may attend to, bool [B, 1, T, T]: itself and earlier positions that
    are not padding (`seen` bool [B, T]). Padding attends to itself, so that no row is empty."""
    places = mx.arange(length)
    before = places[None] <= places[:, None]
    itself = places[None] == places[:, None]
    return before & (seen[:, None, None] | itself)
