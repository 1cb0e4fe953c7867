"""Small models that together use every switch of the configuration, shared by the backends' tests.

Each is a fraction of a megabyte, so that a test may run all of them on every backend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qlip_core.architecture import architecture, init_weights
from qlip_core.config import QLIPConfig, QuantizerConfig, TextConfig, VisionConfig

TEXT = TextConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=64,
    projection_dim=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=12,
    pad_token_id=0,
    bos_token_id=58,
    eos_token_id=59,
)
PLAIN = VisionConfig(
    hidden_size=48,
    intermediate_size=80,
    projection_dim=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=32,
    patch_size=8,
)
# The blocks of the published sizes.
EVA = replace(PLAIN, subln=True, swiglu=True, rope=True, k_bias=False, layer_norm_eps=1e-6)


def quantized(
    vision: VisionConfig, bits: int, group: int, post: int = 0, **settings: Any
) -> VisionConfig:
    """The encoder's config with an MLP bottleneck of `bits` bits into a decoder `post` wide."""
    return replace(
        vision,
        quantizer="bsq",
        quantizer_l2_norm=True,
        quantizer_embed_type="mlp",
        hidden_size_post_q=post or vision.hidden_size,
        quantizer_cfg=QuantizerConfig(embed_dim=bits, group_size=group, **settings),
    )


def _config(
    encoder: VisionConfig,
    decoder: VisionConfig,
    text: TextConfig = TEXT,
    *,
    image_bias: bool = True,
    text_bias: bool = False,
) -> QLIPConfig:
    return QLIPConfig(
        text_config=text,
        vision_config=encoder,
        decoder_config=decoder,
        projection_dim=24,
        vision_projection_bias=image_bias,
        text_projection_bias=text_bias,
    )


def _sized(vision: VisionConfig, image_size: int, patch_size: int) -> VisionConfig:
    return replace(vision, image_size=image_size, patch_size=patch_size)


_QUICK = replace(PLAIN, subln=True, hidden_act="quick_gelu")
_WIDE = replace(
    EVA, hidden_size=64, hidden_size_post_q=64, num_attention_heads=4, num_hidden_layers=1
)
_BARE = replace(EVA, subln=False, q_bias=False, v_bias=False)
_NARROW = replace(PLAIN, hidden_size=32, hidden_size_post_q=32, num_attention_heads=2, rope=True)

CONFIGURATIONS: dict[str, QLIPConfig] = {
    "eva": _config(quantized(EVA, 28, 14), EVA),
    "plain": _config(quantized(PLAIN, 18, 9), PLAIN),
    "quick_gelu": _config(
        quantized(_QUICK, 12, 4),
        _QUICK,
        replace(TEXT, hidden_act="quick_gelu", eos_token_id=2),
    ),
    "swiglu_text": _config(
        quantized(PLAIN, 36, 18),
        EVA,
        replace(TEXT, swiglu=True, subln=True, k_bias=False),
        image_bias=False,
        text_bias=True,
    ),
    "swiglu_without_subln": _config(quantized(_BARE, 36, 1), _BARE),
    "rope_without_swiglu": _config(
        quantized(replace(PLAIN, rope=True), 12, 6), replace(PLAIN, rope=True)
    ),
    "finer_grid": _config(quantized(_sized(EVA, 40, 4), 28, 7), _sized(EVA, 40, 4)),
    "odd_patch": _config(quantized(_sized(EVA, 35, 7), 28, 2), _sized(EVA, 35, 7)),
    "one_patch": _config(quantized(_sized(EVA, 16, 16), 18, 3), _sized(EVA, 16, 16)),
    "wider_decoder": _config(quantized(EVA, 28, 14, post=64), _WIDE),
    "not_quantized": _config(PLAIN, PLAIN),
    "continuous_bottleneck": _config(
        replace(EVA, quantizer_embed_type="mlp", quantizer_cfg=QuantizerConfig(16, 8)), EVA
    ),
    "quantized_features": _config(
        replace(
            _NARROW,
            quantizer="bsq",
            quantizer_l2_norm=True,
            quantizer_cfg=QuantizerConfig(32, 16, persample_entropy_compute="analytical"),
        ),
        _NARROW,
    ),
    "unnormalised": _config(replace(quantized(EVA, 28, 14), quantizer_l2_norm=False), EVA),
}


def random_weights(config: QLIPConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """`init_weights` with scales around 1 and biases that are not 0, so that every tensor matters."""
    generator = np.random.default_rng([seed, 1])
    weights = init_weights(config, seed)
    for name, spec in architecture(config).items():
        if spec.init in ("ones", "zeros"):
            noise = generator.standard_normal(spec.shape, np.float32)
            weights[name] = weights[name] + np.float32(0.1) * noise
    return weights


def random_pixels(config: QLIPConfig, count: int, seed: int = 0) -> np.ndarray:
    """float32 [count, 3, S, S]."""
    shape = (count, 3, config.image_size, config.image_size)
    return np.random.default_rng([seed, 2]).standard_normal(shape, np.float32)


def random_ids(config: QLIPConfig, count: int, seed: int = 0) -> np.ndarray:
    """Texts of different lengths, int64 [count, T]: start, words, end, padding."""
    text = config.text_config
    generator = np.random.default_rng([seed, 3])
    positions = text.max_position_embeddings
    ids = np.full((count, positions), text.pad_token_id, np.int64)
    end = text.eos_token_id if text.eos_token_id != 2 else text.vocab_size - 1
    for row in ids:
        length = int(generator.integers(2, positions + 1))
        row[0], row[length - 1] = text.bos_token_id, end
        row[1 : length - 1] = generator.integers(3, text.vocab_size - 2, length - 2)
    return ids
