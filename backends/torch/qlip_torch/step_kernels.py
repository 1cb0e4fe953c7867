"""One step of drawing on an NVIDIA GPU as five Triton kernels per layer, where PyTorch takes twenty.

A step multiplies every weight by one vector per picture, so it should take as long as reading the weights; but
even a kernel that does almost nothing takes two microseconds, and a layer of a small model has less work than
that. Here a layer is: norm and query-key-value product; rotation, cache and attention; output product and sum;
norm, gate and up products and SwiGLU; down product and sum. One more kernel chooses the sub-token. The numbers
are those of `qlip_torch.generator`, whose docstrings have the equations; products and sums are float32, values
passed between kernels bfloat16.

Legend: R rows (pictures, or twice as many with guidance), D width, O outputs, H heads, K key-value heads,
d = D/H, S positions of the cache.
"""

# Kernels take pointers; names in capitals are compile-time constants. Launches take options that are not among
# a kernel's parameters, which pyright would report.
# pyright: reportMissingImports=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlip_core.generator.sampling import Sampling
from qlip_torch.generator import Generator, Packed, Rope

# Rows that one program multiplies: tensor cores need at least as many, registers hold no more.
_ROWS = (16, 32, 64)
# Inputs that a program reads at once; twice as many if rows are few, to keep enough bytes in flight.
_INNER = 128
# Elements of keys, and as many of values, that attention reads at once.
_TILE = 8192


