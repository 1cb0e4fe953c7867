"""First weights from EVA files: each layout round-trips to the same forward, and resampling by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from configurations import (
    CONFIGURATIONS,
    EVA,
    TEXT,
    quantized,
    random_ids,
    random_weights,
)

from qlip_core.architecture import ArrayWeights, architecture, init_weights
from qlip_core.backends import Network
from qlip_core.config import QLIPConfig
from qlip_core.errors import CheckpointError
from qlip_core.reference import BACKEND
from qlip_core.tensorfile import write_tensors
from qlip_torch.train.initialise import initialise
from qlip_torch.train.resample import bicubic, resample_patch, resample_positions

Arrays = dict[str, np.ndarray]
CONFIG = CONFIGURATIONS["eva"]
WEIGHTS = random_weights(CONFIG, seed=5)
VISION = [n for n, s in architecture(CONFIG).items() if s.part == "encoder"]
LANGUAGE = [n for n, s in architecture(CONFIG).items() if s.part == "text" and n != "logit_scale"]
INNER = "self_attn.inner_attn_ln."


def eva_file(
    weights: Arrays, *, kind: str, fused: bool = False, packed: bool = False, prefix: str = ""
) -> Arrays:
    """Our encoder under timm's names (kind "timm") or EVA's own ("eva")."""
    out: Arrays = {}
    own = kind == "eva"
    inner, ffn = ("inner_attn_ln", "ffn_ln") if own else ("norm", "norm")
    gate, value, down = ("w1", "w2", "w3") if own else ("fc1_g", "fc1_x", "fc2")
    e = "vision_model.embeddings."
    out["cls_token"] = weights[e + "class_embedding"][None, None]
    out["pos_embed"] = weights[e + "position_embedding.weight"][None]
    for k in ("weight", "bias"):
        out[f"patch_embed.proj.{k}"] = weights[f"{e}patch_embedding.{k}"]
        out[f"norm.{k}"] = weights[f"vision_model.post_layernorm.{k}"]
        out[f"head.{k}"] = weights[f"visual_projection.{k}"]
    for i in range(2):
        ours, theirs = f"vision_model.encoder.layers.{i}.", f"blocks.{i}."
        q, kk, v = (weights[f"{ours}self_attn.{n}_proj.weight"] for n in "qkv")
        if fused:
            out[f"{theirs}attn.qkv.weight"] = np.concatenate([q, kk, v])
        else:
            for n, x in zip("qkv", (q, kk, v)):
                out[f"{theirs}attn.{n}_proj.weight"] = x
        for n in "qv":
            bias = f"attn.{n}_bias" if fused or own else f"attn.{n}_proj.bias"
            out[theirs + bias] = weights[f"{ours}self_attn.{n}_proj.bias"]
        for k in ("weight", "bias"):
            out[f"{theirs}norm1.{k}"] = weights[f"{ours}layer_norm1.{k}"]
            out[f"{theirs}norm2.{k}"] = weights[f"{ours}layer_norm2.{k}"]
            out[f"{theirs}attn.proj.{k}"] = weights[f"{ours}self_attn.out_proj.{k}"]
            out[f"{theirs}attn.{inner}.{k}"] = weights[f"{ours}{INNER}{k}"]
            out[f"{theirs}mlp.{ffn}.{k}"] = weights[f"{ours}mlp.ffn_ln.{k}"]
            w1, w2 = weights[f"{ours}mlp.w1.{k}"], weights[f"{ours}mlp.w2.{k}"]
            if packed:
                out[f"{theirs}mlp.fc1.{k}"] = np.concatenate([w1, w2])
            else:
                out[f"{theirs}mlp.{gate}.{k}"], out[f"{theirs}mlp.{value}.{k}"] = w1, w2
            out[f"{theirs}mlp.{down}.{k}"] = weights[f"{ours}mlp.w3.{k}"]
    if own:
        out["rope.freqs_cos"] = out["blocks.0.attn.rope.freqs_sin"] = np.zeros((4, 4), np.float32)
    return {prefix + name: x for name, x in out.items()}


def text_file(weights: Arrays) -> Arrays:
    out: Arrays = {
        "logit_scale": np.array(4.6, np.float32),
        "text.token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "text.positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "text.text_projection": weights["text_projection.weight"].T,
        "text.attn_mask": np.zeros((12, 12), np.float32),
    }
    for k in ("weight", "bias"):
        out[f"text.ln_final.{k}"] = weights[f"text_model.final_layer_norm.{k}"]
        for i in range(2):
            ours, theirs = f"text_model.encoder.layers.{i}.", f"text.transformer.resblocks.{i}."
            for n, m in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("self_attn.out_proj", "attn.out_proj"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                out[f"{theirs}{m}.{k}"] = weights[f"{ours}{n}.{k}"]
            joined = [weights[f"{ours}self_attn.{n}_proj.{k}"] for n in "qkv"]
            out[f"{theirs}attn.in_proj_{k}"] = np.concatenate(joined)
    return out


def written(folder: Path, tensors: Arrays, name: str = "model.safetensors") -> Path:
    write_tensors(folder / name, {n: np.array(x, copy=True) for n, x in tensors.items()})
    return folder / name


def network(weights: Arrays) -> Network:
    return BACKEND.network(CONFIG, ArrayWeights(CONFIG, weights), device="cpu", dtype="float32")


# -- every layout, there and back --------------------------------------------------------------

LAYOUTS = {
    "open_clip": {"kind": "timm", "prefix": "visual.trunk."},
    "open_clip_fused": {"kind": "timm", "prefix": "visual.trunk.", "fused": True},
    "open_clip_packed": {"kind": "timm", "prefix": "visual.trunk.", "packed": True},
    "eva_clip": {"kind": "eva", "prefix": "visual."},
    "eva_clip_fused": {"kind": "eva", "prefix": "visual.", "fused": True},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_eva_clip_gives_the_same_towers(name: str, tmp_path: Path) -> None:
    both = eva_file(WEIGHTS, **LAYOUTS[name]) | text_file(WEIGHTS)
    path = written(tmp_path, both)
    arrays, report = initialise(CONFIG, visual=path, text=path, seed=3)
    for tensor in VISION + LANGUAGE:
        np.testing.assert_array_equal(arrays[tensor], WEIGHTS[tensor], err_msg=tensor)
    assert set(report.used) == set(VISION + LANGUAGE) and not report.resampled
    # All the rest, the logit scale included, starts as a random model does.
    first = init_weights(CONFIG, 3)
    rest = set(arrays) - set(VISION + LANGUAGE)
    assert rest == set(report.left) and "logit_scale" in rest
    for tensor in rest:
        np.testing.assert_array_equal(arrays[tensor], first[tensor])
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    np.testing.assert_array_equal(
        network(arrays).embed_images(pixels), network(WEIGHTS).embed_images(pixels)
    )
    ids = random_ids(CONFIG, 3)
    np.testing.assert_array_equal(
        network(arrays).embed_texts(ids), network(WEIGHTS).embed_texts(ids)
    )


def test_eva02_leaves_what_it_does_not_have(tmp_path: Path) -> None:
    """timm's masked-image models: no norm inside attention, no projection, `fc_norm` for the last norm."""
    file = eva_file(WEIGHTS, kind="timm")
    file = {n: x for n, x in file.items() if ".attn.norm." not in n}
    file["mask_token"] = np.zeros((1, 1, 48), np.float32)
    for kind in ("weight", "bias"):
        file[f"fc_norm.{kind}"] = file.pop(f"norm.{kind}")
    arrays, report = initialise(CONFIG, visual=written(tmp_path, file), seed=1)
    inner = {n for n in VISION if INNER in n}
    projection = {n for n in VISION if n.startswith("visual_projection")}
    assert set(report.used) == set(VISION) - inner - projection
    assert inner | projection <= set(report.left)
    assert set(report.ignored) == {"mask_token", "head.weight", "head.bias"}
    for tensor in inner:
        assert (arrays[tensor] == (1 if tensor.endswith("weight") else 0)).all()
    name = "vision_model.post_layernorm.weight"
    np.testing.assert_array_equal(arrays[name], WEIGHTS[name])
    text = "\n".join(report.lines())
    assert "visual encoder from" in text and "EVA-02" in text
    assert "inner_attn_ln.weight (2 tensors): not in the file, ones" in text
    assert "vision_model.quant_embed (4 tensors): random, seed 1" in text
    assert report.left["logit_scale"] == "starts at 2.6592"


