"""QLIP as PyTorch modules, for inference and for training: blocks small to large, the model, loading.

SPEC sections 1.1 to 1.4. Parameter names and shapes are those of `qlip_core.architecture`, so a state
dict is a checkpoint. Legend: B images, N patches, D width, H heads, d = D/H, L bits, T tokens (N+1
with CLS in the encoder, text positions in the text tower), S image side, p patch side, P projection.

Nothing here knows about devices, precision or other processes: autocast, `fully_shard`, activation
checkpointing and `torch.compile` are applied from outside, preferably block by block (`QLIP.blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from qlip_core.architecture import PARTS, diff_tensors, rotary_tables
from qlip_core.config import QLIPConfig, TextConfig, VisionConfig
from qlip_core.errors import CheckpointError, ConfigError
from qlip_torch.arrays import shared

# -- blocks ------------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """LayerNorm with float32 statistics; computed wholly in float32 if autocast mixes precisions."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype:
            # The bfloat16 and float16 kernels themselves accumulate in float32.
            return super().forward(input)
        weight, bias = self.weight.float(), self.bias.float()
        y = F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(input.dtype)


class Rotary(nn.Module):
    """EVA-02's 2-D rotary embedding of the patches of a grid (SPEC 1.2).

    `leading` tokens before the patches (CLS) are not rotated. The tables are float32 and not stored in
    checkpoints.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: tuple[int, int], head_dim: int, leading: int) -> None:
        super().__init__()
        self.grid, self.head_dim, self.leading = grid, head_dim, leading
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.fill(torch.device("cpu"))

    def fill(self, device: torch.device) -> None:
        """Compute the tables [T, 1, d/2] on `device`: one angle per pair, 0 for leading tokens."""
        tables = rotary_tables(self.grid, self.head_dim)
        for name, table, identity in zip(("cos", "sin"), tables, (1, 0)):
            pairs = np.pad(table[:, ::2], ((self.leading, 0), (0, 0)), constant_values=identity)
            pairs = torch.from_numpy(pairs.astype(np.float32)[:, None])
            setattr(self, name, pairs.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for adjacent pairs: [B, T, H, d] -> same."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        pairs = x.to(dtype).unflatten(-1, (-1, 2))
        cos, sin = self.cos.to(dtype), self.sin.to(dtype)
        if x.is_cpu and not torch.compiler.is_compiling():
            # One vectorised complex product: on the CPU several times faster than the real form.
            turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
        else:
            x0, x1 = pairs.unbind(-1)
            turned = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1)
        return turned.flatten(-2).to(x.dtype)


def both(x: Tensor, first: nn.Linear, second: nn.Linear) -> tuple[Tensor, ...]:
    """Two linear layers of the same input. Compiled training takes them as one product, which reads x once and
    has no two gradients of x to add."""
    if not (first.training and torch.compiler.is_compiling()):
        return first(x), second(x)
    biases = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        for linear in (first, second)
    ]
    y = F.linear(x, torch.cat((first.weight, second.weight)), torch.cat(biases))
    return y.split((first.out_features, second.out_features), dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, D] -> [B, T, D]."""

    def __init__(
        self, config: TextConfig | VisionConfig, rope: Rotary | None, *, causal: bool
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.causal = config.num_attention_heads, causal
        self.q_proj = nn.Linear(width, width, bias=config.q_bias)
        self.k_proj = nn.Linear(width, width, bias=config.k_bias)
        self.v_proj = nn.Linear(width, width, bias=config.v_bias)
        self.inner_attn_ln = _norm(config, width) if config.subln else nn.Identity()
        self.out_proj = nn.Linear(width, width)
        self.rope = rope

    def forward(self, x: Tensor) -> Tensor:
        # Values apart: attention keeps them for backward, and as a slice they would keep the whole product.
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1))  # [B, T, H, d]
            for y in (*both(x, self.q_proj, self.k_proj), self.v_proj(x))
        )
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=self.causal
        )
        y = y.transpose(1, 2).flatten(2)
        return self.out_proj(self.inner_attn_ln(y))


class SwiGLU(nn.Module):
    """w3(ffn_ln(silu(w1 x) * w2 x))."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = _norm(config, hidden) if config.subln else nn.Identity()
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, y = both(x, self.w1, self.w2)
        if torch.is_grad_enabled():
            y = F.silu(gate) * y
        else:  # in place: allocating the widest tensors would cost as much as the arithmetic
            y = F.silu(gate, inplace=True).mul_(y)
        return self.w3(self.ffn_ln(y))


class MLP(nn.Module):
    """fc2(ffn_ln(act(fc1 x)))."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.fc1 = nn.Linear(width, hidden)
        self.act = {"gelu": F.gelu, "quick_gelu": quick_gelu}[config.hidden_act]
        self.ffn_ln = _norm(config, hidden) if config.subln else nn.Identity()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_ln(self.act(self.fc1(x))))


