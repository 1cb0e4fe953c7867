"""Classification by text: the class whose name, in the wordings of some templates, is nearest.

It is zero-shot only if training saw none of the names, which depends on the set (see
`qlip_core.evaluation.emoji`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from qlip_core.data.samples import Tally
from qlip_core.errors import DataError
from qlip_core.evaluation.examples import Examples, batches, check_some
from qlip_core.evaluation.protocol import ReferenceHash, Result, make_protocol, text_hash
from qlip_core.loading import DEFAULT_BATCH, Progress
from qlip_core.model import Model

TEMPLATES = ("{}",)


def evaluate_zero_shot(
    model: Model,
    examples: Examples,
    classes: Sequence[str] | None = None,
    *,
    templates: Sequence[str] = TEMPLATES,
    wordings: Mapping[str, str] | None = None,
    batch_size: int = DEFAULT_BATCH,
    progress: Progress | None = None,
) -> Result:
    """Share of images whose class is the nearest text (top-1), or among the five nearest (top-5).

    A class's text is the mean of its embeddings over `templates`; `wordings` maps classes to words other than
    their names, such as descriptions; `classes` defaults to all labels of the set, sorted. Texts
    that tie count as nearer than the right one. Raises DataError for an image without a label, a label
    that is no class, fewer than 2 classes, or two of one name.
    """
    classes = labels_of(examples) if classes is None else list(classes)
    if len(classes) < 2:
        raise DataError(f"{examples.name}: classes are {classes}; zero-shot needs 2 or more")
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise DataError(f"{examples.name}: class {twice[0]!r} is named more than once")
    number = {name: i for i, name in enumerate(classes)}
    words = [(wordings or {}).get(name, name) for name in classes]
    texts = model.embed_labels(words, templates)  # [C, P]
    broken, reference = Tally(), ReferenceHash()
    truth: list[int] = []
    ranks = []
    for chunk, pixels in batches(model, examples, batch_size, broken):
        labels = [example.label for example in chunk]
        for example in chunk:
            if example.label not in number:
                said = (
                    f"label {example.label!r} is not a class" if example.label else "has no label"
                )
                raise DataError(f"{examples.name}: {example.key}: {said}")
        reference.add(model.preprocessing.to_images(pixels), labels)
        scores = model.embed_images(pixels, batch_size=batch_size) @ texts.T  # [b, C]
        right = np.array([number[label] for label in labels])
        ranks.append(rank_of(scores, right))
        truth += right.tolist()
        if progress is not None:
            progress(len(chunk))
    check_some(len(truth), examples, broken)

    rank, true = np.concatenate(ranks), np.array(truth)
    per_class = {}
    for i, name in enumerate(classes):
        of_class = rank[true == i]
        if len(of_class):
            per_class[name] = {
                "images": len(of_class),
                "top-1": float((of_class < 1).mean()),
                "top-5": float((of_class < 5).mean()),
            }
    scores_out: dict[str, float | None] = {
        "top-1": float((rank < 1).mean()),
        **({"top-5": float((rank < 5).mean())} if len(classes) > 5 else {}),
        "top-1, mean of classes": float(np.mean([c["top-1"] for c in per_class.values()])),
        "chance": 1 / len(classes),
    }
    protocol = make_protocol(
        model,
        "classification by text",
        examples.name,
        len(true),
        reference.hexdigest(),
        uses_text=True,
        settings={
            "classes": len(classes),
            "classes_sha256": text_hash(classes),
            "templates": list(templates),
            **({"told_sha256": text_hash(words)} if wordings else {}),
        },
    )
    return Result(protocol, scores_out, {"classes": per_class}, broken.to_dict())


def labels_of(examples: Examples) -> list[str]:
    """All labels of a set, sorted. Reads the whole set without decoding images."""
    return sorted({label for each in examples if (label := getattr(each, "label", ""))})


def rank_of(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int64 [b]: how many others score at least as high as the right one; scores [b, C], right [b].

    Raises DataError for scores that are not finite, which would rank first.
    """
    if not np.isfinite(scores).all():
        raise DataError("similarities have NaN or infinite values: the model's weights are damaged")
    own = scores[np.arange(len(right)), right]
    return (scores >= own[:, None]).sum(1) - 1
