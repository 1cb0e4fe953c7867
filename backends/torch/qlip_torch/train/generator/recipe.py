"""The recipe of a generator: the tokenizer it is made for, its sizes, its data, its steps.

As strict as the tokenizer's (qlip_torch.train.recipe), and distinguished from it by `kind = "generator"`.
SPEC section 4 has LlamaGen's numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qlip_core.errors import ConfigError, RecipeError
from qlip_core.generator.config import PRESETS, GeneratorConfig
from qlip_core.generator.sampling import Sampling, check_seed
from qlip_torch.train.data import DataConfig
from qlip_torch.train.recipe import CheckpointRecipe, EngineRecipe, StepsRecipe, given_only
from qlip_torch.train.recipe_file import GENERATOR, RecipeFile, find_recipe
from qlip_torch.train.strict import at_least


@dataclass(frozen=True)
class GeneratorModelRecipe:
    """A preset of qlip_core.generator.config, and changes to it."""

    preset: str = "emoji"
    width: int | None = None
    intermediate: int | None = None
    layers: int | None = None
    heads: int | None = None
    key_value_heads: int | None = None
    qk_norm: bool | None = None
    group_size: int | None = None
    """Bits of a sub-token; must divide the tokenizer's bits per patch."""
    separate_sub_tokens: bool | None = None
    conditioner: Literal["qlip-text", "t5"] = "qlip-text"
    prefix_length: int | None = None
    """Tokens of a caption; with "qlip-text" at most the text tower's."""
    t5_model: str | None = None
    condition_size: int | None = None
    """Width of T5's features; with "qlip-text" it is the text tower's."""
    dropout: float = 0.1
    null_probability: float = 0.1
    """Probability that the null prefix replaces a caption, which guidance needs."""
    sampling: Sampling | None = None
    """Default settings for drawing; written into the generator."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise RecipeError(f"preset {self.preset!r}: there are {', '.join(PRESETS)}")
        self.config()

    def config(self) -> GeneratorConfig:
        """The generator before it is fitted to a tokenizer. Raises RecipeError for impossible sizes."""
        sizes = given_only(
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            qk_norm=self.qk_norm,
            group_size=self.group_size,
            separate_sub_tokens=self.separate_sub_tokens,
            prefix_length=self.prefix_length,
            t5_model=self.t5_model,
            condition_size=self.condition_size,
            sampling=self.sampling,
        )
        # Sizes that follow from a changed one are derived again, not kept from the preset.
        if self.width is not None:
            sizes.setdefault("intermediate_size", 0)
        if self.heads is not None:
            sizes.setdefault("num_key_value_heads", 0)
        try:
            return dataclasses.replace(
                PRESETS[self.preset],
                conditioner=self.conditioner,
                dropout=self.dropout,
                null_probability=self.null_probability,
                **sizes,
            )
        except ConfigError as error:
            raise RecipeError(str(error)) from None


@dataclass(frozen=True)
class GeneratorDataRecipe:
    """Token shards from `qlip tokenize`, or captioned images that the tokenizer encodes during training.

    `tokens` is a folder, file or pattern of shards; if empty, `images` is used. `flip` is the probability of
    taking a picture's mirror image, if the shards have them; images have a `flip` of their own.
    """

    tokens: str = ""
    flip: float = 0.5
    images: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise RecipeError(f"flip (={self.flip}) must be a chance from 0 to 1")


@dataclass(frozen=True)
class GeneratorStepsRecipe(StepsRecipe):
    """AdamW with warm-up and cosine: LlamaGen's values, SPEC section 4."""

    batch: int = 256
    micro_batch: int = 256
    clip: float = 1.0
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "learning_rate")


@dataclass(frozen=True)
class GeneratorLogRecipe:
    """How often things are logged, in steps; 0 is never. Each time, pictures of `prompts` are drawn with `seed`."""

    metrics: int = 10
    pictures: int = 1000
    prompts: tuple[str, ...] = ("a cat", "a red apple", "a tree", "a car", "a house", "a fish", "")
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "metrics")
        at_least(self, 0, "pictures")
        check_seed(self.seed)
        if self.pictures and not self.prompts:
            raise RecipeError(
                "prompts is empty: give at least one, or set pictures = 0 to draw none"
            )


@dataclass(frozen=True)
class GeneratorRecipe(RecipeFile):
    """A whole run of a generator's training."""

    KIND = GENERATOR

    kind: Literal["generator"] = "generator"
    name: str = ""
    description: str = ""
    devices: int = 1
    """Number of devices the sizes are meant for."""
    seed: int = 0
    """Seed of initial weights, dropout, dropped captions, and the order of token shards."""
    tokenizer: str = ""
    """The QLIP checkpoint it is made for: a folder or hub id; empty: the one that comes with qlip."""
    tokenizer_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type in which the frozen tokenizer encodes images and captions."""
    start: str = ""
    """A generator of the same sizes to continue from: its folder, or a model that has one (also "bundled"). Only
    its weights are used; it may have been made for another tokenizer. Empty: random weights."""
    model: GeneratorModelRecipe = field(default_factory=GeneratorModelRecipe)
    data: GeneratorDataRecipe = field(default_factory=GeneratorDataRecipe)
    training: GeneratorStepsRecipe = field(default_factory=GeneratorStepsRecipe)
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    log: GeneratorLogRecipe = field(default_factory=GeneratorLogRecipe)
    checkpoints: CheckpointRecipe = field(default_factory=CheckpointRecipe)

    def __post_init__(self) -> None:
        at_least(self, 1, "devices")
        at_least(self, 0, "seed")

    @classmethod
    def load(
        cls, name: str | Path = "generator-emoji", changes: Iterable[str] = ()
    ) -> GeneratorRecipe:
        """A shipped recipe by its name or any by its path, with `changes` ("a.b=c") applied."""
        return cls.from_file(find_recipe(name, GENERATOR)).changed(changes)