class Block(nn.Module):
    """x += attn(ln1(x)); x += mlp(ln2(x)): [B, T, D] -> [B, T, D]."""

    def __init__(
        self, config: TextConfig | VisionConfig, rope: Rotary | None, *, causal: bool
    ) -> None:
        super().__init__()
        self.self_attn = Attention(config, rope, causal=causal)
        self.layer_norm1 = _norm(config, config.hidden_size)
        self.layer_norm2 = _norm(config, config.hidden_size)
        self.mlp = SwiGLU(config) if config.swiglu else MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Transformer(nn.Module):
    """The blocks of a tower. In a vision tower, `leading` tokens precede the patches."""

    def __init__(
        self, config: TextConfig | VisionConfig, *, leading: int = 0, causal: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            rope = None
            if config.rope and isinstance(config, VisionConfig):
                rope = Rotary(config.grid, config.head_dim, leading)
            self.layers.append(Block(config, rope, causal=causal))

    def forward(self, x: Tensor, stop: int | None = None) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class StraightThroughSign(Function):
    """u -> +-1/sqrt(L) for each bit, a corner on the sphere; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        scale = 1 / math.sqrt(u.shape[-1])
        # A comparison, not `sign`, so that 0 and NaN become -1/sqrt(L) on every backend.
        return torch.where(u > 0, scale, -scale).to(u.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return grads[0]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """[B, 3, S, S] -> [B, N, 3*p*p], a patch's values in (channel, row, column) order."""
    blocks = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify` on a grid of (h, w) patches: [B, N, 3*p*p] -> [B, 3, h*p, w*p]."""
    blocks = patches.unflatten(2, (3, patch, patch)).unflatten(1, grid)
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _norm(config: TextConfig | VisionConfig, width: int) -> LayerNorm:
    return LayerNorm(width, eps=config.layer_norm_eps)


# -- towers ------------------------------------------------------------------------------------


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextModel(nn.Module):
    """Token ids [B, T] -> last hidden states [B, T, D]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Transformer(config, causal=True)
        self.final_layer_norm = _norm(config, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class PatchEmbedding(nn.Module):
    """A linear map of each patch, with a convolution's weight layout: [B, 3, S, S] -> [B, N, D].

    Not computed as a convolution, because on CUDA those round float32 to TF32 by default.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        kernel = (config.hidden_size, 3, self.patch, self.patch)
        self.weight = nn.Parameter(torch.empty(kernel))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        return F.linear(patchify(pixels, self.patch), self.weight.flatten(1), self.bias)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N+1, D], CLS first."""
        positions = self.position_embedding.weight
        patches = self.patch_embedding(pixels) + positions[1:]
        cls = (self.class_embedding + positions[0]).to(patches.dtype)
        return torch.cat((cls.expand(len(patches), 1, -1), patches), dim=1)


class VisionModel(nn.Module):
    """Visual encoder and both sides of the bottleneck, or those of them that `parts` names."""

    def __init__(self, config: VisionConfig, parts: tuple[str, ...]) -> None:
        super().__init__()
        width, post = config.hidden_size, config.hidden_size_post_q
        if "encoder" in parts:
            self.embeddings = VisionEmbeddings(config)
            self.encoder = Transformer(config, leading=1)
            self.post_layernorm = _norm(config, width)
        if config.quantizer_embed_type == "mlp":
            if "down" in parts:
                self.quant_embed = BottleneckMLP(width, width, config.code_dim)
            if "up" in parts:
                self.quant_embed_post = BottleneckMLP(config.code_dim, post, post)

    def forward(self, pixels: Tensor, stop: int | None = None) -> Tensor:
        """[B, 3, S, S] -> state after `stop` layers [B, N+1, D]."""
        return self.encoder(self.embeddings(pixels), stop)


class VisionDecoder(nn.Module):
    """z_hat [B, N, D'] -> pixels [B, 3, S, S] (SPEC 1.4)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.patch, self.grid = config.patch_size, config.grid
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_patches, width))
        self.encoder = Transformer(config)
        self.norm = _norm(config, width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.Tanh())
        self.conv_out = nn.Linear(hidden, 3 * self.patch**2)

    def forward(self, z_hat: Tensor) -> Tensor:
        x = self.encoder(z_hat + self.position_embeddings)
        return unpatchify(self.conv_out(self.ffn(self.norm(x))), self.patch, self.grid)


# -- the model ---------------------------------------------------------------------------------


class QLIP(nn.Module):
    """The whole model, or some of its parts (`qlip_core.architecture.PARTS`).

    Its parameters are uninitialised until `init_from`; build under `torch.device("meta")` and use
    `load` where they come from a checkpoint.
    """

    def __init__(self, config: QLIPConfig, parts: tuple[str, ...] = PARTS) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        text, vision = config.text_config, config.vision_config
        if "text" in parts:
            self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
            self.text_model = TextModel(text)
            self.text_projection = nn.Linear(
                text.hidden_size, config.projection_dim, bias=config.text_projection_bias
            )
        if {"encoder", "down", "up"} & set(parts):
            self.vision_model = VisionModel(vision, parts)
        if "encoder" in parts:
            self.visual_projection = nn.Linear(
                vision.hidden_size, config.projection_dim, bias=config.vision_projection_bias
            )
        if "decoder" in parts:
            self.vision_decoder = VisionDecoder(config.decoder_config)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, S, S] -> (cls [B, D], patch features z [B, N, D])."""
        x = self.vision_model(pixels)
        return x[:, 0], x[:, 1:]

    def hidden_states(self, pixels: Tensor, layer: int) -> Tensor:
        """State after `layer` layers [B, N+1, D], CLS first; 0 the embeddings, -1 the last layer.

        Later layers do not run. Raises ConfigError for a layer that does not exist.
        """
        layers = self.config.vision_config.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise ConfigError(
                f"layer {layer} does not exist: the encoder has hidden states 0 to {layers}"
            )
        return self.vision_model(pixels, layer % (layers + 1))

    def embed_image(self, cls: Tensor) -> Tensor:
        """cls [B, D] -> [B, P], not yet of unit length."""
        return self.visual_projection(self.vision_model.post_layernorm(cls))

    def bottleneck_down(self, z: Tensor) -> Tensor:
        """z [B, N, D] -> u [B, N, L], float32, of unit length with `quantizer_l2_norm` (SPEC 1.3)."""
        vision = self.config.vision_config
        if vision.quantizer_embed_type == "mlp":
            # `z` is a slice, and on strided input a linear layer becomes a slow batched product.
            z = self.vision_model.quant_embed(z.contiguous())
        # float32 from here on, even under autocast: it lowers only products, and none follow.
        u = z.to(torch.promote_types(z.dtype, torch.float32))
        return F.normalize(u, dim=-1, eps=1e-12) if vision.quantizer_l2_norm else u

    def quantize(self, u: Tensor) -> Tensor:
        """u [B, N, L] -> the code: +1/sqrt(L) where u > 0, else -1/sqrt(L); straight-through gradient.

        With quantizer "none" the code is u itself.
        """
        return StraightThroughSign.apply(u) if self.config.quantizes else u  # type: ignore[return-value]

    def bottleneck_up(self, code: Tensor) -> Tensor:
        """Code [B, N, L] -> z_hat [B, N, D']."""
        if self.config.vision_config.quantizer_embed_type == "identity":
            return code
        return self.vision_model.quant_embed_post(code)

    def decode(self, z_hat: Tensor) -> Tensor:
        """z_hat [B, N, D'] -> pixels [B, 3, S, S], in the normalised space."""
        return self.vision_decoder(z_hat)

    def text_states(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, T] -> hidden states after `final_layer_norm` [B, T, Dt]."""
        return self.text_model(ids)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, T] -> [B, P], not yet of unit length."""
        pooled = pooled_position(ids, self.config.text_config.eos_token_id)
        states = self.text_states(ids)
        return self.text_projection(states[torch.arange(len(ids), device=ids.device), pooled])

    def blocks(self) -> list[Block]:
        """The transformer blocks of all towers: the units to compile, checkpoint or shard."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def reset_rotary(self) -> None:
        """Recompute the rotary tables, on the parameters' device. Needed after `to_empty`."""
        for block in self.blocks():
            if block.self_attn.rope is not None:
                block.self_attn.rope.fill(block.layer_norm1.weight.device)

    @torch.no_grad()
    def init_from(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy published name -> array into the parameters.

        Raises CheckpointError if a tensor of these parts is missing or misshapen, or any is unknown;
        tensors of other parts are ignored.
        """
        _check(self, arrays)
        for name, parameter in self.named_parameters():
            parameter.copy_(shared(arrays[name]))


def pooled_position(ids: Tensor, eos_token_id: int) -> Tensor:
    """The position where each text [B, T] is pooled: its first end token, or, if `eos_token_id` is 2, its
    largest id (SPEC 1.1)."""
    return (ids if eos_token_id == 2 else (ids == eos_token_id).int()).argmax(-1)


# -- loading -----------------------------------------------------------------------------------


def load(
    config: QLIPConfig,
    arrays: Mapping[str, np.ndarray],
    parts: tuple[str, ...] = PARTS,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> QLIP:
    """A model for inference. On the CPU in float32 its tensors share the arrays' memory, which may be
    read-only: to train, build a QLIP and use `init_from`.

    Raises CheckpointError as `QLIP.init_from` does.
    """
    with torch.device("meta"):
        model = QLIP(config, parts)
    _check(model, arrays)
    tensors = {name: shared(arrays[name]).to(device, dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(tensors, assign=True)
    model.reset_rotary()
    return model.requires_grad_(False).eval()


def _check(model: QLIP, arrays: Mapping[str, np.ndarray]) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if problems := diff_tensors(model.config, shapes, model.parts):
        raise CheckpointError(f"weights do not fit the model: {problems}")
