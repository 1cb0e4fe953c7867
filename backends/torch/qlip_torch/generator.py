"""The generator as PyTorch modules, for training and for drawing: blocks small to large, the model, loading.

SPEC sections 4 and 5. Parameter names and shapes are those of `qlip_core.generator.architecture`, so a
state dict is a checkpoint. Legend: B sequences, T prefix, M sub-tokens, Q new positions, S positions so
far, D width, H heads, K key-value heads, d = D/H, V values of a sub-token, n sub-tokens per patch.

The caller passes in positions, as rotary tables (`Generator.rope`), and caches, so the same blocks run
whole sequences in training and one position at a time in `qlip_torch.sampler`. Nothing here knows about
devices, precision or other processes; `blocks` are the units to compile, checkpoint or shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip_core.errors import CheckpointError
from qlip_core.generator.architecture import diff_tensors, positions, rotary_tables
from qlip_core.generator.config import GeneratorConfig
from qlip_torch.arrays import shared

Rope = tuple[Tensor, Tensor]


class LayerCache(Protocol):
    """Stores the keys and values of new positions and returns those of all positions so far, [B, K, S, d]."""

    def put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


# -- blocks ------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, with float32 statistics."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            # For bfloat16 and float16, F.rms_norm itself computes in float32.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return y.to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head: [B, Q, heads, d] -> same.

    The tables are [Q, 1, d], or [B, Q, 1, d] if positions differ by row, with the first half of the sines
    negated (`Generator.rope`).
    """
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query over all positions so far: q [B, H, 1, d], k and v [B, K, S, d] -> [B, 1, H*d].

    For the CPU, whose fused kernel is made for many queries, and for torch.compile, which fuses this with the
    operations around it.
    """
    B, H, _, d = q.shape
    grouped = (
        q.reshape(B, k.shape[1], -1, d) * d**-0.5
    )  # a group's heads as rows, so that keys and values need not be repeated
    scores = (grouped @ k.transpose(2, 3)).float()  # [B, K, H/K, S]
    if mask is not None:
        hidden = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if hidden else scores + mask
    return (scores.softmax(-1).to(v.dtype) @ v).reshape(B, 1, H * d)


class Packed(nn.Module):
    """Several linear layers of the same input as one matrix, for drawing only: weights [out, in], no gradients.

    On the CPU oneDNN lays the matrix out. Its product with one or a few vectors then reads more bytes a
    second than the ordinary product: with one vector slightly more in float32 and 1.5 times as many in
    bfloat16, with eight 1.5 times; and unlike the ordinary one it scales with threads. torch.compile uses the
    same operators for frozen weights. If the CPU has no instructions for the type, PyTorch's own product with
    one vector still takes half of float32's time, reading half the bytes, but with many it is slower than float32's.
    """

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.weight = torch.cat(weights)
        self.reordered = _reorders(self.weight)
        if self.reordered:
            # Laid out for eight vectors. Compared with the layout for one, a single vector is 8 % slower,
            # two (a picture with guidance) are 1.4 times as fast, eight or more 1.2 times (float32, AVX2).
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 8)
        self.widens = self.weight.device.type == "cpu" and not _computes(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.reordered:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        if self.widens and x.numel() > _WIDENED * x.shape[-1]:
            return F.linear(x.float(), self.weight.float()).to(x.dtype)
        return F.linear(x, self.weight)


# From this many vectors on, converting a 16-bit matrix to float32 beats multiplying it as it is (AVX2).
_WIDENED = 12


def _reorders(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype != torch.float16 and _computes(weight.dtype)


def _computes(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of the type."""
    # PyTorch for Apple silicon is built without oneDNN, and then lacks the operators that tell.
    if dtype != torch.float32 and not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


