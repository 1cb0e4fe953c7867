"""Many pictures as one: reconstructions beside their inputs, drawings under their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qlip_core.images import drawable

_GAP = 4
_LABEL = 16


@dataclass(frozen=True)
class Row:
    """A title, and pairs (input, output), each uint8 [S, S, 3], with a caption each."""

    title: str
    pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]


def draw_grid(rows: Sequence[Row], scale: int = 1) -> np.ndarray:
    """uint8 [H, W, 3]: one row each, input beside output; `scale` repeats pixels to enlarge small pictures."""
    side = rows[0].pairs[0][0].shape[0] * scale
    cell = 2 * side + 3 * _GAP
    width = max(len(row.pairs) for row in rows) * cell
    height = len(rows) * (side + 2 * _LABEL + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for r, row in enumerate(rows):
        top = r * (side + 2 * _LABEL + _GAP)
        draw.text((2, top), drawable(row.title), "black", font)
        for c, (before, after, caption) in enumerate(row.pairs):
            left = c * cell
            for image, x in ((before, left), (after, left + side + _GAP)):
                sheet.paste(_scaled(image, scale), (x, top + _LABEL))
            draw.text((left + 2, top + _LABEL + side), drawable(caption), "black", font)
    return np.asarray(sheet)


def _scaled(image: np.ndarray, scale: int) -> Image.Image:
    return Image.fromarray(image.repeat(scale, 0).repeat(scale, 1))


def draw_sheet(
    title: str,
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int,
    scale: int = 1,
) -> np.ndarray:
    """uint8 [H, W, 3]: rows of at most `columns` pictures uint8 [S, S, 3], each with its caption below in at most
    two lines. Longer captions end in an ellipsis."""
    columns = min(columns, len(pictures))
    side = pictures[0].shape[0] * scale
    cell, line = side + _GAP, side + 2 * _LABEL + _GAP
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell, _LABEL + rows * line), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)

    def fits(text: str, width: int = side - 2) -> bool:
        return draw.textlength(text, font) <= width

    draw.text(
        (2, 0), _cut(drawable(title), lambda text: fits(text, columns * cell - 4)), "black", font
    )
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        left, top = i % columns * cell, _LABEL + i // columns * line
        sheet.paste(_scaled(picture, scale), (left, top))
        lines = _broken(drawable(caption), fits)
        if len(lines) > 2:
            lines[1:] = [_cut(" ".join(lines[1:]), fits)]
        for number, text in enumerate(lines):
            draw.text((left + 2, top + side + number * _LABEL), text, "black", font)
    return np.asarray(sheet)


def _broken(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Text in lines of whole words; a word longer than a line is cut."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if fits(joined):
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        lines[-1] = _cut(word, fits)
    return lines


def _cut(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much as fits, with an ellipsis."""
    if fits(text):
        return text
    return next((cut for n in range(len(text), 0, -1) if fits(cut := f"{text[:n].rstrip()}…")), "")
