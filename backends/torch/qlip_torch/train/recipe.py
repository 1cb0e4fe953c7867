"""A recipe: everything that decides a training run, as one tree of frozen dataclasses read from TOML.

Strict: an unknown key is an error that names it and the nearest valid one; so is a value of the wrong
type. `--set a.b=c` changes one value. SPEC section 3 has the paper's numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlip_core.config import PRESETS, QLIPConfig
from qlip_core.errors import ConfigError, RecipeError
from qlip_torch.train.data import DataConfig
from qlip_torch.train.recipe_file import TOKENIZER, RecipeFile, find_recipe
from qlip_torch.train.strict import at_least

# -- the model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerRecipe:
    """Sizes of a tower; the preset's where not given."""

    width: int | None = None
    intermediate: int | None = None
    layers: int | None = None
    heads: int | None = None


@dataclass(frozen=True)
class TextRecipe(TowerRecipe):
    """Sizes of the text tower; `context` is its number of positions."""

    context: int | None = None
    vocabulary: int | None = None
    """Size of the vocabulary to train ("emoji"); otherwise it is that of the files."""


@dataclass(frozen=True)
class ModelRecipe:
    """The model: a preset of qlip_core.config, and changes to it."""

    preset: str = "qlip-b-16-256"
    tokenizer: str = ""
    """"emoji" (trained on the emoji set's captions), or a folder with vocab.json and merges.txt."""
    image_size: int | None = None
    patch_size: int | None = None
    projection_dim: int | None = None
    bits: int | None = None
    group_size: int | None = None
    inv_temperature: float | None = None
    beta: float | None = None
    gamma_0: float | None = None
    gamma_1: float | None = None
    encoder: TowerRecipe = field(default_factory=TowerRecipe)
    decoder: TowerRecipe = field(default_factory=TowerRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise RecipeError(f"preset {self.preset!r}: there are {', '.join(PRESETS)}")
        self.config()

    def config(self, **special_ids: int) -> QLIPConfig:
        """The published configuration; `special_ids` are pad_token_id, bos_token_id, eos_token_id.

        Raises RecipeError for sizes that fit no model.
        """
        base = PRESETS[self.preset]
        given = given_only(
            vocab_size=self.text.vocabulary, max_position_embeddings=self.text.context
        )
        vocabulary = self.text.vocabulary
        if vocabulary is not None and not special_ids:
            # Placeholders inside the vocabulary; a tokenizer has its own.
            special_ids = {f"{kind}_token_id": vocabulary - 1 for kind in ("pad", "bos", "eos")}
        projection = given_only(projection_dim=self.projection_dim)
        images = given_only(image_size=self.image_size, patch_size=self.patch_size)
        quantizer = given_only(
            embed_dim=self.bits,
            group_size=self.group_size,
            inv_temperature=self.inv_temperature,
            beta=self.beta,
            gamma_0=self.gamma_0,
            gamma_1=self.gamma_1,
        )
        vision, decoder, text = base.vision_config, base.decoder_config, base.text_config
        try:
            decoder = dataclasses.replace(
                decoder, **_sizes(self.decoder), **images, **_post(self.decoder.width)
            )
            return dataclasses.replace(
                base,
                **projection,
                decoder_config=decoder,
                text_config=dataclasses.replace(
                    text, **_sizes(self.text), **given, **special_ids, **projection
                ),
                vision_config=dataclasses.replace(
                    vision,
                    **_sizes(self.encoder),
                    **images,
                    **projection,
                    hidden_size_post_q=decoder.hidden_size,
                    quantizer_cfg=dataclasses.replace(vision.quantizer_cfg, **quantizer),
                ),
            )
        except ConfigError as error:
            raise RecipeError(str(error)) from None


def given_only(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _sizes(tower: TowerRecipe) -> dict[str, Any]:
    return given_only(
        hidden_size=tower.width,
        intermediate_size=tower.intermediate,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
    )


def _post(width: int | None) -> dict[str, Any]:
    return {} if width is None else {"hidden_size_post_q": width}


@dataclass(frozen=True)
class StartRecipe:
    """Where the initial weights come from; random if nothing is given (SPEC section 3)."""

    checkpoint: str = ""
    """A QLIP checkpoint to continue from: its weights, all of them."""
    encoder: str = ""
    """Safetensors of EVA-02 (timm's names) or EVA-CLIP (open_clip's names) for the encoder."""
    text: str = ""
    """Safetensors of EVA-CLIP (open_clip's names) for the text tower."""

    def __post_init__(self) -> None:
        if self.checkpoint and (self.encoder or self.text):
            raise RecipeError(
                "checkpoint and encoder/text exclude each other: give one or the other"
            )


# -- the stages --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatesRecipe:
    """Learning rates of the parameter groups (`qlip_torch.train.optimizers.group_of`).

    encoder: the visual encoder, its class token, position table and last norm. text: the text tower and its
    projection. decoder: the visual decoder. rest: the image side's projection, the bottleneck's two MLPs and the
    logit scale.
    """

    rest: float = 5e-4
    encoder: float = 2e-4
    text: float = 2e-5
    decoder: float = 2e-3

    def __post_init__(self) -> None:
        at_least(self, 0, "rest", "encoder", "text", "decoder")

    @property
    def by_group(self) -> dict[str, float]:
        """By the names of `qlip_torch.train.optimizers.GROUPS`."""
        return {
            "rest": self.rest,
            "visual_encoder": self.encoder,
            "text_encoder": self.text,
            "decoder": self.decoder,
        }


@dataclass(frozen=True)
class StepsRecipe:
    """Steps of an optimizer. `batch` is the global one; `micro_batch` what one forward takes."""

    steps: int = 120_000
    batch: int = 65_536
    micro_batch: int = 512
    warmup: int = 2_000
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 5.0
    ema: float = 0.0
    """Decay of the moving average of the weights that is exported instead of them; 0 is none."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch", "micro_batch")
        at_least(self, 0, "warmup", "weight_decay")
        if self.clip <= 0:
            raise RecipeError(f"clip (={self.clip}) must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"betas (={self.betas}) are decays: 0 to below 1")
        if not 0 <= self.ema < 1:
            raise RecipeError(f"ema (={self.ema}) is a decay: 0 (none) to below 1")
        if self.batch % self.micro_batch and self.micro_batch < self.batch:
            raise RecipeError(
                f"micro_batch (={self.micro_batch}) must divide batch (={self.batch})"
            )

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of each of `ranks` devices in a step. Raises RecipeError if they do not divide evenly."""
        if self.batch % ranks:
            raise RecipeError(f"batch (={self.batch}) does not divide over {ranks} processes")
        each = self.batch // ranks
        micro = min(self.micro_batch, each)
        if each % micro:
            raise RecipeError(
                f"micro_batch (={self.micro_batch}) must divide each process's share of the batch "
                f"({self.batch} / {ranks} = {each})"
            )
        return each // micro


@dataclass(frozen=True)
class StageRecipe(StepsRecipe):
    """Settings common to both stages."""

    mse: float = 1.0
    """a_r"""
    bsq: float = 1.0
    """a_q"""
    commitment: float = 0.0
    """a_z"""
    learning_rate: RatesRecipe = field(default_factory=RatesRecipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "mse", "bsq", "commitment")
        if not any(self.learning_rate.by_group.values()):
            raise RecipeError("learning_rate: every rate is 0, so nothing would be trained")

    @property
    def idle(self) -> tuple[str, ...]:
        """The parts of the model (`qlip_core.architecture.PARTS`) that no loss asks for."""
        return ()

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that gradients reach and a rate is given for."""
        rates = self.learning_rate
        given = {
            "text": rates.text,
            "encoder": rates.encoder,
            "down": rates.rest,
            "up": rates.rest,
            "decoder": rates.decoder,
        }
        return tuple(part for part, rate in given.items() if rate and part not in self.idle)


@dataclass(frozen=True)
class Stage1Recipe(StageRecipe):
    """Reconstruction and alignment together, LAMB (SPEC section 3)."""

    mse: float = 1e3
    align: float = 1.0
    """a_a"""
    commitment: float = 1.0
    max_logit_scale: float = 100.0
    """The largest exp(logit_scale)."""
    optimizer: Literal["lamb", "adamw"] = "lamb"
    """LAMB is the paper's, for batches of tens of thousands; AdamW learns faster from small ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "align")
        at_least(self, 1, "max_logit_scale")
        if not (self.align or self.bsq or self.decodes):
            raise RecipeError("align, mse, bsq and commitment are all 0: nothing is minimised")
        if not self.trained:
            raise RecipeError(
                "learning_rate: no loss asks for the parts whose rate is above 0, so nothing would be trained"
            )

    @property
    def idle(self) -> tuple[str, ...]:
        """The parts of the model (`qlip_core.architecture.PARTS`) that no loss asks for."""
        out = () if self.align else ("text",)
        if self.decodes:
            return out
        return (*out, "up", "decoder") if self.bsq else (*out, "down", "up", "decoder")

    @property
    def decodes(self) -> bool:
        """Whether any loss asks for the decoder."""
        return bool(self.mse or self.commitment)


@dataclass(frozen=True)
class DiscriminatorRecipe:
    """The discriminator of stage 2: StyleGAN's, non-saturating, lazy R1 (SPEC section 3)."""

    learning_rate: float = 1e-4
    base_channels: int = 32768
    max_channels: int = 512
    r1_weight: float = 10.0
    r1_every: int = 16
    start: int = 0
    """First step at which it affects the generator's loss; it trains from step 0."""

    def __post_init__(self) -> None:
        at_least(self, 0, "learning_rate", "r1_weight", "start")
        at_least(self, 1, "r1_every", "base_channels", "max_channels")


@dataclass(frozen=True)
class Stage2Recipe(StageRecipe):
    """Bottleneck and decoder only, with perceptual and adversarial losses, AdamW."""

    batch: int = 16_384
    micro_batch: int = 128
    clip: float = 1.0
    lpips: float = 0.1
    """a_p"""
    ssim: float = 0.0
    """Weight of 1 - SSIM, which is not in the paper: for machines without LPIPS' weights."""
    perceptual: str = ""
    """Weights of LPIPS: a file, folder or hub id, or "random" (not LPIPS: for machines without)."""
    gan: float = 0.1
    """a_g"""
    start: str = ""
    """Stage-1 result: a run folder or a checkpoint; by default this run's own."""
    discriminator: DiscriminatorRecipe = field(default_factory=DiscriminatorRecipe)
    learning_rate: RatesRecipe = field(
        default_factory=lambda: RatesRecipe(rest=5e-4, encoder=0.0, text=0.0, decoder=1e-4)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "lpips", "gan", "ssim")
        if self.learning_rate.encoder or self.learning_rate.text:
            raise RecipeError(
                "learning_rate.encoder and .text must be 0: stage 2 keeps both towers as they are"
            )

    def check_weights(self) -> None:
        """Raises RecipeError if LPIPS is used and its weights are not named. Called only before stage 2 runs,
        since a recipe for stage 1 alone need not name them."""
        if self.lpips and not self.perceptual:
            raise RecipeError(
                "stage2.lpips is not 0 and stage2.perceptual names no weights: give a safetensors file, "
                'perceptual = "random" for a stand-in, or lpips = 0'
            )


# -- the rest ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineRecipe:
    """How the computation runs: this may change speed, memory and rounding, not the mathematics."""

    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast: weights, quantizer, norms and losses stay float32. auto: on CUDA."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    cpu_offload: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    tf32: bool = False
    """TensorFloat-32 in the float32 matrix products of a step on CUDA; cuDNN's convolutions always use it."""

    def __post_init__(self) -> None:
        if self.cpu_offload and self.parallel != "fsdp":
            raise RecipeError('cpu_offload needs parallel = "fsdp"')


@dataclass(frozen=True)
class LogRecipe:
    """How often things are logged, in steps; 0 is never."""

    metrics: int = 10
    gradients: int = 100
    pictures: int = 500
    picture_count: int = 8
    held_out: str = ""
    """A set that training does not see: a folder, tars or parquet. Its first pictures show the run's progress,
    and the first `held_out_count` are measured at the end. By default: the emoji set's own held-out pictures,
    or for other data some training pictures and no measurement."""
    held_out_count: int = 1000

    def __post_init__(self) -> None:
        at_least(self, 0, "gradients", "pictures")
        at_least(self, 1, "metrics", "picture_count", "held_out_count")
        if self.held_out.partition("?")[0] == "emoji":
            raise RecipeError(
                "held_out: the emoji set's held-out pictures are measured anyway; name a set stored in files"
            )


@dataclass(frozen=True)
class CheckpointRecipe:
    every: int = 1000
    keep: int = 2
    background: bool = True
    """Write while training continues."""
    grace_seconds: float = 20.0
    """After SIGTERM: how long a checkpoint may take before the process ends without it."""

    def __post_init__(self) -> None:
        at_least(self, 1, "every", "keep", "grace_seconds")


@dataclass(frozen=True)
class Recipe(RecipeFile):
    """A whole run of the tokenizer's training."""

    KIND = TOKENIZER

    name: str = ""
    description: str = ""
    devices: int = 1
    """Number of devices the sizes are meant for."""
    seed: int = 0
    model: ModelRecipe = field(default_factory=ModelRecipe)
    start: StartRecipe = field(default_factory=StartRecipe)
    data: DataConfig = field(default_factory=DataConfig)
    stage1: Stage1Recipe = field(default_factory=Stage1Recipe)
    stage2: Stage2Recipe = field(default_factory=Stage2Recipe)
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)
    checkpoints: CheckpointRecipe = field(default_factory=CheckpointRecipe)

    def __post_init__(self) -> None:
        at_least(self, 1, "devices")
        at_least(self, 0, "seed")

    @classmethod
    def load(cls, name: str | Path = "emoji", changes: Iterable[str] = ()) -> Recipe:
        """A shipped recipe by its name or any by its path, with `changes` ("a.b=c") applied."""
        return cls.from_file(find_recipe(name)).changed(changes)
