"""The reference forward in numpy: SPEC sections 1.1 to 1.4, line by line.

Slow and obvious on purpose. It is the third implementation, which both others are tested against, and the
backend `numpy` if no framework is installed. Legend of shapes: B images, N patches, D width, H heads,
d = D/H, L bits, T text positions, S image side, p patch side, I intermediate width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from qlip_core.architecture import rotary_tables
from qlip_core.backends import Backend, Network, Weights
from qlip_core.bsq import quantize
from qlip_core.config import QLIPConfig, TextConfig, VisionConfig
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.network import GeneratorNetwork
from qlip_core.text import pooled_position

Tensors = Mapping[str, np.ndarray]

# -- pointwise functions -----------------------------------------------------------------------


def _erf_nodes() -> tuple[np.ndarray, np.ndarray]:
    """Taylor coefficients of erf around nodes 1/128 apart on [0, 6]; beyond 6, erf is 1 in float64."""
    x = np.arange(0, 6 * 128 + 1) / 128
    slope = 2 / math.sqrt(math.pi) * np.exp(-x * x)
    terms = (
        np.array([math.erf(v) for v in x]),
        slope,
        slope * -x,
        slope * (4 * x**2 - 2) / 6,
        slope * (12 * x - 8 * x**3) / 24,
        slope * (16 * x**4 - 48 * x**2 + 12) / 120,
    )
    return x, np.stack(terms)


_NODES, _TAYLOR = _erf_nodes()


def erf(x: np.ndarray) -> np.ndarray:
    """The error function to 1e-14 (numpy has none): five Taylor terms around the nearest node."""
    size = np.fmin(np.abs(x), 6).astype(np.float64)  # NaN counts as 6 here and is restored below
    node = np.rint(size * 128).astype(np.int64)
    step = size - _NODES[node]
    c = _TAYLOR[:, node]
    value = c[0] + step * (c[1] + step * (c[2] + step * (c[3] + step * (c[4] + step * c[5]))))
    return np.where(np.isnan(x), x, np.copysign(value, x)).astype(x.dtype)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (0.5 * (1 + erf(x * x.dtype.type(math.sqrt(0.5)))))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(1.702 * x)


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


_ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


# -- blocks ------------------------------------------------------------------------------------


def linear(w: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    y = x @ w[f"{name}.weight"].T
    bias = w.get(f"{name}.bias")
    return y if bias is None else y + bias


def layer_norm(w: Tensors, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for adjacent pairs: x [..., N, d], tables [N, d]."""
    turned = np.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
    return x * cos + turned * sin


def attention(
    w: Tensors,
    name: str,
    x: np.ndarray,
    config: TextConfig | VisionConfig,
    *,
    rope: tuple[np.ndarray, np.ndarray] | None = None,
    causal: bool = False,
) -> np.ndarray:
    """Multi-head self-attention, [B, T, D] -> [B, T, D] (SPEC 1.1).

    `rope` has tables for the last rows only; leading tokens (CLS) are not rotated.
    """
    B, T, D = x.shape
    H, d = config.num_attention_heads, config.head_dim

    def heads(projection: str) -> np.ndarray:  # [B, H, T, d]
        return linear(w, f"{name}.{projection}", x).reshape(B, T, H, d).transpose(0, 2, 1, 3)

    q, k, v = heads("q_proj") * x.dtype.type(d**-0.5), heads("k_proj"), heads("v_proj")
    if rope is not None:
        first = T - len(rope[0])
        q = np.concatenate([q[:, :, :first], rotate(q[:, :, first:], *rope)], axis=2)
        k = np.concatenate([k[:, :, :first], rotate(k[:, :, first:], *rope)], axis=2)
    scores = q @ k.transpose(0, 1, 3, 2)  # [B, H, T, T]
    if causal:
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    weights = scores / scores.sum(-1, keepdims=True)
    y = (weights @ v).transpose(0, 2, 1, 3).reshape(B, T, D)
    if config.subln:
        y = layer_norm(w, f"{name}.inner_attn_ln", y, config.layer_norm_eps)
    return linear(w, f"{name}.out_proj", y)


def mlp(w: Tensors, name: str, x: np.ndarray, config: TextConfig | VisionConfig) -> np.ndarray:
    if config.swiglu:
        y, output = silu(linear(w, f"{name}.w1", x)) * linear(w, f"{name}.w2", x), "w3"
    else:
        y, output = _ACTIVATIONS[config.hidden_act](linear(w, f"{name}.fc1", x)), "fc2"
    if config.subln:
        y = layer_norm(w, f"{name}.ffn_ln", y, config.layer_norm_eps)
    return linear(w, f"{name}.{output}", y)


