"""The MLX backend: what is specific to it. tests/test_backends.py compares it with the reference."""

from __future__ import annotations

import os
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from configurations import CONFIGURATIONS, random_ids, random_pixels, random_weights
from mlx.utils import tree_flatten
from oracle import (
    TOLERANCE,
    reference_network,
)

from qlip_core import reference
from qlip_core.architecture import PARTS, ArrayWeights, architecture
from qlip_core.bsq import bits_to_codes
from qlip_core.config import PRESETS, QLIPConfig
from qlip_core.errors import BackendError, CheckpointError
from qlip_core.text import pooled_position
from qlip_mlx import BACKEND, QLIP, MlxBackend, load
from qlip_mlx.kernels import (
    FUSED,
    Kernels,
    attend_fused,
    attend_polynomial,
    by_columns,
    exp2,
    silu_fused,
    silu_polynomial,
)
from qlip_mlx.model import Rotary, gelu, patchify, unpatchify, unquantized


def mlx_network(config: QLIPConfig, weights, dtype: str = "float32"):
    return BACKEND.network(config, ArrayWeights(config, weights), device="cpu", dtype=dtype)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# -- against the reference ---------------------------------------------------------------------


def test_a_compiled_forward_equals_the_reference() -> None:
    # One layer: each fused kernel costs a run of the C++ compiler here.
    config = CONFIGURATIONS["wider_decoder"]
    weights = random_weights(config)
    codes = bits_to_codes(np.random.default_rng(0).integers(0, 2, (3, config.num_patches, 28)))
    network = MlxBackend(compile=True).network(
        config, ArrayWeights(config, weights), device="cpu", dtype="float32"
    )
    expected = reference_network(config, weights).decode(codes)
    np.testing.assert_allclose(network.decode(codes), expected, rtol=0, atol=TOLERANCE)


# -- quantized weights -------------------------------------------------------------------------


# Bounds are twice what these weights give; 4 bits on rows of 64 are coarse.
@pytest.mark.parametrize("dtype, of_u, of_pixels", [("int8", 0.022, 0.036), ("int4", 0.36, 0.76)])
def test_quantized_weights_are_near(dtype: str, of_u: float, of_pixels: float) -> None:
    config = PRESETS["tiny"]
    weights, pixels = random_weights(config), random_pixels(config, 4)
    ours, oracle = mlx_network(config, weights, dtype), reference_network(config, weights)
    u = oracle.latents(pixels)
    error = relative_error(ours.latents(pixels), u)
    assert of_u / 8 < error < of_u  # and not 0: it did quantize
    codes = bits_to_codes(u > 0)
    error = relative_error(ours.decode(codes), oracle.decode(codes))
    assert of_pixels / 8 < error < of_pixels
    np.testing.assert_array_equal(ours.encode(pixels), ours.latents(pixels) > 0)


def test_layers_that_stay_unquantized_are_named() -> None:
    config = PRESETS["tiny"]
    network = mlx_network(config, random_weights(config), "int4")
    text = [
        f"text_model.encoder.layers.{i}.{name}"
        for i in range(2)  # the text tower is 32 wide; mlp.fc2 takes 64
        for name in (
            *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
            "mlp.fc1",
        )
    ]
    assert network.unquantized() == [
        *text,
        "text_projection",
        "vision_model.embeddings.patch_embedding",
        "vision_model.quant_embed_post.c_fc",  # 28 bits
    ]
    assert mlx_network(config, random_weights(config)).unquantized() == []


@pytest.mark.parametrize("bits", [8, 4])
def test_all_other_linears_are_quantized(bits: int) -> None:
    config = PRESETS["tiny"]
    model = load(config, random_weights(config), bits=bits)
    kept = set(unquantized(config))
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            assert (module.bits, module.group_size) == (bits, 64)
            assert name not in kept
        elif isinstance(module, nn.Linear):
            assert name in kept


