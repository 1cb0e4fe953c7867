"""One step of the generator's training: cross entropy over sub-tokens, some captions dropped.

Legend: B rows, T prefix, M sub-tokens, V values of a sub-token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlip_core.generator.conditioning import Conditioner, encode_prompts
from qlip_torch.generator import Generator
from qlip_torch.train.distributed import World, clip_gradients, parallelize, prepare_blocks
from qlip_torch.train.generator.feed import Inputs, Rows, dropped
from qlip_torch.train.generator.recipe import GeneratorRecipe, GeneratorStepsRecipe
from qlip_torch.train.optimizers import cosine_warmup, learning_rates, set_rates
from qlip_torch.train.precision import Precision, at_least_float32, no_autocast
from qlip_torch.train.recipe_file import GENERATOR
from qlip_torch.train.stage import NonFiniteError, StepReport
from qlip_torch.train.train_state import TrainState

LOSS = "cross_entropy"


class LossNetwork(nn.Module):
    """The generator's training forward as one module, for an engine to wrap."""

    def __init__(self, model: Generator, precision: Precision) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, features: Tensor, valid: Tensor, null: Tensor, tokens: Tensor) -> Tensor:
        """Mean of -log p(sub-token | caption, sub-tokens before it) over all B*M, in nats.

        Arguments are `Generator.forward`'s.
        """
        device = self.precision.device
        features, valid, null, tokens = (
            x.to(device, non_blocking=True) for x in (features, valid, null, tokens)
        )
        with self.precision.autocast():
            logits = self.model(features, valid, null, tokens)
        with no_autocast(device):
            return F.cross_entropy(at_least_float32(logits).flatten(0, 1), tokens.flatten())


class GeneratorStage:
    """What the training loop steps (`qlip_torch.train.loop.Trained`)."""

    number = GENERATOR

    def __init__(
        self, model: Generator, recipe: GeneratorRecipe, world: World, conditioner: Conditioner
    ) -> None:
        """`model` on the device of `world`, with its first weights."""
        self.recipe: GeneratorStepsRecipe = recipe.training
        self.model, self.world = model, world
        self.precision = Precision.of(recipe.engine, world.device)
        self._seed, self._conditioner = recipe.seed, conditioner
        model.train()
        blocks = model.blocks()
        prepare_blocks(blocks, recipe.engine, random=model.config.dropout > 0)
        network = LossNetwork(model, self.precision)
        self._parallel = parallelize(
            network, blocks, recipe.engine, world, half=self.precision.half
        )
        self.optimizer = torch.optim.AdamW(
            _groups(model, self.recipe),
            lr=self.recipe.learning_rate,
            betas=self.recipe.betas,
            fused=True,
        )
        self.state = TrainState(model, self.optimizer, self.recipe.ema, trained_only=True)

    def step(self, batches: Sequence[Inputs], step: int, *, probe: bool = False) -> StepReport:
        """One update of the weights on this rank's micro-batches, each from `inputs`.

        Raises NonFiniteError before any weight changes.
        """
        rate = cosine_warmup(step, self.recipe.warmup, self.recipe.steps)
        set_rates(self.optimizer, rate)
        losses = []
        for i, inputs in enumerate(batches):
            with self._parallel.syncing(i == len(batches) - 1):
                loss = self._parallel.module(*inputs)
                (loss / len(batches)).backward()
            losses.append(loss.detach())
        # One wait for the device: the mean loss of the global batch and the gradient's norm.
        loss = self.world.mean(torch.stack(losses).mean())
        norm = clip_gradients(self.model.parameters(), self.recipe.clip, self.world)
        value, gradient_norm = torch.stack((loss, norm)).tolist()
        found = {LOSS: value, "gradient norm": gradient_norm}
        if wrong := [name for name, number in found.items() if not math.isfinite(number)]:
            raise NonFiniteError(wrong, step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.state.ema is not None:
            self.state.ema.update(self.model)
        rates = learning_rates(self.optimizer)
        return StepReport({LOSS: value}, value, gradient_norm, rate, None, rates)

    def inputs(self, rows: Rows) -> Inputs:
        """(features [B, T, F], valid [B, T], null [B], tokens [B, M]): captions encoded, some dropped."""
        config = self.model.config
        drop = dropped(self._seed, rows.places, config.null_probability)
        kept = ["" if gone else caption for caption, gone in zip(rows.captions, drop)]
        captions = encode_prompts(kept, self._conditioner, config)
        arrays = captions.features, captions.valid, captions.null, rows.tokens
        inputs = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        if self.world.device.type == "cuda":
            # Page-locked, so that the GPU copies while the host continues.
            inputs = (tensor.pin_memory() for tensor in inputs)
        features, valid, null, tokens = inputs
        return features, valid, null, tokens

    @torch.no_grad()
    def weights(self) -> dict[str, np.ndarray]:
        """All tensors as float32 by name, on the first rank ({} elsewhere): the moving average if there is
        one. Every rank calls it."""
        ema = self.state.ema
        source = ema.shadow if ema is not None else dict(self.model.named_parameters())
        out = {}
        for name, tensor in source.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.world.is_first:
                out[name] = whole.detach().float().cpu().numpy()
        return out


def _groups(model: Generator, recipe: GeneratorStepsRecipe) -> list[dict[str, Any]]:
    """Parameter groups: matrices with decay, the norms' scales without."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    scales = [p for p in model.parameters() if p.ndim < 2]
    rate = {"name": GENERATOR, "lr": recipe.learning_rate, "base_lr": recipe.learning_rate}
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay, **rate},
        {"params": scales, "weight_decay": 0.0, **rate},
    ]
