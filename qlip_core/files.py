"""Files that appear whole or not at all, text files line by line, and the hash of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from qlip_core.errors import DataError


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds `path` to an OSError that names no file: the system does so only on opening, not when a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file written under a temporary name beside `path` and renamed when complete, else removed.

    If `path` is a link, the file that it leads to is replaced. Raises OSError for an existing path that is not
    a regular file, because renaming would replace a device by a file.
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


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256, in hex, of the files' bytes, concatenated."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 so that at any time either the complete old file or the complete new one exists. A file
    that already has this text is left alone."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with atomic_file(path) as file:
        file.write(text.encode())
