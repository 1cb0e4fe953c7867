"""PyTorch and MLX against the numpy reference, over every switch of the configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from configurations import CONFIGURATIONS, random_ids, random_pixels, random_weights
from oracle import (
    SURE,
    TOLERANCE,
    assert_same_latents,
    codes_of,
    each_configuration,
    reference_network,
)

from qlip_core.architecture import ArrayWeights
from qlip_core.backends import Network, get_backend
from qlip_core.bsq import bits_to_integers
from qlip_core.checkpoint import open_checkpoint
from qlip_core.config import QLIPConfig
from qlip_core.tensorfile import TensorFile

OFFICIAL = Path(__file__).parent / "fixtures" / "official_tiny"

each_backend = pytest.mark.parametrize("backend", ["torch", "mlx"])


def network(backend: str, config: QLIPConfig, weights, dtype: str = "float32") -> Network:
    arrays = ArrayWeights(config, weights)
    return get_backend(backend).network(config, arrays, device="cpu", dtype=dtype)


@each_backend
@each_configuration
def test_every_output_equals_the_reference(config: QLIPConfig, backend: str) -> None:
    weights = random_weights(config)
    ours, oracle = network(backend, config, weights), reference_network(config, weights)
    pixels, ids = random_pixels(config, 3), random_ids(config, 5)
    assert_same_latents(ours, oracle, pixels)
    # Both decoders get the same codes, so that a doubtful bit cannot leak into this comparison.
    codes = codes_of(config, oracle.latents(pixels))
    pairs = {
        "decode": (ours.decode(codes), oracle.decode(codes)),
        "embed_images": (ours.embed_images(pixels), oracle.embed_images(pixels)),
        "embed_texts": (ours.embed_texts(ids), oracle.embed_texts(ids)),
    }
    layers = config.vision_config.num_hidden_layers
    for layer in range(-layers - 1, layers + 1):
        pairs[f"hidden_states {layer}"] = (
            ours.hidden_states(pixels, layer),
            oracle.hidden_states(pixels, layer),
        )
    for name, (actual, expected) in pairs.items():
        assert actual.dtype == np.float32, name
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE, err_msg=name)


@each_backend
def test_published_implementation_agrees(backend: str) -> None:
    checkpoint = open_checkpoint(OFFICIAL)
    file = TensorFile(OFFICIAL / "expected.safetensors")
    expected = {name: file.raw(name) for name in file.entries}
    found = get_backend(backend)
    network = found.network(checkpoint.config, checkpoint, device="cpu", dtype="float32")
    pixels, ids = expected["pixel_values"], expected["input_ids"]

    def close(actual: np.ndarray, name: str) -> None:
        np.testing.assert_allclose(actual, expected[name], rtol=0, atol=TOLERANCE, err_msg=name)

    close(network.latents(pixels), "u")
    bits = network.encode(pixels)
    group = checkpoint.config.group_size
    np.testing.assert_array_equal(bits_to_integers(bits, group), expected["group_indices"])
    close(network.decode(expected["zq"]), "recon")
    close(network.hidden_states(pixels, -2), "hidden_m2")

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    images, texts = unit(network.embed_images(pixels)), unit(network.embed_texts(ids))
    close(images, "image_embeds")
    close(texts, "text_embeds")
    scale = np.exp(checkpoint.tensor("logit_scale"))
    np.testing.assert_allclose(
        scale * images @ texts.T, expected["logits_per_image"], rtol=1e-4, atol=1e-4
    )


@each_backend
def test_a_wrong_epsilon_is_noticed(backend: str) -> None:
    config = CONFIGURATIONS["eva"]
    weights = random_weights(config)
    wrong = replace(config, vision_config=replace(config.vision_config, layer_norm_eps=1e-4))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_latents(
            network(backend, wrong, weights),
            reference_network(config, weights),
            random_pixels(config, 3),
        )


@each_backend
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.1), ("float16", 0.02)])
def test_lower_precision_is_near(dtype: str, tolerance: float, backend: str) -> None:
    config = CONFIGURATIONS["eva"]
    weights = random_weights(config)
    ours, oracle = network(backend, config, weights, dtype), reference_network(config, weights)
    pixels, ids = random_pixels(config, 3), random_ids(config, 4)
    u = oracle.latents(pixels)
    latents = ours.latents(pixels)
    np.testing.assert_allclose(latents, u, rtol=0, atol=tolerance)
    # Normalised in float32 whatever went before: unit length to float32's rounding.
    np.testing.assert_allclose(np.linalg.norm(latents, axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(ours.encode(pixels), latents > 0)
    codes = codes_of(config, u)
    np.testing.assert_allclose(ours.decode(codes), oracle.decode(codes), rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        ours.embed_texts(ids), oracle.embed_texts(ids), rtol=0, atol=5 * tolerance
    )


@each_backend
def test_parts_are_loaded_when_first_used_and_once(backend: str) -> None:
    config = CONFIGURATIONS["eva"]
    loaded: list[str] = []

    class Told(ArrayWeights):
        def part(self, part: str) -> dict[str, np.ndarray]:
            loaded.append(part)
            return super().part(part)

    weights = Told(config, random_weights(config))
    pixels, ids = random_pixels(config, 2), random_ids(config, 2)

    def parts_after(*calls: str) -> list[str]:
        loaded.clear()
        made = get_backend(backend).network(config, weights, device="cpu", dtype="float32")
        inputs = {
            "decode": np.ones((2, config.num_patches, 28), np.float32),
            "embed_texts": ids,
        }
        for call in calls:
            getattr(made, call)(inputs.get(call, pixels))
        return loaded

    assert parts_after() == []
    assert parts_after("encode", "latents", "embed_images") == ["encoder", "down"]
    assert parts_after("embed_images") == ["encoder"]
    assert parts_after("decode", "decode") == ["up", "decoder"]
    assert parts_after("embed_texts", "embed_texts") == ["text"]


@each_backend
def test_read_only_weights_and_pixels_are_taken(backend: str) -> None:
    config = CONFIGURATIONS["eva"]
    weights, pixels = random_weights(config), random_pixels(config, 2)
    for array in (*weights.values(), pixels):
        array.flags.writeable = False
    expected = reference_network(config, weights).latents(pixels)
    np.testing.assert_allclose(
        network(backend, config, weights).latents(pixels), expected, atol=SURE
    )


@each_backend
def test_texts_do_not_depend_on_the_length_of_their_neighbours(backend: str) -> None:
    config = CONFIGURATIONS["plain"]
    ours = network(backend, config, random_weights(config))
    ids = random_ids(config, 6)
    alone = np.concatenate([ours.embed_texts(row[None]) for row in ids])
    # Other shapes are summed in another order: to float32's rounding, at the size of the values.
    rounding = 1e-6 * np.abs(alone).max()
    np.testing.assert_allclose(ours.embed_texts(ids), alone, rtol=0, atol=rounding)


@each_backend
def test_empty_batches_have_shapes(backend: str) -> None:
    config = CONFIGURATIONS["eva"]
    ours = network(backend, config, random_weights(config))
    pixels = np.zeros((0, 3, 32, 32), np.float32)
    assert ours.encode(pixels).shape == (0, 16, 28)
    assert ours.decode(np.zeros((0, 16, 28), np.float32)).shape == (0, 3, 32, 32)
    assert ours.embed_texts(np.zeros((0, 12), np.int64)).shape == (0, 24)
