"""The numpy reference against the published implementation, and its parts against hand-worked values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlip_core import bsq, open_checkpoint
from qlip_core.architecture import ArrayWeights
from qlip_core.config import QuantizerConfig
from qlip_core.reference import ReferenceNetwork, erf, patchify, rotate, unpatchify
from qlip_core.text import pooled_position


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 7e-6)])
def test_official_outputs(official: Path, expected: dict, dtype: str, tolerance: float) -> None:
    checkpoint = open_checkpoint(official)
    network = ReferenceNetwork(checkpoint.config, checkpoint, dtype)
    pixels = expected["pixel_values"]

    def close(ours: np.ndarray, name: str) -> None:
        np.testing.assert_allclose(ours, expected[name], atol=tolerance, rtol=0, err_msg=name)

    close(network.hidden_states(pixels, 1), "hidden_m2")
    u = network.latents(pixels)
    close(u, "u")
    bits = bsq.quantize(u)
    np.testing.assert_array_equal(bsq.bits_to_integers(bits, 14), expected["group_indices"])
    np.testing.assert_array_equal(network.encode(pixels), bits)
    close(bsq.bits_to_codes(bits), "zq")
    close(network.decode(bsq.bits_to_codes(bits)), "recon")
    image, text = network.embed_images(pixels), network.embed_texts(expected["input_ids"])
    image /= np.linalg.norm(image, axis=-1, keepdims=True)
    text /= np.linalg.norm(text, axis=-1, keepdims=True)
    close(image, "image_embeds")
    close(text, "text_embeds")
    close(math.exp(checkpoint.tensor("logit_scale")) * image @ text.T, "logits_per_image")


def test_official_indices_are_exact_where_the_published_ones_round(expected: dict) -> None:
    indices = bsq.bits_to_integers(bsq.quantize(expected["u"]), 28)[..., 0]
    groups = expected["group_indices"]
    np.testing.assert_array_equal(indices, groups[..., 0] * 2**14 + groups[..., 1])
    wrong = np.abs(indices - expected["indices"])
    assert 0 < wrong.max() <= 8  # the published float32 sum


def test_official_quantization_loss(official: Path, expected: dict) -> None:
    config = open_checkpoint(official).config.vision_config.quantizer_cfg
    terms = bsq.soft_entropies(expected["u"], config)
    assert terms.loss == pytest.approx(float(expected["quant_loss"]), abs=1e-4)
    # The published code adds 1e-8 inside its logarithms.
    assert terms.codebook == pytest.approx(float(expected["codebook_entropy"]), abs=1e-2)


def test_a_wrong_epsilon_does_not_pass(official: Path, expected: dict) -> None:
    checkpoint = open_checkpoint(official)
    vision = replace(checkpoint.config.vision_config, layer_norm_eps=1e-3)
    config = replace(checkpoint.config, vision_config=vision)
    u = ReferenceNetwork(config, ArrayWeights(config, checkpoint.tensors()), "float32").latents(
        expected["pixel_values"]
    )
    assert np.abs(u - expected["u"]).max() > 1e-4


def test_erf_is_exact_to_rounding() -> None:
    x = np.linspace(-7, 7, 20_001)
    np.testing.assert_allclose(erf(x), [math.erf(v) for v in x], atol=1e-14, rtol=0)
    assert erf(np.array([-0.0, 100], np.float32)).tolist() == [0, 1]


def test_rotation_turns_neighbours() -> None:
    x = np.array([[1.0, 0.0, 0.0, 2.0]])
    a = np.array([[math.pi / 2, math.pi / 2, math.pi, math.pi]])
    np.testing.assert_allclose(rotate(x, np.cos(a), np.sin(a)), [[0, 1, 0, -2]], atol=1e-15)


def test_patches_go_out_and_back_in_channel_row_column_order() -> None:
    pixels = np.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    patches = patchify(pixels, 2)
    # Patch 1 is the upper right: columns 2 and 3 of rows 0 and 1, channel by channel.
    np.testing.assert_array_equal(patches[0, 1], [2, 3, 6, 7, 18, 19, 22, 23, 34, 35, 38, 39])
    np.testing.assert_array_equal(unpatchify(patches, 2, (2, 2)), pixels)


def test_pooling_position() -> None:
    ids = np.array([[5, 9, 3, 9], [5, 3, 3, 3]])
    assert pooled_position(ids, 9).tolist() == [1, 0]
    assert pooled_position(np.array([[2, 7, 9, 1]]), 2).tolist() == [2]  # the old CLIP rule


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("per_bit", [False, True])
def test_entropies_equal_the_softmax_over_all_corners(group: int, per_bit: bool) -> None:
    rng = np.random.default_rng(group)
    u = rng.standard_normal((50, 12))
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    config = QuantizerConfig(
        embed_dim=12,
        group_size=group,
        beta=0.3,
        gamma_0=0.7,
        gamma_1=1.3,
        inv_temperature=10.0,
        persample_entropy_compute="analytical" if per_bit else "group",
    )
    run = 1 if per_bit else group
    corners = bsq.integers_to_bits(np.arange(2**run)[:, None], run) * 2.0 - 1
    per_sample = codebook = 0.0
    for start in range(0, 12, run):
        logits = 2 * 10 * u[:, start : start + run] @ corners.T / math.sqrt(12)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        per_sample += -(p * np.log(p)).sum(-1).mean()
        codebook += -(p.mean(0) * np.log(p.mean(0))).sum()
    commitment = ((np.where(u > 0, 1, -1) / math.sqrt(12) - u) ** 2).sum(-1).mean()
    terms = bsq.soft_entropies(u, config)
    assert terms.per_sample == pytest.approx(per_sample, rel=1e-12)
    assert terms.codebook == pytest.approx(codebook, rel=1e-12)
    assert terms.loss == pytest.approx(
        (0.7 * per_sample - 1.3 * codebook) / 10 + 0.3 * commitment, rel=1e-12
    )
