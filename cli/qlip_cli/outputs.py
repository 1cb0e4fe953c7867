"""Where results go: names, what may not be overwritten, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from qlip_core import Model, VisualTokens

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def is_folder(output: str | Path) -> bool:
    """Whether an output, as typed, names a folder: an existing one, or any name that ends in a slash (which
    pathlib would drop)."""
    return str(output).endswith(("/", os.sep)) or Path(output).is_dir()


def output_path(out: str | Path | None, default: str) -> Path:
    """`out`, or `default` in it if it names a folder, or in the current folder if it is None."""
    return Path(default) if out is None else Path(out, default) if is_folder(out) else Path(out)


def output_file(
    out: str | Path | None,
    default: str,
    *,
    force: bool,
    inputs: Iterable[str | Path] = (),
    option: str = "-o",
    made: Path | None = None,
) -> Path:
    """The file to write (`output_path`). `option` names it, and `made` is a folder, already checked, that will
    exist by the time of writing.

    Checked before any work: raises QlipError if it exists (without `force`), is one of the inputs or not a
    regular file, or is in a folder that does not exist or cannot be written to. A link stands for its target.
    """
    path = output_path(out, default)
    check_free(path, force=force, inputs=inputs, option=option)
    if made is None or path.parent != made:
        check_writable((path.resolve() if path.is_symlink() else path).parent, path, option)
    return path


def check_free(
    path: Path, *, force: bool, inputs: Iterable[str | Path] = (), option: str = "-o"
) -> None:
    """Raises QlipError for a file to write that exists (without `force`), is one of the inputs or no regular
    file."""
    from qlip_core.errors import QlipError

    if path.is_dir():
        raise QlipError(f"{path}: is a folder; name a file with {option}")
    check_regular(path, option)
    if not path.exists():
        return
    if any(same_file(path, given) for given in inputs):
        raise QlipError(f"{path}: is one of the inputs; name another output with {option}")
    if not force:
        raise QlipError(
            f"{path}: already exists; name another with {option}, or overwrite: --force"
        )


def check_folder(folder: Path, option: str = "-o", *, parents: bool = False) -> None:
    """Raises QlipError, before any work, where no folder can be made or written to. With `parents` the folders
    above it may be absent, too."""
    from qlip_core.errors import QlipError

    refuse_stdout(folder, f"name a folder with {option}")
    if folder.exists() and not folder.is_dir():
        raise QlipError(f"{folder}: exists and is not a folder; name another with {option}")
    there = folder if folder.is_dir() else folder.parent
    while parents and not there.exists():
        there = there.parent
    check_writable(there, folder, option)


def refuse_stdout(path: Path, advice: str) -> None:
    """Raises QlipError, with `advice`, for "-", which elsewhere means standard output."""
    from qlip_core.errors import QlipError

    if str(path) == "-":
        raise QlipError(f"-: results are not written to standard output; {advice}")


def check_regular(path: Path, option: str = "-o") -> None:
    """Raises QlipError for what exists and is neither file nor folder, since a rename would replace a device,
    and for "-", since results are files and not a stream."""
    from qlip_core.errors import QlipError

    refuse_stdout(path, f"name a file with {option}")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise QlipError(f"{path}: is a device or a pipe; name a file with {option}")


def check_writable(folder: Path, path: Path, option: str = "-o") -> None:
    """Raises QlipError if no file can be made in `folder` for the output `path`."""
    from qlip_core.errors import QlipError

    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist: create it first"
        raise QlipError(f"{path}: cannot be written, {folder} {problem}")
    try:
        # Only trying tells: root may write where the mode says no, and nowhere on a read-only disk.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise QlipError(
            f"{path}: cannot be written, {_reason(error)} in the folder {folder}: "
            f"choose another with {option}"
        ) from None


def same_file(a: Path, b: str | Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says while `path` is written into one line about `path`."""
    from qlip_core.errors import QlipError

    try:
        yield
    except OSError as error:
        hint = ": free some, or write elsewhere with -o" if error.errno == errno.ENOSPC else ""
        raise QlipError(f"{path}: cannot be written ({_reason(error)}){hint}") from error


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


# -- pictures ----------------------------------------------------------------------------------


def picture_file(
    path: Path,
    inputs: Iterable[str | Path],
    *,
    force: bool,
    option: str = "-o",
    made: Path | None = None,
) -> Path:
    """`output_file` for a picture: a name without a suffix becomes a PNG, and a suffix that is not
    of a picture this command writes is a QlipError."""
    from qlip_core.errors import QlipError

    check_regular(path, option)
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    if path.suffix.lower() not in PICTURES:
        raise QlipError(f"{path}: pictures are written as one of {', '.join(PICTURES)}")
    return output_file(path, path.name, force=force, inputs=inputs, option=option, made=made)


