"""Configuration of a QLIP model: `config.json` of the published layout, read strictly and written back unchanged.

SPEC section 2. Files omit keys that equal their defaults, an unknown key is an error that names it, and
transformers' own bookkeeping is accepted and kept on a round trip.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlip_core.errors import ConfigError
from qlip_core.strict import check_one_of, check_positive, read_json, scalar, unknown_key

# Far more than any model has; checked before listing the tensors of every layer.
MAX_LAYERS = 1024

# Written by transformers, with no meaning for the model.
BOOKKEEPING = frozenset(
    {
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
        "_attn_implementation_autoset",
        "auto_map",
        "initializer_range",
        "initializer_factor",
        "attention_dropout",
        "dropout",
        "model_type",
    }
)
ACTIVATIONS = ("gelu", "quick_gelu")
MAX_LENGTH = 62  # the largest L whose index fits a non-negative int64 with room for arithmetic


@dataclass(frozen=True)
class QuantizerConfig:
    """`quantizer_cfg`: binary spherical quantization (SPEC 1.3)."""

    embed_dim: int = 18
    group_size: int = 9
    soft_entropy: bool = True
    beta: float = 0.0
    gamma_0: float = 1.0
    gamma_1: float = 1.0
    input_format: str = "bchw"
    persample_entropy_compute: str = "group"
    l2_norm: bool = True
    inv_temperature: float = 100.0
    written: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(self, "embed_dim", "group_size", "inv_temperature")
        check_one_of(self, "input_format", ("bchw", "blc"))
        check_one_of(self, "persample_entropy_compute", ("group", "analytical"))
        if self.embed_dim > MAX_LENGTH:
            raise ConfigError(
                f"embed_dim (={self.embed_dim}) is over {MAX_LENGTH}: "
                "the index of a patch must fit an int64"
            )
        if self.embed_dim % self.group_size:
            raise ConfigError(
                f"group_size (={self.group_size}) must divide embed_dim (={self.embed_dim})"
            )
        if not self.l2_norm:
            raise ConfigError(
                "l2_norm=false is not a binary *spherical* quantizer: "
                "only codes on the unit sphere are supported"
            )


@dataclass(frozen=True)
class TextConfig:
    """`text_config`: the causal text encoder (SPEC 1.1)."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    subln: bool = False
    swiglu: bool = False
    rope: bool = False
    pad_token_id: int = 1
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    written: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_tower(self)
        check_positive(self, "vocab_size", "projection_dim", "max_position_embeddings")
        if self.rope:
            raise ConfigError("rope=true is not part of QLIP: text positions are learned")
        if self.max_position_embeddings < 2:
            raise ConfigError("max_position_embeddings must be at least 2")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """`vision_config` and `decoder_config`: both vision towers have the same keys (SPEC 1.1)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    subln: bool = False
    swiglu: bool = False
    rope: bool = False
    quantizer: str = "none"
    quantizer_l2_norm: bool = False
    quantizer_embed_type: str = "identity"
    hidden_size_post_q: int = 0  # 0 stands for "absent": the same as hidden_size
    quantizer_cfg: QuantizerConfig = field(default_factory=QuantizerConfig)
    written: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.hidden_size_post_q == 0:
            object.__setattr__(self, "hidden_size_post_q", self.hidden_size)
        _check_tower(self)
        check_positive(self, "projection_dim", "image_size", "patch_size", "hidden_size_post_q")
        check_one_of(self, "quantizer", ("none", "bsq"))
        check_one_of(self, "quantizer_embed_type", ("identity", "mlp"))
        if self.num_channels != 3:
            raise ConfigError(f"num_channels (={self.num_channels}) must be 3: images are RGB")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"patch_size (={self.patch_size}) must divide image_size (={self.image_size})"
            )
        if self.rope and self.head_dim % 4:
            raise ConfigError(
                f"rope needs a head width divisible by 4, got {self.head_dim} "
                f"(hidden_size {self.hidden_size} / num_attention_heads {self.num_attention_heads})"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def code_dim(self) -> int:
        """L: width of a patch's code (the tower's width if there is no projection)."""
        return (
            self.quantizer_cfg.embed_dim if self.quantizer_embed_type == "mlp" else self.hidden_size
        )


@dataclass(frozen=True)
class QLIPConfig:
    """The whole model: `config.json` (SPEC section 2)."""

    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    decoder_config: VisionConfig = field(default_factory=VisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    vision_projection_bias: bool = True
    text_projection_bias: bool = False
    written: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(self, "projection_dim")
        vision, decoder = self.vision_config, self.decoder_config
        for name in ("image_size", "patch_size"):
            ours, theirs = getattr(vision, name), getattr(decoder, name)
            if ours != theirs:
                raise ConfigError(
                    f"vision_config.{name} (={ours}) and decoder_config.{name} (={theirs}) differ: "
                    "both towers must cover the same patches"
                )
        if vision.hidden_size_post_q != decoder.hidden_size:
            raise ConfigError(
                f"vision_config.hidden_size_post_q (={vision.hidden_size_post_q}) must equal "
                f"decoder_config.hidden_size (={decoder.hidden_size})"
            )
        identity = vision.quantizer_embed_type == "identity"
        if identity and vision.hidden_size_post_q != vision.hidden_size:
            raise ConfigError(
                'quantizer_embed_type "identity" cannot change the width: hidden_size '
                f"(={vision.hidden_size}) must equal hidden_size_post_q "
                f"(={vision.hidden_size_post_q})"
            )
        if (
            identity
            and vision.quantizer == "bsq"
            and vision.quantizer_cfg.embed_dim != vision.hidden_size
        ):
            raise ConfigError(
                'quantizer_embed_type "identity" quantizes the features themselves: embed_dim '
                f"(={vision.quantizer_cfg.embed_dim}) must equal hidden_size "
                f"(={vision.hidden_size})"
            )

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def image_size(self) -> int:
        """S: side of the square image in pixels."""
        return self.vision_config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.vision_config.grid

    @property
    def num_patches(self) -> int:
        """N."""
        return self.vision_config.num_patches

    @property
    def quantizes(self) -> bool:
        return self.vision_config.quantizer == "bsq"

    @property
    def code_dim(self) -> int:
        """L: bits per patch (or the width of the continuous code with quantizer "none")."""
        return self.vision_config.code_dim

    @property
    def group_size(self) -> int:
        """g: bits in a sub-token."""
        return self.vision_config.quantizer_cfg.group_size

    @property
    def compression_ratio(self) -> float:
        """Size of 24-bit RGB over that of the code: 24 / L * p^2 (paper table 2)."""
        return 24 / self.code_dim * self.vision_config.patch_size**2

    # -- reading and writing -------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QLIPConfig:
        """Build from the content of a `config.json`.

        Raises ConfigError for an unknown key (naming the nearest known one), a value of the wrong
        type, or sizes that fit no model.
        """
        values = dict(values)
        model_type = values.get("model_type", "clip")
        if model_type != "clip":
            hint = (
                ": a generator, which draws with its tokenizer's --model and --generator FOLDER"
                if model_type == "qlip_generator"
                else ""
            )
            raise ConfigError(
                f'model_type is "{model_type}", expected "clip": not a QLIP config{hint}'
            )
        return _from_dict(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`: the keys that were read, and others that differ from defaults."""
        out = _to_dict(self)
        nested = {
            "text_config": "clip_text_model",
            "vision_config": "clip_vision_model",
            "decoder_config": "clip_decoder_model",
        }
        if not self.written:
            # A config made here: keys that transformers' own writer always puts at the top level.
            out |= {
                "model_type": "clip",
                "projection_dim": self.projection_dim,
                "logit_scale_init_value": self.logit_scale_init_value,
                "vision_projection_bias": self.vision_projection_bias,
                "text_projection_bias": self.text_projection_bias,
            }
            for key, kind in nested.items():
                out.setdefault(key, {})
                if not getattr(self, key).written:
                    out[key]["model_type"] = kind
        return _sorted(out)

    @classmethod
    def from_file(cls, path: str | Path) -> QLIPConfig:
        return read_json(path, "a checkpoint", cls.from_dict)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


