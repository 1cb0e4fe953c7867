"""From arguments to images and lines of text; handling of bad images."""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlip_cli.terminal import note

if TYPE_CHECKING:
    from qlip_core.errors import ImageError


def standard_input() -> str:
    """The path that "-" stands for. Raises QlipError if there is none."""
    from qlip_core.errors import QlipError

    path = "/dev/stdin"
    # Not by its number, which the next file opened gets.
    if sys.stdin is None:
        raise QlipError("-: standard input is closed")
    kind = os.fstat(0).st_mode
    if stat.S_ISSOCK(kind) or not os.path.exists(path):
        raise QlipError(
            "-: this standard input cannot be opened like a file: send it through `cat |`, or name a file"
        )
    return path


def read_entries(path: Path) -> list[str]:
    """What a text file, or with "-" stdin, lists one a line: the lines stripped, without empty ones. Raises
    TextError if it is not a text file."""
    from qlip_core.errors import TextError

    try:
        if path == Path("-") and sys.stdin is None:
            raise TextError("-: standard input is closed")
        data = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
        lines = re.split("\r\n|\r|\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise TextError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({(error.strerror or '').lower()})") from None
    return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image to read, and what it is called in results and token files.

    Strings in slots, since there may be millions and a Path takes five times the memory. `error` is set if
    something is already known to be wrong, such as a locked folder.
    """

    path: str
    name: str
    error: ImageError | None = None


def collect_images(arguments: Sequence[str]) -> list[ImageFile]:
    """All images that the arguments stand for, in order.

    Files are taken as they are, whatever their suffix; missing ones are reported later with the bad ones. A
    folder stands for the image files below it, named by their path inside it; unreadable folders below it
    count as bad images. A glob that the shell did not expand stands for matching images and folders, "-" for
    standard input. Raises ImageError for a folder or a glob without images, and for an empty name.
    """
    from qlip_core.errors import ImageError

    whole = " ".join(arguments)
    if len(arguments) > 1 and os.path.exists(whole) and not any(map(os.path.exists, arguments)):
        raise ImageError(f'{whole}: a name with spaces needs quotes around it: "{whole}"')
    return [image for argument in arguments for image in _expand(argument, len(arguments) == 1)]


def _expand(argument: str, alone: bool) -> list[ImageFile]:
    from qlip_core.errors import ImageError
    from qlip_core.images import SUFFIXES

    if not argument:  # such as an unset shell variable
        raise ImageError("the name of an image is empty")
    path = Path(argument)
    if argument == "-":
        return [ImageFile(standard_input(), "stdin")]
    # os.path, because Path raises if a name is too long or its folder locked; the core reports those later.
    if os.path.isdir(argument):
        images = _in_folder(path, alone)
        if not images:
            kinds = ", ".join(sorted(SUFFIXES))
            raise ImageError(f"{argument}: no images in this folder (looked for {kinds})")
        return images
    if os.path.exists(argument) or not glob.has_magic(argument):
        return [ImageFile(str(path), _own_name(path))]
    images = []
    for match in map(Path, sorted(glob.glob(argument, recursive=True))):
        if os.path.isdir(match) and "**" not in argument:
            images += _in_folder(match, False)
        elif match.suffix.lower() in SUFFIXES and os.path.isfile(match):
            images.append(ImageFile(str(match), _own_name(match)))
    if not images:
        raise ImageError(f"{argument}: no image matches this pattern")
    return images


def _in_folder(folder: Path, alone: bool) -> list[ImageFile]:
    from qlip_core.images import walk_files

    # With other arguments, two folders may hold the same names, so the folder's own name goes first.
    prefix = "" if alone else f"{folder.resolve().name}/"
    start = len(os.path.join(folder, ""))
    images: list[ImageFile] = []

    def add(path: str, error: ImageError | None = None) -> None:
        name = prefix + path[start:].replace(os.sep, "/")
        images.append(ImageFile(path, name or str(folder), error))

    for path in walk_files(folder, add):
        add(path)
    return images


def _own_name(path: Path) -> str:
    """The path as typed, if it is below the current folder, else its last part."""
    down = not path.is_absolute() and ".." not in path.parts
    return path.as_posix() if down else path.name


@dataclass
class Failures:
    """Collects images that could not be read (the core's `on_error`), for a report at the end."""

    images: list[ImageFile]
    errors: dict[int, ImageError] = field(default_factory=dict)

    def __call__(self, position: int, error: ImageError) -> None:
        self.errors[position] = self.images[position].error or error

    def check_some_left(self) -> None:
        """Raises ImageError if no image was good, after listing them all."""
        from qlip_core.errors import ImageError

        if len(self.errors) < len(self.images):
            return
        if len(self.errors) == 1:
            raise self.errors[0]
        self.list_errors()
        raise ImageError(f"none of the {len(self.images)} images could be read: nothing was done")

    def list_errors(self) -> None:
        """List the bad ones on stderr."""
        if self.errors:
            note(f"{len(self.errors)} of {len(self.images)} images could not be read:")
        for _, error in sorted(self.errors.items()):
            note(f"  {error}")

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"image": self.images[position].name, "error": str(error)}
            for position, error in sorted(self.errors.items())
        ]

    def exit_code(self) -> int:
        return 1 if self.errors else 0