def test_a_missing_key_bias_is_zero_and_a_given_one_needs_a_place(tmp_path: Path) -> None:
    biased = replace(CONFIG.vision_config, k_bias=True)
    config = replace(CONFIG, vision_config=biased)
    file = eva_file(WEIGHTS, kind="timm", prefix="visual.trunk.")
    arrays, _ = initialise(config, visual=written(tmp_path, file))
    key = "vision_model.encoder.layers.0.self_attn.k_proj.bias"
    assert arrays[key].shape == (48,) and not arrays[key].any()
    # A fused bias of zeros for keys loses nothing, another one would be lost: RoPE turns it.
    for value, fits in ((0.0, True), (0.5, False)):
        fused = eva_file(WEIGHTS, kind="timm", prefix="visual.trunk.", fused=True)
        for i in range(2):
            block = f"visual.trunk.blocks.{i}.attn."
            q, v = fused.pop(f"{block}q_bias"), fused.pop(f"{block}v_bias")
            k = np.full(48, value, np.float32)
            fused[f"{block}qkv.bias"] = np.concatenate([q, k, v])
        path = written(tmp_path, fused)
        if fits:
            arrays, _ = initialise(CONFIG, visual=path)
            name = key.replace("k_proj", "v_proj")
            np.testing.assert_array_equal(arrays[name], WEIGHTS[name])
        else:
            with pytest.raises(CheckpointError, match=r"qkv\.bias has a key bias"):
                initialise(CONFIG, visual=path)


