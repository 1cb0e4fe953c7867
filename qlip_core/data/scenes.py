"""Scenes: the content of a picture as data, and how it is drawn at random.

Lengths and positions are fractions of the picture's side, with (0, 0) its top left corner, so a scene
can be painted at any size.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlip_core.data.draws import Draws, stable_hash
from qlip_core.data.emoji_names import Glyph
from qlip_core.data.palette import BRIGHTNESS_JITTER, CHANNEL_JITTER, PALETTE

PLACES: dict[str, tuple[int, int]] = {
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
"""Place to (column, row), each -1, 0 or 1."""

HELD_OUT_SHARE = 0.1
"""Share of all (glyph, background colour, place) combinations that training never sees."""

SMALL = 0.40
LARGE = 0.86
"""A glyph smaller than SMALL of the side may be called small; one of at least LARGE, large."""

_KINDS = (
    ("plain", 0.62),
    ("gradient", 0.24),
    ("stripes", 0.04),
    ("dots", 0.04),
    ("checks", 0.03),
    ("noise", 0.03),
)
_DIRECTIONS = ("down", "right", "diagonal", "radial")
_PAIRS = (
    ("left", "right"),
    ("top", "bottom"),
    ("top left", "bottom right"),
    ("bottom left", "top right"),
)
_TRIPLES = (("left", "centre", "right"), ("top", "bottom left", "bottom right"))

# How far a glyph may tilt (degrees) and be off centre (fraction of the side).
_ALONE, _IN_COMPANY, _PLAIN = (15.0, 0.04), (12.0, 0.01), (5.0, 0.03)

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class PlacedGlyph:
    """One glyph in a picture. x, y: its centre; size: its side; angle: degrees anticlockwise."""

    code: int
    place: str
    x: float
    y: float
    size: float
    angle: float


@dataclass(frozen=True)
class Background:
    """What is behind the glyphs.

    kind: plain, gradient, stripes, dots, checks or noise.
    colours: palette names, the main one first; a second one if the second paint has a name.
    paints: the colours painted, two unless plain.
    direction: down, right or diagonal; for gradients (from paints[0] to paints[1]) also radial.
    period: of stripes and dots; the side of a check or of a cell of noise. seed: the noise's.
    """

    kind: str
    colours: tuple[str, ...]
    paints: tuple[RGB, ...]
    direction: str = ""
    period: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """One picture. `wording` chooses among its true captions."""

    glyphs: tuple[PlacedGlyph, ...]
    background: Background
    wording: int

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        raw = asdict(self)
        raw["glyphs"] = list(raw["glyphs"])
        ground = raw["background"]
        ground["colours"] = list(ground["colours"])
        ground["paints"] = [list(paint) for paint in ground["paints"]]
        return raw


def is_held_out_combination(code: int, colour: str, place: str) -> bool:
    """Whether training never shows this glyph at this place on this main background colour."""
    return stable_hash(f"combination {code:X} {colour} {place}") < HELD_OUT_SHARE * 2**64


def held_out_combinations(scene: Scene) -> int:
    """How many of the scene's glyphs are in a held-out combination."""
    colour = scene.background.colours[0]
    return sum(is_held_out_combination(glyph.code, colour, glyph.place) for glyph in scene.glyphs)


def draw_scene(draws: Draws, pick: Callable[[Draws], Glyph]) -> Scene:
    """A random scene: usually one large glyph in the middle, on a plain or gradient background."""
    count = draws.weighted(((1, 0.80), (2, 0.15), (3, 0.05)))
    glyphs = [pick(draws)]
    while len(glyphs) < count:
        other = pick(draws)
        if other not in glyphs:
            glyphs.append(other)
    if count == 1 and draws.chance(0.72):
        placed = [_place(draws, glyphs[0], "centre", draws.uniform(0.66, 0.96), _ALONE)]
    elif count == 1:
        place = draws.choice(tuple(PLACES))
        placed = [_place(draws, glyphs[0], place, draws.uniform(0.30, 0.50), _ALONE)]
    else:
        places = draws.choice(_PAIRS if count == 2 else _TRIPLES)
        widest = 0.30 if places == _TRIPLES[0] else 0.46
        sizes = [draws.uniform(widest - 0.08, widest) for _ in places]
        placed = [_place(draws, *each, _IN_COMPANY) for each in zip(glyphs, places, sizes)]
    return Scene(tuple(placed), _background(draws, glyphs), draws.bits() >> 32)


