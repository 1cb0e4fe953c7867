"""Metrics that are networks of their own: LPIPS, Inception's features, CLIP's towers. Only torch has them."""

from __future__ import annotations

from typing import Protocol

from qlip_core.backends import get_backend, is_installed
from qlip_core.errors import BackendError
from qlip_core.evaluation.clip_score import Towers
from qlip_core.evaluation.reconstruction import Features, PairMetric


class LearnedMetrics(Protocol):
    """Metrics that the torch backend offers, whatever backend runs the model being measured."""

    def lpips(self, weights: str, device: str) -> PairMetric:
        """`weights`: safetensors files, or "random"."""
        ...

    def inception(self, weights: str, device: str) -> Features:
        """`weights`: safetensors files, or "random"."""
        ...

    def clip(self, source: str, device: str) -> Towers:
        """The CLIP in Hugging Face's layout in a folder or at a hub id."""
        ...


def learned_metrics(what: str, extra: str = "torch") -> LearnedMetrics:
    """The torch backend. Raises BackendError if torch is not installed, saying `what` ("LPIPS needs torch") and
    the `extra` that installs it."""
    if not is_installed("torch"):
        raise BackendError(f"{what}: pip install 'qlip[{extra}]'")
    return get_backend("torch")  # type: ignore[return-value]