def save_picture(
    path: Path, picture: Image.Image | np.ndarray, text: Mapping[str, str] | None = None
) -> None:
    """Write a picture, or pixels uint8 [H, W, 3], whole or not at all; `text` goes into a PNG."""
    from PIL import Image

    from qlip_core.files import atomic_file

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    kind = Image.registered_extensions()[path.suffix.lower()]
    how: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    if kind == "PNG" and text:
        how = {"pnginfo": _png_text(text)}
    with writing(path), atomic_file(path) as file:
        image.save(file, kind, **how)


def _png_text(text: Mapping[str, str]) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)  # the only kind of text chunk that holds any Unicode
    return info


def safe_names(names: Iterable[str]) -> list[str]:
    """Relative paths `.../*.png`, one for each name, all different, none leading out of its folder.

    Token files come from anywhere, so a name is only a wish: parts that lead elsewhere or that some
    file system cannot hold are dropped, and repeated names are numbered.
    """
    files: set[str] = set()
    folders: set[str] = set()
    copies: dict[str, int] = {}  # the next number to try, of each name that came before
    out = []
    for number, name in enumerate(names, 1):
        parts = [part for part in map(_safe_part, name.replace("\\", "/").split("/")) if part]
        stem = PurePosixPath(*parts[:-1], _stem(parts[-1]) if parts else f"image-{number:05}")
        if {str(p).lower() for p in stem.parents} & files:
            stem = PurePosixPath(f"image-{number:05}")
        path, key = f"{stem}.png", str(stem).lower()
        while path.lower() in files or path.lower() in folders:
            copies[key] = copies.get(key, 1) + 1
            path = f"{stem}-{copies[key]}.png"
        files.add(path.lower())  # one name on a Mac and on Windows
        folders |= {str(p).lower() for p in PurePosixPath(path).parents}
        out.append(path)
    return out


def _safe_part(part: str) -> str:
    kept = "".join(c for c in part if c.isprintable() and c not in '<>:"|?*').strip(" .")
    while len(kept.encode("utf-8", "replace")) > 200:
        kept = kept[: len(kept) - 1]
    return kept


def _stem(name: str) -> str:
    from qlip_core.images import SUFFIXES

    suffix = PurePosixPath(name).suffix
    return name[: -len(suffix)] if suffix.lower() in SUFFIXES else name


class PictureFolder:
    """A folder of pictures that is filled out of sight and shown when it is complete."""

    def __init__(self, folder: Path, names: list[str], *, force: bool) -> None:
        """Raises QlipError if a picture exists (without `force`) or the folder cannot be written."""
        from qlip_core.errors import QlipError

        self.folder, self.names = folder, names
        if folder.suffix.lower() in PICTURES and not folder.is_dir():
            raise QlipError(
                f"{folder}: is the name of one picture, and these are {len(names)}: name a folder"
            )
        check_folder(folder)
        for name in names:
            target = folder / name
            if folder.is_dir() and not target.parent.resolve().is_relative_to(folder.resolve()):
                raise QlipError(
                    f"{target}: leads out of {folder} by a link; choose another with -o"
                )
            if target.exists() and not target.is_file():
                raise QlipError(
                    f"{target}: exists and is not a file; choose another folder with -o"
                )
            if target.exists() and not force:
                raise QlipError(
                    f"{target}: already exists; name another folder with -o, or overwrite: --force"
                )
        hidden = f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
        # Inside where it can be: an existing folder may be a disk of its own.
        self._temporary = folder / hidden if folder.is_dir() else folder.with_name(hidden)

    def __enter__(self) -> PictureFolder:
        with writing(self.folder):
            self._temporary.mkdir()
        return self

    def add(self, number: int, pixels: np.ndarray, text: Mapping[str, str] | None = None) -> None:
        """Write picture `number`: uint8 [S, S, 3], with `text` in it."""
        from PIL import Image

        path = self._temporary / self.names[number]
        with writing(self.folder / self.names[number]):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, pnginfo=_png_text(text) if text else None)

    def show(self) -> None:
        """Move everything to its place."""
        with writing(self.folder):
            if not self.folder.exists():
                self._temporary.rename(self.folder)
                return
            for name in self.names:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self._temporary / name).replace(self.folder / name)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)


def decode_into(
    folder: PictureFolder,
    network: Model,
    parts: Sequence[VisualTokens],
    batch_size: int,
    advance: Callable[[int], None],
    text_of: Callable[[int], Mapping[str, str]] | None = None,
) -> None:
    """Decode all images of `parts` into the folder, batch by batch; `text_of` gives the text in picture i.

    That the tokens fit the model was checked before.
    """
    number = 0
    with folder:
        for part in parts:
            for start in range(0, len(part), batch_size):
                pictures = network.decode(part[start : start + batch_size], any_model=True)
                for pixels in pictures:
                    folder.add(number, pixels, text_of(number) if text_of else None)
                    number += 1
                advance(len(pictures))
        folder.show()
