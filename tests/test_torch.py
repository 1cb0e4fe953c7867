"""The PyTorch backend: what is specific to it. tests/test_backends.py compares it with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from configurations import CONFIGURATIONS, random_ids, random_pixels, random_weights
from oracle import (
    SURE,
    assert_same_latents,
    codes_of,
    each_configuration,
    reference_network,
)
from torch import nn
from torch.nn import functional as F

from qlip_core import reference
from qlip_core.architecture import PARTS, ArrayWeights, architecture, rotary_tables
from qlip_core.backends import Network
from qlip_core.config import PRESETS, QLIPConfig
from qlip_core.errors import CheckpointError, ConfigError
from qlip_torch import BACKEND, QLIP, TorchBackend, load
from qlip_torch.model import LayerNorm, Rotary, patchify, unpatchify


def torch_network(config: QLIPConfig, weights, dtype: str = "float32") -> Network:
    return BACKEND.network(config, ArrayWeights(config, weights), device="cpu", dtype=dtype)


# -- against the reference ---------------------------------------------------------------------


@each_configuration
def test_double_precision_equals_the_reference_to_its_rounding(config: QLIPConfig) -> None:
    weights = {n: w.astype(np.float64) for n, w in random_weights(config, 1).items()}
    model = load(config, weights, dtype=torch.float64)
    for block in model.blocks():
        if (rope := block.self_attn.rope) is not None:
            rope.double()
            for table, exact in zip((rope.cos, rope.sin), rotary_tables(rope.grid, rope.head_dim)):
                table[rope.leading :, 0] = torch.from_numpy(exact[:, ::2])
    pixels = random_pixels(config, 2).astype(np.float64)
    vision = config.vision_config
    states = reference.encode_states(weights, vision, pixels)[-1]
    cls, z = model.encode(torch.from_numpy(pixels))
    np.testing.assert_allclose(cls, states[:, 0], rtol=0, atol=1e-12)
    u = reference.bottleneck_down(weights, vision, states[:, 1:])
    np.testing.assert_allclose(model.bottleneck_down(z), u, rtol=0, atol=1e-12)
    code = codes_of(config, u).astype(np.float64)
    z_hat = reference.bottleneck_up(weights, vision, code)
    np.testing.assert_allclose(model.bottleneck_up(torch.from_numpy(code)), z_hat, atol=1e-12)
    expected = reference.decode_states(weights, config.decoder_config, z_hat)
    np.testing.assert_allclose(model.decode(torch.from_numpy(z_hat)), expected, rtol=0, atol=1e-12)


def test_blocks_compile_as_one_graph() -> None:
    config = CONFIGURATIONS["eva"]
    model = load(config, random_weights(config), ("encoder", "decoder"))
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0))
    for block, tokens in zip(model.blocks(), (17, 17, 16, 16), strict=True):
        expected = block(x[:, :tokens])
        block.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(block(x[:, :tokens]), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiled_network_equals_the_reference() -> None:
    config = CONFIGURATIONS["eva"]
    weights = random_weights(config)
    network = TorchBackend(compile=True).network(
        config, ArrayWeights(config, weights), device="cpu", dtype="float32"
    )
    assert_same_latents(network, reference_network(config, weights), random_pixels(config, 2))


# -- the network -------------------------------------------------------------------------------


def test_backend_describes_itself() -> None:
    assert BACKEND.name == "torch"
    assert BACKEND.dtypes == ("float32", "bfloat16", "float16")
    assert BACKEND.version() == torch.__version__
    assert BACKEND.devices()[-1] == "cpu"
    # Otherwise float32 on CUDA would not be float32.
    assert not torch.backends.cuda.matmul.allow_tf32


# -- the module --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*CONFIGURATIONS.values(), *PRESETS.values()])
def test_state_dict_is_the_table(config: QLIPConfig) -> None:
    table = architecture(config)
    with torch.device("meta"):
        for parts in (PARTS, *((part,) for part in PARTS)):
            state = {n: tuple(t.shape) for n, t in QLIP(config, parts).state_dict().items()}
            assert state == {n: s.shape for n, s in table.items() if s.part in parts}


def test_quantize_gives_corners_and_passes_gradients() -> None:
    model = QLIP(CONFIGURATIONS["eva"], ())
    u = torch.tensor([[0.3, -0.2, 0.0, float("nan")]], requires_grad=True)
    code = model.quantize(u)
    assert code.tolist() == [[0.5, -0.5, -0.5, -0.5]]
    gradient = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    code.backward(gradient)
    assert u.grad is not None
    assert torch.equal(u.grad, gradient)


def test_quantize_is_nothing_without_a_quantizer() -> None:
    u = torch.tensor([[0.3, -0.2]])
    assert QLIP(CONFIGURATIONS["not_quantized"], ()).quantize(u) is u


def test_gradients_reach_every_parameter_and_are_right() -> None:
    config = CONFIGURATIONS["eva"]
    model = QLIP(config)
    model.init_from(random_weights(config))
    model.double()
    pixels = torch.from_numpy(random_pixels(config, 2)).double()
    ids = torch.from_numpy(random_ids(config, 2))

    def loss() -> torch.Tensor:
        cls, z = model.encode(pixels)
        # The sign has no gradient to compare with a difference; its own test is above.
        recon = model.decode(model.bottleneck_up(model.bottleneck_down(z)))
        images, texts = model.embed_image(cls), model.embed_text(ids)
        logits = model.logit_scale.exp() * F.normalize(images) @ F.normalize(texts).T
        return recon.square().mean() + logits.square().mean()

    loss().backward()
    # Along the gradient of each tensor, as far as makes every tensor's share of the change 1e-9 (but
    # those of the keys' biases, which attention is blind to).
    slope, steps = 0.0, []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        squared = parameter.grad.square().sum().item()
        steps.append(1e-9 * parameter.grad / max(squared, 1e-12))
        slope += (parameter.grad * steps[-1]).sum().item()
    assert slope > 0.95e-9 * len(steps)
    with torch.no_grad():
        for parameter, step in zip(model.parameters(), steps):
            parameter += step
        above = loss().item()
        for parameter, step in zip(model.parameters(), steps):
            parameter -= 2 * step
        below = loss().item()
    assert above - below == pytest.approx(2 * slope, rel=1e-5)


def test_autocast_keeps_the_residual_stream_and_the_latents_in_float32() -> None:
    config = CONFIGURATIONS["eva"]
    model = QLIP(config)
    model.init_from(random_weights(config))
    pixels = torch.from_numpy(random_pixels(config, 2))
    norms: list[torch.dtype] = []

    def record(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        norms.append(output.dtype)

    for block in model.vision_model.encoder.layers:
        block.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16):
        _, z = model.encode(pixels)
        u = model.bottleneck_down(z)
        model.decode(model.bottleneck_up(model.quantize(u))).square().mean().backward()
    assert norms == [torch.float32, torch.float32]
    assert u.dtype == torch.float32
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(2, 16), atol=1e-6, rtol=0)
    expected = reference_network(config, random_weights(config)).latents(pixels.numpy())
    np.testing.assert_allclose(u.detach(), expected, rtol=0, atol=0.1)


def test_layer_norm_of_mixed_precision_is_computed_in_float32() -> None:
    norm = LayerNorm(64, eps=1e-6)
    x = (1000 + torch.randn(8, 64)).bfloat16()
    expected = F.layer_norm(x.float(), (64,), eps=1e-6).bfloat16()
    assert torch.equal(norm(x), expected)


def test_init_from_is_strict() -> None:
    config = CONFIGURATIONS["eva"]
    weights = random_weights(config)
    QLIP(config, ("encoder",)).init_from(weights)  # tensors of other parts are ignored
    without = {n: w for n, w in weights.items() if n != "vision_decoder.norm.weight"}
    with pytest.raises(CheckpointError, match=r"missing: vision_decoder\.norm\.weight"):
        QLIP(config).init_from(without)
    with pytest.raises(CheckpointError, match="unexpected: surplus"):
        QLIP(config).init_from(weights | {"surplus": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match=r"logit_scale is \[1\], expected \[\]"):
        load(config, weights | {"logit_scale": np.zeros(1, np.float32)})


def test_init_from_copies() -> None:
    config = CONFIGURATIONS["eva"]
    weights = random_weights(config)
    model = QLIP(config)
    model.init_from(weights)
    with torch.no_grad():
        model.visual_projection.weight.zero_()
    assert np.abs(weights["visual_projection.weight"]).min() > 0


def test_a_model_built_on_meta_is_whole_after_to_empty() -> None:
    config = CONFIGURATIONS["eva"]
    weights, pixels = random_weights(config), random_pixels(config, 2)
    with torch.device("meta"):
        model = QLIP(config)
    model.to_empty(device="cpu")
    model.init_from(weights)
    model.reset_rotary()
    _, z = model.encode(torch.from_numpy(pixels))
    expected = reference_network(config, weights).latents(pixels)
    np.testing.assert_allclose(model.bottleneck_down(z).detach(), expected, rtol=0, atol=SURE)


def test_rotary_turns_pairs_and_leaves_leading_tokens() -> None:
    rope = Rotary((2, 2), 8, leading=1)
    x = torch.arange(5 * 8, dtype=torch.float32).reshape(1, 5, 1, 8)
    turned = rope(x)
    assert torch.equal(turned[0, 0], x[0, 0])
    # The last patch stands at row 8 and column 8; frequencies are 1 and 1/100.
    for pair, angle in enumerate((8.0, 0.08, 8.0, 0.08)):
        x0, x1 = x[0, 4, 0, 2 * pair : 2 * pair + 2].tolist()
        expected = complex(x0, x1) * complex(np.cos(angle), np.sin(angle))
        actual = turned[0, 4, 0, 2 * pair : 2 * pair + 2].tolist()
        np.testing.assert_allclose(actual, [expected.real, expected.imag], rtol=1e-5)


def test_rotary_tables_stay_out_of_the_state_dict_and_in_float32() -> None:
    model = load(CONFIGURATIONS["eva"], random_weights(CONFIGURATIONS["eva"]), dtype=torch.bfloat16)
    buffers = dict(model.named_buffers())
    assert len(buffers) == 8  # cos and sin, two layers, encoder and decoder
    assert {b.dtype for b in buffers.values()} == {torch.float32}
    assert not buffers.keys() & model.state_dict().keys()


def test_patchify_equals_the_reference_and_is_undone() -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 35, 35), np.float32)
    patches = patchify(torch.from_numpy(pixels), 7)
    np.testing.assert_array_equal(patches, reference.patchify(pixels, 7))
    np.testing.assert_array_equal(unpatchify(patches, 7, (5, 5)), pixels)


@pytest.mark.parametrize("layer", [3, -4])
def test_hidden_states_refuse_a_layer_that_is_not_there(layer: int) -> None:
    config = CONFIGURATIONS["eva"]
    network = torch_network(config, random_weights(config))
    with pytest.raises(ConfigError, match=f"layer {layer} does not exist.*0 to 2"):
        network.hidden_states(random_pixels(config, 1), layer)
