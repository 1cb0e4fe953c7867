"""Linear probe: how well a linear classifier does on the encoder's last layer (paper table 4).

Features are the CLS token, the mean of the patch tokens, or both side by side, before any projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlip_core.data.samples import Tally
from qlip_core.errors import DataError
from qlip_core.evaluation.examples import Examples, batches, check_some
from qlip_core.evaluation.logistic import fit
from qlip_core.evaluation.protocol import ReferenceHash, Result, make_protocol
from qlip_core.loading import DEFAULT_BATCH, Progress
from qlip_core.model import Model

FEATURES = ("cls", "patches", "both")
L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Penalties tried, on standardised features."""
VALIDATION_SHARE = 0.2
_SEED = 0


def evaluate_linear_probe(
    model: Model,
    train: Examples,
    test: Examples,
    *,
    features: Sequence[str] = FEATURES,
    batch_size: int = DEFAULT_BATCH,
    progress: Progress | None = None,
) -> Result:
    """Accuracy on `test` of logistic regressions fitted to the features of `train`.

    The penalty is the one from `L2` that does best on a fifth of `train`, drawn with a fixed seed; then all
    of `train` is fitted with it. The same inputs give the same figures. Features of all images are kept in
    memory, 8 bytes x encoder width per image. Raises DataError for labels of `test` that `train` lacks, an
    image without a label, or fewer than 2 classes.
    """
    unknown = [name for name in features if name not in FEATURES]
    if unknown or not features:
        raise ValueError(f"features {list(features)}: choose from {', '.join(FEATURES)}")
    reference = ReferenceHash()
    fitted = _extract(model, train, None, batch_size, reference, progress)
    classes = sorted(set(fitted.labels))
    if len(classes) < 2:
        raise DataError(
            f"{train.name}: {len(classes)} classes with labels; a probe needs 2 or more"
        )
    held = _extract(model, test, classes, batch_size, reference, progress)
    number = {name: i for i, name in enumerate(classes)}
    labels, test_labels = (
        np.array([number[name] for name in each.labels]) for each in (fitted, held)
    )

    scores: dict[str, float | None] = {}
    details = {}
    for name in features:
        x, x_test = _chosen(fitted.states, name), _chosen(held.states, name)
        l2, tried = choose_l2(x, labels, len(classes))
        probe = fit(x, labels, len(classes), l2)
        scores[f"accuracy, {name}"] = probe.accuracy(x_test, test_labels)
        details[name] = {
            "l2": l2,
            "validation_accuracy": {str(k): v for k, v in tried.items()},
            "train_accuracy": probe.accuracy(x, labels),
        }
    broken = fitted.broken
    broken.include(held.broken.to_dict())
    protocol = make_protocol(
        model,
        "linear probe",
        f"{train.name} -> {test.name}",
        len(held.labels),
        reference.hexdigest(),
        uses_text=False,
        settings={
            "train_count": len(fitted.labels),
            "classes": len(classes),
            "layer": "last, before post_layernorm",
            "l2": list(L2),
            "validation_share": VALIDATION_SHARE,
            "seed": _SEED,
        },
    )
    return Result(protocol, scores, details, broken.to_dict())


def choose_l2(
    features: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[float, dict[float, float]]:
    """(the best penalty, {penalty: validation accuracy}); of equals the stronger one.

    A fifth, drawn with a fixed seed and not balanced by class, is for validation.
    """
    order = np.random.default_rng(_SEED).permutation(len(labels))
    cut = max(1, round(VALIDATION_SHARE * len(labels)))
    left_out, kept = order[:cut], order[cut:]
    tried: dict[float, float] = {}
    probe = None
    for l2 in L2:  # from the strongest on; each fit starts where the last one ended
        probe = fit(features[kept], labels[kept], classes, l2, start=probe)
        tried[l2] = probe.accuracy(features[left_out], labels[left_out])
    best = max(tried.values())
    return next(l2 for l2 in L2 if tried[l2] == best), tried


@dataclass(frozen=True)
class _Extracted:
    states: np.ndarray  # float32 [n, 2, D]: CLS, mean of patches
    labels: list[str]  # the label of each
    broken: Tally


def _extract(
    model: Model,
    examples: Examples,
    classes: Sequence[str] | None,
    batch_size: int,
    reference: ReferenceHash,
    progress: Progress | None,
) -> _Extracted:
    broken = Tally()
    states, labels = [], []
    known = None if classes is None else set(classes)
    for chunk, pixels in batches(model, examples, batch_size, broken):
        for example in chunk:
            if not example.label:
                raise DataError(f"{examples.name}: {example.key}: no label")
            if known is not None and example.label not in known:
                raise DataError(
                    f"{examples.name}: {example.key}: label {example.label!r} is not in training"
                )
        names = [example.label for example in chunk]
        reference.add(model.preprocessing.to_images(pixels), names)
        hidden = model.hidden_states(pixels, -1, batch_size=batch_size)  # [b, N+1, D]
        states.append(np.stack([hidden[:, 0], hidden[:, 1:].mean(1)], axis=1))
        labels += names
        if progress is not None:
            progress(len(chunk))
    check_some(len(labels), examples, broken)
    return _Extracted(np.concatenate(states), labels, broken)


def _chosen(states: np.ndarray, name: str) -> np.ndarray:
    """[n, D] or, for both, [n, 2D]."""
    if name == "both":
        return states.reshape(len(states), -1)
    return states[:, FEATURES.index(name)]
