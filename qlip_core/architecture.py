"""The architecture as data: every tensor of a checkpoint, with its shape and initial values.

Both backends are built from this table, check what they load against it and are tested with it. It follows
the forward pass: text tower, visual encoder, bottleneck, visual decoder (SPEC section 2).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qlip_core.config import QLIPConfig, TextConfig, VisionConfig
from qlip_core.tensorfile import listed

# A part is loaded as a whole: images need no text tower, encoding needs no decoder.
PARTS = ("text", "encoder", "down", "up", "decoder")

# Tables that published files may carry; they follow from the config, so they are not read.
DERIVED = re.compile(r"(^|\.)rope\.freqs_(cos|sin)$")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its published name, shape, part, and initial values.

    `init` is "ones", "zeros", "constant" (of value `scale`) or "normal" (of deviation `scale`).
    """

    name: str
    shape: tuple[int, ...]
    part: str
    init: str
    scale: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def architecture(config: QLIPConfig) -> dict[str, TensorSpec]:
    """The table of tensors of a model: published name -> TensorSpec."""
    specs = [
        *_text(config),
        *_encoder(config),
        *_bottleneck(config.vision_config),
        *_decoder(config.decoder_config),
    ]
    return {spec.name: spec for spec in specs}


def parameter_count(config: QLIPConfig) -> dict[str, int]:
    """Parameters by part, in the order of PARTS."""
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for spec in architecture(config).values():
        counts[spec.part] += spec.size
    return counts


def is_derived(name: str) -> bool:
    """Whether a tensor of a file is one of the rotary tables to ignore."""
    return DERIVED.search(name) is not None


