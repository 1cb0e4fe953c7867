"""Multinomial logistic regression by full-batch L-BFGS in numpy: convex, deterministic, no settings to tune."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_MEMORY = 10
_SUFFICIENT, _CURVATURE = 1e-4, 0.9
_ROWS = 16384
_ITERATIONS = 200

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]


@dataclass(frozen=True, eq=False)
class LogisticRegression:
    """weights float64 [F, C], bias float64 [C], for features standardised by mean and scale [F]."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Class numbers int64 [n] of features [n, F]."""
        out = np.empty(len(features), np.int64)
        for start in range(0, len(features), _ROWS):
            rows = slice(start, start + _ROWS)
            x = (features[rows] - self.mean) / self.scale
            out[rows] = (x @ self.weights + self.bias).argmax(1)
        return out

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        return float((self.predict(features) == labels).mean())


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    l2: float,
    *,
    start: LogisticRegression | None = None,
    tolerance: float = 1e-5,
) -> LogisticRegression:
    """Minimise mean cross-entropy + l2/2 |W|^2 (the bias is free), features [n, F], labels [n].

    Features are standardised by their own mean and deviation. Stops when no gradient exceeds
    `tolerance`. It begins from `start`, fitted on the same features, which saves most of the work when
    trying several l2.
    """
    mean = features.mean(0, dtype=np.float64)
    deviation = features.std(0, dtype=np.float64)
    # A feature that is constant, up to rounding, is ignored.
    scale = np.where(deviation > 1e-6 * np.abs(mean) + 1e-12, deviation, np.inf)
    width = features.shape[1]
    first = np.zeros((width + 1, classes))
    if start is not None:
        first[:-1], first[-1] = start.weights, start.bias

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(width + 1, classes)
        loss, gradient = 0.0, np.zeros_like(w)
        for begin in range(0, len(features), _ROWS):
            rows = slice(begin, begin + _ROWS)
            x, y = (features[rows] - mean) / scale, labels[rows]
            logits = x @ w[:-1] + w[-1]
            logits -= logits.max(1, keepdims=True)
            odds = np.exp(logits)
            total = odds.sum(1, keepdims=True)
            every = np.arange(len(y))
            loss -= (logits[every, y] - np.log(total[:, 0])).sum()
            error = odds / total
            error[every, y] -= 1
            gradient[:-1] += x.T @ error
            gradient[-1] += error.sum(0)
        loss, gradient = loss / len(features), gradient / len(features)
        gradient[:-1] += l2 * w[:-1]
        return loss + l2 / 2 * float((w[:-1] ** 2).sum()), gradient.reshape(-1)

    w = minimise(objective, first.reshape(-1), _ITERATIONS, tolerance).reshape(width + 1, classes)
    return LogisticRegression(mean, scale, w[:-1], w[-1])


def minimise(
    objective: Objective, start: np.ndarray, iterations: int, tolerance: float
) -> np.ndarray:
    """L-BFGS (Nocedal & Wright, algorithm 7.5) with a bisecting search for the weak Wolfe conditions."""
    x = start
    value, gradient = objective(x)
    history: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=_MEMORY)
    for _ in range(iterations):
        if np.abs(gradient).max() <= tolerance:
            break
        direction = -_scaled(gradient, history)
        found = _search(objective, x, value, gradient, direction, first=not history)
        if found is None:  # rounding leaves no step that lowers the objective
            break
        step, new_value, new_gradient = found
        change = new_gradient - gradient
        if step @ change > 1e-12 * (change @ change) ** 0.5 * (step @ step) ** 0.5:
            history.append((step, change))
        x, value, gradient = x + step, new_value, new_gradient
    return x


def _scaled(gradient: np.ndarray, history: deque[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The inverse Hessian, as the history has it, times the gradient."""
    out = gradient.copy()
    weights = []
    for step, change in reversed(history):
        weight = (step @ out) / (step @ change)
        out -= weight * change
        weights.append(weight)
    if history:
        step, change = history[-1]
        out *= (step @ change) / (change @ change)
    for (step, change), weight in zip(history, reversed(weights)):
        out += (weight - (change @ out) / (step @ change)) * step
    return out


def _search(
    objective: Objective,
    x: np.ndarray,
    value: float,
    gradient: np.ndarray,
    direction: np.ndarray,
    *,
    first: bool,
) -> tuple[np.ndarray, float, np.ndarray] | None:
    slope = gradient @ direction
    if slope >= 0:
        return None
    length = min(1.0, 1.0 / np.abs(gradient).sum()) if first else 1.0
    low, high = 0.0, np.inf
    best = None
    for _ in range(40):
        step = length * direction
        new_value, new_gradient = objective(x + step)
        if new_value > value + _SUFFICIENT * length * slope:
            high = length
        else:
            best = step, new_value, new_gradient
            if new_gradient @ direction >= _CURVATURE * slope:
                break
            low = length
        length = 2 * low if np.isinf(high) else (low + high) / 2
    return best
