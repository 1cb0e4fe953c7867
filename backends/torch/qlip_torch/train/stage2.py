"""Stage 2: bottleneck and decoder learn to look good; encoder and text tower do not change (SPEC section 3).

Minimises `a_r' L_mse + a_q' L_bsq + a_p' L_lpips + a_g' L_gan` (and `1 - SSIM`, if a recipe gives it a
weight). The text tower is not in memory; the frozen encoder runs once per step, without gradients. Legend: B
images, N patches, D width, L bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlip_core.architecture import architecture
from qlip_torch.model import QLIP
from qlip_torch.perceptual import Lpips, build_perceptual, clip_to_signed
from qlip_torch.train import objectives
from qlip_torch.train.accumulate import Features, Terms, accumulated_backward
from qlip_torch.train.discriminator import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    r1_is_due,
    r1_penalty,
)
from qlip_torch.train.distributed import (
    World,
    average_gradients,
    gradient_norm,
    parallelize,
    prepare_blocks,
)
from qlip_torch.train.optimizers import parameter_groups
from qlip_torch.train.pictures import Batch, Normalizer
from qlip_torch.train.precision import Precision, at_least_float32, no_autocast
from qlip_torch.train.recipe import DiscriminatorRecipe, EngineRecipe, Stage2Recipe
from qlip_torch.train.stage import Backward, LayerProbe, Stage
from qlip_torch.train.stage1 import objectives_of_code, reconstruct

PARTS = ("encoder", "down", "up", "decoder")
"""The parts in memory."""


R1_ROWS = 16
"""Images per R1 computation: a second derivative in float32 keeps 0.5 GB for each image at 256 px."""


class Encoded(NamedTuple):
    """A micro-batch after the frozen encoder: `Batch`'s pixels, not on the device, and patch features z
    [B, N, D]."""

    pixels: Tensor
    z: Tensor


class Forward(NamedTuple):
    u: Tensor
    """Unit latents [B, N, L], before the sign."""
    reconstruction: Tensor
    """The reconstruction [B, 3, S, S] in [-1, 1], for the losses on pictures."""
    real: Tensor
    """The input pixels likewise. Without decoding, everything but `u` is 0."""
    mse: Tensor
    commitment: Tensor


class Stage2Network(nn.Module):
    """The model from the encoder's features on, as one module for an engine to wrap.

    `encode` and `reconstruct` are called directly, without gradients.
    """

    def __init__(self, model: QLIP, precision: Precision) -> None:
        super().__init__()
        self.model, self.precision = model, precision
        self.normalize = Normalizer(precision.device)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Encoded:
        """Takes `Batch`'s pixels."""
        with self.precision.autocast():
            return Encoded(pixels, self.model.encode(self.normalize(pixels))[1].contiguous())

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """`Batch`'s pixels to their reconstruction, normalised [B, 3, S, S]."""
        return reconstruct(self.model, self.normalize(pixels), self.precision)

    def forward(self, pixels: Tensor, z: Tensor, decode: bool) -> Forward:
        model = self.model
        with self.precision.autocast():
            with no_autocast(self.precision.device):
                u = model.bottleneck_down(at_least_float32(z))
            if not decode:
                nothing = u.new_zeros(())
                return Forward(u, nothing, nothing, nothing, nothing)
            pixels = self.normalize(pixels)
            z_hat = model.bottleneck_up(model.quantize(u))
            pixels_hat = model.decode(z_hat)
            commitment = (
                objectives.commitment(z, z_hat) if z_hat.shape == z.shape else u.new_zeros(())
            )
            reconstruction, real = clip_to_signed(pixels_hat), clip_to_signed(pixels)
            return Forward(u, reconstruction, real, objectives.mse(pixels_hat, pixels), commitment)