def transformer(
    w: Tensors,
    tower: str,
    x: np.ndarray,
    config: TextConfig | VisionConfig,
    *,
    causal: bool = False,
) -> list[np.ndarray]:
    """All hidden states of a tower, its input and the output of each layer, [B, T, D] each."""
    rope = None
    if config.rope and isinstance(config, VisionConfig):
        cos, sin = rotary_tables(config.grid, config.head_dim)
        rope = cos.astype(x.dtype), sin.astype(x.dtype)
    states = [x]
    for i in range(config.num_hidden_layers):
        layer, eps = f"{tower}.encoder.layers.{i}", config.layer_norm_eps
        y = layer_norm(w, f"{layer}.layer_norm1", x, eps)
        x = x + attention(w, f"{layer}.self_attn", y, config, rope=rope, causal=causal)
        x = x + mlp(w, f"{layer}.mlp", layer_norm(w, f"{layer}.layer_norm2", x, eps), config)
        states.append(x)
    return states


# -- the model ---------------------------------------------------------------------------------


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """[B, 3, S, S] -> [B, N, 3*p*p], a patch's values in (channel, row, column) order."""
    B, C, S, _ = pixels.shape
    n = S // patch
    blocks = pixels.reshape(B, C, n, patch, n, patch).transpose(0, 2, 4, 1, 3, 5)
    return blocks.reshape(B, n * n, C * patch * patch)


def unpatchify(patches: np.ndarray, patch: int, grid: tuple[int, int]) -> np.ndarray:
    """Inverse of `patchify` on a grid of (h, w) patches: [B, N, 3*p*p] -> [B, 3, h*p, w*p]."""
    B, (h, w) = len(patches), grid
    blocks = patches.reshape(B, h, w, 3, patch, patch).transpose(0, 3, 1, 4, 2, 5)
    return blocks.reshape(B, 3, h * patch, w * patch)


def encode_states(w: Tensors, config: VisionConfig, pixels: np.ndarray) -> list[np.ndarray]:
    """Hidden states of the visual encoder, [B, N+1, D] each, CLS first."""
    embeddings = "vision_model.embeddings"
    kernel = w[f"{embeddings}.patch_embedding.weight"].reshape(config.hidden_size, -1)
    x = patchify(pixels, config.patch_size) @ kernel.T + w[f"{embeddings}.patch_embedding.bias"]
    cls = np.broadcast_to(w[f"{embeddings}.class_embedding"], (len(pixels), 1, config.hidden_size))
    x = np.concatenate([cls, x], axis=1) + w[f"{embeddings}.position_embedding.weight"]
    return transformer(w, "vision_model", x, config)


def embed_cls(w: Tensors, config: VisionConfig, cls: np.ndarray) -> np.ndarray:
    """visual_projection(post_layernorm(cls)): [B, D] -> [B, P], not yet of unit length."""
    y = layer_norm(w, "vision_model.post_layernorm", cls, config.layer_norm_eps)
    return linear(w, "visual_projection", y)


def bottleneck_down(w: Tensors, config: VisionConfig, z: np.ndarray) -> np.ndarray:
    """z [B, N, D] -> u [B, N, L], of unit length with `quantizer_l2_norm` (SPEC 1.3)."""
    if config.quantizer_embed_type == "mlp":
        name = "vision_model.quant_embed"
        z = linear(w, f"{name}.c_proj", gelu(linear(w, f"{name}.c_fc", z)))
    if config.quantizer_l2_norm:
        z = z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
    return z


def bottleneck_up(w: Tensors, config: VisionConfig, code: np.ndarray) -> np.ndarray:
    """Code [B, N, L] -> z_hat [B, N, D']."""
    if config.quantizer_embed_type == "identity":
        return code
    name = "vision_model.quant_embed_post"
    return linear(w, f"{name}.c_proj", gelu(linear(w, f"{name}.c_fc", code)))


