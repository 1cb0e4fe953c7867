"""Configuration of a generator: the language model over visual tokens (SPEC section 4).

A generator is a folder of two files, `config.json` (this) and `model.safetensors`
(`qlip_core.generator.architecture`), usually the folder `generator/` inside a tokenizer's.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlip_core.config import MAX_LAYERS, MAX_LENGTH, QLIPConfig
from qlip_core.errors import ConfigError, GenerationError
from qlip_core.generator.sampling import Sampling
from qlip_core.strict import check_one_of, check_positive, read_json, scalar, unknown_key

MODEL_TYPE = "qlip_generator"
CONDITIONERS = ("none", "qlip-text", "t5")
ROPES = ("grid", "sequence")


@dataclass(frozen=True)
class GeneratorConfig:
    """A decoder-only transformer in Llama's form; keys of the transformer are Hugging Face Llama's.

    A picture is M = h*w*n sub-tokens in raster order, n = `sub_tokens` per patch, each with
    2^`group_size` values. It follows a prefix of T = `prefix_length` embeddings.

    `rope` "grid" rotates one half of a head by the patch's row and the other by its column, with zero angles
    on the prefix; "sequence" is Llama's own, by the position in the sequence. With
    `separate_sub_tokens` each of the n sub-tokens has its own rows in the embedding and output tables
    (they mean different bits); without, all share 2^g rows, as in LlamaGen's and UM3's single visual
    vocabulary, and an embedding of the sub-token's number is added to the input.

    `text_vocab_size` rows for text tokens precede the visual ones in both tables, for the unified model of
    SPEC section 5, which also reads and writes text; 0 in a generator of pictures only.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0 stands for "absent": as many as num_attention_heads
    intermediate_size: int = 0  # 0 stands for "absent": `default_intermediate`
    rms_norm_eps: float = 1e-5
    rope: str = "grid"
    rope_theta: float = 10000.0
    qk_norm: bool = False
    grid: tuple[int, int] = (16, 16)
    group_size: int = 14
    sub_tokens: int = 2
    separate_sub_tokens: bool = False
    text_vocab_size: int = 0
    conditioner: str = "qlip-text"
    condition_size: int = 512
    prefix_length: int = 77
    t5_model: str = "google/flan-t5-xl"
    dropout: float = 0.1
    null_probability: float = 0.1
    tokenizer: str = ""  # fingerprint of the tokenizer it was trained for; empty: any that fits
    text_tower: str = ""  # fingerprint of the text tower whose captions it knows; empty: any
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        check_positive(
            self,
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "group_size",
            "sub_tokens",
            "rms_norm_eps",
            "rope_theta",
        )
        for name in ("num_key_value_heads", "intermediate_size", "text_vocab_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} (={getattr(self, name)}) must not be negative")
        if self.num_key_value_heads == 0:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.intermediate_size == 0:
            object.__setattr__(self, "intermediate_size", default_intermediate(self.hidden_size))
        if self.num_hidden_layers > MAX_LAYERS:
            raise ConfigError(f"num_hidden_layers (={self.num_hidden_layers}) is over {MAX_LAYERS}")
        self._check_heads()
        self._check_image()
        self._check_conditioner()
        for name in ("dropout", "null_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} (={getattr(self, name)}) must be in [0, 1)")
        try:
            self.sampling.check(self.visual_vocab_size)
        except GenerationError as error:
            raise ConfigError(f"sampling: {error}") from None

    def _check_heads(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ConfigError(
                f"num_attention_heads (={heads}) must divide hidden_size (={self.hidden_size})"
            )
        if heads % groups:
            raise ConfigError(
                f"num_key_value_heads (={groups}) must divide num_attention_heads (={heads})"
            )
        check_one_of(self, "rope", ROPES)
        parts = 4 if self.rope == "grid" else 2
        if self.head_dim % parts:
            raise ConfigError(
                f'rope "{self.rope}" needs a head width divisible by {parts}, got {self.head_dim} '
                f"(hidden_size {self.hidden_size} / num_attention_heads {heads})"
            )

    def _check_image(self) -> None:
        if min(self.grid) < 1:
            raise ConfigError(f"grid (={list(self.grid)}) must be at least 1x1")
        if self.group_size > 24 or self.code_dim > MAX_LENGTH:
            raise ConfigError(
                f"group_size (={self.group_size}) must be at most 24, and {self.sub_tokens} "
                f"sub-tokens of it at most {MAX_LENGTH} bits"
            )

    def _check_conditioner(self) -> None:
        check_one_of(self, "conditioner", CONDITIONERS)
        if self.conditioner != "none":
            check_positive(self, "prefix_length", "condition_size")
        elif self.rope == "grid":
            raise ConfigError('rope "grid" needs a prefix to start from, but conditioner is "none"')

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def head_dim(self) -> int:
        """d: width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def code_dim(self) -> int:
        """L: bits per patch."""
        return self.group_size * self.sub_tokens

    @property
    def visual_vocab_size(self) -> int:
        """V: values of a sub-token, 2^g."""
        return 1 << self.group_size

    @property
    def visual_rows(self) -> int:
        """Rows of the embedding and output tables that are visual."""
        return self.visual_vocab_size * (self.sub_tokens if self.separate_sub_tokens else 1)

    @property
    def tokens_per_row(self) -> int:
        """Sub-tokens of one row of patches."""
        return self.grid[1] * self.sub_tokens

    @property
    def tokens_per_image(self) -> int:
        """M."""
        return self.grid[0] * self.tokens_per_row

    @property
    def sequence_length(self) -> int:
        """T + M - 1 positions, since the last sub-token is never an input."""
        return self.prefix_length + self.tokens_per_image - 1

    def first_row(self, number: int) -> int:
        """The row of both tables that is value 0 of sub-token `number` of a patch."""
        return self.text_vocab_size + self.separate_sub_tokens * number * self.visual_vocab_size

    # -- fitting a tokenizer -------------------------------------------------------------------

    def fitted(
        self, tokenizer: QLIPConfig, fingerprint: str = "", text_fingerprint: str = ""
    ) -> GeneratorConfig:
        """This generator adapted to the pictures of `tokenizer`: its grid, its L bits as sub-tokens of
        `group_size` bits, and, with "qlip-text", its text tower's width, with a prefix no longer than
        its texts. A T5 in a folder is named by its absolute path. The fingerprints are `Checkpoint.fingerprint`
        and `text_fingerprint`. Raises ConfigError if `group_size` does not divide L."""
        bits = tokenizer.code_dim
        if not tokenizer.quantizes or bits % self.group_size:
            have = f"{bits} bits" if tokenizer.quantizes else "no bits"
            raise ConfigError(
                f"group_size (={self.group_size}) must divide the tokenizer's bits per patch ({have})"
            )
        text, ours = tokenizer.text_config, self.conditioner == "qlip-text"
        t5 = Path(self.t5_model).expanduser()
        return dataclasses.replace(
            self,
            grid=tokenizer.grid,
            sub_tokens=bits // self.group_size,
            condition_size=text.hidden_size if ours else self.condition_size,
            prefix_length=min(self.prefix_length, text.max_position_embeddings)
            if ours
            else self.prefix_length,
            t5_model=os.path.abspath(t5) if t5.is_dir() else self.t5_model,
            tokenizer=fingerprint,
            text_tower=text_fingerprint if ours else "",
        )

    def misfit(self, tokenizer: QLIPConfig) -> str:
        """Why this generator's sub-tokens are not `tokenizer`'s, in a few words; empty if they are."""
        bits = tokenizer.code_dim if tokenizer.quantizes else 0
        if (self.grid, self.code_dim) != (tokenizer.grid, bits):
            h, w = tokenizer.grid
            return (
                f"it draws {self.code_dim} bits per patch on {self.grid[0]}x{self.grid[1]} patches, "
                f"the tokenizer has {bits} on {h}x{w}"
            )
        text = tokenizer.text_config
        if self.conditioner == "qlip-text" and self.condition_size != text.hidden_size:
            return (
                f"it takes caption features {self.condition_size} wide, the text tower's are "
                f"{text.hidden_size}"
            )
        if self.conditioner == "qlip-text" and self.prefix_length > text.max_position_embeddings:
            return (
                f"its prefix has {self.prefix_length} tokens, the text tower at most "
                f"{text.max_position_embeddings}"
            )
        return ""

    # -- reading and writing -------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorConfig:
        """Build from the content of a `config.json`. Raises ConfigError for an unknown key (naming the nearest
        known one), a missing one without a default, a wrong type, or sizes that fit no model."""
        values = dict(values)
        model_type = values.pop("model_type", None)
        if model_type != MODEL_TYPE:
            raise ConfigError(
                f'model_type is "{model_type}", expected "{MODEL_TYPE}": not a generator\'s config'
            )
        return _read(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`: every key."""
        changed = {"grid": list(self.grid), "sampling": self.sampling.to_dict()}
        return {"model_type": MODEL_TYPE} | dataclasses.asdict(self) | changed

    @classmethod
    def from_file(cls, path: str | Path) -> GeneratorConfig:
        return read_json(path, "a generator", cls.from_dict)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def default_intermediate(hidden_size: int) -> int:
    """Llama 2's width of SwiGLU: 2/3 * 4 * D, up to a multiple of 256."""
    return -(-(8 * hidden_size // 3) // 256) * 256


# -- strict reading ----------------------------------------------------------------------------


def _read(cls: type, values: Mapping[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown_key(key, where, fields, "the generator's config")
        known[key] = _typed(str(fields[key].type), value, where + key)
    needed = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if absent := [where + name for name in needed if name not in known]:
        raise ConfigError(f"keys missing from the generator's config: {', '.join(absent)}")
    return cls(**known)


def _typed(kind: str, value: Any, name: str) -> Any:
    if kind == "Sampling":
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a JSON object, got {value!r}")
        return _read(Sampling, value, f"{name}.")
    if kind.startswith("tuple"):
        inner = "int" if "int" in kind else "float"
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ConfigError(f"{name} must be two numbers, got {value!r}")
        return tuple(_typed(inner, item, name) for item in value)
    return scalar(kind, value, name)


# -- presets -----------------------------------------------------------------------------------

# LlamaGen's settings: guidance 7.5, the 1,000 likeliest values.
_LLAMAGEN = Sampling(cfg_scale=7.5, top_k=1000)


def _llamagen(layers: int, heads: int, width: int) -> GeneratorConfig:
    return GeneratorConfig(width, layers, heads, sampling=_LLAMAGEN)


PRESETS: Mapping[str, GeneratorConfig] = {
    # LlamaGen's sizes over QLIP-B-16-256, with its text tower (512 wide, 77 tokens) for captions.
    "B": _llamagen(12, 12, 768),
    "L": _llamagen(24, 16, 1024),
    "XL": _llamagen(36, 20, 1280),
    "XXL": _llamagen(48, 24, 1536),
    "3B": _llamagen(24, 32, 3200),
    # Small enough to ship: 96 px in patches of 8, four sub-tokens of 7 bits with rows of their own.
    "emoji": GeneratorConfig(
        320,
        8,
        5,
        intermediate_size=864,
        grid=(12, 12),
        group_size=7,
        sub_tokens=4,
        separate_sub_tokens=True,
        condition_size=192,
        prefix_length=32,
        sampling=Sampling(cfg_scale=3.0),
    ),
}
