"""Stage 1: all towers learn to reconstruct and to match text (SPEC section 3).

Minimises `a_r L_mse + a_q L_bsq + a_a L_align + a_z L_commitment`. Alignment and the codebook entropy
cover the global batch, over micro-batches and ranks. A tower whose learning rate is 0 is frozen, and
what no loss needs is not computed: training the text tower alone is locked-image tuning (LiT, arXiv
2111.07991). Legend: B images, N patches, L bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip_core.architecture import architecture
from qlip_torch.model import QLIP
from qlip_torch.train import objectives
from qlip_torch.train.accumulate import Features, Terms, accumulated_backward
from qlip_torch.train.distributed import World, average_gradients, parallelize, prepare_blocks
from qlip_torch.train.optimizers import Lamb, group_of, parameter_groups
from qlip_torch.train.pictures import Batch, Normalizer
from qlip_torch.train.precision import Precision, at_least_float32, no_autocast
from qlip_torch.train.recipe import EngineRecipe, Stage1Recipe
from qlip_torch.train.stage import Backward, LayerProbe, Stage, last_shared_layer

SCALE = "model.logit_scale"
# From the encoder's class token to an image's embedding, which only alignment needs.
IMAGE_EMBEDDING = ("visual_projection.", "vision_model.post_layernorm.")


class Forward(NamedTuple):
    """Without alignment, `image` and `text` are 0; without a decoder, the two means are."""

    image: Tensor
    """Unit embeddings [B, P]."""
    text: Tensor
    """Unit embeddings [B, P]."""
    u: Tensor
    """Unit latents [B, N, L], before the sign."""
    mse: Tensor
    commitment: Tensor


class Stage1Network(nn.Module):
    """This stage's forward as one module, for an engine to wrap."""

    def __init__(self, model: QLIP, precision: Precision, *, aligns: bool = True) -> None:
        super().__init__()
        self.model, self.precision, self._aligns = model, precision, aligns
        self.normalize = Normalizer(precision.device)

    def forward(self, pixels: Tensor, ids: Tensor, reconstruct: bool) -> Forward:
        """`Batch`'s pixels and ids [B, T]."""
        model, device = self.model, self.precision.device
        pixels, ids = self.normalize(pixels), ids.to(device, non_blocking=True)
        with self.precision.autocast():
            cls, z = model.encode(pixels)
            with no_autocast(device):
                u = model.bottleneck_down(at_least_float32(z))
            image = text = nothing = u.new_zeros(())
            if self._aligns:
                image, text = model.embed_image(cls), model.embed_text(ids)
                with no_autocast(device):
                    image = F.normalize(at_least_float32(image), dim=-1)
                    text = F.normalize(at_least_float32(text), dim=-1)
            if not reconstruct:
                return Forward(image, text, u, nothing, nothing)
            z_hat = model.bottleneck_up(model.quantize(u))
            pixels_hat = model.decode(z_hat)
            # If the decoder has another width, z and z_hat cannot be compared.
            commitment = objectives.commitment(z, z_hat) if z_hat.shape == z.shape else nothing
            return Forward(image, text, u, objectives.mse(pixels_hat, pixels), commitment)

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """`Batch`'s pixels to their reconstruction, normalised [B, 3, S, S]."""
        return reconstruct(self.model, self.normalize(pixels), self.precision)


class Stage1Losses:
    """The losses of stage 1, split up for accumulation (qlip_torch.train.accumulate)."""

    def __init__(self, network: nn.Module, model: QLIP, recipe: Stage1Recipe, world: World) -> None:
        self.network, self.model, self.world = network, model, world
        self._aligns = recipe.align > 0
        self.weights = {"align": recipe.align} if self._aligns else {}
        if recipe.bsq and model.config.quantizes:
            self.weights["bsq"] = recipe.bsq
        self._decodes = recipe.decodes
        if self._decodes:
            self.weights |= {"mse": recipe.mse, "commitment": recipe.commitment}

    def features(self, inputs: Batch) -> Features:
        return self._cached(self.network(inputs.pixels, inputs.ids, False))

    def forward(self, inputs: Batch) -> tuple[Features, Terms]:
        out = self.network(inputs.pixels, inputs.ids, self._decodes)
        terms = {"mse": out.mse, "commitment": out.commitment} if self._decodes else {}
        return self._cached(out), terms

    def of_features(self, features: Features) -> Terms:
        u, *embeddings = features
        terms: Terms = {}
        if embeddings:
            image, text = embeddings
            group, scale = self.world.loss_group, self.model.logit_scale
            terms["align"] = objectives.info_nce(image, text, scale, group)
        return terms | objectives_of_code(self.model, u, self.world)

    def parameters_of_features(self) -> Sequence[nn.Parameter]:
        scale = self.model.logit_scale
        return [scale] if scale.requires_grad else []

    def _cached(self, out: Forward) -> Features:
        return (out.u, out.image, out.text) if self._aligns else (out.u,)