def test_quantized_b16_keeps_only_two_layers() -> None:
    assert unquantized(PRESETS["qlip-b-16-256"]) == [
        "vision_model.embeddings.patch_embedding",
        "vision_model.quant_embed_post.c_fc",
    ]


# -- the network -------------------------------------------------------------------------------


def test_images_do_not_depend_on_the_batch_and_results_repeat() -> None:
    config = CONFIGURATIONS["eva"]
    weights, pixels = random_weights(config), random_pixels(config, 5)
    network = mlx_network(config, weights)
    u = network.latents(pixels)
    np.testing.assert_array_equal(network.latents(pixels), u)
    np.testing.assert_array_equal(mlx_network(config, weights).latents(pixels), u)
    alone = np.concatenate([network.latents(image[None]) for image in pixels])
    np.testing.assert_allclose(u, alone, rtol=0, atol=1e-6)


def test_a_network_runs_on_another_thread_than_it_was_made_on() -> None:
    config = CONFIGURATIONS["eva"]
    network, pixels = mlx_network(config, random_weights(config)), random_pixels(config, 4)
    here = network.latents(pixels)
    there: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: there.append(network.latents(pixels)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(there[0], here)


def test_the_callers_settings_stand_afterwards() -> None:
    config = CONFIGURATIONS["eva"]
    network = mlx_network(config, random_weights(config))
    before = mx.set_cache_limit(12345678)
    device, stream = mx.default_device(), mx.default_stream(mx.default_device())
    try:
        network.encode(random_pixels(config, 3))
        with pytest.raises(ValueError):
            network.decode(np.zeros((2, 3, 4), np.float32))
        assert mx.default_device() == device
        assert mx.default_stream(device) == stream
    finally:
        assert mx.set_cache_limit(before) == 12345678


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    config = CONFIGURATIONS["eva"]
    network, pixels = mlx_network(config, random_weights(config)), random_pixels(config, 4)
    network.encode(pixels)
    held = mx.get_active_memory()
    for _ in range(5):
        network.encode(pixels)
        assert mx.get_active_memory() <= held


@pytest.mark.parametrize("before, after", [(None, "0"), ("1", "1")])
def test_float32_products_are_not_rounded_to_tf32_unless_the_user_wants_it(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if before is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", before)
    config = CONFIGURATIONS["eva"]
    mlx_network(config, random_weights(config))
    assert os.environ["MLX_ENABLE_TF32"] == after


def test_backend_describes_itself() -> None:
    assert BACKEND.name == "mlx"
    assert BACKEND.dtypes == ("float32", "bfloat16", "float16", "int8", "int4")
    assert BACKEND.version()[0].isdigit()
    assert BACKEND.devices()[-1] == "cpu"


def test_a_mac_without_metal_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device(_: object) -> dict:
        raise RuntimeError("No Metal device available")

    monkeypatch.setattr(mx, "device_info", no_device)
    with pytest.raises(BackendError, match=r"No Metal device available.*use another backend"):
        BACKEND.devices()


# -- the modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*CONFIGURATIONS.values(), PRESETS["tiny"]])
def test_parameters_are_the_table(config: QLIPConfig) -> None:
    table = architecture(config)
    kernel = "vision_model.embeddings.patch_embedding.weight"
    for parts in (PARTS, *((part,) for part in PARTS)):
        leaves = tree_flatten(QLIP(config, parts).parameters())
        assert isinstance(leaves, list)
        ours = {name: tuple(array.shape) for name, array in leaves}
        published = {n: s.shape for n, s in table.items() if s.part in parts}
        if kernel in published:
            width, *patch = published[kernel]
            published[kernel] = (width, int(np.prod(patch)))
        assert ours == published


def test_load_is_strict() -> None:
    config = CONFIGURATIONS["eva"]
    weights = random_weights(config)
    without = {n: w for n, w in weights.items() if n != "vision_decoder.norm.weight"}
    with pytest.raises(CheckpointError, match=r"missing: vision_decoder\.norm\.weight"):
        load(config, without)
    with pytest.raises(CheckpointError, match="unexpected: surplus"):
        load(config, weights | {"surplus": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match=r"logit_scale is \[1\], expected \[\]"):
        load(config, weights | {"logit_scale": np.zeros(1, np.float32)})


def test_rotary_turns_pairs_and_leaves_leading_tokens() -> None:
    x = np.arange(5 * 8, dtype=np.float32).reshape(1, 5, 1, 8)
    turned = np.array(Rotary((2, 2), 8, leading=1)(mx.array(x)))
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])
    # The last patch stands at row 8 and column 8; frequencies are 1 and 1/100.
    for pair, angle in enumerate((8.0, 0.08, 8.0, 0.08)):
        x0, x1 = x[0, 4, 0, 2 * pair : 2 * pair + 2].tolist()
        expected = complex(x0, x1) * complex(np.cos(angle), np.sin(angle))
        actual = turned[0, 4, 0, 2 * pair : 2 * pair + 2].tolist()
        np.testing.assert_allclose(actual, [expected.real, expected.imag], rtol=1e-5)


def test_patchify_equals_the_reference_and_is_undone() -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 35, 35), np.float32)
    patches = patchify(mx.array(pixels), 7)
    np.testing.assert_array_equal(np.array(patches), reference.patchify(pixels, 7))
    np.testing.assert_array_equal(np.array(unpatchify(patches, 7, (5, 5))), pixels)


