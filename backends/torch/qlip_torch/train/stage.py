"""One step of training, the same for both stages.

A step is a backward over the micro-batches, one transfer of all terms to the host (the only wait for the
device), then the optimizer. A term that is not finite stops the run before it reaches the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlip_core.errors import QlipError
from qlip_torch.model import MLP, QLIP, Block, SwiGLU
from qlip_torch.train.accumulate import Terms
from qlip_torch.train.distributed import World, clip_gradients
from qlip_torch.train.optimizers import cosine_warmup, learning_rates, set_rates
from qlip_torch.train.pictures import Batch
from qlip_torch.train.precision import Precision
from qlip_torch.train.recipe import StageRecipe
from qlip_torch.train.train_state import TrainState

# A bit that is nearly always the same carries no information.
DEAD = 0.01


class NonFiniteError(QlipError):
    """A loss term or a gradient norm became NaN or infinite; `terms` names all that did. `step` counts from 1,
    as in metrics.jsonl."""

    def __init__(self, terms: Sequence[str], step: int) -> None:
        super().__init__(
            f"loss term {', '.join(terms)} is not finite at step {step}: start again with a lower learning "
            "rate or a lower gradient clip. Earlier checkpoints are kept: `qlip train export RUN` "
            "makes a model of the newest, which --set start.checkpoint=MODEL continues from"
        )
        self.terms = tuple(terms)


@dataclass(frozen=True)
class Backward:
    """What a backward over the micro-batches returns: the terms, and this rank's latents u [B, N, L]."""

    terms: Terms
    u: Tensor


@dataclass(frozen=True)
class Bits:
    """How the code is used: each bit's share of ones in a batch. Healthy: all 0.3 to 0.7, none dead."""

    usage: tuple[float, ...]

    @property
    def low(self) -> float:
        return min(self.usage)

    @property
    def high(self) -> float:
        return max(self.usage)

    @property
    def dead(self) -> float:
        """Share of bits that are nearly always the same."""
        return sum(not DEAD <= share <= 1 - DEAD for share in self.usage) / len(self.usage)

    @property
    def healthy(self) -> bool:
        return self.low >= 0.3 and self.high <= 0.7


@dataclass(frozen=True)
class StepReport:
    """A step's results as numbers, the same on every rank."""

    terms: dict[str, float]
    total: float
    gradient_norm: float
    rate: float
    """Factor of the schedule."""
    bits: Bits | None
    learning_rates: dict[str, float] = field(default_factory=dict)
    """This step's learning rates by group."""
    logit_scale: float | None = None
    """exp(logit_scale) as this step's alignment used it; None without alignment."""
    layer_norms: dict[str, float] = field(default_factory=dict)
    """Gradient norm of each weighted loss at the last shared layer; empty if not probed."""


class Companion(Protocol):
    """What trains along with the model: stage 2's discriminator."""

    module: nn.Module
    optimizer: Optimizer

    def gradient_norm(self) -> Tensor:
        """Average its gradients over the global batch, and return their norm."""
        ...

    def step(self) -> None: ...


