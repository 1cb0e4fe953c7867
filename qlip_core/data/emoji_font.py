"""Colour-emoji glyphs as pictures: where the font is, and a glyph at the font's own size."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qlip_core.errors import DataError
from qlip_core.files import sha256_of

_NAMES = ("NotoColorEmoji.ttf", "NotoColorEmoji-Regular.ttf", "Apple Color Emoji.ttc")
_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/run/current-system/sw/share/X11/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
)
# Colour-bitmap fonts open only at the sizes of their bitmaps: Noto's CBDT has 109, Apple's sbix 160 and below.
_BITMAP_SIZES = (109, 160, 136, 128, 96)
_PROBE = "\N{RED APPLE}"
_NO_CHARACTER = "\U0010fffd"


def font_folders() -> list[Path]:
    """The folders searched for a colour-emoji font, in order."""
    return [Path(folder).expanduser() for folder in _FOLDERS]


def _candidates(folders: list[Path]) -> list[Path]:
    found = []
    for folder in folders:
        for parent, children, files in os.walk(folder):
            children.sort()
            found += [Path(parent) / name for name in sorted(files) if name in _NAMES]
    return found


@dataclass(frozen=True)
class EmojiFont:
    """A colour-emoji font file that Pillow can draw from, opened at `pixels` a side."""

    path: Path
    face: ImageFont.FreeTypeFont
    pixels: int

    @classmethod
    def find(cls, path: str | Path | None = None) -> "EmojiFont":
        """The font at `path`, or the first usable one in `font_folders()`.

        Raises DataError if there is none, or if `path` is not a colour-emoji font.
        """
        tried = [Path(path)] if path is not None else _candidates(font_folders())
        for candidate in tried:
            font = cls._open(candidate)
            if font is not None:
                return font
        if path is not None:
            raise DataError(
                f"{path}: not a font file with colour-bitmap emoji, which Pillow can draw"
            )
        download = "NotoColorEmoji.ttf from github.com/googlefonts/noto-emoji (folder fonts)"
        how = {
            "linux": "`apt install fonts-noto-color-emoji` (Debian, Ubuntu), `dnf install "
            "google-noto-color-emoji-fonts` (Fedora) or `pacman -S noto-fonts-emoji` (Arch)",
            "darwin": "the one of macOS, /System/Library/Fonts/Apple Color Emoji.ttc, is missing or "
            f"cannot be drawn: put {download} into ~/Library/Fonts",
        }.get(sys.platform, f"put {download} into ~/.fonts")
        raise DataError(f"no colour-emoji font on this machine: {how}, or name a font file")

    @classmethod
    def _open(cls, path: Path) -> "EmojiFont | None":
        if not path.is_file():
            return None
        for pixels in _BITMAP_SIZES:
            try:
                # The basic layout engine draws the same with and without libraqm. Not `truetype`, which would
                # take another font of the same name for a damaged file; and by its path, because bytes are kept
                # in memory twice, and Apple's font has over 100 MB.
                face = ImageFont.FreeTypeFont(
                    str(path), pixels, layout_engine=ImageFont.Layout.BASIC
                )
            except OSError:
                continue
            font = cls(path, face, pixels)
            picture = np.asarray(font._draw(_PROBE))
            opaque = picture[picture[..., 3] > 200][:, :3].astype(int)
            # If Pillow cannot read a font's colours, it draws nothing or a grey outline.
            if len(opaque) and np.ptp(opaque, axis=1).max() > 64:
                return font
        return None

    def _draw(self, text: str) -> Image.Image:
        left, top, right, bottom = self.face.getbbox(text)
        side = max(1, round(right - left), round(bottom - top))
        picture = Image.new("RGBA", (side, side))
        corner = (side - (left + right)) / 2, (side - (top + bottom)) / 2
        ImageDraw.Draw(picture).text(
            (round(corner[0]), round(corner[1])), text, font=self.face, embedded_color=True
        )
        return picture

    def draw(self, code: int) -> Image.Image:
        """The glyph of code point `code`: a square RGBA picture at the font's own size.

        Raises DataError if the font has no picture for it.
        """
        picture = self._draw(chr(code))
        if picture.getbbox() is None or picture.tobytes() == self._draw(_NO_CHARACTER).tobytes():
            raise DataError(
                f"{self.path}: no picture for U+{code:04X}; install a newer emoji font (Unicode 15)"
            )
        return picture

    @property
    def licence(self) -> str:
        """The licence of the font's pictures, in words."""
        if self.path.name.startswith("Noto"):
            return "Noto Color Emoji, Google Inc.: SIL Open Font License 1.1"
        if self.path.name.startswith("Apple"):
            return "Apple Color Emoji: part of macOS, its pictures may not be redistributed"
        return "unknown: see the font's own licence"

    def sha256(self) -> str:
        """SHA-256 of the font file, in hex."""
        return sha256_of([self.path])