# Settings that affect a forward pass but no tensor's name or shape.
_UNSHOWN = (
    "image_size",
    "patch_size",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "rope",
)
_UNSHOWN_BOTTLENECK = ("quantizer", "quantizer_embed_type", "quantizer_l2_norm")


def unshown(config: TextConfig | VisionConfig, *, bottleneck: bool = False) -> dict[str, Any]:
    """The settings of a tower that affect what it computes but do not show in its tensors."""
    names = (*_UNSHOWN, *(_UNSHOWN_BOTTLENECK if bottleneck else ()))
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


# -- strict reading ----------------------------------------------------------------------------


def _from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "written"}
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key in fields:
            known[key] = _typed(fields[key], value, f"{where}{key}")
        elif key not in BOOKKEEPING:
            raise unknown_key(key, where, fields, "the model config")
    try:
        return cls(**known, written=dict(values))
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def _typed(spec: dataclasses.Field, value: Any, name: str) -> Any:
    kind = str(spec.type)  # annotations are strings here
    nested = {cls.__name__: cls for cls in (QuantizerConfig, TextConfig, VisionConfig)}
    if kind in nested:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a JSON object, got {value!r}")
        return _from_dict(nested[kind], value, f"{name}.")
    return scalar(kind, value, name)


def _to_dict(config: Any) -> dict[str, Any]:
    defaults = type(config)()
    out: dict[str, Any] = {k: v for k, v in config.written.items() if k in BOOKKEEPING}
    for spec in dataclasses.fields(config):
        if spec.name == "written":
            continue
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            inner = _to_dict(value)
            if inner or spec.name in config.written:
                out[spec.name] = inner
        elif spec.name in config.written:
            out[spec.name] = value
        elif spec.name == "hidden_size_post_q":
            # If absent, it is read as hidden_size.
            if value != config.hidden_size:
                out[spec.name] = value
        elif value != getattr(defaults, spec.name):
            out[spec.name] = value
    return out


