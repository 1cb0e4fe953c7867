"""LAMB, optimizer state, parameter groups, and the schedule.

LAMB (arXiv 1904.00962, algorithm 2) keeps its state in float32 and works on sharded parameters
(DTensor, as FSDP2 makes them): the update is local, its norms are global.
"""

# torch's own optimizers are built on _foreach_*, which it does not re-export.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qlip_core.errors import RecipeError


class Lamb(Optimizer):
    """`w -= lr * trust * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)`, per parameter.

    m_hat, v_hat: bias-corrected averages of g and g^2. `trust = |w| / |update|`, or 1 where either
    norm is 0. Parameters with fewer than two dimensions (biases, norms, scales) get neither decay nor
    trust ratio, which makes it Adam for them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.05,
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise RecipeError(
                f"LAMB takes lr >= 0, eps > 0, weight_decay >= 0 and betas in [0, 1), got lr={lr}, "
                f"eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. No host sync."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fill_state(self)
        matrices: list[tuple[Tensor, Tensor, float]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            directions = self._directions(params, group)
            plain = [i for i, p in enumerate(params) if p.ndim < 2]
            if plain:
                _descend(
                    [local(params[i]) for i in plain],
                    [directions[i] for i in plain],
                    None,
                    lr=group["lr"],
                )
            for p, direction in zip(params, directions):
                if p.ndim >= 2:
                    matrices.append((p, direction, group["lr"]))
            decayed = [i for i, p in enumerate(params) if p.ndim >= 2 and group["weight_decay"]]
            if decayed:
                torch._foreach_add_(
                    [directions[i] for i in decayed],
                    [local(params[i]).float() for i in decayed],
                    alpha=group["weight_decay"],
                )
        self._step_matrices(matrices)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`, keeping averages in float32 for weights of any dtype."""
        super().load_state_dict(state_dict)
        # The base class has cast the averages to their parameter's dtype.
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for p, key in zip(group["params"], saved["params"]):
                if p.dtype != torch.float32 and key in state_dict["state"]:
                    for name in ("exp_avg", "exp_avg_sq"):
                        value = state_dict["state"][key][name]
                        self.state[p][name] = value.to(p.device, torch.float32, copy=True)

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """`m_hat / (sqrt(v_hat) + eps)` of each parameter's local part, float32, newly allocated."""
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in params]
        grads = [local(p.grad).float() for p in params if p.grad is not None]
        average = [local(state["exp_avg"]) for state in states]
        square = [local(state["exp_avg_sq"]) for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        steps = [state["step"].item() for state in states]
        torch._foreach_lerp_(average, grads, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - beta2)
        # m / (sqrt(v) * c1 / sqrt(c2) + c1 * eps), with the corrections c = 1 - beta^step.
        first = [1 - beta1**s for s in steps]
        denominator = torch._foreach_sqrt(square)
        torch._foreach_mul_(
            denominator, [c / math.sqrt(1 - beta2**s) for c, s in zip(first, steps)]
        )
        torch._foreach_add_(denominator, [c * group["eps"] for c in first])
        return list(torch._foreach_div(average, denominator))

    def _step_matrices(self, matrices: list[tuple[Tensor, Tensor, float]]) -> None:
        """Scale each direction by its trust ratio and apply it: one all-reduce for all norms."""
        by_layout: dict[Any, list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
        for p, direction, lr in matrices:
            by_layout[_layout(p), p.device].append((p, direction, lr))
        for (layout, _), members in by_layout.items():
            weights = [local(p) for p, _, _ in members]
            directions = [direction for _, direction, _ in members]
            norms = torch.stack(
                torch._foreach_norm([w.float() for w in weights]) + torch._foreach_norm(directions)
            )
            if layout is not None:
                norms = _global_norms(norms, *layout)
            weight_norms, direction_norms = norms.chunk(2)
            usable = (weight_norms > 0) & (direction_norms > 0)
            trust = torch.where(usable, weight_norms / direction_norms, 1.0).unbind()
            for lr in dict.fromkeys(lr for _, _, lr in members):
                chosen = [i for i, member in enumerate(members) if member[2] == lr]
                of_rate = ([each[i] for i in chosen] for each in (weights, directions, trust))
                _descend(*of_rate, lr=lr)


def fill_state(optimizer: Optimizer) -> None:
    """Create the state that Adam and LAMB make in their first step, so that a checkpoint always has it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                # torch's fused kernels keep the step count on the device, all others on the host, which reads it
                # without a sync.
                where = p.device if group.get("fused") else None
                state["step"] = torch.tensor(0.0, device=where)
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)


def _descend(
    weights: list[Tensor], directions: list[Tensor], trust: list[Tensor] | None, *, lr: float
) -> None:
    """`w -= lr * trust * direction`; None: a ratio of 1."""
    if any(w.dtype != d.dtype for w, d in zip(weights, directions)):
        for i, (w, d) in enumerate(zip(weights, directions)):
            w.copy_(w.float() - lr * (d if trust is None else trust[i] * d))
    elif trust is None:
        torch._foreach_add_(weights, directions, alpha=-lr)
    else:
        torch._foreach_addcmul_(weights, directions, trust, value=-lr)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layout(p: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh that a parameter is sharded over, and along which of its dimensions."""
    if not isinstance(p, DTensor):
        return None
    sharded = tuple(i for i, place in enumerate(p.placements) if place.is_shard())
    return (p.device_mesh, sharded) if sharded else None


def _global_norms(norms: Tensor, mesh: Any, dimensions: tuple[int, ...]) -> Tensor:
    squares = norms.square()
    for dimension in dimensions:
        dist.all_reduce(squares, group=mesh.get_group(dimension))
    return squares.sqrt()


# --- parameter groups ----------------------------------------------------------------------------

GROUPS = ("rest", "visual_encoder", "text_encoder", "decoder")


def group_of(name: str) -> str:
    """Which of `GROUPS` a parameter, named as in SPEC section 2, belongs to."""
    if name.startswith(("text_model.", "text_projection")):
        return "text_encoder"
    if name.startswith("vision_decoder."):
        return "decoder"
    if name.startswith("vision_model.") and not name.startswith("vision_model.quant_embed"):
        return "visual_encoder"
    return "rest"


def parameter_groups(
    model: nn.Module, rates: dict[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups by tower (SPEC section 3's learning rates), decay on matrices only.

    rates: a learning rate for each of `GROUPS`. Parameters that need no gradient, and groups whose
    rate is 0, are left out. Each group has `name` ("decoder", "decoder/no_decay"), `lr` and `base_lr`,
    which `set_rates` scales by the schedule. Raises RecipeError for other names.
    """
    if set(rates) != set(GROUPS):
        raise RecipeError(f"learning rates are for {list(GROUPS)}, got {sorted(rates)}")
    groups: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        tower = group_of(name)
        rate = rates[tower]
        if not p.requires_grad or rate == 0:
            continue
        decays = p.ndim >= 2
        key = tower if decays else f"{tower}/no_decay"
        if key not in groups:
            groups[key] = {
                "name": key,
                "params": [],
                "lr": rate,
                "base_lr": rate,
                "weight_decay": weight_decay if decays else 0.0,
            }
        groups[key]["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def cosine_warmup(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate at a step counted from 0: linear up to 1, then cosine to 0.

    `(step + 1) / warmup` before warmup, then `(1 + cos(pi x)) / 2` with
    `x = (step - warmup) / (total - warmup)`, held at 0 from `total` on.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return (1 + math.cos(math.pi * progress)) / 2


def set_rates(optimizer: Optimizer, factor: float) -> None:
    """Set every group's `lr` to `factor * base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Every group's `lr` by name, listing groups with and without decay as one."""
    return {group["name"].partition("/")[0]: group["lr"] for group in optimizer.param_groups}
