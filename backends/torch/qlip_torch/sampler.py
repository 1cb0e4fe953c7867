"""Drawing with a generator in PyTorch: the cache, the noise, the filters, the loop over sub-tokens.

It follows the rule of qlip_core.generator.sampling, in tensors. On CUDA a step is recorded once and
replayed, and nothing in it depends on the host; elsewhere the loop runs step by step. Either way the host
waits for the device only when it hands sub-tokens out, every `Draw.every` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.network import Draw
from qlip_core.generator.sampling import GOLDEN, MULTIPLIERS, Sampling, largest_odds, share_of
from qlip_torch.generator import Generator, LayerCache, causal_mask

if TYPE_CHECKING:  # needs Triton, which only PyTorch's CUDA builds include
    from qlip_torch.step_kernels import FusedStep

# -- noise -------------------------------------------------------------------------------------


def _signed(word: int) -> int:
    """The int32 with the bits of a uint32, since torch has no arithmetic on unsigned integers."""
    return word - (1 << 32) if word >> 31 else word


def _shifted(x: Tensor, count: int) -> Tensor:
    return (x >> count) & ((1 << (32 - count)) - 1)


def mix(x: Tensor) -> Tensor:
    """`sampling.mix` on the bits of int32."""
    first, second = (_signed(m) for m in MULTIPLIERS)
    x = (x ^ _shifted(x, 16)) * first
    x = (x ^ _shifted(x, 15)) * second
    return x ^ _shifted(x, 16)


def hash_values(keys: Tensor, count: int) -> Tensor:
    """Keys int32 [..., 2] -> hashes of the values 0 to `count` - 1, int32 [..., count]."""
    values = torch.arange(count, dtype=torch.int32, device=keys.device)
    x = mix(values * _signed(GOLDEN) + keys[..., :1])
    return mix(x ^ keys[..., 1:])


def gumbel(hashed: Tensor) -> Tensor:
    """`sampling.gumbel`: int32 -> float32 of the same shape."""
    u = _shifted(hashed, 1).float() * 2**-31 + 2**-32
    return -torch.log(-torch.log1p(-u.clamp_max(1 - 2**-24)))


# -- a step's choice ---------------------------------------------------------------------------


def keep(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """`sampling.keep`: logits float32 [B, V] with -inf for what the filters drop."""
    V = logits.shape[-1]
    k = min(top_k, V) if top_k else V
    if k == V and top_p >= 1:
        return logits
    if top_p >= 1:  # no need to sort them, which costs time
        threshold = logits.topk(k, sorted=False).values.amin(-1, keepdim=True)
    else:
        largest = logits.topk(k).values
        odds = ((largest - largest[:, :1]).exp() * largest_odds(k)).long()
        upto = odds.cumsum(-1)
        limit = share_of(upto[:, -1:], top_p)
        count = (upto - odds < limit).sum(-1, keepdim=True).clamp_min(1)
        threshold = largest.gather(-1, count - 1)
    return logits.masked_fill(logits < threshold, -torch.inf)


def choose(logits: Tensor, noise: Tensor | None, sampling: Sampling) -> Tensor:
    """Guided logits float32 [B, V] and noise [B, V] (None: temperature 0) -> values int64 [B]."""
    if noise is None:
        return logits.argmax(-1)
    return (keep(logits / sampling.temperature, sampling.top_k, sampling.top_p) + noise).argmax(-1)


def guide(logits: Tensor, scale: Tensor | float) -> Tensor:
    """l_null + s (l_text - l_null): [2B, V] -> [B, V]."""
    text, null = logits.chunk(2)
    return null + scale * (text - null)


# -- the cache ---------------------------------------------------------------------------------

# The cache's length is a multiple of this, because fused attention would copy masks of other lengths.
_ALIGNED = 16


class Cache:
    """Keys and values of all positions, [layers, 2, B, K, S, d], allocated once.

    `at` says where the next positions go: a slice, or, for a recorded step, which must not depend on the
    host, an index tensor; then the first `limit` positions are returned, for the caller to mask.
    """

    def __init__(self, model: Generator, batch: int, device: str, dtype: torch.dtype) -> None:
        config = model.config
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        length = -(-config.sequence_length // _ALIGNED) * _ALIGNED
        shape = (layers, 2, batch, heads, length, config.head_dim)
        # Zeros, because masked values are multiplied by 0 and must not be NaN.
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        self.at: slice | Tensor = slice(0, 0)
        self.limit = length
        self.layers: list[LayerCache] = [_Layer(self, *pair) for pair in self.store]


@dataclass
class _Layer:
    cache: Cache
    keys: Tensor
    values: Tensor

    def put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        at = self.cache.at
        if isinstance(at, Tensor):
            self.keys.index_copy_(2, at, keys)
            self.values.index_copy_(2, at, values)
            return self.keys[:, :, : self.cache.limit], self.values[:, :, : self.cache.limit]
        self.keys[:, :, at] = keys
        self.values[:, :, at] = values
        return self.keys[:, :, : at.stop], self.values[:, :, : at.stop]


# -- the network -------------------------------------------------------------------------------


@dataclass
class _State:
    """Pictures being drawn: what the loop reads and writes, all on the device."""

    cache: Cache
    states: Tensor  # predict the first sub-token, [B', D]; B' is 2B with guidance
    seen: Tensor | None  # bool [B', 1, 1, S], None if no caption is padded
    drawn: Tensor  # int64 [B, M]
    keys: Tensor  # int32 [M, B, 2]
    scales: Tensor  # float32 [M]


class TorchGenerator:
    """A generator on a device, behind the interface of qlip_core.generator.network."""

    def __init__(
        self,
        model: Generator,
        *,
        device: str,
        dtype: str,
        compiled: bool = False,
        fused: FusedStep | None = None,
    ) -> None:
        """`compiled`: the model's blocks are compiled, so each new shape costs a compilation. `fused` runs
        the recorded steps that it suits."""
        self.model, self.compiled, self.fused = model, compiled, fused
        self.config: GeneratorConfig = model.config
        self.device = device
        self.dtype = dtype
        self.records = device.startswith("cuda")
        self._type = model.model.norm.weight.dtype
        # The CPU's bfloat16 product of one query with the keys takes four times as long as float32's, which
        # costs more than reading twice the bytes.
        self._cached = torch.float32 if device == "cpu" else self._type
        self._rope = model.rope(device)
        self._recording: Recording | None = None

    @torch.inference_mode()
    def draw(self, order: Draw) -> Iterator[np.ndarray]:
        """Sub-tokens in raster order, int64 [B, `order.every`] each time."""
        state = self._start(order)
        self._choose(order, state, state.states, 0, self._noise(order, state.keys[:1]))
        recording = self._replayed(order, state) if self.records else None
        run = self._steps(order, state) if recording is None else recording.run
        for start in range(0, order.steps, order.every):
            stop = min(start + order.every, order.steps)
            run(max(start, 1), stop)
            yield state.drawn[:, start:stop].cpu().numpy()
        self._recording = recording

    def _start(self, order: Draw) -> _State:
        """Run the prefix through the model, which fills the cache's first T positions."""
        captions = order.captions.with_null() if order.guided else order.captions
        features = torch.from_numpy(captions.features).to(self.device, self._type)
        null, seen = (torch.from_numpy(x).to(self.device) for x in (captions.null, captions.seen()))
        B, T = seen.shape
        cache = Cache(self.model, B, self.device, self._cached)
        cache.at = slice(0, T)
        padded = not captions.seen().all()
        rope = self._rope[0][:T], self._rope[1][:T]
        prefix = self.model.embed_prefix(features, null)
        mask = causal_mask(T, seen) if padded else None
        with torch.compiler.set_stance("force_eager"):  # once per picture: not worth compiling
            states = self.model.model(prefix, rope, mask, cache.layers)[:, -1]
        after = F.pad(seen, (0, cache.store.shape[4] - T), value=True)[:, None, None]
        drawn = torch.zeros(len(order.captions), order.steps, dtype=torch.int64, device=self.device)
        keys = torch.from_numpy(order.keys.view(np.int32)).to(self.device)
        scales = torch.from_numpy(order.scales).to(self.device)
        return _State(cache, states, after if padded else None, drawn, keys, scales)

    def _noise(self, order: Draw, keys: Tensor) -> Tensor | None:
        """Keys int32 [steps, B, 2] -> noise [steps, B, V]; None at temperature 0."""
        if order.sampling.temperature == 0:
            return None
        return gumbel(hash_values(keys, self.config.visual_vocab_size))

    def _choose(
        self, order: Draw, state: _State, states: Tensor, step: int, noise: Tensor | None
    ) -> None:
        """States [B', D] of the last position and noise [1, B, V] -> the sub-token of `step`."""
        logits = self.model.visual_logits(states, step % self.config.sub_tokens).float()
        if order.guided:
            logits = guide(logits, float(order.scales[step]))
        state.drawn[:, step] = choose(logits, None if noise is None else noise[0], order.sampling)

    def _steps(self, order: Draw, state: _State) -> Run:
        """The loop, step by step."""
        T, cos, sin = self.config.prefix_length, *self._rope

        def run(start: int, stop: int) -> None:
            # The noise of several steps at once: one by one, its many small operations would take long.
            noise = self._noise(order, state.keys[start:stop])
            for step in range(start, stop):
                values = state.drawn[:, step - 1 : step]
                x = self.model.embed_sub_tokens(_twice(values, order.guided), step - 1)
                at = state.cache.at = slice(T + step - 1, T + step)
                seen = None if state.seen is None else state.seen[..., : at.stop]
                states = self.model.model(x, (cos[at], sin[at]), seen, state.cache.layers)
                row = step - start
                kept = None if noise is None else noise[row : row + 1]
                self._choose(order, state, states[:, 0], step, kept)

        return run

    def _replayed(self, order: Draw, state: _State) -> Recording:
        """The loop as a recording: the last order's if this one differs only in its contents.

        No other order can use it until these pictures are done, so two orders may be drawn alternately.
        """
        padded = state.seen is not None
        shape = (order.sampling, order.guided, order.every, state.drawn.shape, padded)
        recording, self._recording = self._recording, None
        if recording is not None and recording.shape == shape:
            recording.fill(state)
        else:
            del recording  # frees its memory before the next recording allocates its own
            recording = Recording(self, order, state, shape)
        state.drawn = recording.state.drawn
        return recording


