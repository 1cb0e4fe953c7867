"""Retrieval among captioned pictures, both ways: recall at 1, 5 and 10."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlip_core.data.samples import Tally
from qlip_core.errors import DataError
from qlip_core.evaluation.examples import Examples, batches, check_some
from qlip_core.evaluation.protocol import ReferenceHash, Result, make_protocol
from qlip_core.loading import DEFAULT_BATCH, Progress
from qlip_core.model import Model

RECALLS = (1, 5, 10)
# Rows of the n x n similarities that are in memory at a time.
_CHUNK = 1024


def evaluate_retrieval(
    model: Model,
    examples: Examples,
    *,
    batch_size: int = DEFAULT_BATCH,
    progress: Progress | None = None,
) -> Result:
    """R@1, R@5 and R@10 of finding a picture's caption among all, and a caption's picture among all.

    Every caption equal to the picture's own counts as a hit, and so does every picture with that caption.
    Texts or pictures that tie with the best hit rank before it. Raises DataError for a picture without a
    caption, or a set of fewer than 2.
    """
    broken, reference = Tally(), ReferenceHash()
    captions: list[str] = []
    vectors = []
    for chunk, pixels in batches(model, examples, batch_size, broken):
        said = [example.caption for example in chunk]
        for example in chunk:
            if not example.caption:
                raise DataError(f"{examples.name}: {example.key} has no caption")
        reference.add(model.preprocessing.to_images(pixels), said)
        captions += said
        vectors.append(model.embed_images(pixels, batch_size=batch_size))
        if progress is not None:
            progress(len(chunk))
    check_some(len(captions), examples, broken)
    if len(captions) < 2:
        raise DataError(f"{examples.name}: retrieval needs 2 pictures or more, got 1")

    distinct = list(dict.fromkeys(captions))
    embedded = model.embed_texts(distinct, batch_size=4 * batch_size)
    number = {caption: i for i, caption in enumerate(distinct)}
    group = np.array([number[caption] for caption in captions])
    images, texts = np.concatenate(vectors), embedded[group]
    to_text = recall(images, texts, group, group)
    # One query per distinct caption, since equal captions are the same query.
    to_image = recall(embedded, images, np.arange(len(distinct)), group)
    scores: dict[str, float | None] = {}
    scores |= {f"image to text R@{k}": share for k, share in to_text.items()}
    scores |= {f"text to image R@{k}": share for k, share in to_image.items()}
    protocol = make_protocol(
        model,
        "retrieval",
        examples.name,
        len(captions),
        reference.hexdigest(),
        uses_text=True,
        settings={"recalls": list(RECALLS), "distinct_captions": len(distinct)},
    )
    return Result(protocol, scores, {}, broken.to_dict())


def recall(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_group: np.ndarray,
    candidate_group: np.ndarray,
    recalls: Sequence[int] = RECALLS,
    chunk: int = _CHUNK,
) -> dict[int, float]:
    """Share of queries [Q, P] with a candidate [C, P] of their own group among the k most similar.

    `query_group` [Q], `candidate_group` [C]. Candidates of another group that tie with the best hit rank
    before it. Memory is `chunk` x C. Raises DataError for vectors that are not finite.
    """
    if not (np.isfinite(queries).all() and np.isfinite(candidates).all()):
        raise DataError("embeddings have NaN or infinite values: the model's weights are damaged")
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        scores = queries[rows] @ candidates.T  # [chunk, C]
        hit = query_group[rows, None] == candidate_group[None]
        best = np.where(hit, scores, -np.inf).max(1)
        ranks[rows] = ((scores >= best[:, None]) & ~hit).sum(1)
    return {k: float((ranks < k).mean()) for k in recalls}
