"""numpy, PyTorch and MLX give the same on the same weights.

Each backend is held to the numpy reference elsewhere; here they are compared with each other, over the
whole path that a user takes, at tiny size, and once at the full size of B-16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

import numpy as np
import pytest
from configurations import random_ids, random_pixels, random_weights

from qlip_core.architecture import ArrayWeights
from qlip_core.backends import Network, get_backend
from qlip_core.bsq import bits_to_codes, bits_to_integers, quantize
from qlip_core.config import PRESETS, QLIPConfig

BACKENDS = ("numpy", "torch", "mlx")
TOLERANCE = 1e-4  # embeddings and pixels absolute, logits relative
SURE = 1e-5  # bits are equal wherever |u| is above this

Call = Callable[[Network], np.ndarray]


def networks(config: QLIPConfig, weights: Mapping[str, np.ndarray]) -> dict[str, Network]:
    return {
        name: get_backend(name).network(
            config, ArrayWeights(config, weights), device="cpu", dtype="float32"
        )
        for name in BACKENDS
    }


def on_each(models: Mapping[str, Network], call: Call) -> dict[str, np.ndarray]:
    return {name: call(network) for name, network in models.items()}


def assert_close(results: Mapping[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    for (a, x), (b, y) in combinations(results.items(), 2):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=f"{a} and {b}")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def assert_parity(
    models: Mapping[str, Network], config: QLIPConfig, images: int, texts: int
) -> None:
    pixels, ids = random_pixels(config, images), random_ids(config, texts)
    latents = on_each(models, lambda network: network.latents(pixels))
    assert_close(latents, SURE)
    bits = {name: quantize(u) for name, u in latents.items()}
    sure = np.abs(latents["numpy"]) > SURE
    assert sure.mean() > 0.999
    for name in BACKENDS:
        np.testing.assert_array_equal(bits[name][sure], bits["numpy"][sure], err_msg=name)

    # All decoders get the same codes, so that a doubtful bit cannot leak into this comparison.
    codes = bits_to_codes(bits["numpy"])
    assert_close(on_each(models, lambda network: network.decode(codes)))

    embeddings = on_each(models, lambda network: unit(network.embed_images(pixels)))
    labels = on_each(models, lambda network: unit(network.embed_texts(ids)))
    assert_close(embeddings)
    assert_close(labels)
    scale = np.exp(np.float32(config.logit_scale_init_value))
    logits = {name: scale * embeddings[name] @ labels[name].T for name in BACKENDS}
    # Relative to the size of the logits: one that happens to be near 0 has no relative precision.
    assert_close(logits, TOLERANCE * float(np.abs(logits["numpy"]).max()))


@pytest.mark.parametrize("seed", range(3))
def test_backends_agree_at_tiny_size(seed: int) -> None:
    config = PRESETS["tiny"]
    assert_parity(networks(config, random_weights(config, seed)), config, images=4, texts=6)


def test_indices_are_the_same_integers() -> None:
    config = PRESETS["tiny"]
    models, pixels = networks(config, random_weights(config)), random_pixels(config, 4, seed=7)
    bits = on_each(models, lambda network: network.encode(pixels))
    u = models["numpy"].latents(pixels)
    patches = (np.abs(u) > SURE).all(-1)  # those without a doubtful bit
    assert patches.mean() > 0.95
    for width in (config.code_dim, config.group_size):
        expected = bits_to_integers(bits["numpy"], width)
        assert expected.dtype == np.int64
        for name in BACKENDS:
            actual = bits_to_integers(bits[name], width)
            np.testing.assert_array_equal(actual[patches], expected[patches], err_msg=name)


def test_weights_that_differ_in_one_layer_are_noticed() -> None:
    config = PRESETS["tiny"]
    weights = random_weights(config)
    models = networks(config, weights)
    name = "vision_model.encoder.layers.1.mlp.w2.bias"
    other = weights | {name: weights[name] + np.float32(1e-3)}
    models["mlx"] = networks(config, other)["mlx"]
    with pytest.raises(AssertionError, match="numpy and mlx"):
        assert_parity(models, config, images=2, texts=2)


def test_backends_agree_at_the_size_of_b16() -> None:
    config = PRESETS["qlip-b-16-256"]
    assert_parity(networks(config, random_weights(config)), config, images=1, texts=1)
