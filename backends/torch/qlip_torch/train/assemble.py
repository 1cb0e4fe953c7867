"""From a recipe to what a stage starts with: tokenizer, configuration, initial weights, fixed pictures."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip_core.architecture import architecture
from qlip_core.checkpoint import Checkpoint, open_checkpoint
from qlip_core.config import QLIPConfig
from qlip_core.data.captions import caption_corpus
from qlip_core.data.samples import Bad, Limits
from qlip_core.data.shards import open_source
from qlip_core.data.vocabulary import train_bpe
from qlip_core.errors import CheckpointError, DataError, ImageError, RecipeError
from qlip_core.evaluation.examples import StoredExamples
from qlip_core.hub import from_hub
from qlip_core.images import open_image
from qlip_core.preprocessing import CLIP_MEAN, CLIP_STD, resize_and_crop
from qlip_core.text import FILES as TOKENIZER_FILES
from qlip_core.text import Tokenizer
from qlip_torch.train.data import DataConfig, Loader, Source, make_loader
from qlip_torch.train.distributed import World
from qlip_torch.train.initialise import initialise
from qlip_torch.train.recipe import LogRecipe, Recipe, StageRecipe
from qlip_torch.train.run_folder import stage1_model
from qlip_torch.train.sources import is_emoji, open_training_source


@dataclass(frozen=True)
class Start:
    """What a stage begins with. `weights` are float32 by published name."""

    config: QLIPConfig
    weights: dict[str, np.ndarray]
    tokenizer: Tokenizer
    tokenizer_folder: Path
    origin: tuple[str, ...]
    """Where the weights come from, as lines of the plan."""


def write_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Train the vocabulary if the recipe asks for one, and write it to the run's folder, whole or not at all.

    Raises RecipeError if its size is not given, or is more than the captions yield.
    """
    model = recipe.model
    if model.tokenizer != "emoji":
        return
    size = model.text.vocabulary
    if size is None:
        raise RecipeError(
            'model.tokenizer = "emoji" trains a vocabulary: give its size as model.text.vocabulary'
        )
    length = model.config().text_config.max_position_embeddings
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    found = train_bpe(caption_corpus(), size, part, context_length=length)
    if found != size:
        raise RecipeError(
            f"model.text.vocabulary (={size}): the emoji captions have no more than {found} tokens"
        )
    part.rename(folder)


def tokenizer_folder(recipe: Recipe, folder: Path) -> Path:
    """Where the recipe's tokenizer files are; `folder` is where `write_tokenizer` wrote."""
    if recipe.model.tokenizer == "emoji":
        return folder
    if not recipe.model.tokenizer:
        raise RecipeError(
            'model.tokenizer is empty: give "emoji", or a folder with vocab.json and merges.txt'
        )
    path = Path(recipe.model.tokenizer)
    if path.is_dir():
        return path
    try:
        return from_hub(recipe.model.tokenizer, wanted=TOKENIZER_FILES)
    except CheckpointError as error:
        raise RecipeError(f"model.tokenizer: {error}") from None


def first_start(recipe: Recipe, folder: Path) -> Start:
    """Stage 1's beginning: the recipe's model, random or from `start`."""
    if recipe.start.checkpoint:
        found = open_checkpoint(stage1_model(recipe.start.checkpoint))
        start = start_from(found, recipe.start.checkpoint)
        if other := _difference(recipe.model.config(), start.config):
            note = f"the sizes are the checkpoint's, not the recipe's [model]: {other}"
            start = dataclasses.replace(start, origin=(*start.origin, note))
        return start
    if not recipe.stage1.learning_rate.encoder and not recipe.start.encoder:
        raise RecipeError(
            "stage1.learning_rate.encoder is 0, and the encoder would stay random: give start.checkpoint "
            "(a trained QLIP) or start.encoder"
        )
    files = tokenizer_folder(recipe, folder)
    tokenizer = Tokenizer.from_folder(files, recipe.model.config().text_config)
    if tokenizer is None:
        raise RecipeError(f"model.tokenizer: {files} has no vocab.json and merges.txt")
    ids = {}
    if recipe.model.text.vocabulary is not None:
        ids = {
            "pad_token_id": tokenizer.pad,
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end,
        }
    config = recipe.model.config(**ids)
    start = recipe.start
    weights, report = initialise(config, start.encoder, start.text, recipe.seed)
    lines = report.lines() if start.encoder or start.text else [f"random, seed {recipe.seed}"]
    return Start(config, weights, tokenizer, files, tuple(lines))