@triton.jit
def _product(
    x, norm, weight, out, rows, outputs, eps,
    INNER: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out [R, O] = norm(x [R, INNER]) weight^T. GATE: weight is [2 O, INNER], and out = silu(first) * second.
    ADD: the result is added to `out`."""
    r = tl.arange(0, BLOCK_R)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    second = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    squares = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, INNER, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        there = (r[:, None] < rows) & (i[None, :] < INNER)
        values = tl.load(x + r[:, None] * INNER + i[None, :], mask=there, other=0.0)
        if NORM:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            scale = tl.load(norm + i, mask=i < INNER, other=0.0).to(tl.float32)
            values = (wide * scale[None, :]).to(values.dtype)
        there = (o[None, :] < outputs) & (i[:, None] < INNER)
        at = weight + o[None, :].to(tl.int64) * INNER + i[:, None]
        total = tl.dot(values, tl.load(at, mask=there, other=0.0), total)
        if GATE:
            at += outputs.to(tl.int64) * INNER
            second = tl.dot(values, tl.load(at, mask=there, other=0.0), second)
    if NORM:
        # A row's norm is known only once the whole row has been read; it commutes with the product.
        factor = tl.rsqrt(squares / INNER + eps)[:, None]
        total *= factor
        second *= factor
    if GATE:
        total = total / (1 + tl.exp(-total)) * second
    there = (r[:, None] < rows) & (o[None, :] < outputs)
    at = out + r[:, None] * outputs + o[None, :]
    if ADD:
        total += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _turned(head, norm, cos, sin, at, eps, D: tl.constexpr, NORM: tl.constexpr):
    """A head [d] of queries or keys, normed and rotated to position `at` (`generator.rotate`)."""
    i = tl.arange(0, D)
    other = (i + D // 2) % D
    x, y = tl.load(head + i), tl.load(head + other)
    kind = x.dtype
    x, y = x.to(tl.float32), y.to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        x = (x * factor * tl.load(norm + i).to(tl.float32)).to(kind).to(tl.float32)
        y = (y * factor * tl.load(norm + other).to(tl.float32)).to(kind).to(tl.float32)
    turned = x * tl.load(cos + at * D + i) + y * tl.load(sin + at * D + i)
    return turned.to(kind)


@triton.jit
def _attend(
    qkv, q_norm, k_norm, cos, sin, keys, values, seen, position, out, length, eps, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr,
    NORM: tl.constexpr, SEEN: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Row r's head h over all positions so far: qkv [R, H + 2 K, d] of position `position` [1], whose keys
    and values go into the cache, [R, K, S, d] each; `seen` [R, S] says which may be attended to."""
    r, h = tl.program_id(0), tl.program_id(1)
    group = h // (HEADS // GROUPS)
    i = tl.arange(0, D)
    at = tl.load(position).to(tl.int32)
    row = qkv + r * (HEADS + 2 * GROUPS) * D
    q = _turned(row + h * D, q_norm, cos, sin, at, eps, D, NORM).to(tl.float32)
    key = _turned(row + (HEADS + group) * D, k_norm, cos, sin, at, eps, D, NORM)
    value = tl.load(row + (HEADS + GROUPS + group) * D + i)
    plane = (r * GROUPS + group).to(tl.int64) * length * D
    if h % (HEADS // GROUPS) == 0:
        tl.store(keys + plane + at * D + i, key)
        tl.store(values + plane + at * D + i, value)
    # The current position first, from registers: another head's program may not have stored it yet. Each row of
    # the tile keeps its own softmax, so that the loop does not wait for other threads.
    first = tl.arange(0, BLOCK_S) == 0
    largest = tl.zeros((BLOCK_S,), tl.float32) + tl.sum(q * key.to(tl.float32), axis=0) * scale
    total = tl.where(first, 1.0, 0.0)
    y = tl.where(first[:, None], value.to(tl.float32)[None, :], 0.0)
    for start in tl.range(0, at, BLOCK_S, num_stages=3):
        s = start + tl.arange(0, BLOCK_S)
        there = s < at
        place = plane + s[:, None] * D + i[None, :]
        k = tl.load(keys + place, mask=there[:, None], other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=there[:, None], other=0.0).to(tl.float32)
        score = tl.sum(q[None, :] * k, axis=1) * scale
        if SEEN:
            there = there & (tl.load(seen + r * length + s, mask=there, other=0) != 0)
        score = tl.where(there, score, -float("inf"))
        top = tl.maximum(largest, score)
        shrink, weight = tl.exp(largest - top), tl.exp(score - top)
        total = total * shrink + weight
        y = y * shrink[:, None] + weight[:, None] * v
        largest = top
    share = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(total * share, axis=0)
    y = tl.sum(y * share[:, None], axis=0)
    tl.store(out + (r * HEADS + h) * D + i, (y / total).to(out.dtype.element_ty))


@triton.jit
def _choose(
    logits, noise, scales, count, first, drawn, pictures, steps, temperature,
    V: tl.constexpr, TOP_K: tl.constexpr, GUIDED: tl.constexpr, NOISY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`sampler.choose` for picture b and step number `count` [1], into drawn [B, M]: logits [R, V], noise
    [steps from `first` [1] on, B, V] if the temperature is not 0. TOP_K: 0 keeps all values."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK_V)
    there = i < V
    step = tl.load(count)
    x = tl.load(logits + b * V + i, mask=there, other=0.0)
    if GUIDED:
        null = tl.load(logits + (pictures + b) * V + i, mask=there, other=0.0)
        x = null + tl.load(scales + step) * (x - null)
    if NOISY:
        x = tl.div_rn(x, temperature)
    x = tl.where(there, x, -float("inf"))
    if NOISY:
        if TOP_K:
            # Floats as integers of the same order; find the k-th largest of these, bit by bit from the highest.
            bits = x.to(tl.int32, bitcast=True)
            ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            kth = tl.where(tl.sum((ordered >= 0).to(tl.int32), axis=0) >= TOP_K, 0, -0x80000000)
            for place in range(31):
                larger = kth | (1 << (30 - place))
                enough = tl.sum((ordered >= larger).to(tl.int32), axis=0) >= TOP_K
                kth = tl.where(enough, larger, kth)
            threshold = (kth ^ ((kth >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            x = tl.where(x >= threshold, x, -float("inf"))
        row = (step - tl.load(first)) * pictures + b
        x += tl.load(noise + row * V + i, mask=there, other=0.0)
    tl.store(drawn + b * steps + step, tl.argmax(x, axis=0).to(tl.int64))


class FusedStep:
    """A step of the model with these kernels; it uses the model's own weights (`Generator.fuse`)."""

    def __init__(self, model: Generator, rope: Rope) -> None:
        self.model = model
        self.cos, self.sin = (table.reshape(table.shape[0], -1).contiguous() for table in rope)

    def suits(self, rows: int) -> bool:
        """Whether the kernels can run it: bfloat16 (which has float32's range, so that a norm can be applied
        after its product), a head size that is a power of two, and few enough rows to read the weights once."""
        d, dtype = self.model.config.head_dim, self.model.model.norm.weight.dtype
        return dtype == torch.bfloat16 and d & (d - 1) == 0 and rows <= _ROWS[-1]

    def __call__(
        self, x: Tensor, number: int, position: Tensor, seen: Tensor | None, store: Tensor
    ) -> Tensor:
        """Embeddings [R, D] of the sub-token at `position` int64 [1] -> float32 logits [R, V] of sub-token
        `number`. Its keys and values go into `store` [layers, 2, R, K, S, d]; `seen` bool [R, 1, 1, S]."""
        model, config = self.model, self.model.config
        x = x.clone()  # the residual stream, added to in place
        R, H, K, d = len(x), config.num_attention_heads, config.num_key_value_heads, config.head_dim
        eps, length = config.rms_norm_eps, store.shape[4]
        marks = None if seen is None else seen.contiguous().view(torch.uint8)
        for layer, (keys, values) in zip(model.blocks(), store):
            attention, mlp = layer.self_attn, layer.mlp
            assert attention.fused is not None and mlp.fused is not None, "Generator.fuse first"
            qkv = self._product(x, attention.fused, norm=layer.input_layernorm.weight)
            y = torch.empty(R, H * d, device=x.device, dtype=x.dtype)
            norms = attention.q_norm, attention.k_norm
            q_norm, k_norm = (x if norm is None else norm.weight for norm in norms)
            _attend[R, H](
                qkv, q_norm, k_norm, self.cos, self.sin, keys, values,
                x if marks is None else marks, position, y, length, eps, d**-0.5,
                HEADS=H, GROUPS=K, D=d, NORM=attention.q_norm is not None,
                SEEN=marks is not None, BLOCK_S=_TILE // d, num_warps=8,
            )  # fmt: skip
            self._product(y, attention.o_proj, out=x)
            h = self._product(x, mlp.fused, norm=layer.post_attention_layernorm.weight, gate=True)
            self._product(h, mlp.down_proj, out=x)
        head = model.heads[number]
        return self._product(x, head, norm=model.model.norm.weight, kind=torch.float32)

    @staticmethod
    def choose(
        logits: Tensor,
        noise: Tensor | None,
        scales: Tensor | None,
        count: Tensor,
        first: Tensor,
        drawn: Tensor,
        sampling: Sampling,
    ) -> None:
        """Logits [R, V] -> the sub-token of step number `count` int64 [1] in `drawn` int64 [B, M]; noise [steps,
        B, V] from step number `first` int64 [1] on, None at temperature 0; `scales` [M] with guidance. Does not
        apply `top_p`."""
        assert sampling.top_p >= 1
        V = logits.shape[1]
        _choose[len(drawn),](
            logits, logits if noise is None else noise, logits if scales is None else scales,
            count, first, drawn, *drawn.shape, float(sampling.temperature),
            V=V, TOP_K=int(sampling.top_k) % V, GUIDED=scales is not None, NOISY=noise is not None,
            BLOCK_V=triton.next_power_of_2(V), num_warps=16,
        )  # fmt: skip

    def _product(
        self,
        x: Tensor,
        packed: torch.nn.Module,
        *,
        norm: Tensor | None = None,
        gate: bool = False,
        out: Tensor | None = None,
        kind: torch.dtype | None = None,
    ) -> Tensor:
        """`_product` of x [R, I]: added to `out`, or as a new tensor of dtype `kind` (None: x's dtype)."""
        assert isinstance(packed, Packed)
        rows, weight = len(x), packed.weight
        outputs = len(weight) // 2 if gate else len(weight)
        add = out is not None
        if out is None:
            out = torch.empty(rows, outputs, device=x.device, dtype=kind or x.dtype)
        block = next(b for b in _ROWS if b >= rows)
        # Narrow, so that even a small matrix is spread over all multiprocessors.
        wide = 16 if outputs <= 4096 else 32
        _product[triton.cdiv(outputs, wide),](
            x, x if norm is None else norm, weight, out, rows, outputs, self.model.config.rms_norm_eps,
            INNER=x.shape[1], NORM=norm is not None, GATE=gate, ADD=add,
            BLOCK_R=block, BLOCK_O=wide, BLOCK_I=_INNER if block > 16 else 2 * _INNER, num_warps=4, num_stages=4,
        )  # fmt: skip
        return out
