"""The public model: images and texts in, tokens, pictures, embeddings and probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from qlip_core import bsq
from qlip_core.backends import Network, check_dtype, choose_device, get_backend
from qlip_core.checkpoint import Checkpoint, open_checkpoint
from qlip_core.errors import CheckpointError, QlipError, TextError, TokenFileError
from qlip_core.generator.checkpoint import GeneratorCheckpoint
from qlip_core.generator.config import GeneratorConfig
from qlip_core.generator.generate import Request, TokenDrawer, merged
from qlip_core.generator.load import find_generator, load_drawer, require_generator
from qlip_core.generator.sampling import Sampling
from qlip_core.images import ImageLike
from qlip_core.loading import (
    DEFAULT_BATCH,
    OnError,
    Progress,
    check_batch_size,
    pixel_batches,
    slices,
)
from qlip_core.text import check_ids
from qlip_core.tokens import VisualTokens

Images = ImageLike | Sequence[ImageLike] | np.ndarray
Texts = str | Sequence[str] | np.ndarray


def load(
    model: str | Path | None = None,
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    generator: str | Path | None = None,
) -> Model:
    """Load a model: a folder, a `.safetensors` file beside its config, a hub id, or (None) the bundled one.

    `backend` is auto, torch, mlx or numpy; `device` and `dtype` are the backend's (`qlip doctor`
    lists them). `generator` is the folder of a generator made for this tokenizer (None: `generator/`
    in the model's folder, if there is one). Only headers are read: each part's weights are loaded when
    first used. Raises BackendError, ConfigError or CheckpointError.
    """
    chosen = get_backend(backend)
    where = choose_device(chosen, device)
    check_dtype(chosen, dtype)
    checkpoint = open_checkpoint(model, revision)
    network = chosen.network(checkpoint.config, checkpoint, device=where, dtype=dtype)
    # A generator that was asked for is opened at once, the model's own only when needed: if that is damaged or
    # made for another tokenizer, everything but drawing still works.
    found = None if generator is None else find_generator(checkpoint, generator)
    return Model(checkpoint, network, chosen.name, found)


class Model:
    """A loaded QLIP. All arrays are numpy.

    Images are given as paths, encoded bytes, PIL images or uint8 [H, W, 3] arrays, one or a sequence, or as
    a float32 [B, 3, S, S] array of pixels that are already preprocessed.

    All methods work in batches of `batch_size`. Shapes: B images or texts, S image side, N patches, L bits,
    D encoder width.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        network: Network,
        backend: str,
        generator: GeneratorCheckpoint | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._generator = generator
        self.config = checkpoint.config
        self.network = network
        self.backend = backend
        self.device = network.device
        self.dtype = network.dtype
        self.preprocessing = checkpoint.preprocessing

    def __repr__(self) -> str:
        where = f"{self.backend}, {self.device}, {self.dtype}"
        return f"Model({str(self.checkpoint.folder)!r}, {where})"

    @property
    def fingerprint(self) -> str:
        """32 hex digits by which token files name this tokenizer."""
        return self.checkpoint.fingerprint

    # -- images to tokens and back -----------------------------------------------------------

    def preprocess(self, images: Images, *, batch_size: int = DEFAULT_BATCH) -> np.ndarray:
        """float32 [B, 3, S, S], normalised: CLIPImageProcessor's preprocessing (SPEC section 2)."""
        return self._gather(images, lambda pixels: pixels, batch_size, self._pixel_shape)

    def latents(self, images: Images, *, batch_size: int = DEFAULT_BATCH) -> np.ndarray:
        """float32 [B, N, L]: the unit vectors u before the sign (SPEC 1.3)."""
        shape = (self.config.num_patches, self.config.code_dim)
        return self._gather(images, self.network.latents, batch_size, shape)

    def encode(self, images: Images, *, batch_size: int = DEFAULT_BATCH) -> VisualTokens:
        """Images to VisualTokens, which are named by their paths if all images are paths."""
        sequence = as_sequence(images)
        batches = [tokens for _, tokens in self.encode_batches(sequence, batch_size=batch_size)]
        tokens = VisualTokens.concatenate(batches or [self._no_tokens()])
        if isinstance(sequence, list) and all(isinstance(i, str | Path) for i in sequence):
            names = tuple(str(i) for i in sequence)
            return VisualTokens(tokens.packed, tokens.length, tokens.grid, tokens.model, names)
        return tokens

    def encode_batches(
        self,
        images: Sequence[ImageLike] | np.ndarray,
        *,
        batch_size: int = DEFAULT_BATCH,
        on_error: OnError | None = None,
    ) -> Iterator[tuple[list[int], VisualTokens]]:
        """Yield (positions in `images`, tokens) batch by batch.

        An image that cannot be read raises ImageError or, with `on_error`, is passed to it as (position,
        error) and left out.
        """
        if not self.config.quantizes:
            raise QlipError(
                'this checkpoint has quantizer "none", so its images have no bits; '
                "use latents() or reconstruct()"
            )
        for positions, pixels in self.batches(images, batch_size, on_error):
            packed = bsq.pack(self.network.encode(pixels))
            grid = self.config.grid
            yield positions, VisualTokens(packed, self.config.code_dim, grid, self.fingerprint)

    def decode(
        self,
        tokens: VisualTokens,
        *,
        batch_size: int = DEFAULT_BATCH,
        any_model: bool = False,
    ) -> np.ndarray:
        """Tokens to pictures: uint8 [B, S, S, 3].

        Raises TokenFileError for tokens of another tokenizer (with `any_model` only if their sizes do not
        fit), and for anything but VisualTokens.
        """
        check_tokens(tokens)
        size = self.config.image_size
        out = np.empty((len(tokens), size, size, 3), np.uint8)
        for start, pixels in self._decoded(tokens, batch_size, any_model):
            out[start : start + len(pixels)] = self.preprocessing.to_images(pixels)
        return out

    def decode_pixels(
        self,
        tokens: VisualTokens,
        *,
        batch_size: int = DEFAULT_BATCH,
        any_model: bool = False,
    ) -> np.ndarray:
        """Tokens to the decoder's own output: float32 [B, 3, S, S], normalised space, unclipped."""
        check_tokens(tokens)
        out = np.empty((len(tokens), *self._pixel_shape), np.float32)
        for start, pixels in self._decoded(tokens, batch_size, any_model):
            out[start : start + len(pixels)] = pixels
        return out

    def reconstruct(self, images: Images, *, batch_size: int = DEFAULT_BATCH) -> np.ndarray:
        """Images through the bottleneck and back: uint8 [B, S, S, 3]; works with quantizer "none"."""

        def through(pixels: np.ndarray) -> np.ndarray:
            u = self.network.latents(pixels)
            codes = bsq.bits_to_codes(bsq.quantize(u)) if self.config.quantizes else u
            return self.preprocessing.to_images(self.network.decode(codes))

        size = self.config.image_size
        return self._gather(images, through, batch_size, (size, size, 3), np.uint8)

    # -- meaning -----------------------------------------------------------------------------

    def embed_images(self, images: Images, *, batch_size: int = DEFAULT_BATCH) -> np.ndarray:
        """float32 [B, projection_dim], unit length."""
        shape = (self.config.projection_dim,)
        return _unit(self._gather(images, self.network.embed_images, batch_size, shape))

    def embed_texts(self, texts: Texts, *, batch_size: int = 4 * DEFAULT_BATCH) -> np.ndarray:
        """float32 [B, projection_dim], unit length. Strings, or token ids int [B, T].

        Raises TextError for strings where the checkpoint has no tokenizer, or ids out of range.
        """
        if isinstance(texts, np.ndarray) and texts.dtype.kind in "iu":
            ids = check_ids(texts, self.config.text_config)
        else:
            ids = self.tokenize(texts, batch_size=batch_size)
        rows = [self.network.embed_texts(batch) for batch in slices(ids, batch_size)]
        return _unit(np.concatenate([*rows, np.empty((0, self.config.projection_dim), np.float32)]))

    def tokenize(self, texts: Texts, *, batch_size: int = 4 * DEFAULT_BATCH) -> np.ndarray:
        """int64 [B, max_position_embeddings]: start token, text, end token, padding."""
        check_batch_size(batch_size)
        if self.checkpoint.tokenizer is None:
            raise TextError(
                f"{self.checkpoint.folder}: no tokenizer files (tokenizer.json, or vocab.json and "
                "merges.txt), so it takes token ids only, not strings"
            )
        each = [texts] if isinstance(texts, str) else list(texts)
        starts = range(0, max(1, len(each)), batch_size)
        return np.concatenate([self.checkpoint.tokenizer(each[i : i + batch_size]) for i in starts])

    def similarity(
        self, images: Images, texts: Texts, *, batch_size: int = DEFAULT_BATCH
    ) -> np.ndarray:
        """Logits float32 [B, T]: exp(logit_scale) times the cosine.

        Texts are short, so batches of them are four times `batch_size`, here and in `classify`.
        """
        image = self.embed_images(images, batch_size=batch_size)
        return self.logit_scale * image @ self.embed_texts(texts, batch_size=4 * batch_size).T

    def classify(
        self,
        images: Images,
        labels: Sequence[str],
        *,
        templates: Sequence[str] = ("{}",),
        batch_size: int = DEFAULT_BATCH,
    ) -> np.ndarray:
        """Probabilities float32 [B, T] over `labels`, rows sum to 1.

        A label's embedding is the mean over `templates` ("a photo of {}"), normalised to unit length.
        """
        classes = self.embed_labels(labels, templates, batch_size=4 * batch_size)
        logits = self.logit_scale * self.embed_images(images, batch_size=batch_size) @ classes.T
        return softmax(logits)

    def embed_labels(
        self,
        labels: Sequence[str],
        templates: Sequence[str] = ("{}",),
        *,
        batch_size: int = 4 * DEFAULT_BATCH,
    ) -> np.ndarray:
        """float32 [T, projection_dim]: each label's mean over all templates, unit length."""
        if isinstance(labels, str) or not len(labels):
            raise TextError("labels must be a non-empty list of strings")
        if isinstance(templates, str) or not len(templates):
            raise TextError("templates must be a non-empty list of strings")
        for template in templates:
            if "{}" not in template:
                raise TextError(f'template "{template}" has no {{}} for the label to stand in')
        texts = [template.replace("{}", label) for label in labels for template in templates]
        embedded = self.embed_texts(texts, batch_size=batch_size)
        embedded = embedded.reshape(len(labels), len(templates), -1)
        return _unit(embedded.mean(1))

    @property
    def logit_scale(self) -> np.float32:
        """exp of the stored logit_scale, the factor on cosines. Raises CheckpointError if that is not
        finite."""
        stored = np.float32(self.checkpoint.tensor("logit_scale"))
        with np.errstate(over="ignore"):
            scale = np.exp(stored)
        if not np.isfinite(scale):
            raise CheckpointError(
                f"{self.checkpoint.folder}: logit_scale is {stored}, whose exponential is not a finite float32"
            )
        return scale

    def hidden_states(
        self, images: Images, layer: int = -2, *, batch_size: int = DEFAULT_BATCH
    ) -> np.ndarray:
        """The encoder's states after `layer` layers: float32 [B, N+1, D], CLS first.

        0 is the input of the first layer, -1 the output of the last. LLaVA takes -2 without CLS (SPEC section 6).
        """
        layers = self.config.vision_config.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise ValueError(f"layer {layer}: the encoder has states {-layers - 1} to {layers}")
        index = layer % (layers + 1)
        shape = (self.config.num_patches + 1, self.config.vision_config.hidden_size)
        return self._gather(
            images, lambda pixels: self.network.hidden_states(pixels, index), batch_size, shape
        )

    # -- text to image -----------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        n: int = 1,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_schedule: str | None = None,
        cfg_interval: tuple[float, float] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Draw `n` pictures of each prompt: uint8 [len(prompts)*n, S, S, 3] (SPEC section 4).

        Settings that are None are the generator's own (`generator_config.sampling`);
        `qlip_core.generator.sampling.Sampling` explains them. The same seed gives the same picture on every
        backend, whatever else is drawn with it. An empty prompt draws without a caption; one that is too long
        is cut, with a PromptCut warning. `progress` is called with the number of sub-tokens drawn since the
        last call. Raises GenerationError for a setting out of range or a model without a generator.
        """
        tokens = self.generate_tokens(
            prompts,
            seed=seed,
            n=n,
            cfg_scale=cfg_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cfg_schedule=cfg_schedule,
            cfg_interval=cfg_interval,
            batch_size=batch_size,
            progress=progress,
        )
        return self.decode(tokens, batch_size=batch_size)

    def generate_tokens(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        n: int = 1,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_schedule: str | None = None,
        cfg_interval: tuple[float, float] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> VisualTokens:
        """Like `generate`, but before decoding: VisualTokens named by their prompts."""
        sampling = merged(
            self.generator_config.sampling,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cfg_scale=cfg_scale,
            cfg_schedule=cfg_schedule,
            cfg_interval=cfg_interval,
        )
        drawn = self.generate_batches(
            prompts, sampling, seed=seed, n=n, batch_size=batch_size, progress=progress
        )
        return VisualTokens.concatenate([self._no_tokens(), *(tokens for _, tokens in drawn)])

    def generate_batches(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        n: int = 1,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, VisualTokens]]:
        """Yield (number of the first picture, VisualTokens named by their prompts) batch by batch.

        `sampling` has all settings (None: the generator's own).
        """
        check_batch_size(batch_size)
        drawer = self._drawer
        config, empty = drawer.config, self._no_tokens()
        request = Request.of(
            prompts, n, seed, sampling or config.sampling, config.visual_vocab_size
        )
        for start, bits in drawer.draw(request, batch_size, progress):
            names = request.prompts[start : start + len(bits)]
            yield start, replace(empty, packed=bsq.pack(bits), names=names)

    def generate_stream(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        n: int = 1,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_schedule: str | None = None,
        cfg_interval: tuple[float, float] | None = None,
    ) -> Iterator[np.ndarray]:
        """Like `generate`, but yield the unfinished pictures after each row of patches: uint8 [B, S, S, 3].

        What is not drawn yet is grey. The last pictures are those of `generate`.
        """
        drawer = self._drawer
        sampling = merged(
            drawer.config.sampling,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cfg_scale=cfg_scale,
            cfg_schedule=cfg_schedule,
            cfg_interval=cfg_interval,
        )
        request = Request.of(prompts, n, seed, sampling, drawer.config.visual_vocab_size)
        if not len(request):
            return iter(())
        return (self._so_far(bits) for bits in drawer.stream(request))

    @cached_property
    def generator(self) -> GeneratorCheckpoint | None:
        """The generator named in `load`, or the model's own, or None. Raises ConfigError or CheckpointError
        if it is damaged or was made for another tokenizer."""
        return self._generator or find_generator(self.checkpoint, None)

    @property
    def generator_config(self) -> GeneratorConfig:
        """The generator's config. Raises GenerationError for a model without a generator."""
        return require_generator(self.checkpoint, self.generator).config

    def _so_far(self, bits: np.ndarray) -> np.ndarray:
        """Bits [B, p, L] of the first p patches, whole rows -> pictures, grey below those rows."""
        config = self.config
        codes = np.zeros((len(bits), config.num_patches, config.code_dim), np.float32)
        codes[:, : bits.shape[1]] = bsq.bits_to_codes(bits)
        pictures = self.preprocessing.to_images(self.network.decode(codes))
        h, w = config.grid
        pictures[:, bits.shape[1] // w * (config.image_size // h) :] = 128
        return pictures

    @cached_property
    def _drawer(self) -> TokenDrawer:
        return load_drawer(self.checkpoint, self.generator, self.network, self.backend)

    # -- batches -----------------------------------------------------------------------------

    def batches(
        self,
        images: Sequence[ImageLike] | np.ndarray,
        batch_size: int = DEFAULT_BATCH,
        on_error: OnError | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield (positions, pixels float32 [b, 3, S, S]); images load while the model works."""
        if isinstance(images, np.ndarray):
            start = 0
            for pixels in slices(self._check_pixels(images), batch_size):
                yield list(range(start, start + len(pixels))), pixels
                start += len(pixels)
        else:
            yield from pixel_batches(
                images, self.preprocessing, batch_size=batch_size, on_error=on_error
            )

    @property
    def _pixel_shape(self) -> tuple[int, int, int]:
        return 3, self.config.image_size, self.config.image_size

    def _gather(
        self,
        images: Images,
        compute: Callable[[np.ndarray], np.ndarray],
        batch_size: int,
        shape: tuple[int, ...],
        dtype: type = np.float32,
    ) -> np.ndarray:
        sequence = as_sequence(images)
        out = np.empty((len(sequence), *shape), dtype)
        for positions, pixels in self.batches(sequence, batch_size):
            out[positions[0] : positions[-1] + 1] = compute(pixels)
        return out

    def _decoded(
        self, tokens: VisualTokens, batch_size: int, any_model: bool
    ) -> Iterable[tuple[int, np.ndarray]]:
        check_batch_size(batch_size)
        config = self.config
        if not config.quantizes or (tokens.length, tokens.grid) != (config.code_dim, config.grid):
            bits = f"{config.code_dim} bits" if config.quantizes else "no bits"
            raise TokenFileError(
                f"tokens of {tokens.length} bits on a {tokens.grid[0]}x{tokens.grid[1]} grid do not "
                f"fit this model: {bits} on {config.grid[0]}x{config.grid[1]}"
            )
        if tokens.model and tokens.model != self.fingerprint and not any_model:
            raise TokenFileError(
                f"these tokens were made by another tokenizer ({tokens.model}, this one is "
                f"{self.fingerprint}): load that model, or decode them all the same with any_model=True (--any-model)"
            )
        for start in range(0, len(tokens), batch_size):
            codes = bsq.bits_to_codes(tokens[start : start + batch_size].bits)
            yield start, self.network.decode(codes)

    def _no_tokens(self) -> VisualTokens:
        config = self.config
        empty = np.empty((0, bsq.packed_bytes(config.num_patches, config.code_dim)), np.uint8)
        return VisualTokens(empty, config.code_dim, config.grid, self.fingerprint)

    def _check_pixels(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.dtype != np.float32 or pixels.ndim != 4 or pixels.shape[1:] != self._pixel_shape:
            raise QlipError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}; expected preprocessed float32 "
                f"[B, {', '.join(map(str, self._pixel_shape))}], or uint8 [H, W, 3] images"
            )
        if not np.isfinite(pixels).all():
            raise QlipError("pixels have NaN or infinite values")
        return pixels


def as_sequence(images: Images) -> list[ImageLike] | np.ndarray:
    """A list of images; a preprocessed float array stays one."""
    if isinstance(images, np.ndarray):
        if images.dtype == np.uint8:
            return list(images) if images.ndim == 4 else [images]
        return images
    # An open file, too, can be iterated, but is no sequence of images: `open_image` says what it is.
    if isinstance(images, ImageLike) or hasattr(images, "read"):
        return [images]  # type: ignore[list-item]
    return list(images)


def check_tokens(tokens: object) -> None:
    if not isinstance(tokens, VisualTokens):
        raise TokenFileError(
            f"expected VisualTokens, got {type(tokens).__name__}: VisualTokens.load(path) reads a token file, "
            "VisualTokens.from_bits(bits, grid) takes an array"
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [..., T] -> probabilities that sum to 1 over the last axis."""
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-12))
