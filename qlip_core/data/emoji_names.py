"""What each emoji is called: the table of names, and which names training sees.

`emoji_names.tsv` has one line per glyph: code point, `*` if it is a common thing, its name as used in a
caption (with article), other names for it, the palette colours on which it would be invisible, and what it
looks like, in words shared with other glyphs ("a round red fruit with a green leaf").
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from qlip_core.data.draws import stable_hash
from qlip_core.data.palette import PALETTE

UNSEEN_SHARE = 0.15
"""Share of the uncommon glyphs whose names and pictures training never sees."""


@dataclass(frozen=True)
class Glyph:
    """One emoji: a single code point, and the words for what it shows."""

    code: int
    name: str
    synonyms: tuple[str, ...]
    common: bool
    clashes: tuple[str, ...]
    description: str

    @property
    def unseen(self) -> bool:
        """Whether training never sees this glyph: a fixed choice by its code point."""
        return not self.common and _rank(self.code) < UNSEEN_SHARE * 2**64


def _rank(code: int) -> int:
    return stable_hash(f"unseen {code:X}")


def _data_file(name: str) -> str:
    return files("qlip_core.data").joinpath(name).read_text("utf-8")


def parse_names(table: str) -> tuple[Glyph, ...]:
    """The glyphs of a table in the format of `emoji_names.tsv`, in its order."""
    glyphs = []
    for line in table.splitlines():
        if line.startswith("#"):
            continue
        code, common, name, synonyms, clashes, description = line.split("\t")
        glyphs.append(
            Glyph(
                code=int(code, 16),
                name=name,
                synonyms=tuple(synonyms.split("|")) if synonyms else (),
                common=common == "*",
                clashes=tuple(clashes.split("|")) if clashes else (),
                description=description,
            )
        )
        assert set(glyphs[-1].clashes) <= PALETTE.keys()
    return tuple(glyphs)


@cache
def all_glyphs() -> tuple[Glyph, ...]:
    """Every glyph that has a name, by code point."""
    return parse_names(_data_file("emoji_names.tsv"))


@cache
def glyph_by_name() -> dict[str, Glyph]:
    """Each glyph under its one primary name."""
    return {glyph.name: glyph for glyph in all_glyphs()}


@cache
def glyph_by_code() -> dict[int, Glyph]:
    return {glyph.code: glyph for glyph in all_glyphs()}


def seen_glyphs() -> tuple[Glyph, ...]:
    """The glyphs that training draws from, by code point."""
    return tuple(glyph for glyph in all_glyphs() if not glyph.unseen)


def unseen_glyphs() -> tuple[Glyph, ...]:
    """The glyphs kept out of training, in the order of a hash."""
    kept_out = [glyph for glyph in all_glyphs() if glyph.unseen]
    return tuple(sorted(kept_out, key=lambda glyph: _rank(glyph.code)))


CLASS_NAMES_100: tuple[str, ...] = tuple(_data_file("class_names_100.txt").splitlines())
"""A hundred common seen names: the classes of the plain classification test."""

UNSEEN_NAMES: tuple[str, ...] = tuple(glyph.name for glyph in unseen_glyphs())
"""The names kept out of training, in the order of a hash."""