@dataclass
class Stage:
    """A stage as the loop steps it. `backward` is specific to the stage; the rest is common."""

    number: int
    model: QLIP
    recipe: StageRecipe
    world: World
    optimizer: Optimizer
    weights: dict[str, float]
    shared_layer: nn.Linear
    precision: Precision
    backward: Callable[[Sequence[Batch], int, LayerProbe | None], Backward]
    """Takes this rank's micro-batches, the step's number, and the probe at the shared layer, if any."""
    after: Callable[[int], None]
    reconstruct: Callable[[Tensor], Tensor]
    """A `Batch`'s pixels to their reconstruction, normalised; every rank calls it."""
    companion: Companion | None = None

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # Stage 2's frozen parts are stored in its start; stage 1 stores those that its recipe froze.
        frozen_elsewhere = self.number == 2
        self.state = TrainState(
            self.model, self.optimizer, self.recipe.ema, trained_only=frozen_elsewhere
        )
        if self.companion is not None:
            self.state.add("discriminator", self.companion.module, self.companion.optimizer)

    def step(self, batches: Sequence[Batch], step: int, *, probe: bool = False) -> StepReport:
        """One update of the weights on this rank's micro-batches.

        Raises NonFiniteError, naming the term, before any weight changes.
        """
        rate = cosine_warmup(step, self.recipe.warmup, self.recipe.steps)
        for optimizer in self.state.optimizers:
            set_rates(optimizer, rate)
        layer = LayerProbe(self.shared_layer) if probe else None
        try:
            found = self.backward(batches, step, layer)
        finally:
            if layer is not None:
                layer.close()
        norms = {"gradient norm": clip_gradients(self.parameters, self.recipe.clip, self.world)}
        if self.companion is not None:
            norms["discriminator gradient norm"] = self.companion.gradient_norm()
        terms, gradient_norm, bits, scale = self._to_host(found, norms, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.companion is not None:
            self.companion.step()
        self.after(step)
        if self.state.ema is not None:
            self.state.ema.update(self.model)
        return StepReport(
            terms=terms,
            total=sum(weight * terms[name] for name, weight in self.weights.items()),
            gradient_norm=gradient_norm,
            rate=rate,
            bits=bits,
            learning_rates=learning_rates(self.optimizer),
            logit_scale=scale,
            layer_norms=layer.norms(self.weights, self.world) if layer is not None else {},
        )

    def _to_host(
        self, found: Backward, norms: dict[str, Tensor], step: int
    ) -> tuple[dict[str, float], float, Bits | None, float | None]:
        """Terms, the first of the gradient norms, bits and exp(logit_scale) as numbers, with a single wait for
        the device."""
        names = list(found.terms)
        values = [found.terms[name].float().reshape(1) for name in names]
        if self.model.config.quantizes:
            values.append((found.u > 0).float().mean((0, 1)))
        same = [norm.reshape(1) for norm in norms.values()]  # equal on every rank: no mean needed
        if "align" in self.weights:
            same.append(self.model.logit_scale.detach().float().exp().reshape(1))
        numbers = torch.cat((*same, self.world.mean(torch.cat(values)))).tolist()
        same, numbers = numbers[: len(same)], numbers[len(same) :]
        found_norms, scales = same[: len(norms)], same[len(norms) :]
        terms = dict(zip(names, numbers))
        wrong = [name for name, value in terms.items() if not math.isfinite(value)]
        # Gradients may have NaN even if every term is finite.
        if not wrong:
            wrong = [name for name, norm in zip(norms, found_norms) if not math.isfinite(norm)]
        if wrong:
            raise NonFiniteError(wrong, step + 1)
        usage = numbers[len(names) :]
        bits = Bits(tuple(usage)) if usage else None
        return terms, found_norms[0], bits, scales[0] if scales else None


def last_shared_layer(model: QLIP) -> nn.Linear:
    """The last linear layer of the encoder's last MLP: w3, or fc2 (paper section 4)."""
    block = model.vision_model.encoder.layers[-1]
    assert isinstance(block, Block)
    mlp = block.mlp
    if isinstance(mlp, SwiGLU):
        return mlp.w3
    assert isinstance(mlp, MLP)
    return mlp.fc2


class LayerProbe:
    """The gradient of each loss at a linear layer's weight, over all micro-batches and ranks.

    Computed from the layer's input x and output y (`dL/dW = sum (dL/dy)^T x`), not from the parameter,
    which an engine may have sharded.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._sums: dict[str, Tensor] = {}
        self._listening = False
        self._seen: tuple[Tensor, Tensor] | None = None
        self._hook = layer.register_forward_hook(self._note)

    def close(self) -> None:
        self._hook.remove()

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Activation checkpointing runs the layer again in backward; the graph contains the first run's output.
        if self._listening and output.requires_grad:
            self._seen = (inputs[0].detach(), output)
            self._listening = False

    def listen(self) -> None:
        """Call before a forward with gradients."""
        self._listening = True

    def watch(self, pieces: Terms) -> None:
        """Call after it with the parts of the loss, before their backward; keeps the graph."""
        if self._seen is None:
            return
        x, y = self._seen
        self._seen = None
        for name, piece in pieces.items():
            at_output = None
            if piece.requires_grad:
                (at_output,) = torch.autograd.grad(piece, y, retain_graph=True, allow_unused=True)
            if at_output is None:
                at_output = torch.zeros_like(y)
            gradient = at_output.float().flatten(0, -2).T @ x.float().flatten(0, -2)
            self._sums[name] = self._sums.get(name, 0) + gradient

    def norms(self, weights: dict[str, float], world: World) -> dict[str, float]:
        """Norm of each loss's gradient, times the loss's weight."""
        return {
            name: weights[name] * float(world.mean(gradient).norm().item())
            for name, gradient in self._sums.items()
        }