def test_a_qlip_checkpoint_moves_to_another_grid(tmp_path: Path) -> None:
    finer = replace(EVA, image_size=32, patch_size=4)
    config = replace(CONFIG, vision_config=quantized(finer, 28, 14), decoder_config=finer)
    path = written(tmp_path, WEIGHTS)
    arrays, report = initialise(config, visual=path, text=path)
    patch = "vision_model.embeddings.patch_embedding.weight"
    positions = "vision_model.embeddings.position_embedding.weight"
    assert set(report.resampled) == {patch, positions}
    assert arrays[patch].shape == (48, 3, 4, 4) and arrays[positions].shape == (65, 48)
    np.testing.assert_array_equal(arrays[patch], resample_patch(WEIGHTS[patch], 4))
    np.testing.assert_array_equal(arrays[positions][0], WEIGHTS[positions][0])
    name = "text_model.encoder.layers.1.mlp.fc2.weight"
    np.testing.assert_array_equal(arrays[name], WEIGHTS[name])
    with pytest.raises(CheckpointError, match="nothing for vision_model"):
        deeper = replace(config.vision_config, num_hidden_layers=3)
        initialise(replace(config, vision_config=deeper), visual=path)


def test_a_shorter_context_takes_the_first_positions(tmp_path: Path) -> None:
    config = replace(CONFIG, text_config=replace(TEXT, max_position_embeddings=7))
    arrays, report = initialise(config, text=written(tmp_path, text_file(WEIGHTS)))
    name = "text_model.embeddings.position_embedding.weight"
    np.testing.assert_array_equal(arrays[name], WEIGHTS[name][:7])
    assert report.resampled == {name: "the first 7 of 12 positions"}


def test_projections_of_another_width_are_left(tmp_path: Path) -> None:
    config = replace(CONFIG, projection_dim=20)
    file = eva_file(WEIGHTS, kind="eva", prefix="visual.")
    arrays, report = initialise(config, visual=written(tmp_path, file))
    assert arrays["visual_projection.weight"].shape == (20, 48)
    assert (
        "is [24, 48], visual_projection.weight needs [20, 48]"
        in (report.left["visual_projection.weight"])
    )


def test_nothing_given_is_random() -> None:
    arrays, report = initialise(CONFIG, seed=9)
    first = init_weights(CONFIG, 9)
    assert not report.sources and set(report.left) == set(first)
    assert all(np.array_equal(arrays[n], first[n]) for n in first)


# -- what does not fit is said -----------------------------------------------------------------


def test_strict_errors(tmp_path: Path) -> None:
    good = eva_file(WEIGHTS, kind="timm", prefix="visual.trunk.")

    def fails(tensors: Arrays, match: str, config: QLIPConfig = CONFIG) -> None:
        with pytest.raises(CheckpointError, match=match):
            initialise(config, visual=written(tmp_path, tensors))

    fails(
        good | {"visual.trunk.extra": np.zeros(2, np.float32)}, r"unexpected visual\.trunk\.extra"
    )
    less = {n: x for n, x in good.items() if "blocks.1.norm2.bias" not in n}
    fails(less, r"nothing for vision_model\.encoder\.layers\.1\.layer_norm2\.bias")
    fails(text_file(WEIGHTS), "none of the known layouts")
    damaged = dict(good)
    damaged["visual.trunk.cls_token"] = np.full((1, 1, 48), np.nan, np.float32)
    fails(damaged, r"cls_token has 48 values that are NaN")
    shallow = replace(CONFIG.vision_config, num_hidden_layers=1)
    fails(good, r"unexpected visual\.trunk\.blocks\.1", replace(CONFIG, vision_config=shallow))
    narrow = dict(good)
    narrow["visual.trunk.norm.weight"] = np.ones(40, np.float32)
    fails(narrow, r"norm\.weight is \[40\], .* needs \[48\]")
    oblong = dict(good)
    oblong["visual.trunk.pos_embed"] = np.zeros((1, 16, 48), np.float32)
    fails(oblong, "15 positions are not a square grid")
    with pytest.raises(CheckpointError, match="not a hub id"):
        initialise(CONFIG, visual=tmp_path / "absent.safetensors")


