"""Captions of a scene: several wordings, each of them true of what is painted."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from qlip_core.data.draws import Draws, stable_hash
from qlip_core.data.emoji_names import (
    Glyph,
    all_glyphs,
    glyph_by_code,
    glyph_by_name,
    seen_glyphs,
)
from qlip_core.data.palette import PALETTE
from qlip_core.data.scenes import LARGE, SMALL, Background, PlacedGlyph, Scene

PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "centre": ("in the middle", "in the centre", "in the center"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
OPENINGS = ("a picture of", "an emoji of", "an icon of", "a drawing of", "an image of")
SMALL_WORDS = ("small", "little")
LARGE_WORDS = ("large", "big")

# {a} and {b} are the scene's two glyphs, in order.
_PAIR_WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("left", "right"): (
        "{a} on the left and {b} on the right",
        "{a} to the left of {b}",
        "{b} to the right of {a}",
        "{a} next to {b}",
    ),
    ("top", "bottom"): (
        "{a} at the top and {b} at the bottom",
        "{a} above {b}",
        "{b} below {a}",
    ),
    ("top left", "bottom right"): (
        "{a} in the top left corner and {b} in the bottom right corner",
        "{a} at the top left and {b} at the bottom right",
    ),
    ("bottom left", "top right"): (
        "{a} in the bottom left corner and {b} in the top right corner",
        "{a} at the bottom left and {b} at the top right",
    ),
}
# {c} is the main colour, {d} the second one if it has its own name.
_ONE_COLOUR: dict[str, tuple[str, ...]] = {
    "plain": ("on a {c} background", "against a {c} background", "on {c}"),
    "gradient": ("on a {c} gradient background", "on a {c} gradient"),
    "stripes": ("on a striped {c} background", "on a {c} background with stripes"),
    "dots": ("on a dotted {c} background", "on a {c} background with dots"),
    "checks": ("on a checked {c} background", "on a {c} background with checks"),
    "noise": ("on a cloudy {c} background", "on a mottled {c} background"),
}
_TWO_COLOURS: dict[str, tuple[str, ...]] = {
    "gradient": (
        "on a {c} and {d} gradient background",
        "on a background fading from {c} to {d}",
        "on a {c} to {d} gradient",
    ),
    "stripes": ("on a {c} and {d} striped background", "on a striped {c} and {d} background"),
    "dots": ("on a {c} background with {d} dots", "on a dotted {c} and {d} background"),
    "checks": ("on a {c} and {d} checked background", "on a checked {c} and {d} background"),
}
_GRADIENT_ENDS: dict[str, str] = {
    "down": "on a background that is {c} at the top and {d} at the bottom",
    "right": "on a background that is {c} on the left and {d} on the right",
    "diagonal": "on a background that is {c} at the top left and {d} at the bottom right",
    "radial": "on a background that is {c} in the middle and {d} at the edges",
}
_ON_VOWELS = {"a orange": "an orange"}
_WORDING = stable_hash("wording")


def _fix_articles(text: str) -> str:
    for wrong, right in _ON_VOWELS.items():
        text = text.replace(wrong, right)
    return text


def sized(name: str, adjective: str) -> str | None:
    """`name` with a size word after its article; None for a name that allows none."""
    article, _, rest = name.partition(" ")
    if article not in ("a", "an") or {"small", "large", "big", "little"} & set(rest.split()):
        return None
    return f"a {adjective} {rest}"


def size_words(placed: PlacedGlyph) -> tuple[str, ...]:
    """The size words true of a glyph: those for small, those for large, or none."""
    if placed.size < SMALL:
        return SMALL_WORDS
    return LARGE_WORDS if placed.size >= LARGE else ()


def names_of(glyph: Glyph) -> tuple[str, ...]:
    """The primary name, then other names."""
    return (glyph.name, *glyph.synonyms)


def ground_words(ground: Background) -> tuple[str, ...]:
    """Every wording of the background, the plainest first."""
    if len(ground.colours) == 1:
        phrases = _ONE_COLOUR[ground.kind]
        return tuple(_fix_articles(phrase.format(c=ground.colours[0])) for phrase in phrases)
    phrases = _TWO_COLOURS[ground.kind]
    if ground.kind == "gradient":
        phrases = (*phrases, _GRADIENT_ENDS[ground.direction])
    first, second = ground.colours
    return tuple(_fix_articles(phrase.format(c=first, d=second)) for phrase in phrases)


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _subjects(scene: Scene, names: tuple[str, ...]) -> tuple[str, ...]:
    """Every wording of what the picture shows, with these names; the bare names first."""
    if len(scene.glyphs) == 1:
        placed, name = scene.glyphs[0], names[0]
        adorned = [sized(name, word) for word in size_words(placed)]
        called = [name, *(each for each in adorned if each)]
        where = ["", *(f" {words}" for words in PLACE_WORDS[placed.place])]
        return tuple(each + place for each, place in product(called, where))
    places = tuple(placed.place for placed in scene.glyphs)
    listed = [_joined(list(names)), _joined(list(names[::-1]))]
    if len(names) == 2:
        first, second = places
        related = [words.format(a=names[0], b=names[1]) for words in _PAIR_WORDS[first, second]]
    else:
        related = [_joined([f"{n} {PLACE_WORDS[p][0]}" for n, p in zip(names, places)])]
    return (*listed, *related)


def _on(subject: str, ground: str) -> str:
    return f"{subject} {ground}"


def name_caption(scene: Scene) -> str:
    """Only the things in the picture, by primary names: "a cat", "a red apple and a guitar"."""
    return _subjects(scene, _primary(scene))[0]


def described(name: str) -> str:
    """A glyph's primary name and what it looks like: "a red apple, a round red fruit with …"."""
    return f"{name}, {glyph_by_name()[name].description}"


