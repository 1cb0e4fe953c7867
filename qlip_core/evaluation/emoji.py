"""The emoji set's evaluations. No set mixes seen and unseen names, and only unseen ones are zero-shot.

"Seen" names occurred in training captions; their pictures here are new renderings. "Unseen" names and
glyphs were kept out of training altogether.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from qlip_core.data.captions import full_caption, ground_words
from qlip_core.data.draws import Draws, stable_hash
from qlip_core.data.emoji_names import CLASS_NAMES_100, UNSEEN_NAMES, glyph_by_name
from qlip_core.data.emoji_set import EmojiSet, Split
from qlip_core.data.palette import PALETTE
from qlip_core.data.scenes import Background, is_held_out_combination
from qlip_core.errors import DataError
from qlip_core.evaluation.examples import Example
from qlip_core.evaluation.prompts import Prompt, PromptSet

CLASSES = 100
CAPTIONS = 500
HELD_OUT = 1000
_SEED = 0  # of the random colours in prompts
UNSEEN_CLASS_NAMES: tuple[str, ...] = UNSEEN_NAMES[:CLASSES]

SEEN_NAMES_TITLE = "100 seen names, unseen renderings"
UNSEEN_NAMES_TITLE = "zero-shot: 100 unseen names"
DESCRIBED_TITLE = "zero-shot: 100 unseen names, told by descriptions"
SEEN_CAPTIONS_TITLE = "captions of seen names, unseen renderings"
UNSEEN_CAPTIONS_TITLE = "zero-shot: captions of unseen names"
SEEN_PROMPTS_TITLE = "prompts of 100 seen names on backgrounds that training could show them on"
NAME_PROMPTS_TITLE = "prompts of 100 seen names alone"
COMBINATION_PROMPTS_TITLE = "prompts of combinations never trained: seen names on other backgrounds"


@dataclass(frozen=True)
class EmojiExamples:
    """`count` samples of an `EmojiSet`, rendered as they are read.

    wording: "caption" (the sample's own), or "full" (every glyph, place and background; samples that
    repeat an earlier caption are left out).
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
        used: set[str] = set()
        index = found = 0
        while found < self.count:
            scene = emoji.scene(index)
            caption = full_caption(scene) if self.wording == "full" else emoji.caption(scene)
            if self.wording != "full" or caption not in used:
                used.add(caption)
                found += 1
                label = caption if self.plain else ""
                key = f"emoji-{self.split}-{self.seed}-{index:08d}"
                yield Example(key, emoji.render(scene), caption, label)
            index += 1


def reconstruction_examples(size: int, count: int = HELD_OUT) -> EmojiExamples:
    """Held-out scenes of seen glyphs: for PSNR and SSIM."""
    return EmojiExamples("held-out renderings", size, count, "held-out")


def seen_class_examples(size: int, count: int = HELD_OUT) -> EmojiExamples:
    """Held-out plain renderings of `CLASS_NAMES_100`, each in turn. Not zero-shot."""
    return EmojiExamples(
        SEEN_NAMES_TITLE, size, count, "held-out", plain=True, names=CLASS_NAMES_100
    )


def unseen_class_examples(
    size: int, count: int = HELD_OUT, title: str = UNSEEN_NAMES_TITLE
) -> EmojiExamples:
    """Plain renderings of the first 100 of `UNSEEN_NAMES`, each in turn: zero-shot."""
    return EmojiExamples(title, size, count, "unseen", plain=True, names=UNSEEN_CLASS_NAMES)


def unseen_descriptions() -> dict[str, str]:
    """For each unseen name what its glyph looks like: "a black and white striped wild animal with …".

    Classification by these is zero-shot too: training never saw the pictures or names, only the words in
    other captions. The descriptions were written with the pictures at hand.
    """
    return {name: glyph_by_name()[name].description for name in UNSEEN_CLASS_NAMES}


def seen_caption_examples(size: int, count: int = CAPTIONS) -> EmojiExamples:
    """Held-out scenes of seen glyphs with full captions, all different."""
    return EmojiExamples(SEEN_CAPTIONS_TITLE, size, count, "held-out", wording="full")


def unseen_caption_examples(size: int, count: int = CAPTIONS) -> EmojiExamples:
    """Scenes of unseen glyphs with full captions, all different: zero-shot."""
    return EmojiExamples(UNSEEN_CAPTIONS_TITLE, size, count, "unseen", wording="full")


def probe_examples(size: int, count: int = HELD_OUT) -> tuple[EmojiExamples, EmojiExamples]:
    """(training, test) for a linear probe over `CLASS_NAMES_100`: plain renderings, four to one."""
    train = EmojiExamples(
        "100 seen names, training renderings",
        size,
        4 * count,
        "train",
        plain=True,
        names=CLASS_NAMES_100,
    )
    return train, seen_class_examples(size, count)


# -- prompts -----------------------------------------------------------------------------------

# Where training usually shows a single glyph, and so where one is drawn if its prompt names no place.
_PLACE = "centre"


def seen_prompts() -> PromptSet:
    """One prompt for each of `CLASS_NAMES_100`, with a random colour: "a red apple on a blue background".

    Training could show each glyph in the middle of this background, and may have used the same captions:
    renderings and combinations are held out, captions are not.
    """
    return _on_colours(SEEN_PROMPTS_TITLE, held_out=False)


def seen_name_prompts() -> PromptSet:
    """The bare `CLASS_NAMES_100`: "a red apple"."""
    prompts = tuple(Prompt(name, name) for name in CLASS_NAMES_100)
    return PromptSet(f"emoji ({NAME_PROMPTS_TITLE})", prompts, CLASS_NAMES_100)


def combination_prompts() -> PromptSet:
    """Like `seen_prompts`, but on backgrounds in whose middle training never showed the glyph.

    Ten of `CLASS_NAMES_100` have no such background and are left out; they stay among the names to
    choose from. Training may have used the words for a glyph elsewhere in the picture.
    """
    return _on_colours(COMBINATION_PROMPTS_TITLE, held_out=True)


def _on_colours(title: str, *, held_out: bool) -> PromptSet:
    stream = stable_hash(f"prompts {'combinations' if held_out else 'held-out'} {_SEED}")
    prompts = []
    for index, name in enumerate(CLASS_NAMES_100):
        glyph = glyph_by_name()[name]
        colours = [
            colour
            for colour in PALETTE
            if colour not in glyph.clashes
            and is_held_out_combination(glyph.code, colour, _PLACE) == held_out
        ]
        if colours:
            ground = Background("plain", (Draws(stream, index).choice(colours),), ())
            prompts.append(Prompt(f"{name} {ground_words(ground)[0]}", name))
    about = f"emoji ({title}): {len(prompts)}, seed {_SEED}"
    return PromptSet(about, tuple(prompts), CLASS_NAMES_100)
