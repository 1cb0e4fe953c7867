"""The generator: config and table, numpy against torch and MLX, caches, captions, the public API."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from configurations import random_weights

import qlip_core as qlip
from qlip_core import Model, VisualTokens, hub
from qlip_core.errors import CheckpointError, ConfigError, GenerationError, TextError
from qlip_core.generator import reference
from qlip_core.generator.architecture import (
    architecture,
    init_weights,
    parameter_count,
    positions,
    rotary_tables,
)
from qlip_core.generator.checkpoint import open_generator, save_generator
from qlip_core.generator.conditioning import TextTower, encode_prompts
from qlip_core.generator.config import PRESETS, GeneratorConfig
from qlip_core.generator.generate import PromptCut, Request
from qlip_core.generator.network import Captions, Draw, GeneratorNetwork
from qlip_core.generator.sampling import Sampling, guidance_scales, step_keys
from qlip_mlx import generator as mlx_generator
from qlip_mlx.kernels import FUSED, Kernels, attend_polynomial, by_columns, silu_polynomial
from qlip_mlx.sampler import Cache, MlxGenerator
from qlip_torch import generator as torch_generator
from qlip_torch.sampler import Recording, TorchGenerator

BASE = GeneratorConfig(
    32,
    2,
    4,
    intermediate_size=48,
    grid=(3, 4),
    group_size=4,
    sub_tokens=2,
    condition_size=12,
    prefix_length=5,
)
CONFIGS = {
    "llamagen": BASE,
    "separate rows": replace(BASE, separate_sub_tokens=True, sub_tokens=3),
    "grouped queries": replace(BASE, num_key_value_heads=2),
    "qk norm": replace(BASE, qk_norm=True, num_key_value_heads=1),
    "one sub-token": replace(BASE, sub_tokens=1, group_size=6),
    "unified": replace(
        BASE, rope="sequence", rope_theta=5e5, text_vocab_size=10, qk_norm=True, hidden_size=40
    ),
}
SETTINGS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0),
    "greedy, guided": Sampling(temperature=0, cfg_scale=2),
    "filtered": Sampling(cfg_scale=3, top_k=7, top_p=0.8),
    "interval": Sampling(0.7, cfg_scale=2, cfg_schedule="linear", cfg_interval=(0.2, 0.6)),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_setting = pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)


def weights_of(config: GeneratorConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under which every tensor matters and logits are of order 1."""
    rng = np.random.default_rng([seed, 1])
    out = {name: 4 * w for name, w in init_weights(config, seed).items()}
    for name, spec in architecture(config).items():
        if spec.init == "ones":
            out[name] = (1 + 0.2 * rng.standard_normal(spec.shape)).astype(np.float32)
    return out


def captions_of(config: GeneratorConfig) -> Captions:
    """Three: padded, whole, and one replaced by the null prefix."""
    shape = (3, config.prefix_length, config.condition_size)
    features = np.random.default_rng(2).standard_normal(shape, np.float32)
    valid = np.arange(config.prefix_length) >= np.array([[2], [0], [4]])
    return Captions(features, valid, np.array([False, False, True]))


def tokens_of(config: GeneratorConfig, count: int) -> np.ndarray:
    shape = (count, config.tokens_per_image)
    return np.random.default_rng(3).integers(0, config.visual_vocab_size, shape)


def torch_of(config: GeneratorConfig, weights: dict[str, np.ndarray]) -> GeneratorNetwork:
    model = torch_generator.load(config, weights)
    return TorchGenerator(model, device="cpu", dtype="float32")


def mlx_of(config: GeneratorConfig, weights: dict[str, np.ndarray]) -> GeneratorNetwork:
    with mx.stream(mx.cpu):
        # What large models run on Linux. For models as small as these, `PLAIN_CPU` takes MLX's own kernels.
        kernels = Kernels(attend_polynomial, silu_polynomial, by_columns)
        model = mlx_generator.load(config, weights, kernels=kernels)
    aside = mx.new_thread_local_stream(mx.cpu)
    return MlxGenerator(model, "cpu", "float32", mx.float32, on_cpu, aside)


