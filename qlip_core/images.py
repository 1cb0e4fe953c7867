"""Images in and out, with Pillow: any file a viewer shows becomes 8-bit RGB as the viewer shows it."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qlip_core.errors import ImageError

# A path, encoded bytes, a PIL image, or uint8 [H, W, 3].
ImageLike = str | Path | bytes | bytearray | Image.Image | np.ndarray

# HEIC cannot be read, but a folder's (a phone's photos, for instance) are reported, not passed over.
_HEIC = frozenset({".heic", ".heif"})
SUFFIXES = _HEIC | frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
)
# Pillow warns about large images long before it refuses them, and about odd but harmless metadata. Filters
# are global and images are decoded in many threads, so this is set once, for Pillow's modules only.
warnings.filterwarnings("ignore", module=r"PIL\.")
_MAX_PIPE = 2**28  # bytes; more than any sane picture
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def open_image(image: ImageLike, name: str | None = None) -> Image.Image:
    """Any image as 8-bit RGB: upright, over white if transparent, the first frame of an animation.

    `name` is used in messages (default: its path). Raises ImageError, saying whether the file is missing,
    unreadable, not an image, cut short, or too large to decode safely.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, name or "array")
    if isinstance(image, Image.Image):
        name = name or "PIL image"
        try:
            return _decoded(lambda: to_rgb(image), name)
        except UnidentifiedImageError as error:
            raise ImageError(f"{name}: not an image ({error})") from None
    if isinstance(image, bytes | bytearray):
        return _decode(io.BytesIO(image), name or "image data")
    if not isinstance(image, str | os.PathLike):
        raise ImageError(
            f"{name or 'image'}: expected a path, the bytes of a file, a PIL image or uint8 [H, W, 3], got "
            f"{type(image).__name__}"
        )
    if image == "":  # Path("") would be the current folder
        raise ImageError("the name of an image is empty")
    path = Path(image)
    name = name or str(path)
    try:
        with path.open("rb") as file:
            # Decoders seek, which a pipe cannot.
            return _decode(file if file.seekable() else _whole(file, name), name)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, expected an image file") from None
    except PermissionError:
        raise ImageError(f"{name}: no permission to read it") from None
    except OSError as error:  # a name that is too long, a circle of links, a disk that fails
        raise ImageError(f"{name}: cannot be read ({error.strerror})") from None


def _whole(pipe: BinaryIO, name: str) -> io.BytesIO:
    data = pipe.read(_MAX_PIPE + 1)
    if len(data) > _MAX_PIPE:
        raise ImageError(
            f"{name}: over {_MAX_PIPE:,} bytes come out of this pipe; write them to a file"
        )
    return io.BytesIO(data)


def _decode(file: io.IOBase, name: str) -> Image.Image:
    def opened() -> Image.Image:
        with Image.open(file) as image:  # type: ignore[arg-type]
            return to_rgb(image)

    try:
        return _decoded(opened, name)
    except UnidentifiedImageError:
        raise ImageError(f"{name}: {_not_an_image(file)}") from None


def _not_an_image(file: io.IOBase) -> str:
    file.seek(0)
    start = file.read(12)
    if not start:
        return "empty file"
    if start[4:8] == b"ftyp" and start[8:12] not in (b"avif", b"avis"):
        return "HEIC or a video, which Pillow does not read; convert it to JPEG or PNG first"
    return "not an image"


def _decoded(decode: Callable[[], Image.Image], name: str) -> Image.Image:
    """The result of `decode`, with Pillow's many exceptions as ImageError."""
    try:
        image = decode()
    except UnidentifiedImageError:
        raise
    except Warning as warning:  # if the process turns warnings into errors
        raise ImageError(f"{name}: {warning}") from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name}: over {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, too many to decode safely: "
            "shrink it first"
        ) from None
    except MemoryError:
        raise ImageError(f"{name}: not enough memory to decode it") from None
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        # Pillow's decoders raise all of these for damaged data.
        raise ImageError(f"{name}: truncated or damaged image ({error})") from None
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ImageError(f"{name}: damaged image ({type(error).__name__}: {error})") from None
    if not all(image.size):
        raise ImageError(f"{name}: an image of {image.width}x{image.height} pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as a viewer shows it: rotated by EXIF, over white, 16 bits scaled to 8."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if getattr(image, "is_animated", False) else image
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255 or image.mode != "I":
            values = values // 257 if values.max(initial=0) <= 65535 else values >> 24
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        if values.max(initial=0) <= 1:
            values = values * 255
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only conversion that Pillow supports
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ImageError(f"{name}: expected uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    return Image.fromarray(array)


def drawable(text: str) -> str:
    """Text in ASCII, without accents and with "?" for other letters: all that Pillow's own font has.

    It would draw other characters as boxes.
    """
    plain = (unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() for c in text)
    return "".join(p or "?" for c, p in zip(text, plain) if not unicodedata.combining(c))


def find_images(folder: str | Path) -> list[Path]:
    """Image files below a folder, sorted by path. Hidden files and folders are left out."""
    return [Path(path) for path in walk_files(folder)]


def walk_files(
    folder: str | Path,
    on_error: Callable[[str, ImageError], None] | None = None,
    suffixes: frozenset[str] = SUFFIXES,
) -> Iterator[str]:
    """`find_images`, one by one and as strings, so that a million of them fit in memory.

    Linked folders are left out, since links may form loops. A folder that cannot be read raises ImageError,
    or, with `on_error`, is passed to it and left out.
    """
    names: list[str] = []
    folders: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:  # an entry takes ten times the memory of its name
                if not entry.name.startswith("."):
                    names.append(entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        folders.add(entry.name)
    except OSError as error:
        failed = ImageError(f"{folder}: this folder cannot be read ({error.strerror})")
        if on_error is None:
            raise failed from None
        on_error(os.fspath(folder), failed)
        return
    for name in sorted(names):
        path = os.path.join(folder, name)
        if name in folders:
            yield from walk_files(path, on_error, suffixes)
        elif os.path.splitext(name)[1].lower() in suffixes and os.path.isfile(path):
            yield path