class Attention(nn.Module):
    """Grouped-query self-attention, [B, Q, D] -> [B, Q, D]."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        queries, keys = self.heads * self.head_dim, self.groups * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj: nn.Linear | Packed = nn.Linear(queries, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.fused: Packed | None = None

    def fuse(self) -> None:
        """Query, key and value projections as one matrix, for drawing."""
        self.fused = Packed(self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        self.o_proj = Packed(self.o_proj.weight)
        del self.q_proj, self.k_proj, self.v_proj

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """`mask` broadcasts to [B, H, Q, S]: bool (True where attention is allowed), or values added to the
        scores. None is causal attention."""
        q, k, v = self.project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # Rotating both at once halves the number of calls, which dominate the time of small models.
        turned = rotate(torch.cat((q, k), dim=2), rope)
        q, k = turned.transpose(1, 2).split((self.heads, self.groups), dim=1)
        v = v.transpose(1, 2)
        dtype = v.dtype
        if cache is not None:
            k, v = cache.put(k, v)
            q = q.to(k.dtype)  # on the CPU a cache is float32 whatever the weights are
        if q.shape[2] == 1 and (q.device.type == "cpu" or torch.compiler.is_compiling()):
            return self.o_proj(attend_once(q, k, v, mask).to(dtype))
        if self.heads != self.groups:
            k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).flatten(2).to(dtype))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, Q, D] -> queries [B, Q, H, d], keys and values [B, Q, K, d]."""
        if self.fused is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            shape = (-1, self.head_dim)
            return q.unflatten(-1, shape), k.unflatten(-1, shape), v.unflatten(-1, shape)
        heads = self.fused(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=2)
        return q, k, v


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj: nn.Linear | Packed = nn.Linear(hidden, width, bias=False)
        self.fused: Packed | None = None

    def fuse(self) -> None:
        """Both input projections as one matrix, for drawing."""
        self.fused = Packed(self.gate_proj.weight, self.up_proj.weight)
        self.down_proj = Packed(self.down_proj.weight)
        del self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.fused(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x)): [B, Q, D] -> [B, Q, D]."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), rope, mask, cache)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(y, self.dropout, self.training)


class Transformer(nn.Module):
    """Embedding table, blocks and final norm: Llama's `model`."""

    def __init__(self, config: GeneratorConfig, rows: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None = None,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """Embeddings [B, Q, D] -> last hidden states, normalised."""
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, None if caches is None else caches[i])
        return self.norm(x)