def mlx_as_on_a_gpu(config: GeneratorConfig, weights: dict[str, np.ndarray]) -> GeneratorNetwork:
    """The operations that a GPU runs, on the CPU: MLX's own kernels and a single stream."""
    with mx.stream(mx.cpu):
        model = mlx_generator.load(config, weights, kernels=FUSED)
    return MlxGenerator(model, "cpu", "float32", mx.float32, on_cpu)


def on_cpu() -> contextlib.AbstractContextManager[None]:
    return mx.stream(mx.cpu)


def numpy_of(config: GeneratorConfig, weights: dict[str, np.ndarray]) -> GeneratorNetwork:
    return reference.ReferenceGenerator(config, weights)


BACKENDS: dict[str, Callable[..., GeneratorNetwork]] = {
    "numpy": numpy_of,
    "torch": torch_of,
    "mlx": mlx_of,
}
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def order_of(
    config: GeneratorConfig,
    captions: Captions,
    sampling: Sampling,
    numbers: list[int],
    every: int = 5,
) -> Draw:
    steps = config.tokens_per_image
    scales = guidance_scales(sampling, steps)
    return Draw(captions, sampling, step_keys(7, numbers, steps), scales, every)


def drawn(network: GeneratorNetwork, order: Draw) -> np.ndarray:
    return np.concatenate(list(network.draw(order)), axis=1)


def exact_logits(
    config: GeneratorConfig, weights: dict[str, np.ndarray], captions: Captions, tokens: np.ndarray
) -> np.ndarray:
    wide = {name: w.astype(np.float64) for name, w in weights.items()}
    return reference.image_logits(wide, config, captions.astype(np.dtype(np.float64)), tokens)


# -- config and table --------------------------------------------------------------------------


def test_sizes_are_llamagens() -> None:
    millions = {name: round(parameter_count(c) / 1e6) for name, c in PRESETS.items()}
    assert [millions[n] for n in ("B", "L", "XL")] == [111, 344, 776]  # SPEC: 111, 343, 775
    assert 1400 <= millions["XXL"] < 1420 and 3050 < millions["3B"] < 3150
    assert millions["emoji"] == 10
    assert [PRESETS[n].intermediate_size for n in ("B", "L", "XL")] == [2048, 2816, 3584]


@each_config
def test_config_survives_its_json(config: GeneratorConfig) -> None:
    again = GeneratorConfig.from_dict(json.loads(config.to_json()))
    assert again == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_sise": 1}, 'unknown key "hidden_sise".*did you mean "hidden_size"'),
        ({"hidden_size": "32"}, "hidden_size must be an integer, got '32'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads .=3. must divide"),
        ({"num_attention_heads": 16}, 'rope "grid" needs a head width divisible by 4, got 2'),
        ({"grid": [3]}, "grid must be two numbers"),
        ({"conditioner": "clip"}, 'conditioner is "clip"'),
        ({"group_size": 40}, "group_size .=40. must be at most 24"),
        ({"sampling": {"top_k": 17}}, "sampling: top_k .=17. must be 0 .all. to 16"),
        ({"sampling": {"topk": 1}}, 'unknown key "sampling.topk"'),
        ({"model_type": "clip"}, 'model_type is "clip", expected "qlip_generator"'),
        ({"dropout": 1.0}, "dropout .=1.0. must be in"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .=1000000000. is over 1024"),
    ],
)
def test_bad_configs_are_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeneratorConfig.from_dict(BASE.to_dict() | change)


def test_positions_by_hand() -> None:
    config = replace(BASE, grid=(2, 2), prefix_length=2)
    expected = [[0, 0]] * 2 + [[0, 0]] * 2 + [[0, 1]] * 2 + [[1, 0]] * 2 + [[1, 1]]
    np.testing.assert_array_equal(positions(config), expected)
    cos, sin = rotary_tables(config, positions(config))  # d = 8: two pairs for each axis
    assert (cos[:4] == 1).all() and (sin[:4] == 0).all()
    np.testing.assert_allclose(np.arccos(cos[-1]), [1, 0.01, 1, 0.01], atol=1e-12)
    np.testing.assert_allclose(np.arcsin(sin[4]), [0, 0, 1, 0.01], atol=1e-12)
    line = replace(config, rope="sequence")
    np.testing.assert_array_equal(positions(line)[:, 0], np.arange(9))


