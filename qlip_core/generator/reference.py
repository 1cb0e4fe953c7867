"""The generator's forward and its sampling loop in numpy: SPEC section 4, line by line.

Slow and obvious on purpose: the PyTorch and MLX generators are tested against it, and the backend
`numpy` draws with it. Legend of shapes: B sequences, T prefix, S positions so far, Q new positions,
D width, H heads, K key-value heads, d = D/H, V values of a sub-token, n sub-tokens per patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qlip_core.generator.architecture import positions, rotary_tables
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.network import Captions, Draw
from qlip_core.generator.sampling import choose
from qlip_core.reference import silu

Tensors = Mapping[str, np.ndarray]
Rope = tuple[np.ndarray, np.ndarray]

# -- blocks ------------------------------------------------------------------------------------


def linear(w: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T


def rms_norm(w: Tensors, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x: np.ndarray, rope: Rope) -> np.ndarray:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head: x [B, H, Q, d]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = rope
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Cache:
    """Keys and values of all positions, [layers, B, K, S, d], allocated once and filled in order."""

    def __init__(self, config: GeneratorConfig, batch: int, length: int, dtype: np.dtype) -> None:
        heads = (batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = np.zeros((config.num_hidden_layers, *heads), dtype)
        self.values = np.zeros_like(self.keys)
        self.length = 0


def attention(
    w: Tensors,
    layer: int,
    x: np.ndarray,
    config: GeneratorConfig,
    rope: Rope,
    allowed: np.ndarray,
    cache: Cache,
) -> np.ndarray:
    """Q new positions attend to all so far: x [B, Q, D], allowed bool [B, 1, Q, S] -> [B, Q, D]."""
    name = f"model.layers.{layer}.self_attn"
    (B, Q, _), d = x.shape, config.head_dim

    def heads(projection: str) -> np.ndarray:  # [B, heads, Q, d]
        return linear(w, f"{name}.{projection}", x).reshape(B, Q, -1, d).transpose(0, 2, 1, 3)

    q, k, v = heads("q_proj"), heads("k_proj"), heads("v_proj")
    if config.qk_norm:
        q = rms_norm(w, f"{name}.q_norm", q, config.rms_norm_eps)
        k = rms_norm(w, f"{name}.k_norm", k, config.rms_norm_eps)
    start, stop = cache.length, cache.length + Q
    cache.keys[layer, :, :, start:stop] = rotate(k, rope)
    cache.values[layer, :, :, start:stop] = v
    group = config.num_attention_heads // config.num_key_value_heads
    k = np.repeat(cache.keys[layer, :, :, :stop], group, axis=1)
    v = np.repeat(cache.values[layer, :, :, :stop], group, axis=1)
    scores = rotate(q, rope) @ k.transpose(0, 1, 3, 2) * x.dtype.type(d**-0.5)  # [B, H, Q, S]
    scores = np.where(allowed, scores, -np.inf)
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    y = (odds / odds.sum(-1, keepdims=True)) @ v
    return linear(w, f"{name}.o_proj", y.transpose(0, 2, 1, 3).reshape(B, Q, -1))


def mlp(w: Tensors, layer: int, x: np.ndarray) -> np.ndarray:
    name = f"model.layers.{layer}.mlp"
    gate, up = linear(w, f"{name}.gate_proj", x), linear(w, f"{name}.up_proj", x)
    return linear(w, f"{name}.down_proj", silu(gate) * up)


def transformer(
    w: Tensors,
    config: GeneratorConfig,
    x: np.ndarray,
    rope: Rope,
    allowed: np.ndarray,
    cache: Cache,
) -> np.ndarray:
    """Q new positions [B, Q, D] -> their last hidden states, normalised, [B, Q, D]; fills the cache.

    `rope` holds the tables of these Q positions, [Q, d/2] each.
    """
    for i in range(config.num_hidden_layers):
        layer, eps = f"model.layers.{i}", config.rms_norm_eps
        y = rms_norm(w, f"{layer}.input_layernorm", x, eps)
        x = x + attention(w, i, y, config, rope, allowed, cache)
        x = x + mlp(w, i, rms_norm(w, f"{layer}.post_attention_layernorm", x, eps))
    cache.length += x.shape[1]
    return rms_norm(w, "model.norm", x, config.rms_norm_eps)


def causal_mask(start: int, queries: int, valid: np.ndarray | None = None) -> np.ndarray:
    """Which positions each new one may attend to: bool [B or 1, 1, Q, start + Q].

    Itself and all before it, except padding in the prefix (`valid` bool [B, T] False). Padding attends to
    itself, so that its row is not empty; the result is never used.
    """
    query = start + np.arange(queries)[:, None]
    key = np.arange(start + queries)[None]
    allowed = np.broadcast_to(key <= query, (1, 1, queries, start + queries))
    if valid is None:
        return allowed
    seen = np.ones((len(valid), start + queries), bool)
    T = min(valid.shape[1], start + queries)
    seen[:, :T] = valid[:, :T]
    return allowed & (seen[:, None, None] | (key == query))


# -- the model ---------------------------------------------------------------------------------


def embed_prefix(w: Tensors, captions: Captions) -> np.ndarray:
    """Caption features [B, T, F] -> prefix [B, T, D]; the null prefix where `captions.null`."""
    hidden = gelu_tanh(linear(w, "caption_projector.fc1", captions.features))
    prefix = linear(w, "caption_projector.fc2", hidden)
    return np.where(captions.null[:, None, None], w["null_prefix"], prefix)


def embed_sub_tokens(
    w: Tensors, config: GeneratorConfig, values: np.ndarray, start: int = 0
) -> np.ndarray:
    """Sub-tokens number `start`, `start` + 1, ... of pictures: int64 [B, Q] -> [B, Q, D]."""
    numbers = (start + np.arange(values.shape[1])) % config.sub_tokens
    first = np.array([config.first_row(j) for j in range(config.sub_tokens)])
    x = w["model.embed_tokens.weight"][values + first[numbers]]
    table = w.get("sub_token_embedding.weight")
    return x if table is None else x + table[numbers]


def visual_logits(w: Tensors, config: GeneratorConfig, x: np.ndarray, number: int) -> np.ndarray:
    """States that predict sub-token `number` of a patch: [..., D] -> [..., V]."""
    first = config.first_row(number)
    return x @ w["lm_head.weight"][first : first + config.visual_vocab_size].T


def text_logits(w: Tensors, config: GeneratorConfig, x: np.ndarray) -> np.ndarray:
    """States that predict a text token: [..., D] -> [..., text_vocab_size] (SPEC section 5), for the unified
    model, which reads and writes text besides sub-tokens. Drawing uses only visual logits."""
    return x @ w["lm_head.weight"][: config.text_vocab_size].T


def image_logits(
    w: Tensors, config: GeneratorConfig, captions: Captions, tokens: np.ndarray
) -> np.ndarray:
    """Logits of every sub-token given those before it, as in training, without a cache.

    tokens int64 [B, M] -> float [B, M, V].
    """
    prefix = embed_prefix(w, captions)
    x = np.concatenate([prefix, embed_sub_tokens(w, config, tokens[:, :-1])], axis=1)
    B, length, _ = x.shape
    cos, sin = rotary_tables(config, positions(config))
    rope = cos.astype(x.dtype), sin.astype(x.dtype)
    allowed = causal_mask(0, length, captions.seen())
    states = transformer(w, config, x, rope, allowed, Cache(config, B, length, x.dtype))
    states = states[:, config.prefix_length - 1 :]
    logits = [
        visual_logits(w, config, states[:, s], s % config.sub_tokens)
        for s in range(config.tokens_per_image)
    ]
    return np.stack(logits, axis=1)


# -- the network -------------------------------------------------------------------------------


@dataclass
class ReferenceGenerator:
    """The forward above with the interface of every backend's generator (qlip_core.generator.network)."""

    config: GeneratorConfig
    weights: Tensors
    dtype: str = "float32"
    device: str = "cpu"

    def draw(self, order: Draw) -> Iterator[np.ndarray]:
        w, config = self.weights, self.config
        kind = np.dtype(self.dtype)
        captions = order.rows
        x = embed_prefix(w, captions.astype(kind))
        cos, sin = rotary_tables(config, positions(config))
        cos, sin = cos.astype(kind), sin.astype(kind)
        cache = Cache(config, len(captions), config.sequence_length, kind)
        seen = captions.seen()
        chunk = []
        for step in range(order.steps):
            at = slice(cache.length, cache.length + x.shape[1])
            allowed = causal_mask(at.start, x.shape[1], seen)
            states = transformer(w, config, x, (cos[at], sin[at]), allowed, cache)[:, -1]
            logits = visual_logits(w, config, states, step % config.sub_tokens).astype(np.float32)
            if order.guided:
                text, null = np.split(logits, 2)
                logits = null + order.scales[step] * (text - null)
            values = choose(logits, order.keys[step], order.sampling)
            chunk.append(values)
            if len(chunk) == order.every or step == order.steps - 1:
                yield np.stack(chunk, axis=1)
                chunk = []
            repeated = np.tile(values, 2) if order.guided else values
            x = embed_sub_tokens(w, config, repeated[:, None], step)
