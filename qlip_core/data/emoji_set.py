"""The emoji set: endless captioned pictures, each a function of (seed, split, index) alone.

For training, tests and demos that need no download:

    emoji = EmojiSet(size=64, seed=0, split="train")
    image, caption, about = emoji.sample(0)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from qlip_core.data import captions
from qlip_core.data.draws import Draws, stable_hash
from qlip_core.data.emoji_font import EmojiFont
from qlip_core.data.emoji_names import (
    Glyph,
    glyph_by_code,
    glyph_by_name,
    seen_glyphs,
    unseen_glyphs,
)
from qlip_core.data.paint import Painter
from qlip_core.data.scenes import (
    Scene,
    draw_plain_scene,
    draw_scene,
    held_out_combinations,
)
from qlip_core.errors import DataError

Split = Literal["train", "held-out", "combinations", "unseen"]
Wording = Literal["name", "scene", "described"]


class EmojiSet:
    """Captioned renderings of emoji at `size` x `size` pixels; sample i is always the same.

    split: what the scenes show.
      train: seen glyphs; no held-out combination of glyph, background colour and place.
      held-out: like train, but renderings that training never sees, whatever its seed.
      combinations: seen glyphs, each in a held-out combination.
      unseen: glyphs that training never sees, in any combination.
    plain: one large upright glyph in the middle of a plain background, each glyph in turn (sample i
      shows glyph i modulo their number).
    wording: "scene" captions name the glyphs, usually the background, sometimes size and place; "name"
      captions only the things shown; "described" ones what those look like, half of them with names
      too. By default "name" if plain, else "scene".
    names: only these glyphs, by primary name.
    common_share: share of glyphs drawn from the common ones only, in addition to their regular share.
    font: a font file; by default the first colour-emoji font found on the machine.
    """

    def __init__(
        self,
        size: int = 64,
        seed: int = 0,
        split: Split = "train",
        *,
        plain: bool = False,
        wording: Wording | None = None,
        names: Sequence[str] | None = None,
        common_share: float = 0.3,
        font: str | Path | None = None,
    ):
        if split not in get_args(Split):
            raise DataError(f"split {split!r}: must be one of {', '.join(get_args(Split))}")
        if not 8 <= size <= 1024:
            raise DataError(f"size {size}: a picture's side must be 8 to 1024 pixels")
        if not 0 <= seed < 2**63:
            raise DataError(f"seed {seed}: must be from 0 to 2^63 - 1")
        if wording is not None and wording not in get_args(Wording):
            raise DataError(f"wording {wording!r}: must be one of {', '.join(get_args(Wording))}")
        self.size, self.seed, self.split, self.plain = size, seed, split, plain
        self.wording: Wording = wording or ("name" if plain else "scene")
        self.common_share = common_share
        self.glyphs = unseen_glyphs() if split == "unseen" else seen_glyphs()
        if names is not None:
            self.glyphs = tuple(self._named(name) for name in names)
        if len(self.glyphs) < 3 and not plain:
            raise DataError(
                f"{len(self.glyphs)} names: a scene may need 3; give more, or plain=True"
            )
        if not self.glyphs:
            raise DataError("no names: give at least one")
        self._common = tuple(glyph for glyph in self.glyphs if glyph.common)
        self._stream = stable_hash(f"{split} {'plain' if plain else 'scenes'} {seed}")
        self.font = EmojiFont.find(font)
        self._painter = Painter(self.font, size)

    def _named(self, name: str) -> Glyph:
        glyph = glyph_by_name().get(name)
        if glyph is None or glyph not in self.glyphs:
            where = f"in the split {self.split!r}" if glyph else "in the table"
            raise DataError(f"no glyph named {name!r} {where}")
        return glyph

    def _pick(self, draws: Draws) -> Glyph:
        common = self._common and draws.chance(self.common_share)
        return draws.choice(self._common if common else self.glyphs)

    def scene(self, index: int) -> Scene:
        """What picture `index` (0 or more) shows."""
        if not 0 <= index < 2**63:
            raise DataError(f"sample {index}: must be from 0 to 2^63 - 1")
        draws = Draws(self._stream, index)
        while True:
            if self.plain:
                scene = draw_plain_scene(draws, self.glyphs[index % len(self.glyphs)])
            else:
                scene = draw_scene(draws, self._pick)
            wanted = len(scene.glyphs) if self.split == "combinations" else 0
            if self.split == "unseen" or held_out_combinations(scene) == wanted:
                return scene

    def render(self, scene: Scene) -> np.ndarray:
        """The scene's picture: uint8 [S, S, 3], sRGB."""
        return self._painter.paint(scene)

    def caption(self, scene: Scene) -> str:
        """The scene's caption, one of `captions`, in the set's wording."""
        wordings = {
            "name": captions.name_caption,
            "scene": captions.caption,
            "described": captions.described_caption,
        }
        return wordings[self.wording](scene)

    def captions(self, scene: Scene) -> tuple[str, ...]:
        """Every caption that is true of the scene."""
        return captions.captions(scene)

    def sample(self, index: int) -> tuple[np.ndarray, str, dict[str, Any]]:
        """(picture uint8 [S, S, 3], caption, what it shows in JSON types)."""
        scene = self.scene(index)
        return self.render(scene), self.caption(scene), self.describe(scene, index)

    def describe(self, scene: Scene, index: int) -> dict[str, Any]:
        """What a sample shows, in JSON types: names, places, background, and the whole scene."""
        return {
            "split": self.split,
            "seed": self.seed,
            "index": index,
            "names": [glyph_by_code()[placed.code].name for placed in scene.glyphs],
            "places": [placed.place for placed in scene.glyphs],
            "background": scene.background.kind,
            "colours": list(scene.background.colours),
            "full_caption": captions.full_caption(scene),
            "scene": scene.to_dict(),
        }