Run = Callable[[int, int], None]
# Recorded steps attend to a multiple of this many positions, or to all of them.
_REACH = 256


class Recording:
    """Steps recorded as CUDA graphs, one for each sub-token number of a patch and each `limit` on the
    positions that attention reads. The step's number, the cache's position and the noise's keys are read
    from device memory, so a replay needs nothing from the host."""

    def __init__(self, network: TorchGenerator, order: Draw, state: _State, shape: object) -> None:
        self.network, self.order, self.state, self.shape = network, order, state, shape
        config = network.config
        # Number of sub-tokens drawn so far; starts at 1, since the first comes from the prefix.
        self.count = torch.ones(1, dtype=torch.int64, device=network.device)
        self.places = torch.arange(state.cache.store.shape[4], device=network.device)
        # The noise of the steps from number `first` on, made outside the recording: its many small
        # operations cost as much for one step as for all.
        self.first = torch.ones(1, dtype=torch.int64, device=network.device)
        self.noise = network._noise(order, state.keys[: order.every])
        kept = state.cache.store.clone(), state.drawn.clone()
        rows = state.cache.store.shape[2]
        self.fused = network.fused if network.fused and network.fused.suits(rows) else None
        # If a picture's first patches read the whole cache, attention would read twice as much in all. The
        # fused step reads its range from device memory and needs no limits.
        length, one = len(self.places), network.compiled or self.fused is not None
        self.limits = [length] if one else [*range(_REACH, length, _REACH), length]
        self.graphs = {
            (number, limit): self._record(number, limit)
            for limit in self.limits
            for number in range(config.sub_tokens)
        }
        state.cache.store.copy_(kept[0])
        state.drawn.copy_(kept[1])
        self.count.fill_(1)

    def fill(self, state: _State) -> None:
        """Copy the initial state of other pictures into the memory that the recordings work on."""
        ours = self.state
        ours.cache.store.copy_(state.cache.store)
        for mine, theirs in (
            (ours.drawn, state.drawn),
            (ours.keys, state.keys),
            (ours.scales, state.scales),
            (ours.seen, state.seen),
        ):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        self.count.fill_(1)

    def run(self, start: int, stop: int) -> None:
        config = self.network.config
        if self.noise is not None:
            noise = self.network._noise(self.order, self.state.keys[start:stop])
            assert noise is not None
            self.noise[: len(noise)].copy_(noise)
            self.first.fill_(start)
        for step in range(start, stop):
            limit = next(n for n in self.limits if n >= config.prefix_length + step)
            self.graphs[step % config.sub_tokens, limit].replay()

    def _record(self, number: int, limit: int) -> torch.cuda.CUDAGraph:
        self.state.cache.limit = limit
        side = torch.cuda.Stream(self.network.device)
        side.wait_stream(torch.cuda.current_stream(self.network.device))
        with torch.cuda.stream(side):  # libraries must set themselves up outside the recording
            self.count.fill_(1)
            self._step(number)
        torch.cuda.current_stream(self.network.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "thread_local", so that CUDA calls of other threads (training's feed, the loader's pinning of memory)
        # are not recorded and do not abort the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(number)
        return graph

    def _step(self, number: int) -> None:
        """Step number `count`, which draws sub-token `number` of its patch."""
        network, order, state = self.network, self.order, self.state
        model, config, count = network.model, network.config, self.count
        before = (number - 1) % config.sub_tokens
        values = state.drawn.index_select(1, count - 1)
        x = model.embed_sub_tokens(_twice(values, order.guided), before)
        at = state.cache.at = count + (config.prefix_length - 1)
        if self.fused is not None:
            logits = self.fused(x[:, 0], number, at, state.seen, state.cache.store)
        else:
            logits = self._logits(x, number, at)
        noise, sampling = self.noise, order.sampling
        if self.fused is not None and sampling.top_p >= 1:
            scales = state.scales if order.guided else None
            self.fused.choose(logits, noise, scales, count, self.first, state.drawn, sampling)
        else:
            if order.guided:
                logits = guide(logits, state.scales.index_select(0, count))
            if noise is not None:
                noise = noise.index_select(0, count - self.first)[0]
            chosen = choose(logits, noise, sampling)
            state.drawn.index_copy_(1, count, chosen[:, None])
        count += 1

    def _logits(self, x: Tensor, number: int, at: Tensor) -> Tensor:
        """Embeddings [R, 1, D] at position `at` -> float32 logits [R, V], with the model's own modules."""
        network, state = self.network, self.state
        cos, sin = (table.index_select(0, at) for table in network._rope)
        limit = state.cache.limit
        mask = self.places[:limit] <= at
        if state.seen is not None:
            mask = state.seen[..., :limit] & mask
        else:
            mask = mask.expand(len(x), 1, 1, -1)
        # An additive mask, converted once: otherwise every layer would do it.
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        states = network.model.model(x, (cos, sin), mask, state.cache.layers)[:, 0]
        return network.model.visual_logits(states, number).float()


def _twice(values: Tensor, guided: bool) -> Tensor:
    """[B, 1] -> [2B, 1] with guidance: both halves continue from the same sub-token."""
    return values.repeat(2, 1) if guided else values
