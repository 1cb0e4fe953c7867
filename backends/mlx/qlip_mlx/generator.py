"""The generator as MLX modules, for drawing: blocks small to large, the model, loading.

SPEC sections 4 and 5. Legend: B sequences, T prefix, Q new positions, S positions so far, D width, H heads,
K key-value heads, d = D/H, V values of a sub-token, n sub-tokens per patch.

Classes and their order are those of the PyTorch file. What differs: there is no training, so the
projections of one input are always one matrix (`_laid_out` maps the checkpoint's names to these), and the
output table is split into one head per sub-token number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlip_core.errors import CheckpointError
from qlip_core.generator.architecture import diff_tensors, positions, rotary_tables
from qlip_core.generator.config import GeneratorConfig
from qlip_mlx.kernels import FUSED, Kernels, Mask
from qlip_mlx.weights import load_weights

Rope = tuple[mx.array, mx.array]


class LayerCache(Protocol):
    """Stores the keys and values of new positions and returns those of all positions so far, [B, K, S, d]."""

    def put(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...


# -- blocks ------------------------------------------------------------------------------------


def rotate(x: mx.array, rope: Rope) -> mx.array:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head: [B, Q, heads, d] -> same.

    The tables are [Q, 1, d], with the first half of the sines negated (`Generator.rope`).
    """
    cos, sin = rope
    a, b = mx.split(x, 2, axis=-1)
    return (x * cos + mx.concatenate([b, a], axis=-1) * sin).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention, [B, Q, D] -> [B, Q, D]."""

    def __init__(self, config: GeneratorConfig, kernels: Kernels) -> None:
        super().__init__()
        width, d = config.hidden_size, config.head_dim
        self.heads, self.groups, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            d,
        )
        self.attend = kernels.attend
        self.qkv_proj = nn.Linear(width, (self.heads + 2 * self.groups) * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, width, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(d, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(d, config.rms_norm_eps)

    def __call__(self, x: mx.array, rope: Rope, mask: Mask, cache: LayerCache) -> mx.array:
        """`mask` bool, broadcast to [B, H, Q, S]: True where attention is allowed. None: causal."""
        together = mx.unflatten(self.qkv_proj(x), -1, (-1, self.head_dim))
        turning = self.heads + self.groups
        qk, v = together[:, :, :turning], together[:, :, turning:]
        if "q_norm" in self:
            q, k = self.q_norm(qk[:, :, : self.heads]), self.k_norm(qk[:, :, self.heads :])
            qk = mx.concatenate([q, k], axis=2)
        qk = rotate(qk, rope).swapaxes(1, 2)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        k, v = cache.put(k, v.swapaxes(1, 2))
        how = "causal" if mask is None and q.shape[2] > 1 else mask
        y = self.attend(q, k, v, how)
        return self.o_proj(y.swapaxes(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: GeneratorConfig, kernels: Kernels) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.silu = kernels.silu
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(self.silu(gate) * up)


class Block(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x)): [B, Q, D] -> [B, Q, D]."""

    def __init__(self, config: GeneratorConfig, kernels: Kernels) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, kernels)

    def __call__(self, x: mx.array, rope: Rope, mask: Mask, cache: LayerCache) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding table, blocks and final norm: Llama's `model`."""

    def __init__(self, config: GeneratorConfig, rows: int, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        self.layers = [Block(config, kernels) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, rope: Rope, mask: Mask, caches: list[LayerCache]) -> mx.array:
        """Embeddings [B, Q, D] -> last hidden states, normalised."""
        for layer, cache in zip(self.layers, caches):
            x = layer(x, rope, mask, cache)
        return self.norm(x)


class CaptionProjector(nn.Module):
    """fc2(gelu(fc1(x))), tanh-GELU, no biases: [B, T, F] -> [B, T, D]."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.condition_size, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.fc1(x)
        # Not MLX's own, which is compiled separately; on Linux that runs a C++ compiler.
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return self.fc2(0.5 * x * (1 + mx.tanh(inner)))


# -- the model ---------------------------------------------------------------------------------


class Generator(nn.Module):
    """The language model over visual tokens."""

    def __init__(self, config: GeneratorConfig, kernels: Kernels = FUSED) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        if config.conditioner != "none":
            self.caption_projector = CaptionProjector(config)
            self.null_prefix = mx.zeros((config.prefix_length, width))
        self.model = Transformer(config, config.text_vocab_size + config.visual_rows, kernels)
        if config.sub_tokens > 1 and not config.separate_sub_tokens:
            self.sub_token_embedding = nn.Embedding(config.sub_tokens, width)
        heads = config.sub_tokens if config.separate_sub_tokens else 1
        self.heads = [nn.Linear(width, config.visual_vocab_size, bias=False) for _ in range(heads)]
        if config.text_vocab_size:
            self.text_head = nn.Linear(width, config.text_vocab_size, bias=False)

    def embed_prefix(self, features: mx.array, null: mx.array) -> mx.array:
        """Caption features [B, T, F] -> prefix [B, T, D]; the null prefix where `null` [B]."""
        return mx.where(null[:, None, None], self.null_prefix, self.caption_projector(features))

    def embed_sub_tokens(self, values: mx.array, start: int = 0) -> mx.array:
        """Sub-tokens number `start`, `start` + 1, ... of pictures: [B, Q] -> [B, Q, D]."""
        config = self.config
        numbers = [(start + i) % config.sub_tokens for i in range(values.shape[1])]
        first = mx.array([config.first_row(j) for j in numbers], values.dtype)
        x = self.model.embed_tokens(values + first)
        if "sub_token_embedding" in self:
            x = x + self.sub_token_embedding(mx.array(numbers))
        return x

    def visual_logits(self, states: mx.array, number: int) -> mx.array:
        """States that predict sub-token `number` of a patch: [..., D] -> [..., V]."""
        return self.heads[number % len(self.heads)](states)

    def text_logits(self, states: mx.array) -> mx.array:
        """States that predict a text token: [..., D] -> [..., text_vocab_size], for the unified model (SPEC section 5)."""
        return self.text_head(states)

    def rope(self, at: np.ndarray | None = None) -> Rope:
        """Rotary tables for `rotate` of positions [S, axes] (None: a whole picture), float32 [S, 1, d] each."""
        where = positions(self.config) if at is None else at
        cos, sin = rotary_tables(self.config, where)
        cos, sin = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
        return mx.array(cos[:, None], mx.float32), mx.array(sin[:, None], mx.float32)


# -- loading -----------------------------------------------------------------------------------


def load(
    config: GeneratorConfig,
    arrays: Mapping[str, np.ndarray],
    *,
    dtype: mx.Dtype = mx.float32,
    bits: int | None = None,
    kernels: Kernels = FUSED,
) -> Generator:
    """A generator with `arrays` (name -> array) in `dtype`, on MLX's default device.

    With `bits` (8 or 4) every linear whose rows divide into groups of `weights.GROUP` is quantized.
    Raises CheckpointError if a tensor is missing, misshapen or unknown.
    """
    if problems := diff_tensors(config, {name: array.shape for name, array in arrays.items()}):
        raise CheckpointError(f"weights do not fit the generator: {problems}")
    model = Generator(config, kernels)
    tensors = _laid_out(config, arrays)
    load_weights(model, tensors, dtype=dtype, bits=bits, lay_out=kernels.lay_out)
    return model


def _laid_out(
    config: GeneratorConfig, arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's tensors under these modules' names, some joined and some split, one by one, so that
    copies of joined ones are not all in memory at once."""
    rest = {name: array for name, array in arrays.items() if name != "lm_head.weight"}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for whole, parts in (
            (f"{layer}.self_attn.qkv_proj", [f"{layer}.self_attn.{p}_proj" for p in "qkv"]),
            (f"{layer}.mlp.gate_up_proj", [f"{layer}.mlp.{p}_proj" for p in ("gate", "up")]),
        ):
            joined = [rest.pop(f"{p}.weight") for p in parts]
            yield f"{whole}.weight", np.concatenate(joined)
    yield from rest.items()
    table, V = arrays["lm_head.weight"], config.visual_vocab_size
    for j in range(config.sub_tokens if config.separate_sub_tokens else 1):
        yield f"heads.{j}.weight", table[config.first_row(j) : config.first_row(j) + V]
    if config.text_vocab_size:
        yield "text_head.weight", table[: config.text_vocab_size]
