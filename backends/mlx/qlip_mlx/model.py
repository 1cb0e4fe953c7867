"""QLIP as MLX modules, for inference: blocks small to large, the model, loading.

SPEC sections 1.1 to 1.4. Parameter names are those of `qlip_core.architecture`. Legend: B images,
N patches, D width, H heads, d = D/H, L bits, T tokens (N+1 with CLS in the encoder, text positions in
the text tower), S image side, p patch side, P projection.

Classes and their order are those of the PyTorch file. What differs: attention and SiLU are chosen by
device (`Kernels`), the patch kernel is stored flat, weights may be quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlip_core.architecture import PARTS, architecture, diff_tensors, rotary_tables
from qlip_core.config import QLIPConfig, TextConfig, VisionConfig
from qlip_core.errors import CheckpointError
from qlip_mlx.kernels import FUSED, Kernels
from qlip_mlx.weights import fits, load_weights

# -- blocks ------------------------------------------------------------------------------------


class Rotary:
    """EVA-02's 2-D rotary embedding of the patches of a grid (SPEC 1.2).

    `leading` tokens before the patches (CLS) are not rotated. The tables are float32 and not stored in
    checkpoints.
    """

    def __init__(self, grid: tuple[int, int], head_dim: int, leading: int) -> None:
        cos, sin = rotary_tables(grid, head_dim)
        rows = ((leading, 0), (0, 0))
        self.cos = mx.array(np.pad(cos, rows, constant_values=1)[:, None], mx.float32)  # [T, 1, d]
        self.sin = mx.array(np.pad(sin, rows)[:, None], mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for adjacent pairs: [B, T, H, d] -> same."""
        pairs = mx.unflatten(x, -1, (x.shape[-1] // 2, 2))
        turned = mx.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
        return (x * self.cos + turned * self.sin).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, D] -> [B, T, D]."""

    def __init__(
        self,
        config: TextConfig | VisionConfig,
        rope: Rotary | None,
        kernels: Kernels,
        *,
        causal: bool,
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.attend = config.num_attention_heads, kernels.attend
        self.mask = "causal" if causal else None
        self.q_proj = nn.Linear(width, width, bias=config.q_bias)
        self.k_proj = nn.Linear(width, width, bias=config.k_bias)
        self.v_proj = nn.Linear(width, width, bias=config.v_bias)
        self.inner_attn_ln = _norm(config, width) if config.subln else nn.Identity()
        self.out_proj = nn.Linear(width, width)
        self.rope = rope

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (
            mx.unflatten(project(x), -1, (self.num_heads, -1))  # [B, T, H, d]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        y = self.attend(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), self.mask)
        y = y.swapaxes(1, 2).flatten(2)
        return self.out_proj(self.inner_attn_ln(y))


class SwiGLU(nn.Module):
    """w3(ffn_ln(silu(w1 x) * w2 x))."""

    def __init__(self, config: TextConfig | VisionConfig, kernels: Kernels) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.silu = kernels.silu
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = _norm(config, hidden) if config.subln else nn.Identity()
        self.w3 = nn.Linear(hidden, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w3(self.ffn_ln(self.silu(self.w1(x)) * self.w2(x)))


class MLP(nn.Module):
    """fc2(ffn_ln(act(fc1 x)))."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.fc1 = nn.Linear(width, hidden)
        self.act = {"gelu": gelu, "quick_gelu": quick_gelu}[config.hidden_act]
        self.ffn_ln = _norm(config, hidden) if config.subln else nn.Identity()
        self.fc2 = nn.Linear(hidden, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.ffn_ln(self.act(self.fc1(x))))


class Block(nn.Module):
    """x += attn(ln1(x)); x += mlp(ln2(x)): [B, T, D] -> [B, T, D]."""

    def __init__(
        self,
        config: TextConfig | VisionConfig,
        rope: Rotary | None,
        kernels: Kernels,
        *,
        causal: bool,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(config, rope, kernels, causal=causal)
        self.layer_norm1 = _norm(config, config.hidden_size)
        self.layer_norm2 = _norm(config, config.hidden_size)
        self.mlp = SwiGLU(config, kernels) if config.swiglu else MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Transformer(nn.Module):
    """The blocks of a tower. In a vision tower, `leading` tokens precede the patches."""

    def __init__(
        self,
        config: TextConfig | VisionConfig,
        kernels: Kernels,
        *,
        leading: int = 0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        rope = None
        if config.rope and isinstance(config, VisionConfig):
            rope = Rotary(config.grid, config.head_dim, leading)
        self.layers = [
            Block(config, rope, kernels, causal=causal) for _ in range(config.num_hidden_layers)
        ]

    def __call__(self, x: mx.array, stop: int | None = None) -> mx.array:
        """The state after `stop` layers (all of them if None)."""
        for layer in self.layers[:stop]:
            x = layer(x)
        return x


class BottleneckMLP(nn.Module):
    """c_proj(gelu(c_fc(x)))."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, out)

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(gelu(self.c_fc(x)))


# Not MLX's own, which is compiled separately; on Linux that runs a C++ compiler.
def gelu(x: mx.array) -> mx.array:
    return x * (0.5 * (1 + mx.erf(x * math.sqrt(0.5))))


def quick_gelu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(1.702 * x)


def patchify(pixels: mx.array, patch: int) -> mx.array:
    """[B, 3, S, S] -> [B, N, 3*p*p], a patch's values in (channel, row, column) order."""
    blocks = mx.unflatten(mx.unflatten(pixels, 3, (-1, patch)), 2, (-1, patch))
    return blocks.transpose(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: mx.array, patch: int, grid: tuple[int, int]) -> mx.array:
    """Inverse of `patchify` on a grid of (h, w) patches: [B, N, 3*p*p] -> [B, 3, h*p, w*p]."""
    blocks = mx.unflatten(mx.unflatten(patches, 2, (3, patch, patch)), 1, grid)
    return blocks.transpose(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _norm(config: TextConfig | VisionConfig, width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=config.layer_norm_eps)


# -- towers ------------------------------------------------------------------------------------


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextModel(nn.Module):
    """Token ids [B, T] -> last hidden states [B, T, D]."""

    def __init__(self, config: TextConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Transformer(config, kernels, causal=True)
        self.final_layer_norm = _norm(config, config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class PatchEmbedding(nn.Module):
    """A linear map of each patch: [B, 3, S, S] -> [B, N, D].

    `weight` is the published kernel [D, 3, p, p] laid flat, [D, 3*p*p] (`_laid_out`). It is never
    quantized, being under 1 % of the encoder and the first layer, whose errors reach all others.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.weight = mx.zeros((config.hidden_size, 3 * self.patch**2))
        self.bias = mx.zeros(config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        return mx.addmm(self.bias, patchify(pixels, self.patch), self.weight.T)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = mx.zeros(config.hidden_size)
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        """[B, 3, S, S] -> [B, N+1, D], CLS first."""
        patches = self.patch_embedding(pixels)
        cls = mx.broadcast_to(self.class_embedding, (len(patches), 1, patches.shape[-1]))
        return mx.concatenate([cls, patches], axis=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    """Visual encoder and both sides of the bottleneck, or those of them that `parts` names."""

    def __init__(self, config: VisionConfig, parts: tuple[str, ...], kernels: Kernels) -> None:
        super().__init__()
        width, post = config.hidden_size, config.hidden_size_post_q
        if "encoder" in parts:
            self.embeddings = VisionEmbeddings(config)
            self.encoder = Transformer(config, kernels, leading=1)
            self.post_layernorm = _norm(config, width)
        if config.quantizer_embed_type == "mlp":
            if "down" in parts:
                self.quant_embed = BottleneckMLP(width, width, config.code_dim)
            if "up" in parts:
                self.quant_embed_post = BottleneckMLP(config.code_dim, post, post)

    def __call__(self, pixels: mx.array, stop: int | None = None) -> mx.array:
        """[B, 3, S, S] -> state after `stop` layers [B, N+1, D]."""
        return self.encoder(self.embeddings(pixels), stop)


class VisionDecoder(nn.Module):
    """z_hat [B, N, D'] -> pixels [B, 3, S, S] (SPEC 1.4)."""

    def __init__(self, config: VisionConfig, kernels: Kernels) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.patch, self.grid = config.patch_size, config.grid
        self.position_embeddings = mx.zeros((1, config.num_patches, width))
        self.encoder = Transformer(config, kernels)
        self.norm = _norm(config, width)
        self.ffn = [nn.Linear(width, hidden)]
        self.conv_out = nn.Linear(hidden, 3 * self.patch**2)

    def __call__(self, z_hat: mx.array) -> mx.array:
        x = self.norm(self.encoder(z_hat + self.position_embeddings))
        return unpatchify(self.conv_out(mx.tanh(self.ffn[0](x))), self.patch, self.grid)


# -- the model ---------------------------------------------------------------------------------


class QLIP(nn.Module):
    """The whole model, or some of its parts (`qlip_core.architecture.PARTS`), before `load`."""

    def __init__(
        self, config: QLIPConfig, parts: tuple[str, ...] = PARTS, kernels: Kernels = FUSED
    ) -> None:
        super().__init__()
        self.config = config
        text, vision = config.text_config, config.vision_config
        if "text" in parts:
            self.logit_scale = mx.array(config.logit_scale_init_value)
            self.text_model = TextModel(text, kernels)
            self.text_projection = nn.Linear(
                text.hidden_size, config.projection_dim, bias=config.text_projection_bias
            )
        if {"encoder", "down", "up"} & set(parts):
            self.vision_model = VisionModel(vision, parts, kernels)
        if "encoder" in parts:
            self.visual_projection = nn.Linear(
                vision.hidden_size, config.projection_dim, bias=config.vision_projection_bias
            )
        if "decoder" in parts:
            self.vision_decoder = VisionDecoder(config.decoder_config, kernels)

    def encode(self, pixels: mx.array) -> tuple[mx.array, mx.array]:
        """Pixels [B, 3, S, S] -> (cls [B, D], patch features z [B, N, D])."""
        x = self.vision_model(pixels)
        return x[:, 0], x[:, 1:]

    def hidden_states(self, pixels: mx.array, layer: int) -> mx.array:
        """State after `layer` layers [B, N+1, D], CLS first; 0 the embeddings, -1 the last layer.

        Later layers do not run. `qlip_core.Model` checks that the layer exists.
        """
        return self.vision_model(pixels, layer % (self.config.vision_config.num_hidden_layers + 1))

    def embed_image(self, cls: mx.array) -> mx.array:
        """cls [B, D] -> [B, P], not yet of unit length."""
        return self.visual_projection(self.vision_model.post_layernorm(cls))

    def bottleneck_down(self, z: mx.array) -> mx.array:
        """z [B, N, D] -> u [B, N, L], float32, of unit length with `quantizer_l2_norm` (SPEC 1.3)."""
        vision = self.config.vision_config
        if vision.quantizer_embed_type == "mlp":
            z = self.vision_model.quant_embed(z)
        u = z.astype(mx.float32)
        if vision.quantizer_l2_norm:
            u = u / mx.maximum(mx.linalg.norm(u, axis=-1, keepdims=True), 1e-12)
        return u

    def bottleneck_up(self, code: mx.array) -> mx.array:
        """Code [B, N, L] -> z_hat [B, N, D']."""
        if self.config.vision_config.quantizer_embed_type == "identity":
            return code
        return self.vision_model.quant_embed_post(code)

    def decode(self, z_hat: mx.array) -> mx.array:
        """z_hat [B, N, D'] -> pixels [B, 3, S, S], in the normalised space."""
        return self.vision_decoder(z_hat)

    def embed_text(self, ids: mx.array, pooled: mx.array) -> mx.array:
        """Token ids [B, T], each pooled at `pooled` [B] -> [B, P], not yet of unit length."""
        states = self.text_model(ids)
        return self.text_projection(states[mx.arange(len(ids)), pooled])


# -- loading -----------------------------------------------------------------------------------

LINEARS = (nn.Linear, PatchEmbedding)


def load(
    config: QLIPConfig,
    arrays: Mapping[str, np.ndarray],
    parts: tuple[str, ...] = PARTS,
    *,
    dtype: mx.Dtype = mx.float32,
    bits: int | None = None,
    kernels: Kernels = FUSED,
) -> QLIP:
    """A model with `arrays` (published name -> array) in `dtype`, on MLX's default device.

    With `bits` (8 or 4) every linear whose rows divide into groups of `weights.GROUP` is quantized.
    Raises CheckpointError if a tensor of these parts is missing or misshapen, or one is unknown.
    """
    if problems := diff_tensors(config, {n: a.shape for n, a in arrays.items()}, parts):
        raise CheckpointError(f"weights do not fit the model: {problems}")
    model = QLIP(config, parts, kernels)
    tensors = ((name, _laid_out(name, array)) for name, array in arrays.items())
    load_weights(model, tensors, dtype=dtype, bits=bits, lay_out=kernels.lay_out, linears=LINEARS)
    return model


def unquantized(config: QLIPConfig, parts: tuple[str, ...] = PARTS) -> list[str]:
    """Names of the linears (the patch embedding is one) that are never quantized, in forward order."""
    modules = dict(QLIP(config, parts).named_modules())
    names = (name.removesuffix(".weight") for name in architecture(config))
    return [n for n in names if isinstance(modules.get(n), LINEARS) and not fits(modules[n])]


def _laid_out(name: str, array: np.ndarray) -> np.ndarray:
    """A published tensor as stored here; only the patch kernel differs."""
    if name == "vision_model.embeddings.patch_embedding.weight":
        return array.reshape(len(array), -1)
    return array