def described_caption(scene: Scene) -> str:
    """The things in the picture described by their appearance, half of the time with their names."""
    glyphs = [glyph_by_code()[placed.code] for placed in scene.glyphs]
    if Draws(_WORDING, scene.wording).chance(0.5):
        return _joined([glyph.description for glyph in glyphs])
    return _joined([described(glyph.name) for glyph in glyphs])


def full_caption(scene: Scene) -> str:
    """Primary names, notable sizes, places and background, always in the same words."""
    names, ground = _primary(scene), ground_words(scene.background)[0]
    if len(scene.glyphs) == 1:
        placed, name = scene.glyphs[0], names[0]
        words = size_words(placed)
        adorned = sized(name, words[0]) if words else None
        return _on(f"{adorned or name} {PLACE_WORDS[placed.place][0]}", ground)
    return _on(_subjects(scene, names)[2], ground)


def _primary(scene: Scene) -> tuple[str, ...]:
    return tuple(glyph_by_code()[placed.code].name for placed in scene.glyphs)


def captions(scene: Scene) -> tuple[str, ...]:
    """Every caption of the scene, without the openings ("a picture of …")."""
    every_name = [names_of(glyph_by_code()[placed.code]) for placed in scene.glyphs]
    grounds = ground_words(scene.background)
    found = []
    for names in product(*every_name):
        for subject in _subjects(scene, names):
            found += [subject, *(_on(subject, ground) for ground in grounds)]
    return tuple(dict.fromkeys(found))


def caption(scene: Scene) -> str:
    """One of the scene's captions, chosen by `scene.wording`; half are short, half complete."""
    draws = Draws(_WORDING, scene.wording)
    names = []
    for placed in scene.glyphs:
        glyph = glyph_by_code()[placed.code]
        other = glyph.synonyms and draws.chance(0.25)
        names.append(draws.choice(glyph.synonyms) if other else glyph.name)
    subjects = _subjects(scene, tuple(names))
    bare = draws.chance(0.55 if _is_central(scene) else 0.25)
    subject = subjects[0] if bare else draws.choice(subjects[1:])
    if draws.chance(0.68):
        # A background's plainest wording is as common as all its others together.
        grounds = ground_words(scene.background)
        subject = _on(subject, grounds[0] if draws.chance(0.5) else draws.choice(grounds))
    return f"{draws.choice(OPENINGS)} {subject}" if draws.chance(0.15) else subject


def _is_central(scene: Scene) -> bool:
    return len(scene.glyphs) == 1 and scene.glyphs[0].place == "centre"


def caption_corpus(glyphs: Sequence[Glyph] | None = None) -> list[str]:
    """Texts with every word that captions of `glyphs` can use (None: all, unseen ones included), for training a
    vocabulary.

    Each name occurs a few times; the words around names are about as common as in captions.
    """
    colours = list(PALETTE)
    places = [words for phrases in PLACE_WORDS.values() for words in phrases]
    grounds = [phrase for phrases in _ONE_COLOUR.values() for phrase in phrases]
    texts = []
    for number, glyph in enumerate(all_glyphs() if glyphs is None else glyphs):
        for name in names_of(glyph):
            number += 7
            ground = grounds[number % len(grounds)].format(c=colours[number % len(colours)])
            texts += [name, name, name, _on(name, _fix_articles(ground))]
            texts.append(f"{OPENINGS[number % len(OPENINGS)]} {name}")
            texts.append(f"{sized(name, 'small') or name} {places[number % len(places)]}")
        texts.append(described(glyph.name))
    pairs = [phrase for phrases in _PAIR_WORDS.values() for phrase in phrases]
    texts += [
        phrase.format(a="a large thing", b="a little thing") for phrase in pairs for _ in range(5)
    ]
    twos = [phrase for phrases in _TWO_COLOURS.values() for phrase in phrases]
    for first, second in zip(colours, colours[1:] + colours[:1]):
        texts += [
            _fix_articles(phrase.format(c=first, d=second))
            for phrase in (*twos, *_GRADIENT_ENDS.values())
        ]
    if glyphs is None:
        # A vocabulary also gets words from the usual zero-shot prompts, which captions do not use.
        texts += [
            "a photo of a big one",
            "a good photo of the thing",
            "a rendering of many",
            "this is not an art",
        ]
    return texts


def untrained_words(prompts: Iterable[str]) -> list[str]:
    """Words and symbols of `prompts` that no training caption of the emoji set can hold, in order."""
    known = set(words_in(caption_corpus(seen_glyphs())))
    return [word for word in dict.fromkeys(words_in(prompts)) if word not in known]


def words_in(texts: Iterable[str]) -> Iterator[str]:
    """Words of letters and single symbols such as emoji, in lower case; no digits or punctuation."""
    for text in texts:
        yield from (
            word
            for word in re.findall(r"[^\W\d_]+|[^\w\s]", text.lower())
            if word.isalpha() or unicodedata.category(word) == "So"
        )
