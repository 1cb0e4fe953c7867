"""What an unseen name can be read from: top-1 by how many of its words training's captions held.

    python docs/unseen.py [MODEL]

The table of the model card: told by the name, and by a description of the thing. Words such as "a" and
"of" are not counted.
"""

from __future__ import annotations

import sys

import numpy as np

import qlip_core as qlip
from qlip_core.data.captions import names_of
from qlip_core.data.emoji_names import seen_glyphs
from qlip_core.evaluation.emoji import (
    UNSEEN_CLASS_NAMES,
    unseen_class_examples,
    unseen_descriptions,
)

SMALL_WORDS = {"a", "an", "the", "of", "and", "with", "in", "on", "its", "to", "at"}
GROUPS = ("all words known", "some words known", "no word known")


def group_of(name: str, known: set[str]) -> str:
    words = [word for word in name.split() if word not in SMALL_WORDS]
    found = sum(word in known for word in words)
    return GROUPS[0] if found == len(words) else GROUPS[1] if found else GROUPS[2]


def main(name: str | None) -> None:
    model = qlip.load(name)
    known = {word for glyph in seen_glyphs() for each in names_of(glyph) for word in each.split()}
    examples = list(unseen_class_examples(model.config.image_size))
    images = model.embed_images(np.stack([example.image for example in examples]))
    right = np.array([UNSEEN_CLASS_NAMES.index(example.label) for example in examples])
    hits = [
        (images @ model.embed_labels(texts).T).argmax(1) == right
        for texts in (UNSEEN_CLASS_NAMES, list(unseen_descriptions().values()))
    ]
    groups = np.array([group_of(name, known) for name in UNSEEN_CLASS_NAMES])
    for group in GROUPS:
        rows = groups[right] == group
        by_name, described = (found[rows].mean() for found in hits)
        print(
            f"{group:<18} {(groups == group).sum():3} names  {rows.sum():4} renderings  "
            f"top-1 by name {by_name:6.1%}, by description {described:6.1%}"
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