class Adversary:
    """The discriminator with its own optimizer; it learns from each micro-batch that the model reconstructs.

    It is replicated, and its gradients are averaged in one message per step. They are not clipped: `clip`
    is for the model, and Adam does not depend on their scale. Its learning rate follows the model's schedule.
    """

    def __init__(
        self,
        recipe: DiscriminatorRecipe,
        stage: Stage2Recipe,
        image_size: int,
        precision: Precision,
        world: World,
    ) -> None:
        self.recipe, self.precision, self.world = recipe, precision, world
        module = Discriminator(image_size, recipe.base_channels, recipe.max_channels)
        self.module: nn.Module = module.to(world.device)
        rate = {"lr": recipe.learning_rate, "base_lr": recipe.learning_rate}
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [{"params": list(self.module.parameters()), **rate}],
            betas=stage.betas,
            weight_decay=stage.weight_decay,
            fused=True,
        )

    def generator_loss(self, pixels_hat: Tensor) -> Tensor:
        """The adversarial loss of the model; leaves the discriminator's own gradients alone."""
        self.module.requires_grad_(False)
        try:
            with self.precision.autocast():
                return generator_loss(self.module(pixels_hat))
        finally:
            self.module.requires_grad_(True)

    def backward(self, pixels: Tensor, pixels_hat: Tensor, step: int, share: float) -> Terms:
        """Add the gradients of its losses on a micro-batch, scaled by the micro-batch's `share` of the batch."""
        with self.precision.autocast():
            loss = discriminator_loss(self.module(pixels), self.module(pixels_hat.detach()))
        (loss * share).backward()
        terms = {"discriminator": loss.detach()}
        if self.recipe.r1_weight and r1_is_due(step, self.recipe.r1_every):
            terms["r1"] = self._penalize(pixels, share)
        return terms

    def _penalize(self, pixels: Tensor, share: float) -> Tensor:
        """Add R1's gradients, a few images at a time."""
        penalty = pixels.new_zeros(())
        for rows in pixels.chunk(-(-len(pixels) // R1_ROWS)):
            part = r1_penalty(self.module, rows, self.recipe.r1_weight, self.recipe.r1_every)
            part = part * (len(rows) / len(pixels))
            (part * share).backward()
            penalty += part.detach()
        return penalty

    def gradient_norm(self) -> Tensor:
        """Average the gradients over ranks; their norm."""
        average_gradients(self.module.parameters(), self.world)
        return gradient_norm(self.module.parameters(), self.world)

    def step(self) -> None:
        """Call after `gradient_norm`."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Stage2Losses:
    """The losses of stage 2, split up for accumulation (qlip_torch.train.accumulate)."""

    def __init__(
        self,
        network: nn.Module,
        model: QLIP,
        recipe: Stage2Recipe,
        world: World,
        precision: Precision,
        perceptual: Lpips | None,
        adversary: Adversary | None,
    ) -> None:
        self.network, self.model, self.world = network, model, world
        self.precision, self.perceptual, self.adversary = precision, perceptual, adversary
        self._gan, self._gan_start = recipe.gan, recipe.discriminator.start
        self.discriminator_terms: Terms = {}
        """The discriminator's own terms in this step, over its micro-batches."""
        self._step, self._share = 0, 1.0
        self._seen: tuple[Tensor, Tensor] | None = None
        self.weights: dict[str, float] = {"mse": recipe.mse, "commitment": recipe.commitment}
        if model.config.quantizes:
            self.weights["bsq"] = recipe.bsq
        if perceptual is not None:
            self.weights["lpips"] = recipe.lpips
        if recipe.ssim:
            self.weights["ssim"] = recipe.ssim

    def begin(self, step: int, micro_batches: int) -> None:
        """Call before a step; decides whether the discriminator affects the model's loss yet."""
        if self.adversary is not None:
            self.weights["gan"] = self._gan if step >= self._gan_start else 0.0
        self._step, self._share, self.discriminator_terms = step, 1 / micro_batches, {}

    def train_discriminator(self) -> None:
        """Take the discriminator's gradients on a micro-batch's reconstruction, after the backward has freed its
        memory. Doing so at once, not after the whole batch, keeps only one micro-batch's pictures in memory."""
        if self.adversary is None or self._seen is None:
            return
        (real, reconstruction), self._seen = self._seen, None
        for name, term in self.adversary.backward(
            real, reconstruction, self._step, self._share
        ).items():
            self.discriminator_terms[name] = (
                self.discriminator_terms.get(name, 0) + term * self._share
            )

    def features(self, inputs: Encoded) -> Features:
        return (self.network(inputs.pixels, inputs.z, False).u,)

    def forward(self, inputs: Encoded) -> tuple[Features, Terms]:
        out = self.network(inputs.pixels, inputs.z, True)
        terms = {"mse": out.mse, "commitment": out.commitment}
        if self.perceptual is not None:
            with self.precision.autocast():
                terms["lpips"] = self.perceptual(out.reconstruction, out.real)
        if "ssim" in self.weights:
            terms["ssim"] = objectives.ssim(out.reconstruction, out.real)
        if self.adversary is not None:
            terms["gan"] = self.adversary.generator_loss(out.reconstruction)
            self._seen = out.real, out.reconstruction.detach()
        return (out.u,), terms

    def of_features(self, features: Features) -> Terms:
        return objectives_of_code(self.model, features[0], self.world)

    def parameters_of_features(self) -> Sequence[nn.Parameter]:
        return []


def build_stage2(
    model: QLIP, recipe: Stage2Recipe, engine: EngineRecipe, world: World, seed: int
) -> Stage:
    """The stage that the loop steps, from a model (on the device, the parts in PARTS)."""
    precision = Precision.of(engine, world.device)
    model.train()
    table = architecture(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(table[name].part in recipe.trained)
    network = Stage2Network(model, precision)
    blocks = model.blocks()
    prepare_blocks(blocks, engine)
    methods = ["encode", "reconstruct"]
    wrapped = parallelize(network, blocks, engine, world, methods=methods, half=precision.half)
    groups = parameter_groups(model, recipe.learning_rate.by_group, recipe.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    perceptual = adversary = None
    if recipe.lpips:
        perceptual = build_perceptual(recipe.perceptual, seed).to(world.device)
    if recipe.gan:
        # The same initial weights on every rank.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adversary = Adversary(
                recipe.discriminator, recipe, model.config.image_size, precision, world
            )
    losses = Stage2Losses(wrapped.module, model, recipe, world, precision, perceptual, adversary)

    def backward(batches: Sequence[Batch], step: int, probe: LayerProbe | None) -> Backward:
        losses.begin(step, len(batches))
        encoded = [network.encode(batch.pixels) for batch in batches]
        found = accumulated_backward(
            losses,
            encoded,
            probe=probe,
            syncing=wrapped.syncing,
            after_each=losses.train_discriminator,
        )
        return Backward(found.terms | losses.discriminator_terms, found.features[0])

    return Stage(
        number=2,
        model=model,
        recipe=recipe,
        world=world,
        optimizer=optimizer,
        weights=losses.weights,
        shared_layer=_bottleneck_end(model),
        precision=precision,
        backward=backward,
        after=lambda step: None,
        reconstruct=network.reconstruct,
        companion=adversary,
    )


def _bottleneck_end(model: QLIP) -> nn.Linear:
    """The last layer that every loss of this stage trains: the bottleneck's projection to L bits."""
    vision = model.vision_model
    if model.config.vision_config.quantizer_embed_type == "mlp":
        return vision.quant_embed.c_proj
    return model.vision_decoder.conv_out