def objectives_of_code(model: QLIP, u: Tensor, world: World) -> Terms:
    """BSQ's terms for all latents u [B, N, L] of the global batch; none without a quantizer."""
    if not model.config.quantizes:
        return {}
    quantizer = model.config.vision_config.quantizer_cfg
    found = objectives.bsq_entropy(
        u,
        quantizer.group_size,
        quantizer.inv_temperature,
        quantizer.gamma_0,
        quantizer.gamma_1,
        quantizer.beta,
        per_bit=quantizer.persample_entropy_compute == "analytical",
        group=world.loss_group,
    )
    return {
        "bsq": found.total,
        "per_sample_entropy": found.per_sample,
        "codebook_entropy": found.codebook,
    }


def reconstruct(model: QLIP, pixels: Tensor, precision: Precision) -> Tensor:
    """Normalised pixels [B, 3, S, S] through the code and back."""
    # Runs rarely, and with another batch size than steps: not worth compiling.
    with torch.compiler.set_stance("force_eager"), precision.autocast():
        _, z = model.encode(pixels)
        with no_autocast(precision.device):
            u = model.bottleneck_down(at_least_float32(z))
        return model.decode(model.bottleneck_up(model.quantize(u)))


def freeze(model: QLIP, recipe: Stage1Recipe) -> None:
    """Turn off gradients of the parameters that this stage does not train."""
    rates, table = recipe.learning_rate.by_group, architecture(model.config)
    for name, parameter in model.named_parameters():
        asked_for = table[name].part not in recipe.idle
        if not recipe.align and name.startswith(IMAGE_EMBEDDING):
            asked_for = False
        parameter.requires_grad_(asked_for and rates[group_of(name)] > 0)


def build_stage1(model: QLIP, recipe: Stage1Recipe, engine: EngineRecipe, world: World) -> Stage:
    """The stage that the loop steps, from a model (on the device, all parts)."""
    precision = Precision.of(engine, world.device)
    model.train()
    freeze(model, recipe)
    network = Stage1Network(model, precision, aligns=recipe.align > 0)
    blocks = model.blocks()
    prepare_blocks(blocks, engine)
    wrapped = parallelize(
        network, blocks, engine, world, apart=[SCALE], methods=["reconstruct"], half=precision.half
    )
    groups = parameter_groups(model, recipe.learning_rate.by_group, recipe.weight_decay)
    kind = {"lamb": Lamb, "adamw": partial(torch.optim.AdamW, fused=True)}[recipe.optimizer]
    optimizer = kind(groups, betas=recipe.betas, weight_decay=recipe.weight_decay)
    losses = Stage1Losses(wrapped.module, model, recipe, world)

    def backward(batches: Sequence[Batch], step: int, probe: LayerProbe | None) -> Backward:
        found = accumulated_backward(losses, batches, probe=probe, syncing=wrapped.syncing)
        # InfoNCE uses logit_scale outside the wrapped forward, so no engine averages its gradient.
        if model.logit_scale.requires_grad:
            average_gradients([model.logit_scale], world)
        return Backward(found.terms, found.features[0])

    @torch.no_grad()
    def after(step: int) -> None:
        model.logit_scale.clamp_(max=math.log(recipe.max_logit_scale))

    return Stage(
        number=1,
        model=model,
        recipe=recipe,
        world=world,
        optimizer=optimizer,
        weights=losses.weights,
        shared_layer=last_shared_layer(model),
        precision=precision,
        backward=backward,
        after=after,
        reconstruct=network.reconstruct,
    )