def decode_states(w: Tensors, config: VisionConfig, z_hat: np.ndarray) -> np.ndarray:
    """The visual decoder with its head: z_hat [B, N, D'] -> pixels [B, 3, S, S] (SPEC 1.4)."""
    x = z_hat + w["vision_decoder.position_embeddings"]
    x = transformer(w, "vision_decoder", x, config)[-1]
    x = layer_norm(w, "vision_decoder.norm", x, config.layer_norm_eps)
    patches = linear(w, "vision_decoder.conv_out", np.tanh(linear(w, "vision_decoder.ffn.0", x)))
    return unpatchify(patches, config.patch_size, config.grid)


def text_states(w: Tensors, config: TextConfig, ids: np.ndarray) -> np.ndarray:
    """Token ids [B, T] -> hidden states after the last norm [B, T, Dt]."""
    embeddings = "text_model.embeddings"
    x = w[f"{embeddings}.token_embedding.weight"][ids]
    x = x + w[f"{embeddings}.position_embedding.weight"][: ids.shape[1]]
    x = transformer(w, "text_model", x, config, causal=True)[-1]
    return layer_norm(w, "text_model.final_layer_norm", x, config.layer_norm_eps)


def embed_text(w: Tensors, config: TextConfig, ids: np.ndarray) -> np.ndarray:
    """Token ids [B, T] -> text_projection(pooled) [B, P], not yet of unit length."""
    x = text_states(w, config, ids)
    pooled = x[np.arange(len(ids)), pooled_position(ids, config.eos_token_id)]
    return linear(w, "text_projection", pooled)


# -- the backend -------------------------------------------------------------------------------


class ReferenceNetwork:
    """The forward above with the interface of every backend (qlip_core.backends)."""

    def __init__(self, config: QLIPConfig, weights: Weights, dtype: str) -> None:
        self.config = config
        self.device = "cpu"
        self.dtype = dtype
        self._type = np.dtype(dtype)
        self._weights = weights

    def _part(self, part: str) -> dict[str, np.ndarray]:
        return {name: t.astype(self._type) for name, t in self._weights.part(part).items()}

    # Each part is read when it is first used.
    @cached_property
    def _text(self) -> Tensors:
        return self._part("text")

    @cached_property
    def _encoder(self) -> Tensors:
        return self._part("encoder")

    @cached_property
    def _down(self) -> Tensors:
        return self._part("down")

    @cached_property
    def _decoder(self) -> Tensors:
        return self._part("up") | self._part("decoder")

    def hidden_states(self, pixels: np.ndarray, layer: int) -> np.ndarray:
        states = encode_states(self._encoder, self.config.vision_config, self._cast(pixels))
        return states[layer].astype(np.float32)

    def latents(self, pixels: np.ndarray) -> np.ndarray:
        return self._latents(pixels).astype(np.float32)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return quantize(self._latents(pixels))

    def _latents(self, pixels: np.ndarray) -> np.ndarray:
        vision = self.config.vision_config
        z = encode_states(self._encoder, vision, self._cast(pixels))[-1][:, 1:]
        return bottleneck_down(self._down, vision, z)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        w = self._decoder
        z_hat = bottleneck_up(w, self.config.vision_config, self._cast(codes))
        return decode_states(w, self.config.decoder_config, z_hat).astype(np.float32)

    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        vision = self.config.vision_config
        cls = encode_states(self._encoder, vision, self._cast(pixels))[-1][:, 0]
        return embed_cls(self._encoder, vision, cls).astype(np.float32)

    def embed_texts(self, ids: np.ndarray) -> np.ndarray:
        return embed_text(self._text, self.config.text_config, ids).astype(np.float32)

    def text_states(self, ids: np.ndarray) -> np.ndarray:
        return text_states(self._text, self.config.text_config, ids).astype(np.float32)

    def _cast(self, x: np.ndarray) -> np.ndarray:
        return x.astype(self._type)


class NumpyBackend:
    name = "numpy"
    dtypes = ("float32", "float64")

    def version(self) -> str:
        return np.__version__

    def devices(self) -> list[str]:
        return ["cpu"]

    def network(self, config: QLIPConfig, weights: Weights, *, device: str, dtype: str) -> Network:
        return ReferenceNetwork(config, weights, dtype)

    def generator(
        self,
        config: GeneratorConfig,
        weights: Mapping[str, np.ndarray],
        *,
        device: str,
        dtype: str,
    ) -> GeneratorNetwork:
        # Imported here because that module imports this one.
        from qlip_core.generator.reference import ReferenceGenerator

        held = {name: tensor.astype(dtype) for name, tensor in weights.items()}
        return ReferenceGenerator(config, held, dtype)


BACKEND: Backend = NumpyBackend()