def test_llama_weights_give_llamas_logits() -> None:
    """Hugging Face's own implementation, its names and its random weights, grouped queries and all."""
    transformers = pytest.importorskip("transformers")
    config = GeneratorConfig(
        32,
        3,
        4,
        num_key_value_heads=2,
        intermediate_size=48,
        rope="sequence",
        rope_theta=5e5,
        conditioner="none",
        prefix_length=0,
        text_vocab_size=50,
        group_size=4,
        sub_tokens=1,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=66,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=5e5,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ).eval()
    ids = torch.randint(0, 50, (2, 9))
    expected = theirs(ids).logits[..., :50].detach().numpy()
    arrays = {name: t.detach().numpy() for name, t in theirs.state_dict().items()}

    model = torch_generator.load(config, arrays)
    at = np.arange(9)[:, None]
    states = model.model(model.model.embed_tokens(ids), model.rope("cpu", at))
    np.testing.assert_allclose(model.text_logits(states).numpy(), expected, atol=1e-4)

    x = arrays["model.embed_tokens.weight"][ids.numpy()]
    cos, sin = (t.astype(np.float32) for t in rotary_tables(config, at))
    cache = reference.Cache(config, 2, 9, np.dtype(np.float32))
    mask = reference.causal_mask(0, 9)
    states = reference.transformer(arrays, config, x, (cos, sin), mask, cache)
    np.testing.assert_allclose(reference.text_logits(arrays, config, states), expected, atol=1e-4)

    ours = mlx_generator.load(config, arrays)
    caches = Cache(config, 2, mx.float32)
    caches.at = slice(0, 9)
    embedded = ours.model.embed_tokens(mx.array(ids.numpy()))
    states = ours.model(embedded, ours.rope(at), None, caches.layers)
    np.testing.assert_allclose(np.array(ours.text_logits(states)), expected, atol=1e-4)


# -- one forward, three implementations --------------------------------------------------------


@each_config
def test_torch_logits_equal_the_reference(config: GeneratorConfig) -> None:
    weights, captions, tokens = weights_of(config), captions_of(config), tokens_of(config, 3)
    exact = exact_logits(config, weights, captions, tokens)
    assert exact.std() > 0.3
    arguments = [captions.features, captions.valid, captions.null, tokens]
    tensors = [torch.from_numpy(x) for x in arguments]
    trained = torch_generator.Generator(config)
    trained.init_from(weights)
    fused = torch_generator.load(config, weights)
    for model in (trained.eval(), fused):
        logits = model(*tensors).detach().numpy()
        np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-4)


@each_backend
@each_config
def test_cached_steps_equal_the_whole(
    config: GeneratorConfig, backend: Callable[..., GeneratorNetwork]
) -> None:
    """Greedy drawing step by step takes at each place what the whole sequence's logits say there."""
    weights, captions = weights_of(config), captions_of(config)
    order = order_of(config, captions, Sampling(temperature=0), [0, 0, 0])
    tokens = drawn(backend(config, weights), order)
    exact = exact_logits(config, weights, captions, tokens)
    np.testing.assert_array_equal(exact.argmax(-1), tokens)


@each_config
@each_setting
def test_one_seed_one_picture(config: GeneratorConfig, sampling: Sampling) -> None:
    """The same sub-tokens on numpy, torch and MLX; of each picture alone as in the batch."""
    weights, captions = weights_of(config), captions_of(config)
    order = order_of(config, captions, sampling, [0, 1, 5])
    expected = drawn(numpy_of(config, weights), order)
    assert expected.shape == (3, config.tokens_per_image)
    for backend in (torch_of, mlx_of):
        network = backend(config, weights)
        np.testing.assert_array_equal(drawn(network, order), expected)
        alone = order_of(config, captions[1:2], sampling, [1], every=100)
        np.testing.assert_array_equal(drawn(network, alone), expected[1:2])