def test_of_several_files_the_fitting_one_counts(tmp_path: Path) -> None:
    written(tmp_path, text_file(WEIGHTS), "text.safetensors")
    written(tmp_path, eva_file(WEIGHTS, kind="timm"), "trunk.safetensors")
    _, report = initialise(CONFIG, visual=tmp_path, text=tmp_path)
    assert len(report.sources) == 2
    written(tmp_path, eva_file(WEIGHTS, kind="eva", prefix="visual."), "clip.safetensors")
    with pytest.raises(CheckpointError, match="several fit"):
        initialise(CONFIG, visual=tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        initialise(CONFIG, visual=tmp_path)


# -- resampling --------------------------------------------------------------------------------


def test_bicubic_by_hand() -> None:
    # 2 -> 4: new centres at -1/4, 1/4, 3/4, 5/4 of the old; Keys' kernel with a = -1/2 at distances
    # 1/4 and 5/4, 1/4 and 3/4 ..., and rows brought to sum 1.
    near, three, five = 0.8671875, 0.2265625, -0.0703125
    expected = np.array(
        [
            [near / (near + five), five / (near + five)],
            [near / (near + three), three / (near + three)],
            [three / (near + three), near / (near + three)],
            [five / (near + five), near / (near + five)],
        ]
    )
    np.testing.assert_allclose(bicubic(2, 4), expected, rtol=1e-12)
    np.testing.assert_allclose(bicubic(5, 5), np.eye(5), atol=1e-15)


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 8), (7, 12), (12, 7)])
def test_bicubic_is_pillows_and_torchs(old: int, new: int) -> None:
    import torch
    from PIL import Image

    image = np.random.default_rng(old).random((old, old)).astype(np.float32)
    ours = bicubic(old, new) @ image @ bicubic(old, new).T
    pillow = Image.fromarray(image, "F").resize((new, new), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(ours, np.asarray(pillow), atol=2e-6)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None, None], (new, new), mode="bicubic", antialias=True
    )
    np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=2e-6)


def test_a_growing_patch_gives_the_same_tokens() -> None:
    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((5, 3, 14, 14)).astype(np.float32)
    patch = generator.standard_normal((3, 14, 14))
    up = bicubic(14, 16)
    larger = np.einsum("ap,cpq,bq->cab", up, patch, up)
    token = np.einsum("dcpq,cpq->d", kernel, patch)
    resized = np.einsum("dcpq,cpq->d", resample_patch(kernel, 16), larger)
    np.testing.assert_allclose(resized, token, rtol=1e-5)


def test_a_shrinking_patch_is_the_least_squares_one() -> None:
    """2x2 to 1x1: bicubic shrinking by two is the mean, and the best single weight is the sum."""
    kernel = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(bicubic(2, 1), [[0.5, 0.5]])
    np.testing.assert_allclose(resample_patch(kernel, 1), [[[[6.0]]]], rtol=1e-6)
    # The normal equations: what is left of the kernel, B never sees.
    wide = np.random.default_rng(1).standard_normal((4, 3, 16, 16)).astype(np.float32)
    shrink = bicubic(16, 8)
    back = np.einsum("ap,dcab,bq->dcpq", shrink, resample_patch(wide, 8), shrink)
    left = np.einsum("ap,dcpq,bq->dcab", shrink, wide - back, shrink)
    np.testing.assert_allclose(left, 0, atol=1e-6)


def test_positions_by_hand() -> None:
    table = np.array([[9.0], [0.0], [1.0], [2.0], [3.0]], np.float32)  # CLS, 2x2
    out = resample_positions(table, (4, 4))
    assert out.shape == (17, 1) and out[0, 0] == 9
    rows = bicubic(2, 4) @ np.array([0.0, 1.0])
    # The table is 2 * row + column, and interpolation is linear in it.
    expected = 2 * rows[:, None] + rows[None]
    np.testing.assert_allclose(out[1:, 0].reshape(4, 4), expected, rtol=1e-6)
    assert resample_positions(table, (2, 2)) is table
    assert resample_positions(table, (1, 3)).shape == (4, 1)
    with pytest.raises(ValueError, match="not a square"):
        resample_positions(table[:4], (2, 2))
