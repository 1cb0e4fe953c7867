"""How a picture was drawn, written into the PNG and read back from it.

Three text chunks: `Description` (the prompt) and `Software`, which other programs show, and `qlip`, a JSON
object with everything that determines the picture.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

KEY = "qlip"


def text_chunks(record: dict[str, Any]) -> dict[str, str]:
    """Name of the chunk -> its text."""
    prompt = record.get("prompt", "; ".join(record.get("prompts", [])))
    return {
        "Description": prompt,
        "Software": f"qlip {record['qlip']}",
        KEY: json.dumps(record, ensure_ascii=False),
    }


def is_png(path: Path) -> bool:
    """Whether a file starts as a PNG does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def read_record(path: Path) -> dict[str, Any]:
    """The record that `text_chunks` wrote. Raises ImageError for a picture without one."""
    from qlip_core.errors import ImageError

    try:
        text = _own_text(path)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise ImageError(f"{path}: damaged picture ({error})") from None
    if text is None:
        raise ImageError(
            f"{path}: no record of how it was drawn: not a picture from `qlip generate`"
        )
    try:
        record = json.loads(text, parse_constant=_refuse)
        if not isinstance(record, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise ImageError(f"{path}: its record of how it was drawn is damaged") from None
    return record


def _own_text(path: Path) -> str | None:
    """The text chunk `qlip` of a PNG. Skips the pixels, so a picture may have any size."""
    from PIL.PngImagePlugin import PngStream

    with path.open("rb") as file:
        file.seek(8)
        chunks = PngStream(file)
        while KEY not in chunks.im_text:
            kind, position, length = chunks.read()
            if kind == b"IEND":
                return None
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                chunks.crc(kind, chunks.call(kind, position, length))
            else:
                file.seek(length + 4, 1)
        return str(chunks.im_text[KEY])


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
