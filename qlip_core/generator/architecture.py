"""The generator as data: every tensor with its shape and initial values, and the rotary tables.

Parts that Llama has use Hugging Face Llama's names, so that such weights load unchanged. Ours are
`caption_projector` (caption features into the model's width), `null_prefix` (replaces a dropped caption)
and `sub_token_embedding` (the number of a sub-token in its patch). SPEC section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from qlip_core.architecture import TensorSpec, diff_table, initial_values
from qlip_core.generator.config import GeneratorConfig

PART = "generator"
_DEVIATION = 0.02  # LlamaGen's and GPT-2's


def architecture(config: GeneratorConfig) -> dict[str, TensorSpec]:
    """The table of tensors of a generator: name -> TensorSpec, in the order of the forward pass."""
    return {spec.name: spec for spec in _specs(config)}


def parameter_count(config: GeneratorConfig) -> int:
    return sum(spec.size for spec in architecture(config).values())


def init_weights(config: GeneratorConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights, the same on every machine: deviation 0.02, divided by sqrt(2 * layers) for
    matrices that write to the residual stream (GPT-2's rule)."""
    return {spec.name: initial_values(spec, seed) for spec in architecture(config).values()}


def diff_tensors(config: GeneratorConfig, found: Mapping[str, tuple[int, ...]]) -> str:
    """How `found` (name -> shape) differs from this generator, in one line; empty if it does not."""
    return diff_table(architecture(config), found, (PART,))


def _specs(config: GeneratorConfig) -> Iterator[TensorSpec]:
    width, d = config.hidden_size, config.head_dim
    hidden = config.intermediate_size
    queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
    rows = config.text_vocab_size + config.visual_rows
    to_residual = _DEVIATION * (2 * config.num_hidden_layers) ** -0.5
    if config.conditioner != "none":
        yield _matrix("caption_projector.fc1.weight", config.condition_size, width)
        yield _matrix("caption_projector.fc2.weight", width, width)
        yield _matrix("null_prefix", width, config.prefix_length)
    yield _matrix("model.embed_tokens.weight", width, rows)
    if config.sub_tokens > 1 and not config.separate_sub_tokens:
        yield _matrix("sub_token_embedding.weight", width, config.sub_tokens)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield _scale(f"{layer}.input_layernorm.weight", width)
        yield _matrix(f"{layer}.self_attn.q_proj.weight", width, queries)
        yield _matrix(f"{layer}.self_attn.k_proj.weight", width, keys)
        yield _matrix(f"{layer}.self_attn.v_proj.weight", width, keys)
        if config.qk_norm:
            yield _scale(f"{layer}.self_attn.q_norm.weight", d)
            yield _scale(f"{layer}.self_attn.k_norm.weight", d)
        yield _matrix(f"{layer}.self_attn.o_proj.weight", queries, width, to_residual)
        yield _scale(f"{layer}.post_attention_layernorm.weight", width)
        yield _matrix(f"{layer}.mlp.gate_proj.weight", width, hidden)
        yield _matrix(f"{layer}.mlp.up_proj.weight", width, hidden)
        yield _matrix(f"{layer}.mlp.down_proj.weight", hidden, width, to_residual)
    yield _scale("model.norm.weight", width)
    yield _matrix("lm_head.weight", width, rows)


def _matrix(name: str, fan_in: int, fan_out: int, deviation: float = _DEVIATION) -> TensorSpec:
    return TensorSpec(name, (fan_out, fan_in), PART, "normal", deviation)


def _scale(name: str, width: int) -> TensorSpec:
    return TensorSpec(name, (width,), PART, "ones")


# -- positions ---------------------------------------------------------------------------------


def positions(config: GeneratorConfig) -> np.ndarray:
    """Positions of prefix and sub-tokens, int64 [T + M - 1, axes].

    "grid": (row, column) of the patch, both counted from 0, the same for all sub-tokens of a patch;
    `rotary_tables` does not rotate the prefix. "sequence": 0, 1, 2, ...
    """
    length = config.sequence_length
    if config.rope == "sequence":
        return np.arange(length)[:, None]
    h, w = config.grid
    patches = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 2)
    prefix = np.zeros((config.prefix_length, 2), np.int64)
    return np.concatenate([prefix, np.repeat(patches, config.sub_tokens, axis=0)])[:length]


def rotary_tables(config: GeneratorConfig, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) float64 [S, d/2] for positions [S, axes], one axis (Llama) or two (the grid).

    Value j belongs to the pair (j, j + d/2) of a head, Hugging Face Llama's convention. With two axes the
    first half of the pairs rotates by the row, the second by the column. Position 0 means no rotation, so
    the prefix, at (0, 0), has zero angles.
    """
    axes = positions.shape[1]
    pairs = config.head_dim // 2 // axes
    frequencies = config.rope_theta ** (-np.arange(pairs) / pairs)
    angles = (positions[:, :, None] * frequencies).reshape(len(positions), -1)
    return np.cos(angles), np.sin(angles)