def _sorted(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _sorted(values[k]) for k in sorted(values)}
    return values


def _check_tower(config: Any) -> None:
    """The errors of this and the checks below name no tower; `_from_dict` adds it."""
    check_positive(
        config,
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "layer_norm_eps",
    )
    check_one_of(config, "hidden_act", ACTIVATIONS)
    if config.num_hidden_layers > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers (={config.num_hidden_layers}) is over {MAX_LAYERS}")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"num_attention_heads (={config.num_attention_heads}) must divide "
            f"hidden_size (={config.hidden_size})"
        )


# -- presets -----------------------------------------------------------------------------------


def _preset(
    width: int,
    intermediate: int,
    layers: int,
    heads: int,
    patch: int,
    size: int,
    text: TextConfig,
    projection: int,
) -> QLIPConfig:
    tower: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
        "k_bias": False,
        "subln": True,
        "swiglu": True,
        "rope": True,
    }
    return QLIPConfig(
        text_config=text,
        vision_config=VisionConfig(
            **tower,
            projection_dim=projection,
            quantizer="bsq",
            quantizer_l2_norm=True,
            quantizer_embed_type="mlp",
            quantizer_cfg=QuantizerConfig(embed_dim=28, group_size=14, input_format="blc"),
        ),
        decoder_config=VisionConfig(**tower),
        projection_dim=projection,
    )


_TEXT_L = TextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
)
_TEXT_TINY = TextConfig(
    vocab_size=1000,
    hidden_size=32,
    intermediate_size=64,
    projection_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=999,
    bos_token_id=998,
    eos_token_id=999,
)

PRESETS: Mapping[str, QLIPConfig] = {
    "qlip-b-16-256": _preset(768, 2048, 12, 12, 16, 256, TextConfig(), 512),
    "qlip-b-8-256": _preset(768, 2048, 12, 12, 8, 256, TextConfig(), 512),
    "qlip-l-14-392": _preset(1024, 2730, 24, 16, 14, 392, _TEXT_L, 768),
    "tiny": _preset(64, 128, 2, 4, 8, 64, _TEXT_TINY, 48),
}