def _difference(ours: QLIPConfig, theirs: QLIPConfig) -> str:
    """The first size in which two models differ, the tokenizer's excepted; empty if none."""
    if ours.image_size != theirs.image_size:
        return f"{theirs.image_size} pixels, not {ours.image_size}"
    mine, other = architecture(ours), architecture(theirs)
    for name in sorted(mine.keys() | other.keys()):
        if "token_embedding" in name:
            continue
        a, b = (list(table[name].shape) if name in table else "absent" for table in (other, mine))
        if a != b:
            return f"{name} is {a}, not {b}"
    return ""


def start_from(checkpoint: Checkpoint, origin: str) -> Start:
    """A start from a QLIP checkpoint. Raises RecipeError as `check_start` does."""
    tokenizer = check_start(checkpoint, origin)
    return Start(checkpoint.config, checkpoint.tensors(), tokenizer, checkpoint.folder, (origin,))


def check_start(checkpoint: Checkpoint, origin: str) -> Tokenizer:
    """The tokenizer of a checkpoint to continue from. Raises RecipeError if it has none, or if the checkpoint
    normalises pixels differently or was made for another loss."""
    if checkpoint.tokenizer is None:
        raise RecipeError(f"{origin}: has no tokenizer files, and training reads captions")
    found = checkpoint.preprocessing
    if (found.mean, found.std) != (CLIP_MEAN, CLIP_STD):
        raise RecipeError(
            f"{origin}: normalises pixels by mean {found.mean} and deviation {found.std}; training "
            f"supports only CLIP's, {CLIP_MEAN} and {CLIP_STD}"
        )
    if not checkpoint.config.vision_config.quantizer_cfg.soft_entropy:
        raise RecipeError(
            f"{origin}: soft_entropy=false, but training takes the soft codes' entropies"
        )
    return checkpoint.tokenizer


def check_sources(data: DataConfig, image_size: int, held_out: str) -> None:
    """Raises DataError if a training source or the held-out set does not exist, before anything costly is done."""
    limits = Limits(image_bytes=data.image_megabytes * 2**20)
    for source in data.sources:
        open_training_source(source.location, image_size, data.seed, limits)
    if held_out:
        open_source(held_out, dataclasses.replace(limits, caption=False))


def stage_loader(
    recipe: Recipe, stage: StageRecipe, start: Start, world: World, state: dict[str, Any] | None
) -> Loader:
    """Micro-batches of this rank; a global batch is `stage.micro_batches(ranks)` of them from each rank."""
    return make_loader(
        recipe.data,
        image_size=start.config.image_size,
        tokenizer=start.tokenizer,
        batch_size=stage.batch,
        micro_batches=stage.micro_batches(world.size),
        rank=world.rank,
        world_size=world.size,
        state=state,
    )


def fixed_pixels(data: DataConfig, start: Start, log: LogRecipe) -> Tensor:
    """The fixed pictures that show a run's progress, uint8 [B, 3, S, S], at most `log.picture_count`: from the
    held-out set if one is named, else from the training source (from the emoji set, held-out ones)."""
    size, count = start.config.image_size, log.picture_count
    if log.held_out:
        return _first_pixels(log.held_out, size, count)
    quiet = dataclasses.replace(
        data,
        sources=tuple(held_out(source) for source in data.sources),
        workers=0,
        streams=1,
        shuffle_buffer=count,
        scale=(1.0, 1.0),
        flip=0.0,
    )
    with make_loader(quiet, image_size=size, tokenizer=start.tokenizer, batch_size=count) as loader:
        return next(loader).pixels


def _first_pixels(location: str, size: int, count: int) -> Tensor:
    """The first readable pictures of a set, preprocessed as for measuring. Raises DataError if there are none."""
    found: list[np.ndarray] = []
    for each in StoredExamples(location):
        if len(found) == count:
            break
        if not isinstance(each, Bad):
            with suppress(ImageError):  # reported and counted when the set is measured
                found.append(np.asarray(resize_and_crop(open_image(each.image, each.key), size)))
    if not found:
        raise DataError(f"{location}: no picture in it can be read")
    return torch.from_numpy(np.stack(found).transpose(0, 3, 1, 2).copy())


def held_out(source: Source) -> Source:
    """The same source; if it is the emoji set, with the pictures that training never sees."""
    if not is_emoji(source.location):
        return source
    _, _, query = source.location.partition("?")
    kept = [option for option in query.split("&") if option and not option.startswith("split=")]
    return Source("emoji?" + "&".join(["split=held-out", *kept]), source.weight)