def init_weights(config: QLIPConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights, the same on every machine; a tensor's values do not depend on others.

    Matrices are Glorot-normal; those that write to the residual stream are divided by sqrt(2 * layers),
    so that its variance does not grow with depth (GPT-2's rule).
    """
    return {spec.name: initial_values(spec, seed) for spec in architecture(config).values()}


def initial_values(spec: TensorSpec, seed: int) -> np.ndarray:
    """The initial float32 values of a tensor, which depend only on its name and the seed."""
    if spec.init == "normal":
        generator = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
        return generator.standard_normal(spec.shape, np.float32) * np.float32(spec.scale)
    value = {"ones": 1.0, "zeros": 0.0, "constant": spec.scale}[spec.init]
    return np.full(spec.shape, value, np.float32)


# -- towers ------------------------------------------------------------------------------------


def _text(config: QLIPConfig) -> Iterator[TensorSpec]:
    text, part = config.text_config, "text"
    width = text.hidden_size
    embeddings = "text_model.embeddings"
    positions = (text.max_position_embeddings, width)
    yield TensorSpec("logit_scale", (), part, "constant", config.logit_scale_init_value)
    yield TensorSpec(
        f"{embeddings}.token_embedding.weight", (text.vocab_size, width), part, "normal", 0.02
    )
    yield TensorSpec(f"{embeddings}.position_embedding.weight", positions, part, "normal", 0.01)
    yield from _layers("text_model", text, part)
    yield from _norm("text_model.final_layer_norm", width, part)
    yield from _linear(
        "text_projection", width, config.projection_dim, part, bias=config.text_projection_bias
    )


def _encoder(config: QLIPConfig) -> Iterator[TensorSpec]:
    vision, part = config.vision_config, "encoder"
    width, patch = vision.hidden_size, vision.patch_size
    embeddings = "vision_model.embeddings"
    kernel = (width, 3, patch, patch)
    positions = (vision.num_patches + 1, width)
    yield TensorSpec(f"{embeddings}.class_embedding", (width,), part, "normal", 0.02)
    fan_in = 3 * patch * patch
    yield TensorSpec(
        f"{embeddings}.patch_embedding.weight", kernel, part, "normal", _glorot(fan_in, width)
    )
    yield TensorSpec(f"{embeddings}.patch_embedding.bias", (width,), part, "zeros")
    yield TensorSpec(f"{embeddings}.position_embedding.weight", positions, part, "normal", 0.02)
    yield from _layers("vision_model", vision, part)
    yield from _norm("vision_model.post_layernorm", width, part)
    yield from _linear(
        "visual_projection", width, config.projection_dim, part, bias=config.vision_projection_bias
    )


def _bottleneck(vision: VisionConfig) -> Iterator[TensorSpec]:
    if vision.quantizer_embed_type == "identity":
        return
    width, bits, out = vision.hidden_size, vision.code_dim, vision.hidden_size_post_q
    yield from _linear("vision_model.quant_embed.c_fc", width, width, "down")
    yield from _linear("vision_model.quant_embed.c_proj", width, bits, "down")
    yield from _linear("vision_model.quant_embed_post.c_fc", bits, out, "up")
    yield from _linear("vision_model.quant_embed_post.c_proj", out, out, "up")


def _decoder(decoder: VisionConfig) -> Iterator[TensorSpec]:
    part, width, hidden = "decoder", decoder.hidden_size, decoder.intermediate_size
    positions = (1, decoder.num_patches, width)
    yield TensorSpec("vision_decoder.position_embeddings", positions, part, "normal", 0.02)
    yield from _layers("vision_decoder", decoder, part)
    yield from _norm("vision_decoder.norm", width, part)
    yield from _linear("vision_decoder.ffn.0", width, hidden, part)
    yield from _linear("vision_decoder.conv_out", hidden, 3 * decoder.patch_size**2, part)


# -- blocks ------------------------------------------------------------------------------------


def _layers(tower: str, config: TextConfig | VisionConfig, part: str) -> Iterator[TensorSpec]:
    width, hidden = config.hidden_size, config.intermediate_size
    to_residual = (2 * config.num_hidden_layers) ** -0.5
    for i in range(config.num_hidden_layers):
        layer = f"{tower}.encoder.layers.{i}"
        attention = f"{layer}.self_attn"
        yield from _linear(f"{attention}.q_proj", width, width, part, bias=config.q_bias)
        yield from _linear(f"{attention}.k_proj", width, width, part, bias=config.k_bias)
        yield from _linear(f"{attention}.v_proj", width, width, part, bias=config.v_bias)
        if config.subln:
            yield from _norm(f"{attention}.inner_attn_ln", width, part)
        yield from _linear(f"{attention}.out_proj", width, width, part, gain=to_residual)
        yield from _norm(f"{layer}.layer_norm1", width, part)
        yield from _norm(f"{layer}.layer_norm2", width, part)
        inputs, output = (("w1", "w2"), "w3") if config.swiglu else (("fc1",), "fc2")
        for name in inputs:
            yield from _linear(f"{layer}.mlp.{name}", width, hidden, part)
        if config.subln:
            yield from _norm(f"{layer}.mlp.ffn_ln", hidden, part)
        yield from _linear(f"{layer}.mlp.{output}", hidden, width, part, gain=to_residual)


def _linear(
    name: str, fan_in: int, fan_out: int, part: str, *, bias: bool = True, gain: float = 1.0
) -> Iterator[TensorSpec]:
    scale = gain * _glorot(fan_in, fan_out)
    yield TensorSpec(f"{name}.weight", (fan_out, fan_in), part, "normal", scale)
    if bias:
        yield TensorSpec(f"{name}.bias", (fan_out,), part, "zeros")


def _norm(name: str, width: int, part: str) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (width,), part, "ones")
    yield TensorSpec(f"{name}.bias", (width,), part, "zeros")


def _glorot(fan_in: int, fan_out: int) -> float:
    return math.sqrt(2 / (fan_in + fan_out))


# -- rotary tables -----------------------------------------------------------------------------

_ROTARY_BASE = 10000.0
_PRETRAINED_GRID = 16


def rotary_tables(grid: tuple[int, int], head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of EVA-02's 2-D rotary embedding, float64 [N, head_dim] (SPEC 1.2).

    Positions are rescaled to a 16x16 grid; the row rotates the first half of a head, the column the second;
    every angle is repeated, because the rotation pairs adjacent values.
    """
    rows, columns = grid
    axis_dim = head_dim // 2
    frequencies = _ROTARY_BASE ** (-2 * np.arange(axis_dim // 2) / axis_dim)

    def angles(count: int) -> np.ndarray:
        positions = _PRETRAINED_GRID * np.arange(count) / count
        return np.repeat(positions[:, None] * frequencies, 2, axis=1)  # [count, head_dim/2]

    table = np.empty((rows, columns, head_dim))
    table[:, :, :axis_dim] = angles(rows)[:, None]
    table[:, :, axis_dim:] = angles(columns)[None]
    table = table.reshape(rows * columns, head_dim)
    return np.cos(table), np.sin(table)


# -- weights against the table -----------------------------------------------------------------


class ArrayWeights:
    """Weights held in memory, float32 by name, with a checkpoint's interface (qlip_core.backends)."""

    def __init__(self, config: QLIPConfig, arrays: Mapping[str, np.ndarray]) -> None:
        self._parts = {name: spec.part for name, spec in architecture(config).items()}
        self._arrays = arrays

    def part(self, part: str) -> dict[str, np.ndarray]:
        return {name: self._arrays[name] for name, of in self._parts.items() if of == part}


def diff_tensors(
    config: QLIPConfig, found: Mapping[str, tuple[int, ...]], parts: tuple[str, ...] = PARTS
) -> str:
    """How `found` (name -> shape) differs from this model, in one line that names up to 100 tensors of each
    kind of problem; empty if it does not.

    With fewer `parts`, tensors of the others may be missing but not wrong.
    """
    return diff_table(architecture(config), found, parts)


def diff_table(
    table: Mapping[str, TensorSpec], found: Mapping[str, tuple[int, ...]], parts: tuple[str, ...]
) -> str:
    """`diff_tensors` for any table of tensors."""
    missing = [n for n, spec in table.items() if n not in found and spec.part in parts]
    unexpected = [n for n in found if n not in table and not is_derived(n)]
    misshapen = [
        f"{n} is {list(found[n])}, expected {list(spec.shape)}"
        for n, spec in table.items()
        if n in found and tuple(found[n]) != spec.shape
    ]
    found_problems = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in found_problems if names)
