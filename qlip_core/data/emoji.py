"""Captioned emoji pictures: a set for training, tests and demos that needs no download.

emoji = EmojiSet(size=64, seed=0, split="train")
image, caption, about = emoji.sample(0)
"""

from qlip_core.data.captions import caption, caption_corpus, captions, full_caption, name_caption
from qlip_core.data.emoji_names import (
    CLASS_NAMES_100,
    UNSEEN_NAMES,
    Glyph,
    all_glyphs,
    glyph_by_name,
    seen_glyphs,
    unseen_glyphs,
)
from qlip_core.data.emoji_set import EmojiSet, Split, Wording
from qlip_core.data.emoji_shards import write_shards
from qlip_core.data.scenes import Background, PlacedGlyph, Scene, is_held_out_combination

__all__ = [
    "CLASS_NAMES_100",
    "UNSEEN_NAMES",
    "Background",
    "EmojiSet",
    "Glyph",
    "PlacedGlyph",
    "Scene",
    "Split",
    "Wording",
    "all_glyphs",
    "caption",
    "caption_corpus",
    "captions",
    "full_caption",
    "glyph_by_name",
    "is_held_out_combination",
    "name_caption",
    "seen_glyphs",
    "unseen_glyphs",
    "write_shards",
]
