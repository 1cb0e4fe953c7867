"""From a user's notation for a set of files to the list of files, and from a file's address to its bytes.

Addresses: local paths, http(s), and whatever WebDataset (`pipe:`, gs, hf, ais, …) and fsspec (s3, …) open.
A `pipe:` address is a shell command that runs as the user. As in WebDataset, it is for people who write
their own recipes.
"""

from __future__ import annotations

import glob
import http.client
import itertools
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from qlip_core.errors import DataError

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+):(?=//)|^(pipe):")
_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)\Z")
_GLOB = re.compile(r"[*?\[]")
# Schemes that webdataset's own openers handle; fsspec handles all others.
_WEBDATASET = frozenset({"pipe", "sftp", "ftps", "scp", "gs", "htgs", "hf", "ais"})
_HTTP = frozenset({"http", "https"})
_TIMEOUT = 60.0
# A broken connection is retried, and reading resumes at the sample where it broke.
RETRIES = 4
_FIRST_PAUSE = 0.5
MAX_FILES = 1_000_000


class ByteStream(Protocol):
    """A forward-only stream."""

    def read(self, size: int = -1, /) -> bytes: ...


def scheme(address: str) -> str:
    """ "http", "s3", "pipe", …, or "" for a local path."""
    found = _SCHEME.match(address)
    name = (found.group(1) or found.group(2)).lower() if found else ""
    return "" if name == "file" else name


def local_path(address: str) -> Path:
    """The path of a local address, `file://` taken off."""
    return Path(re.sub(r"^file://", "", address))


def expand(location: str) -> list[str]:
    """Every address that `location` stands for, in order: braces first, then wildcards, sorted.

    Raises DataError if a path does not exist or a wildcard matches nothing.
    """
    if not scheme(location) and local_path(location).exists():
        return [location]
    out: list[str] = []
    addresses = [location] if scheme(location) == "pipe" else expand_braces(location)
    for address in addresses:
        kind = scheme(address)
        if kind:
            wild = _GLOB.search(address) and kind not in _WEBDATASET | _HTTP
            out += _remote_glob(address) if wild else [address]
            continue
        path = local_path(address)
        if path.exists():
            out.append(address)
        elif _GLOB.search(str(path)):
            found = sorted(glob.glob(str(path), recursive=True))
            if not found:
                raise DataError(f"{address}: no file matches")
            out += found
        else:
            raise DataError(f"{address}: no such file or folder")
    return out


def expand_braces(text: str) -> list[str]:
    """ "a{00..02}b{x,y}" -> 6 strings, the last brace varying fastest. Numbers keep leading zeros."""
    pieces = _BRACES.split(text)
    # split() alternates text outside and inside braces.
    choices = [[p] if i % 2 == 0 else _choices(p, text) for i, p in enumerate(pieces)]
    total = 1
    for options in choices:
        total *= len(options)
    if total > MAX_FILES:
        raise DataError(f"{text}: stands for {total} files, over the limit of {MAX_FILES}")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(inside: str, text: str) -> list[str]:
    numbers = _RANGE.match(inside)
    if not numbers:
        if ".." in inside:
            raise DataError(f"{text}: {{{inside}}} is not a range of numbers such as {{000..099}}")
        return inside.split(",")
    first, last = numbers.groups()
    if abs(int(last) - int(first)) >= MAX_FILES:
        raise DataError(f"{text}: {{{inside}}} is over the limit of {MAX_FILES} files")
    padded = any(len(n.lstrip("-")) > 1 and n.lstrip("-")[0] == "0" for n in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]


def wait_to_retry(address: str, failures: int, error: OSError, advice: str = "") -> None:
    """Wait, longer after each of the `failures` in a row, before reading `address` again.

    Raises DataError, with `advice`, for a local file, or after too many failures.
    """
    if not scheme(address) or failures > RETRIES:
        raise DataError(f"{address}: cannot be read ({error}){advice}") from None
    time.sleep(_FIRST_PAUSE * 2 ** (failures - 1))


@contextmanager
def opened(address: str) -> Iterator[ByteStream]:
    """The bytes of `address` as a stream; for a local file one that can seek.

    Raises DataError if an extra is missing. Any failure while reading, including a transfer that ends early, is
    an OSError, because a cut connection must never be taken for the end of a file.
    """
    kind = scheme(address)
    if not kind:
        with local_path(address).open("rb") as file:
            yield file
    elif kind in _HTTP:
        # WebDataset runs curl for these, which is not installed everywhere and waits for ever on a stalled server.
        try:
            response = urllib.request.urlopen(address, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()  # it holds the connection
            raise
        except (http.client.InvalidURL, ValueError) as error:
            raise DataError(f"{address}: {error}") from None
        with response:
            yield _Download(response)
    elif kind in _WEBDATASET:
        pipe = _webdataset_open(address)
        try:
            yield _Checked(pipe)
        finally:
            # If reading stopped early, the command is still running, and its exit status does not matter.
            pipe.ignore_errors = True
            if pipe.proc.poll() is None:
                pipe.proc.terminate()
            pipe.close()
    else:
        with fsspec_open(address) as file:
            yield _Remote(file)


class _Remote:
    """A file of fsspec's, whose clients each have their own exceptions; all become OSError."""

    def __init__(self, file):
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self._file.read(size)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


class _Download:
    """An HTTP response that must be as long as announced."""

    def __init__(self, response: http.client.HTTPResponse):
        self._response = response
        length = response.headers.get("Content-Length", "")
        self._left = int(length) if length.isdigit() else None

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self._response.read(size)
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from None
        if self._left is not None:
            self._left -= len(data)
            if not data and size and self._left:
                raise OSError(f"the connection ended {self._left} bytes too soon")
        return data


class _Checked:
    """A command's output; the command must succeed."""

    def __init__(self, pipe):
        self._pipe = pipe

    def read(self, size: int = -1, /) -> bytes:
        data = self._pipe.read(size)
        if not data and size:
            self._pipe.wait_for_child()
        return data


def _webdataset_open(address: str) -> Any:
    """A `webdataset.gopen.Pipe`."""
    try:
        from webdataset.gopen import gopen
    except ImportError:
        raise DataError(f"{address}: needs webdataset; pip install 'qlip[data]'") from None
    try:
        return gopen(address, "rb")
    except ImportError as error:
        raise DataError(f"{address}: {error}; pip install {error.name}") from None


def fsspec_open(address: str) -> Any:
    """A file that fsspec opens. Raises DataError if an extra is missing or it does not support the address."""
    try:
        import fsspec
    except ImportError:
        raise DataError(f"{address}: needs fsspec; pip install 'qlip[data]'") from None
    try:
        opener: Any = fsspec.open(address, "rb")
        return opener.open()
    except (ImportError, ValueError) as error:
        raise DataError(f"{address}: {error}") from None


def _remote_glob(address: str) -> list[str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise DataError(f"{address}: needs fsspec; pip install 'qlip[data]'") from None
    try:
        system, path = url_to_fs(address)
        found = sorted(str(system.unstrip_protocol(name)) for name in system.glob(path))
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"{address}: {error}") from None
    if not found:
        raise DataError(f"{address}: no file matches")
    return found
