"""The emoji set's evaluations. Seen and unseen names never share a set, and only unseen ones are zero-shot.

"Seen" names stood in training's captions; their pictures here are new renderings. "Unseen" names and
glyphs were kept out of training altogether.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from qlip_core.data.captions import full_caption
from qlip_core.data.emoji_names import CLASS_NAMES_100, UNSEEN_NAMES
from qlip_core.data.emoji_set import EmojiSet, Split
from qlip_core.errors import DataError
from qlip_core.evaluation.examples import Example

CLASSES = 100
CAPTIONS = 500
HELD_OUT = 1000
UNSEEN_CLASS_NAMES: tuple[str, ...] = UNSEEN_NAMES[:CLASSES]

SEEN_NAMES_TITLE = "100 seen names, unseen renderings"
UNSEEN_NAMES_TITLE = "zero-shot: 100 unseen names"
SEEN_CAPTIONS_TITLE = "captions of seen names, unseen renderings"
UNSEEN_CAPTIONS_TITLE = "zero-shot: captions of unseen names"


@dataclass(frozen=True)
class EmojiExamples:
    """`count` samples of an `EmojiSet`, rendered as they are read.

    wording: "caption" (the sample's own), or "full" (every glyph, place and background, no two samples
    alike: those that repeat an earlier caption are left out).
    """

    title: str
    size: int
    count: int
    split: Split
    seed: int = 0
    plain: bool = False
    names: tuple[str, ...] | None = None
    wording: str = "caption"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"count (={self.count}) must be at least 1")

    @property
    def name(self) -> str:
        font = self._emoji.font
        return (
            f"emoji ({self.title}): {self.count} of split {self.split}, seed {self.seed}, "
            f"{'plain' if self.plain else 'scenes'}, {self.size} px, font {font.sha256()[:12]}"
        )

    @cached_property
    def _emoji(self) -> EmojiSet:
        return EmojiSet(self.size, self.seed, self.split, plain=self.plain, names=self.names)

    def __iter__(self) -> Iterator[Example]:
        emoji = self._emoji
        said: set[str] = set()
        index = found = 0
        while found < self.count:
            scene = emoji.scene(index)
            caption = full_caption(scene) if self.wording == "full" else emoji.caption(scene)
            if self.wording != "full" or caption not in said:
                said.add(caption)
                found += 1
                label = caption if self.plain else ""
                key = f"emoji-{self.split}-{self.seed}-{index:08d}"
                yield Example(key, emoji.render(scene), caption, label)
            index += 1


def reconstruction_examples(size: int, count: int = HELD_OUT, seed: int = 0) -> EmojiExamples:
    """Held-out scenes of seen glyphs: for PSNR and SSIM."""
    return EmojiExamples("held-out renderings", size, count, "held-out", seed)


def seen_class_examples(size: int, count: int = HELD_OUT, seed: int = 0) -> EmojiExamples:
    """Plain renderings, held out, of `CLASS_NAMES_100`, which take turns. Not zero-shot."""
    return EmojiExamples(
        SEEN_NAMES_TITLE, size, count, "held-out", seed, plain=True, names=CLASS_NAMES_100
    )


def unseen_class_examples(size: int, count: int = HELD_OUT, seed: int = 0) -> EmojiExamples:
    """Plain renderings of the first 100 of `UNSEEN_NAMES`, which take turns: zero-shot."""
    return EmojiExamples(
        UNSEEN_NAMES_TITLE, size, count, "unseen", seed, plain=True, names=UNSEEN_CLASS_NAMES
    )


def seen_caption_examples(size: int, count: int = CAPTIONS, seed: int = 0) -> EmojiExamples:
    """Held-out scenes of seen glyphs with their whole captions, all different."""
    return EmojiExamples(SEEN_CAPTIONS_TITLE, size, count, "held-out", seed, wording="full")


def unseen_caption_examples(size: int, count: int = CAPTIONS, seed: int = 0) -> EmojiExamples:
    """Scenes of unseen glyphs with their whole captions, all different: zero-shot."""
    return EmojiExamples(UNSEEN_CAPTIONS_TITLE, size, count, "unseen", seed, wording="full")


def probe_examples(
    size: int, count: int = HELD_OUT, seed: int = 0
) -> tuple[EmojiExamples, EmojiExamples]:
    """(training, test) for a linear probe over `CLASS_NAMES_100`: plain renderings, four to one."""
    train = EmojiExamples(
        "100 seen names, training renderings",
        size,
        4 * count,
        "train",
        seed,
        plain=True,
        names=CLASS_NAMES_100,
    )
    return train, seen_class_examples(size, count, seed)
