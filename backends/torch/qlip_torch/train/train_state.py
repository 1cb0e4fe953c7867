"""The state of a model in training between steps, by names that do not depend on the number of ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from qlip_torch.train.ema import Ema
from qlip_torch.train.optimizers import fill_state


class TrainState:
    """Weights, optimizer states and moving average: all that a resumed run needs of a model."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, decay: float, *, trained_only: bool
    ) -> None:
        """decay: of the moving average, `ema`; 0 is none. trained_only: leave out frozen weights, which are
        stored elsewhere."""
        self.ema = Ema(model, decay) if decay else None
        self.optimizers = [optimizer]
        fill_state(optimizer)
        self._parts = [("model", "optimizer", model, optimizer, trained_only)]

    def add(self, name: str, module: nn.Module, optimizer: Optimizer) -> None:
        """Include another network that is trained along with the model."""
        self.optimizers.append(optimizer)
        fill_state(optimizer)
        self._parts.append((name, f"{name}_optimizer", module, optimizer, False))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, as held by this rank, to save or to load into."""
        out: dict[str, Tensor] = {}
        for weights, states, module, optimizer, trained_only in self._parts:
            for name, p in module.named_parameters():
                if p.requires_grad or not trained_only:
                    out[f"{weights}.{name}"] = p.detach()
                for key, value in optimizer.state.get(p, {}).items():
                    out[f"{states}.{name}.{key}"] = value
        if self.ema is not None:
            out |= {f"ema.{name}": tensor for name, tensor in self.ema.shadow.items()}
        return out

    def numbers(self) -> dict[str, Any]:
        """The state that is not tensors, in JSON types."""
        return {"ema_updates": self.ema.updates if self.ema is not None else 0}

    def restore_numbers(self, numbers: dict[str, Any]) -> None:
        if self.ema is not None:
            self.ema.updates = int(numbers["ema_updates"])