@each_config
def test_what_mlx_runs_on_a_gpu_draws_the_same_picture(config: GeneratorConfig) -> None:
    weights, captions = weights_of(config), captions_of(config)
    order = order_of(config, captions, SETTINGS["filtered"], [0, 1, 5])
    expected = drawn(numpy_of(config, weights), order)
    np.testing.assert_array_equal(drawn(mlx_as_on_a_gpu(config, weights), order), expected)


def test_guidance_is_the_formula() -> None:
    """Greedy guided drawing against logits mixed by hand from two whole sequences."""
    config, scale = BASE, 2.5
    weights, captions = weights_of(config), captions_of(config)
    order = order_of(config, captions, Sampling(temperature=0, cfg_scale=scale), [0, 0, 0])
    tokens = drawn(numpy_of(config, weights), order)
    text = exact_logits(config, weights, captions, tokens)
    absent = replace(captions, null=np.ones(3, bool))
    null = exact_logits(config, weights, absent, tokens)
    np.testing.assert_array_equal((null + scale * (text - null)).argmax(-1), tokens)
    assert (tokens[:2] != text[:2].argmax(-1)).any()


def test_padding_changes_nothing() -> None:
    """A caption's picture does not depend on how far the prefix is padded."""
    longer = replace(BASE, prefix_length=9)
    weights = weights_of(BASE)
    captions = captions_of(BASE)[:2]
    wider = {**weights, "null_prefix": weights_of(longer)["null_prefix"]}
    room = ((0, 0), (4, 0))
    noise = np.random.default_rng(5).standard_normal((2, 4, 12)).astype(np.float32)
    padded = Captions(
        np.concatenate([noise, captions.features], axis=1),
        np.pad(captions.valid, room),
        captions.null,
    )
    tokens = tokens_of(BASE, 2)
    np.testing.assert_allclose(
        exact_logits(longer, wider, padded, tokens),
        exact_logits(BASE, weights, captions, tokens),
        atol=1e-12,
    )


def test_dropout_is_for_training_only() -> None:
    model = torch_generator.Generator(BASE)
    model.init_from(weights_of(BASE))
    captions, tokens = captions_of(BASE), tokens_of(BASE, 3)
    arguments = [captions.features, captions.valid, captions.null, tokens]
    tensors = [torch.from_numpy(x) for x in arguments]
    assert not torch.equal(model.train()(*tensors), model(*tensors))
    assert torch.equal(model.eval()(*tensors), model(*tensors))