class CaptionProjector(nn.Module):
    """fc2(gelu(fc1(x))), tanh-GELU, no biases: [B, T, F] -> [B, T, D]."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.condition_size, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


# -- the model ---------------------------------------------------------------------------------


class Generator(nn.Module):
    """The language model over visual tokens."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        rows = config.text_vocab_size + config.visual_rows
        if config.conditioner != "none":
            self.caption_projector = CaptionProjector(config)
            self.null_prefix = nn.Parameter(torch.empty(config.prefix_length, width))
        self.model = Transformer(config, rows)
        self.sub_token_embedding: nn.Embedding | None = None
        if config.sub_tokens > 1 and not config.separate_sub_tokens:
            self.sub_token_embedding = nn.Embedding(config.sub_tokens, width)
        self.lm_head = nn.Linear(width, rows, bias=False)
        self.heads: list[Packed] = []  # of each sub-token number, once fused
        # Tables for a whole picture, kept by training: making them in each step would wait for the GPU.
        self._rope: Rope | None = None

    def forward(self, features: Tensor, valid: Tensor, null: Tensor, tokens: Tensor) -> Tensor:
        """Logits of every sub-token given the caption and the sub-tokens before it, for training.

        `features` [B, T, F], `valid` bool [B, T] (False: padding, on the left), `null` bool [B] (True:
        the null prefix instead), `tokens` int64 [B, M] in raster order -> [B, M, V].
        """
        prefix = self.embed_prefix(features, null)
        x = torch.cat((prefix, self.embed_sub_tokens(tokens[:, :-1])), dim=1)
        x = F.dropout(x, self.config.dropout, self.training)
        order, back = padding_last(valid | null[:, None], x.shape[1])
        if self._rope is None or self._rope[0].device != x.device:
            self._rope = self.rope(x.device)
        cos, sin = self._rope
        states = self.model(_rows(x, order), (cos[order], sin[order]))
        return self.image_logits(_rows(states, back[:, self.config.prefix_length - 1 :]))

    def embed_prefix(self, features: Tensor, null: Tensor) -> Tensor:
        """Caption features [B, T, F] -> prefix [B, T, D]; the null prefix where `null` [B]."""
        prefix = self.caption_projector(features)
        return torch.where(null[:, None, None], self.null_prefix.to(prefix.dtype), prefix)

    def embed_sub_tokens(self, values: Tensor, start: int = 0) -> Tensor:
        """Sub-tokens number `start`, `start` + 1, ... of pictures: int64 [B, Q] -> [B, Q, D]."""
        n = self.config.sub_tokens
        if values.shape[1] == 1:
            # Drawing: every operation costs time, and with a single number no tensor of numbers is needed.
            number = start % n
            x = self.model.embed_tokens(values + self.config.first_row(number))
            table = self.sub_token_embedding
            return x if table is None else x + table.weight[number]
        numbers = torch.arange(start, start + values.shape[1], device=values.device) % n
        stride = self.config.first_row(1) - self.config.first_row(0)
        x = self.model.embed_tokens(values + numbers * stride + self.config.first_row(0))
        if self.sub_token_embedding is not None:
            x = x + self.sub_token_embedding(numbers)
        return x

    def image_logits(self, states: Tensor) -> Tensor:
        """States [B, M, D] that predict sub-tokens 0 to M-1 -> [B, M, V]."""
        config = self.config
        if not config.separate_sub_tokens:
            return self.visual_logits(states, 0)
        by_number = states.unflatten(1, (-1, config.sub_tokens))  # [B, N, n, D]
        logits = [self.visual_logits(by_number[:, :, j], j) for j in range(config.sub_tokens)]
        return torch.stack(logits, dim=2).flatten(1, 2)

    def visual_logits(self, states: Tensor, number: int) -> Tensor:
        """States that predict sub-token `number` of a patch: [..., D] -> [..., V]."""
        if self.heads:
            return self.heads[number](states)
        first = self.config.first_row(number)
        return F.linear(states, self.lm_head.weight[first : first + self.config.visual_vocab_size])

    def text_logits(self, states: Tensor) -> Tensor:
        """States that predict a text token: [..., D] -> [..., text_vocab_size] (SPEC section 5)."""
        return F.linear(states, self.lm_head.weight[: self.config.text_vocab_size])

    def rope(self, device: torch.device | str, at: np.ndarray | None = None) -> Rope:
        """Rotary tables for `rotate` of positions [S, axes] (None: a whole picture), float32 [S, 1, d] each."""
        where = positions(self.config) if at is None else at
        cos, sin = rotary_tables(self.config, where)
        cos, sin = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
        return tuple(torch.from_numpy(t.astype(np.float32)[:, None]).to(device) for t in (cos, sin))  # type: ignore[return-value]

    def blocks(self) -> list[Block]:
        """The transformer blocks: the units to compile, checkpoint or shard."""
        return [module for module in self.modules() if isinstance(module, Block)]

    @torch.no_grad()
    def fuse(self) -> Generator:
        """Lay the weights out for drawing, where each is read once per sub-token. The result cannot be trained:
        the separate projections are gone, and in a pure image model so is the unpacked output table."""
        for block in self.blocks():
            block.self_attn.fuse()
            block.mlp.fuse()
        config, table = self.config, self.lm_head.weight
        if config.separate_sub_tokens:
            firsts = [config.first_row(j) for j in range(config.sub_tokens)]
            self.heads = [Packed(table[i : i + config.visual_vocab_size]) for i in firsts]
        else:
            first = config.first_row(0)
            self.heads = [Packed(table[first:])] * config.sub_tokens
        if not config.text_vocab_size:
            del self.lm_head
        return self

    @torch.no_grad()
    def init_from(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy name -> array into the parameters. Raises CheckpointError if they do not fit."""
        _check(self.config, arrays)
        for name, parameter in self.named_parameters():
            parameter.copy_(shared(arrays[name]))


def padding_last(seen: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """An order of each row's `length` positions that puts its padding last, and the inverse order.

    `seen` bool [B, T]: prefix positions that are not padding -> int64 [B, S] each: where the new positions
    come from, and where the old ones went. At the end, padding is hidden by causality alone and attention
    needs no mask: the fused kernels skip half the scores, and the fastest one on CUDA accepts no mask.
    """
    padding = F.pad(~seen, (0, length - seen.shape[1]), value=False)
    order = padding.to(torch.uint8).argsort(dim=1, stable=True)
    return order, order.argsort(dim=1)


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """x [B, S, D] at positions `order` int64 [B, R] -> [B, R, D]."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def causal_mask(length: int, seen: Tensor) -> Tensor:
    """Which positions each of `length` positions may attend to, bool [B, 1, S, S].

    `seen` bool [B, T]: prefix positions that are not padding. Padding attends to itself, so that no row
    is empty.
    """
    before = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    keys = F.pad(seen, (0, length - seen.shape[1]), value=True)
    itself = torch.eye(length, dtype=torch.bool, device=seen.device)
    return before & (keys[:, None, None] | itself)


# -- loading -----------------------------------------------------------------------------------


def load(
    config: GeneratorConfig,
    arrays: Mapping[str, np.ndarray],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Generator:
    """A fused generator for drawing. To train, build a Generator and use `init_from`.

    Raises CheckpointError if a tensor is missing, misshapen or unknown.
    """
    _check(config, arrays)
    with torch.device("meta"):
        model = Generator(config)
    tensors = {name: shared(arrays[name]).to(device, dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval().fuse()


def _check(config: GeneratorConfig, arrays: Mapping[str, np.ndarray]) -> None:
    if problems := diff_tensors(config, {name: array.shape for name, array in arrays.items()}):
        raise CheckpointError(f"weights do not fit the generator: {problems}")
