"""Painting a scene: the background, then each glyph rotated, resized and pasted."""

import math

import numpy as np
from PIL import Image

from qlip_core.data.draws import uniform_grid
from qlip_core.data.emoji_font import EmojiFont
from qlip_core.data.scenes import Background, PlacedGlyph, Scene

# Each glyph is cached at these fractions of the font's size, each a clean reduction. Rotating and scaling the
# next larger one in a single transform gives smooth results and is fast.
_LEVELS = (0.5, 0.6, 0.72, 0.86, 1.0)


class Painter:
    """Paints scenes at `size` x `size` pixels. Keeps each glyph once drawn (about 220 kB each)."""

    def __init__(self, font: EmojiFont, size: int):
        self.font = font
        self.size = size
        self._glyphs: dict[int, list[Image.Image]] = {}
        middles = (np.arange(size, dtype=np.float32) + 0.5) / size
        self._x = np.broadcast_to(middles, (size, size))
        self._y = self._x.T

    def paint(self, scene: Scene) -> np.ndarray:
        """The picture: uint8 [S, S, 3], sRGB."""
        picture = Image.fromarray(self._background(scene.background))
        for glyph in scene.glyphs:
            self._lay(picture, glyph)
        return np.array(picture)

    def _glyph(self, code: int, side: float) -> Image.Image:
        if code not in self._glyphs:
            # RGBa: colours multiplied by alpha, so that transparent pixels add no colour when resampling.
            whole = self.font.draw(code).convert("RGBa")
            widths = [round(level * whole.width) for level in _LEVELS[:-1]]
            smaller = [whole.resize((w, w), Image.Resampling.BICUBIC) for w in widths]
            self._glyphs[code] = [*smaller, whole]
        levels = self._glyphs[code]
        return next((glyph for glyph in levels if side <= glyph.width), levels[-1])

    def _lay(self, picture: Image.Image, placed: PlacedGlyph) -> None:
        side = placed.size * self.size
        glyph = self._glyph(placed.code, side)
        pixels = max(1, round(side))
        if placed.angle:
            glyph, pixels = _turned(glyph, placed.angle, side)
        elif pixels != glyph.width:
            glyph = glyph.resize((pixels, pixels), Image.Resampling.BICUBIC)
        glyph = glyph.convert("RGBA")
        left = round(placed.x * self.size - pixels / 2)
        top = round(placed.y * self.size - pixels / 2)
        picture.paste(glyph, (left, top), glyph)

    def _background(self, ground: Background) -> np.ndarray:
        first = np.array(ground.paints[0], np.float32)
        if ground.kind == "plain":
            return np.full((self.size, self.size, 3), ground.paints[0], np.uint8)
        second = np.array(ground.paints[1], np.float32)
        mixed = first + self._pattern(ground)[..., None] * (second - first)
        return (np.clip(mixed, 0, 255) + 0.5).astype(np.uint8)

    def _pattern(self, ground: Background) -> np.ndarray:
        """Share of the second paint at each pixel: float32 [S, S] in [0, 1]."""
        x, y = self._x, self._y
        along = {"down": y, "right": x, "diagonal": (x + y) / 2}
        if ground.kind == "gradient":
            if ground.direction == "radial":
                return np.minimum(1, np.hypot(x - 0.5, y - 0.5) / 0.66)
            return along[ground.direction]
        turn = 2 * np.pi / ground.period
        if ground.kind == "stripes":
            # "diagonal" is a mean of two axes, so its period is half as many pixels each way.
            stretch = 1.5 if ground.direction == "diagonal" else 1.0
            return self._edge(np.sin(turn * stretch * along[ground.direction]), turn * stretch)
        if ground.kind == "checks":
            half = turn / 2
            return self._edge(np.sin(half * x) * np.sin(half * y), half)
        if ground.kind == "dots":
            return self._edge(np.cos(turn * x) + np.cos(turn * y) - 0.7, turn)
        cells = max(2, round(1 / ground.period) + 1)
        noise = Image.fromarray(uniform_grid(ground.seed, cells, cells))
        grown = np.asarray(noise.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return np.clip(grown, 0, 1)

    def _edge(self, wave: np.ndarray, slope: float) -> np.ndarray:
        """1 where `wave` > 0, its edge a pixel wide; `slope`: the wave's slope there, per side."""
        return np.clip(0.5 + wave * (self.size / slope), 0, 1)


def _turned(glyph: Image.Image, angle: float, side: float) -> tuple[Image.Image, int]:
    """The glyph, `side` pixels wide, rotated by `angle` degrees anticlockwise, and the side of the square picture
    that holds it."""
    # Smaller than all cached sizes: reduce it first, or the rotation would skip pixels.
    if side < 0.8 * glyph.width:
        width = max(1, round(side))
        glyph = glyph.resize((width, width), Image.Resampling.BICUBIC)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    pixels = math.ceil(side * (abs(cos) + abs(sin)))
    scale, half, middle = glyph.width / side, pixels / 2, glyph.width / 2
    a, b = scale * cos, -scale * sin
    # Where each pixel (x, y) of the result comes from: (a x + b y + c, -b x + a y + f).
    c, f = middle - a * half - b * half, middle + b * half - a * half
    turned = glyph.transform(
        (pixels, pixels),
        Image.Transform.AFFINE,
        (a, b, c, -b, a, f),
        Image.Resampling.BICUBIC,
    )
    return turned, pixels