def test_every_weight_is_trained() -> None:
    model = torch_generator.Generator(CONFIGS["separate rows"])
    model.init_from(weights_of(model.config))
    captions, tokens = captions_of(model.config), tokens_of(model.config, 3)
    arguments = [captions.features, captions.valid, captions.null, tokens]
    logits = model(*[torch.from_numpy(x) for x in arguments])
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(tokens).flatten()
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_lower_precision_draws(name: str, dtype: str) -> None:
    network = qlip.get_backend(name).generator(BASE, weights_of(BASE), device="cpu", dtype=dtype)
    order = order_of(BASE, captions_of(BASE), Sampling(cfg_scale=2), [0, 0, 0])
    tokens = drawn(network, order)
    exact = drawn(numpy_of(BASE, weights_of(BASE)), order)
    # The first sub-token hangs on no other: the noise decides it in any precision.
    assert (tokens[:, 0] == exact[:, 0]).mean() >= 2 / 3
    assert tokens.min() >= 0 and tokens.max() < BASE.visual_vocab_size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_without_onednn_draws(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch is built for Apple silicon."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    test_lower_precision_draws("torch", dtype)


def test_training_in_bfloat16_does_not_widen_what_attention_gives() -> None:
    config, model = BASE, torch_generator.Generator(BASE)
    kinds = []
    for block in model.blocks():
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, x: kinds.append(x[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.zeros(1, config.sequence_length, config.hidden_size)
        model.model(x, model.rope("cpu"))
    assert kinds == [torch.bfloat16] * config.num_hidden_layers


def test_quantized_weights_draw() -> None:
    config = replace(BASE, hidden_size=64, intermediate_size=64)
    network = qlip.get_backend("mlx").generator(
        config, weights_of(config), device="cpu", dtype="int8"
    )
    order = order_of(config, captions_of(config)[:1], Sampling(), [0])
    assert drawn(network, order).shape == (1, 24)


# -- captions ----------------------------------------------------------------------------------


def test_text_tower_ends_at_the_end_token(tiny_model: Path) -> None:
    model = qlip.load(tiny_model, backend="numpy")
    text = replace(model.config.text_config, eos_token_id=519)
    tower = TextTower(model.checkpoint.tokenizer, model.network.text_states, text, 6)
    features, valid = tower(["cat", "a cat in a dog, cat and dog"])
    np.testing.assert_array_equal(valid, [[0, 0, 0, 1, 1, 1], [1] * 6])
    ids = model.tokenize("cat")
    # Within rounding: a BLAS sums in an order that depends on the shape.
    alone = model.network.text_states(ids[:, :3])[0]
    np.testing.assert_allclose(features[0, 3:], alone, atol=1e-5)
    # Over the limit the last words go and the end token stays.
    long = model.tokenize("a cat in a dog, cat and dog")
    cut = np.concatenate([long[:, :5], [[519]]], axis=1)
    np.testing.assert_allclose(features[1], model.network.text_states(cut)[0], atol=1e-5)
    assert tower.count(["cat"]) == [3]


def test_prompts_become_captions() -> None:
    class Fixed:
        def __call__(self, prompts):
            assert list(prompts) == ["a", "bb"]  # once each, the empty ones not at all
            features = np.stack([np.full((5, 12), len(p), np.float32) for p in prompts])
            return features, np.ones((2, 5), bool)

        def count(self, prompts):
            return [1] * len(prompts)

    captions = encode_prompts(["a", "", "bb", "a", " "], Fixed(), BASE)
    np.testing.assert_array_equal(captions.null, [0, 1, 0, 0, 1])
    np.testing.assert_array_equal(captions.features[:, 0, 0], [1, 0, 2, 1, 0])
    with pytest.raises(GenerationError, match=r"gives \[5, 12\] per caption, .* takes \[5, 13\]"):
        encode_prompts(["a", "bb"], Fixed(), replace(BASE, condition_size=13))


# -- the public API ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawing_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A tiny tokenizer with a tiny generator in its folder."""
    config = qlip.PRESETS["tiny"]
    text = replace(config.text_config, eos_token_id=519, bos_token_id=518, pad_token_id=519)
    config = replace(config, text_config=text)
    folder = tmp_path_factory.mktemp("drawing") / "model"
    weights = random_weights(config, seed=1)
    qlip.save_checkpoint(folder, config, weights, tokenizer_from=tokenizer_folder)
    checkpoint = qlip.open_checkpoint(folder)
    ours = replace(BASE, group_size=7, prefix_length=8, sampling=Sampling(cfg_scale=2.0))
    ours = ours.fitted(config, checkpoint.fingerprint, checkpoint.text_fingerprint)
    assert (ours.grid, ours.sub_tokens, ours.condition_size) == ((8, 8), 4, 32)
    save_generator(folder / "generator", ours, weights_of(ours))
    return folder


@pytest.fixture(scope="module")
def model(drawing_model: Path) -> Model:
    return qlip.load(drawing_model, backend="torch")


def test_same_pictures_on_every_backend(drawing_model: Path, model: Model) -> None:
    prompts = ["a cat", "", "a dog in an cat"]
    tokens = model.generate_tokens(prompts, seed=3, n=2, batch_size=4)
    assert tokens.names == ("a cat", "a cat", "", "", "a dog in an cat", "a dog in an cat")
    assert (tokens.model, tokens.grid, tokens.length) == (model.fingerprint, (8, 8), 28)
    for backend in ("numpy", "mlx"):
        other = qlip.load(drawing_model, backend=backend)
        assert other.generate_tokens(prompts, seed=3, n=2) == tokens
    pictures = model.generate(prompts, seed=3, n=2)
    assert pictures.shape == (6, 64, 64, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures, model.decode(tokens))


def test_a_picture_does_not_depend_on_its_neighbours(model: Model) -> None:
    both = model.generate_tokens(["a dog", "a cat"], seed=5, n=3)
    assert model.generate_tokens("a cat", seed=5, n=3) == both[3:]
    assert model.generate_tokens("a cat", seed=5) == both[3]
    assert both[3] != both[4] and model.generate_tokens("a cat", seed=6) != both[3]
    twice = model.generate_tokens(["a cat", "a cat"], seed=5)
    assert twice == both[3:5]  # named twice is as good as n=2
    assert len(model.generate_tokens([])) == 0


def test_nothing_to_draw_is_drawn_at_once(model: Model) -> None:
    assert model.generate([]).shape[0] == 0 and list(model.generate_stream([])) == []
    for wrong in (None, 3):
        with pytest.raises(TextError, match="prompts must be strings"):
            model.generate(wrong)  # type: ignore[arg-type]
    for interval in (0.5, (0.5,), ("a", "b")):
        with pytest.raises(GenerationError, match="must be two numbers"):
            model.generate("a", cfg_interval=interval)  # type: ignore[arg-type]


def test_streaming_ends_with_the_whole(model: Model) -> None:
    frames = list(model.generate_stream(["a cat", "a dog"], seed=1))
    assert len(frames) == 8  # rows of patches
    np.testing.assert_array_equal(frames[-1], model.generate(["a cat", "a dog"], seed=1))
    assert (frames[2][:, 24:] == 128).all() and (frames[2][:, :24] != 128).any()


def test_progress_counts_sub_tokens(model: Model) -> None:
    heard: list[int] = []
    model.generate_tokens("a cat", n=3, batch_size=2, progress=heard.append)
    assert sum(heard) == 3 * 64 * 4 and len(heard) == 16


def test_long_prompts_are_cut_with_a_warning(model: Model) -> None:
    with pytest.warns(PromptCut, match='"cat cat .*" has 12 tokens, over the limit of 8'):
        model.generate_tokens("cat " * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate_tokens("cat")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": 1.5}, "seed .=1.5. must be an integer"),
        ({"seed": True}, "seed .=True. must be an integer"),
        ({"seed": -1}, "seed .=-1. must be 0 to"),
        ({"cfg_scale": -1}, "cfg_scale .=-1. must be a number from 0 to 100"),
        ({"cfg_scale": float("nan")}, "cfg_scale .=nan."),
        ({"temperature": -0.1}, "temperature .=-0.1."),
        ({"top_k": 129}, "top_k .=129. must be 0 .all. to 128"),
        ({"top_k": 0.5}, "top_k .=0.5. must be an integer"),
        ({"top_p": 0}, "top_p .=0. must be above 0"),
        ({"cfg_schedule": "cosine"}, 'cfg_schedule is "cosine"'),
        ({"cfg_interval": (0.5, 0.2)}, "cfg_interval .=0.5 to 0.2."),
        ({"n": 0}, "n .=0. must be a positive number"),
    ],
)
def test_bad_settings_are_refused_in_one_line(model: Model, settings: dict, message: str) -> None:
    with pytest.raises(GenerationError, match=message) as caught:
        model.generate("a cat", **settings)
    assert "\n" not in str(caught.value)


def test_prompts_must_be_strings(model: Model) -> None:
    with pytest.raises(TextError, match="prompts must be strings, got int"):
        model.generate([3])  # type: ignore[list-item]


def test_generators_of_other_tokenizers_are_refused(
    drawing_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = drawing_model / "generator"
    found = open_generator(folder)
    config = qlip.open_checkpoint(drawing_model).config
    qlip.save_checkpoint(tmp_path / "model", config, random_weights(config, seed=2))
    with pytest.raises(CheckpointError, match="made for another tokenizer"):
        qlip.load(tmp_path / "model", backend="numpy", generator=folder)
    weights = random_weights(config, seed=1)
    weights["text_model.final_layer_norm.weight"] += 1
    qlip.save_checkpoint(tmp_path / "model", config, weights)
    with pytest.raises(CheckpointError, match="captions from another text tower"):
        qlip.load(tmp_path / "model", backend="numpy", generator=folder)
    anyone = replace(found.config, tokenizer="", text_tower="", grid=(4, 4))
    save_generator(tmp_path / "other", anyone, found.tensors())
    with pytest.raises(CheckpointError, match="draws 28 bits per patch on 4x4 patches"):
        qlip.load(tiny_model, backend="numpy", generator=tmp_path / "other")
    with pytest.raises(CheckpointError, match="no such folder"):
        qlip.load(tiny_model, backend="numpy", generator=tmp_path / "absent")
    without = qlip.load(tiny_model, backend="numpy")
    with pytest.raises(GenerationError, match="this model has no generator"):
        without.generate("a cat")


def test_a_generator_is_named_by_its_folder_or_by_a_model_that_has_one(
    drawing_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_generator(drawing_model).folder == drawing_model / "generator"
    assert open_generator(drawing_model / "generator").folder == drawing_model / "generator"
    monkeypatch.setattr(hub, "BUNDLED", drawing_model)
    assert open_generator("bundled").folder == drawing_model / "generator"
    with pytest.raises(CheckpointError, match="not a file"):
        open_generator(drawing_model / "config.json")


def test_a_saved_generator_comes_back(tmp_path: Path) -> None:
    weights = weights_of(BASE)
    save_generator(tmp_path / "g", BASE, weights)
    found = open_generator(tmp_path / "g")
    assert found.config == BASE
    for name, values in found.tensors().items():
        np.testing.assert_array_equal(values, weights[name])
    del weights["null_prefix"]
    with pytest.raises(CheckpointError, match="missing: null_prefix"):
        save_generator(tmp_path / "h", BASE, weights)
    assert [p.name for p in tmp_path.iterdir()] == ["g"]
    (tmp_path / "g" / "config.json").write_text(replace(BASE, hidden_size=48).to_json())
    with pytest.raises(CheckpointError, match="misshapen"):
        open_generator(tmp_path / "g")


def test_requests_number_the_pictures_of_a_prompt() -> None:
    request = Request.of(["a", "b", "a"], 2, 0, Sampling(), 16)
    assert request.prompts == ("a", "a", "b", "b", "a", "a")
    assert request.numbers == (0, 1, 0, 1, 2, 3)


def test_tokens_of_a_generator_are_the_tokenizers(model: Model) -> None:
    tokens = model.generate_tokens("a cat", seed=2)
    again = VisualTokens.from_groups(tokens.groups(7), 7, (8, 8))
    assert again == tokens


def without_recording(recording: Recording, number: int, limit: int) -> SimpleNamespace:
    """For `Recording._record`: a step that is run each time instead of recorded."""

    def replay() -> None:
        recording.state.cache.limit = limit
        recording._step(number)

    return SimpleNamespace(replay=replay)


def test_the_recorded_step_is_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded on CUDA, run without recording: indices from tensors, masks over the cache."""
    monkeypatch.setattr(Recording, "_record", without_recording)
    monkeypatch.setattr("qlip_torch.sampler._REACH", 8)  # several in a picture
    for config in (BASE, CONFIGS["separate rows"]):
        weights, captions = weights_of(config), captions_of(config)
        network = TorchGenerator(
            torch_generator.load(config, weights), device="cpu", dtype="float32"
        )
        network.records = True
        for chosen, sampling in ((captions, SETTINGS["filtered"]), (captions[1:], Sampling())):
            for numbers in ([0, 1, 2], [4, 2, 7]):  # the second in the memory of the first
                order = order_of(config, chosen, sampling, numbers[: len(chosen)])
                expected = drawn(numpy_of(config, weights), order)
                np.testing.assert_array_equal(drawn(network, order), expected)
        one, two = (order_of(config, captions, Sampling(), [i] * 3) for i in (0, 1))
        both = list(zip(network.draw(one), network.draw(two)))  # in turns
        for k, order in enumerate((one, two)):
            ours = np.concatenate([pair[k] for pair in both], axis=1)
            np.testing.assert_array_equal(ours, drawn(numpy_of(config, weights), order))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_step_is_the_step() -> None:
    program = Path(__file__).with_name("step_kernels_program.py")
    path = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "same\n", done.stderr
