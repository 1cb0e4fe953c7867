"""Fréchet distance between two sets of features (FID, arXiv 1706.08500), in numpy float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qlip_core.errors import QlipError


class FeatureStatistics:
    """Exact mean and covariance of features added in batches, in the memory of one F x F matrix."""

    def __init__(self) -> None:
        self.count = 0
        self._shift: np.ndarray | None = None
        self._sum = self._products = np.empty(0)

    def add(self, features: np.ndarray) -> None:
        """Features [B, F]. Raises QlipError if they are not finite."""
        if not np.isfinite(features).all():
            raise QlipError("features have NaN or infinite values")
        features = features.astype(np.float64)
        if self._shift is None:
            # Sums of squares around a value near the mean do not lose digits to cancellation.
            self._shift = features.mean(0)
            width = features.shape[1]
            self._sum, self._products = np.zeros(width), np.zeros((width, width))
        features = features - self._shift
        self.count += len(features)
        self._sum += features.sum(0)
        self._products += features.T @ features

    def gaussian(self) -> Gaussian:
        """The normal distribution of the same mean and covariance (divided by count - 1)."""
        if self._shift is None or self.count < 2:
            raise QlipError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self._sum / self.count
        centred = self._products - self.count * np.outer(mean, mean)
        return Gaussian(mean + self._shift, centred / (self.count - 1))


@dataclass(frozen=True, eq=False)
class Gaussian:
    """mean float64 [F], covariance float64 [F, F]."""

    mean: np.ndarray
    covariance: np.ndarray


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The trace of the root equals that of (R C_b R)^(1/2), R = C_a^(1/2), which is symmetric. That takes
    two eigendecompositions and avoids a matrix root that rounding makes complex.
    """
    root = _root(a.covariance)
    inner = root @ b.covariance @ root
    eigenvalues = np.linalg.eigvalsh((inner + inner.T) / 2)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    difference = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(0.0, difference @ difference + trace))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