def draw_plain_scene(draws: Draws, glyph: Glyph) -> Scene:
    """One large glyph in the middle of a plain background, easiest to recognise."""
    placed = _place(draws, glyph, "centre", draws.uniform(0.80, 0.94), _PLAIN)
    colour = _colour(draws, [glyph])
    ground = Background("plain", (colour,), (_jitter(draws, PALETTE[colour]),))
    return Scene((placed,), ground, draws.bits() >> 32)


def _place(
    draws: Draws, glyph: Glyph, place: str, size: float, freedom: tuple[float, float]
) -> PlacedGlyph:
    column, row = PLACES[place]
    margin = draws.uniform(0.02, 0.05)
    tilt, wander = freedom
    wander = min(wander, (1 - size) / 2)
    x, y = (
        0.5 + side * (0.5 - size / 2 - margin) if side else 0.5 + draws.uniform(-wander, wander)
        for side in (column, row)
    )
    angle = 0.0 if draws.chance(0.4) else draws.uniform(-tilt, tilt)
    # Rounded so that the JSON beside a picture holds the whole scene in few characters.
    return PlacedGlyph(glyph.code, place, round(x, 4), round(y, 4), round(size, 4), round(angle, 2))


def _colour(draws: Draws, glyphs: Sequence[Glyph]) -> str:
    clashes = {clash for glyph in glyphs for clash in glyph.clashes}
    colours = [colour for colour in PALETTE if colour not in clashes]
    return "white" if "white" in colours and draws.chance(0.08) else draws.choice(colours)


def _jitter(draws: Draws, paint: RGB) -> RGB:
    # Mostly in brightness, because a grey with unequal channels looks pink or green.
    shift = draws.below(2 * BRIGHTNESS_JITTER + 1) - BRIGHTNESS_JITTER
    red, green, blue = (
        min(255, max(0, level + shift + draws.below(2 * CHANNEL_JITTER + 1) - CHANNEL_JITTER))
        for level in paint
    )
    return red, green, blue


def _shade(paint: RGB, amount: float) -> RGB:
    """`paint` moved by `amount` towards white, or towards black if it is already light."""
    goal = 0 if sum(paint) > 480 else 255
    red, green, blue = (round(level + amount * (goal - level)) for level in paint)
    return red, green, blue


def _background(draws: Draws, glyphs: Sequence[Glyph]) -> Background:
    kind = draws.weighted(_KINDS)
    colour = _colour(draws, glyphs)
    paint = _jitter(draws, PALETTE[colour])
    if kind == "plain":
        return Background(kind, (colour,), (paint,))
    other = _colour(draws, glyphs)
    named = other != colour and (kind == "gradient" or (kind != "noise" and draws.chance(0.35)))
    if named:
        colours, paints = (colour, other), (paint, _jitter(draws, PALETTE[other]))
    else:
        colours, paints = (colour,), (paint, _shade(paint, draws.uniform(0.16, 0.30)))
    if kind == "gradient":
        return Background(kind, colours, paints, draws.choice(_DIRECTIONS))
    direction = draws.choice(_DIRECTIONS[:3]) if kind == "stripes" else ""
    # Periods of 8 px and more at 64 px: finer ones would be noise to a tokenizer with 8-px patches.
    period = round(draws.uniform(0.125, 0.28), 3)
    return Background(kind, colours, paints, direction, period, draws.bits() >> 32)