# -- kernels -----------------------------------------------------------------------------------


def test_gelu_is_the_exact_one() -> None:
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    np.testing.assert_allclose(np.array(gelu(mx.array(x))), reference.gelu(x), rtol=0, atol=1e-6)


def test_exp2_is_a_float32_rounding_away() -> None:
    t = np.linspace(-126, 126, 200_003, dtype=np.float32)
    exact = np.exp2(t.astype(np.float64))
    np.testing.assert_allclose(np.array(exp2(mx.array(t))), exact, rtol=3e-7)
    assert np.array(exp2(mx.array([-1000.0, -np.inf]))).max() < 2e-38
    assert np.isnan(np.array(exp2(mx.array([np.nan])))).all()


def test_silu_of_the_cpu_equals_the_fused_one() -> None:
    x = np.concatenate([np.linspace(-300, 300, 6001), [0, -1e30, 1e30]]).astype(np.float32)
    exact = x / (1 + np.exp(-x.astype(np.float64).clip(-700)))
    for silu in (silu_fused, silu_polynomial):
        np.testing.assert_allclose(np.array(silu(mx.array(x))), exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("mask", [None, "causal", "some"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_attention_of_the_cpu_equals_the_fused_one(
    mask: str | None, groups: int, scale: float
) -> None:
    generator = np.random.default_rng(0)

    def draw(heads: int) -> mx.array:
        return mx.array(generator.standard_normal((2, heads, 17, 8), np.float32))

    q, k, v = draw(3), draw(3 // groups), draw(3 // groups)
    seen = draw(1)[..., :1].swapaxes(2, 3) > 0
    seen = seen | mx.eye(17).astype(mx.bool_)  # no row is empty
    how = seen if mask == "some" else mask
    fused = np.array(attend_fused(scale * q, k, v, how))
    np.testing.assert_allclose(
        np.array(attend_polynomial(scale * q, k, v, how)), fused, rtol=0, atol=2e-6 * scale
    )


def test_both_sets_of_kernels_give_the_same_model() -> None:
    config = CONFIGURATIONS["swiglu_text"]
    weights, ids = random_weights(config), random_ids(config, 3)
    pooled = mx.array(pooled_position(ids, config.text_config.eos_token_id))
    ours, plain = (
        load(config, weights, kernels=kernels).embed_text(mx.array(ids), pooled)
        for kernels in (Kernels(attend_polynomial, silu_polynomial, by_columns), FUSED)
    )
    np.testing.assert_allclose(np.array(ours), np.array(plain), rtol=0, atol=1e-5)
