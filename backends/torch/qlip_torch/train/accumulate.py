"""Feature-cached gradient accumulation: the gradients of one large batch, in the memory of a small one.

A loss such as InfoNCE or the codebook entropy needs the features of the whole batch at once, but
features are small and activations are not. So (GradCache, arXiv 2101.06983):

1. without gradients, compute and keep the features of every micro-batch;
2. take the losses on all features together, and their gradients at the features;
3. run each micro-batch forward again, with gradients, and backward from `sum(features * their
   gradient)` plus the micro-batch's share of the losses that are means over images.

By the chain rule the parameters' gradients are those of the whole batch. The forward draws no random
numbers, so both passes compute the same features. A single micro-batch needs one pass and no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

Inputs = TypeVar("Inputs", contravariant=True)
Features = tuple[Tensor, ...]
Terms = dict[str, Tensor]


class Losses(Protocol[Inputs]):
    """What a stage minimises, split up for accumulation."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Each term's weight in the total. Terms without one are only reported."""
        ...

    def features(self, inputs: Inputs) -> Features:
        """What `of_features` needs from a micro-batch, rows first. Called without gradients."""
        ...

    def forward(self, inputs: Inputs) -> tuple[Features, Terms]:
        """The same features, and the terms that are means over the micro-batch's images."""
        ...

    def of_features(self, features: Features) -> Terms:
        """The terms computed from the features of all micro-batches together."""
        ...

    def parameters_of_features(self) -> Sequence[nn.Parameter]:
        """Parameters that `of_features` uses itself."""
        ...


@dataclass(frozen=True)
class Accumulated:
    """What one accumulated backward found: every term, detached, and the features of the batch."""

    terms: Terms
    features: Features


class GradientProbe(Protocol):
    """`listen` is called before each forward with gradients, `watch` after it with each term's part of the loss."""

    def listen(self) -> None: ...

    def watch(self, pieces: Terms) -> None: ...


def accumulated_backward(
    losses: Losses[Inputs],
    batches: Sequence[Inputs],
    *,
    probe: GradientProbe | None = None,
    syncing: Callable[[bool], AbstractContextManager[None]] = lambda last: nullcontext(),
    after_each: Callable[[], None] = lambda: None,
) -> Accumulated:
    """Add the gradients of the weighted total over all `batches` (of equal size) to `.grad`.

    `syncing(last)` is entered around each micro-batch, for an engine that averages gradients over
    ranks at the last one. `probe` sees the terms unweighted. `after_each` is called after each backward.
    """
    if len(batches) == 1:
        with syncing(True):
            if probe is not None:
                probe.listen()
            features, terms = losses.forward(batches[0])
            terms = {**losses.of_features(features), **terms}
            if probe is not None:
                probe.watch({name: terms[name] for name in losses.weights})
            _total(terms, losses.weights).backward()
        after_each()
        return Accumulated(_detached(terms), tuple(f.detach() for f in features))

    with torch.no_grad():
        rows = [losses.features(inputs) for inputs in batches]
    cached = tuple(torch.cat(parts).requires_grad_() for parts in zip(*rows))
    counts = [len(parts[0]) for parts in rows]
    del rows
    terms, gradients = _feature_gradients(losses, cached, apart=probe is not None)

    share = 1 / len(batches)
    sums: Terms = {}
    for index, (inputs, piece) in enumerate(zip(batches, _split(gradients, counts))):
        with syncing(index == len(batches) - 1):
            if probe is not None:
                probe.listen()
            features, local = losses.forward(inputs)
            pieces = {name: _dot(features, gradient) for name, gradient in piece.items()}
            for name, term in local.items():
                sums[name] = sums.get(name, 0) + term.detach() * share
                if name in losses.weights:
                    pieces[name] = term * share
            if probe is not None:
                probe.watch(pieces)
            # "all" is already weighted.
            _total(pieces, {"all": 1.0, **losses.weights}).backward()
        after_each()
    return Accumulated({**terms, **sums}, tuple(f.detach() for f in cached))


def _feature_gradients(
    losses: Losses, cached: Features, *, apart: bool
) -> tuple[Terms, dict[str, Features]]:
    """The terms of the features, and their gradients at the features: the total's, or (`apart`) each term's."""
    terms = losses.of_features(cached)
    parameters = list(losses.parameters_of_features())
    weighted = {name: term for name, term in terms.items() if name in losses.weights}
    if not weighted:
        return _detached(terms), {}
    total = _total(weighted, losses.weights)
    gradients: dict[str, Features] = {}
    if apart:
        for name, term in weighted.items():
            gradients[name] = torch.autograd.grad(
                term, cached, retain_graph=True, allow_unused=True, materialize_grads=True
            )
    found = torch.autograd.grad(
        total, [*cached, *parameters], allow_unused=True, materialize_grads=True
    )
    for parameter, gradient in zip(parameters, found[len(cached) :]):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    if not apart:
        gradients["all"] = found[: len(cached)]
    return _detached(terms), gradients


def _split(gradients: dict[str, Features], counts: list[int]) -> Iterator[dict[str, Features]]:
    """The gradients of each micro-batch's rows."""
    start = 0
    for count in counts:
        rows = slice(start, start + count)
        yield {name: tuple(each[rows] for each in parts) for name, parts in gradients.items()}
        start += count


def _dot(features: Features, gradients: Features) -> Tensor:
    total = features[0].new_zeros(())
    for feature, gradient in zip(features, gradients):
        total = total + (feature * gradient).sum()
    return total


def _total(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    parts = [term * weights[name] for name, term in terms.items() if name in weights]
    return torch.stack(parts).sum()


def _detached(terms: Terms) -> Terms:
    return {name: term.detach() for name, term in terms.items()}
