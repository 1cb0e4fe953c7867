"""Files that appear whole or not at all; and text files, line by line."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qlip_core.errors import DataError


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives what the system says of a write its file, which it names on opening alone: a full disk comes later."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write under a temporary name beside `path`, renamed when whole; else nothing stays.

    Where `path` is a link, the file that it leads to is replaced. Raises OSError for what is there and is no
    regular file: renaming would put a file in the place of a device.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "is not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8. Raises DataError if it cannot be read as one."""
    try:
        return Path(path).read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({(error.strerror or '').lower()})") from None


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 so that at every instant the old file or the new one is there, whole. A file that
    says the same already is left alone."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with atomic_file(path) as file:
        file.write(text.encode())
