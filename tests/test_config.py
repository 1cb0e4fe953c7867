"""The published config.json, both ways, and everything it must refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlip_core.architecture import architecture, diff_tensors, parameter_count, rotary_tables
from qlip_core.config import PRESETS, QLIPConfig, QuantizerConfig, TextConfig, VisionConfig
from qlip_core.errors import ConfigError


def test_official_config_round_trips_to_the_letter(official: Path) -> None:
    values = json.loads((official / "config.json").read_text())
    config = QLIPConfig.from_dict(values)
    assert config == PRESETS["tiny"]
    assert config.to_dict() == values  # with transformers' bookkeeping


def test_presets_round_trip_and_leave_out_defaults() -> None:
    for config in PRESETS.values():
        assert QLIPConfig.from_dict(json.loads(config.to_json())) == config
    written = PRESETS["qlip-b-16-256"].to_dict()
    assert written["text_config"] == {"model_type": "clip_text_model"}
    assert written["vision_config"] == {
        "image_size": 256,
        "intermediate_size": 2048,
        "k_bias": False,
        "layer_norm_eps": 1e-6,
        "model_type": "clip_vision_model",
        "patch_size": 16,
        "quantizer": "bsq",
        "quantizer_cfg": {"embed_dim": 28, "group_size": 14, "input_format": "blc"},
        "quantizer_embed_type": "mlp",
        "quantizer_l2_norm": True,
        "rope": True,
        "subln": True,
        "swiglu": True,
    }


def test_post_quantizer_width_is_written_where_absence_would_change_it() -> None:
    vision = VisionConfig(hidden_size=512, num_attention_heads=8, hidden_size_post_q=768)
    config = QLIPConfig(
        vision_config=replace(
            vision,
            quantizer="bsq",
            quantizer_embed_type="mlp",
            quantizer_cfg=QuantizerConfig(embed_dim=18, group_size=9),
        ),
    )
    assert config.to_dict()["vision_config"]["hidden_size_post_q"] == 768
    assert QLIPConfig.from_dict(config.to_dict()) == config


def test_parameters_of_the_published_size() -> None:
    assert sum(parameter_count(PRESETS["qlip-b-16-256"]).values()) == 239_434_013  # 239.4 M


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_dims": 48}, 'unknown key "projection_dims".*did you mean "projection_dim"'),
        ({"vision_config": {"hiden_size": 3}}, 'unknown key "vision_config.hiden_size"'),
        ({"vision_config": {"quantizer_cfg": {"group": 3}}}, "vision_config.quantizer_cfg.group"),
        ({"model_type": "llama"}, 'model_type is "llama"'),
        ({"vision_config": 3}, "vision_config must be a JSON object"),
        ({"vision_config": {"hidden_size": "768"}}, "hidden_size must be an integer, got '768'"),
        ({"vision_config": {"hidden_size": True}}, "hidden_size must be an integer"),
        (
            {"vision_config": {"layer_norm_eps": float("nan")}},
            "layer_norm_eps must be a finite number",
        ),
        ({"vision_config": {"num_attention_heads": 7}}, r"\(=7\) must divide hidden_size \(=768\)"),
        ({"vision_config": {"patch_size": 15}}, r"\(=15\) must divide image_size \(=224\)"),
        ({"vision_config": {"image_size": 256}}, r"image_size \(=256\) and decoder_config"),
        ({"vision_config": {"hidden_size": 0}}, r"hidden_size \(=0\) must be positive"),
        ({"vision_config": {"num_channels": 1}}, r"num_channels \(=1\) must be 3"),
        ({"vision_config": {"quantizer": "vq"}}, 'quantizer is "vq", expected one of none, bsq'),
        ({"vision_config": {"hidden_act": "relu"}}, r'^vision_config\.hidden_act is "relu"'),
        (
            {"vision_config": {"quantizer_cfg": {"embed_dim": 28}}},
            r"^vision_config\.quantizer_cfg\.group_size \(=9\) must divide embed_dim",
        ),
        ({"text_config": {"vocab_size": 0}}, r"^text_config\.vocab_size \(=0\) must be positive"),
        (
            {"vision_config": {"quantizer_cfg": {"embed_dim": 64, "group_size": 8}}},
            r"\(=64\) is over 62",
        ),
        ({"vision_config": {"quantizer": "bsq"}}, r"embed_dim \(=18\) must equal hidden_size"),
        ({"decoder_config": {"hidden_size": 384}}, r"\(=768\) must equal decoder_config"),
        ({"text_config": {"rope": True}}, "text positions are learned"),
        ({"vision_config": {"rope": True, "num_attention_heads": 128}}, "divisible by 4, got 6"),
    ],
)
def test_impossible_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QLIPConfig.from_dict({"model_type": "clip", **change})


def test_unreadable_config_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="no such file"):
        QLIPConfig.from_file(path)
    for text, message in (
        ("{", "not a readable JSON"),
        ("[1]", "expected a JSON object, got list"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            QLIPConfig.from_file(path)


def test_tensor_differences_name_both_sides() -> None:
    config = PRESETS["tiny"]
    shapes = {name: spec.shape for name, spec in architecture(config).items()}
    assert diff_tensors(config, {**shapes, "vision_model.rope.freqs_cos": (64, 16)}) == ""
    broken = {**shapes, "surprise": (1,), "logit_scale": (1,)}
    del broken["text_projection.weight"]
    assert diff_tensors(config, broken) == (
        "missing: text_projection.weight; unexpected: surprise; "
        "misshapen: logit_scale is [1], expected []"
    )


def test_optional_tensors_follow_the_config() -> None:
    vision = VisionConfig(q_bias=False, v_bias=False, swiglu=False, subln=True)
    names = architecture(QLIPConfig(TextConfig(), vision, VisionConfig(k_bias=False)))
    layer = "vision_model.encoder.layers.0"
    assert f"{layer}.self_attn.q_proj.bias" not in names
    assert f"{layer}.self_attn.k_proj.bias" in names
    assert f"{layer}.self_attn.inner_attn_ln.weight" in names
    assert names[f"{layer}.mlp.ffn_ln.weight"].shape == (3072,)
    assert f"{layer}.mlp.fc1.bias" in names and f"{layer}.mlp.w1.bias" not in names
    assert "vision_decoder.encoder.layers.0.self_attn.k_proj.bias" not in names
    assert "vision_model.quant_embed.c_fc.weight" not in names  # embed type "identity"


def test_rotary_tables_by_hand() -> None:
    cos, sin = rotary_tables((2, 4), 8)  # r = 4: frequencies 1 and 1/100
    assert cos.shape == sin.shape == (8, 8)
    # Row 1 of 2 is position 8, column 3 of 4 position 12.
    angles = [8, 8, 0.08, 0.08, 12, 12, 0.12, 0.12]
    import numpy as np

    np.testing.assert_allclose(cos[7], np.cos(angles), atol=1e-15)
    np.testing.assert_allclose(sin[7], np.sin(angles), atol=1e-15)
