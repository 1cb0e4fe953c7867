"""`qlip decode`: token files to pictures."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip_cli import options
from qlip_cli.inputs import standard_input
from qlip_cli.options import BackendName, BatchSize, Device, Dtype, Force, Json, ModelName, Revision
from qlip_cli.outputs import (
    PICTURES,
    PictureFolder,
    decode_into,
    is_folder,
    picture_file,
    safe_names,
    save_picture,
)
from qlip_cli.terminal import count_text, note, print_json, print_line, progress

if TYPE_CHECKING:
    from qlip_core import Model, VisualTokens
    from qlip_core.errors import TokenFileError

    TokenFiles = list[tuple[Path, VisualTokens]]


def decode(
    tokens: Annotated[
        list[str],
        typer.Argument(metavar="TOKENS", hidden=True),
    ],
    output: Annotated[
        str | None,
        options.output(
            "Picture for one image, folder for several (default: TOKENS-decoded.png, or TOKENS-decoded)."
        ),
    ] = None,
    any_model: Annotated[
        bool,
        typer.Option("--any-model", help="Also decode tokens that another tokenizer made."),
    ] = False,
    model: ModelName = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn tokens back into pictures.

    TOKENS is a .qlip file, a folder (all .qlip files below it), a glob or - (standard input). One image
    becomes a PNG, several a folder of PNGs, which have the names that the token files give them (repeated
    names are numbered). For one image the suffix of OUT may also be .jpg, .webp, .bmp or .tiff. A token file
    that cannot be read is left out and listed, and the exit status is 1.
    """
    files, failed = load_token_files(tokens)
    count = sum(len(part) for _, part in files)
    several = count > 1 or bool(failed)  # as requested, even if only one could be read
    stem = "decoded" if len(files) + len(failed) > 1 else f"{files[0][0].stem}-decoded"
    given = (stem if several else f"{stem}.png") if output is None else output
    out = Path(given)
    named = out.suffix.lower() in PICTURES
    single = count == 1 and (named or not several) and not is_folder(given)
    picture = picture_file(out, [path for path, _ in files], force=force) if single else None
    folder = None if single else PictureFolder(out, safe_names(wishes(files)), force=force)

    network = options.load_model(model, revision, backend, device, dtype)
    for path, part in files:
        check_fit(network, path, part, any_model)
    written: list[Path] = []
    with progress("decoding", count) as advance:
        if picture is not None:
            [part] = [part for _, part in files if len(part)]
            save_picture(picture, network.decode(part, any_model=any_model)[0])
            written.append(picture)
        if folder is not None:
            decode_into(folder, network, [part for _, part in files], batch_size, advance)
            written += [out / name for name in folder.names]

    size = network.config.image_size
    if json:
        document: dict[str, Any] = {"output": str(picture or out), "images": count}
        document |= {"size": size, "files": [str(path) for path in written]}
        errors = [{"file": str(path), "error": str(error)} for path, error in failed.items()]
        print_json(document | {"failed": errors})
    else:
        what = f"{count_text(count, 'image')}, {size}x{size} pixels"
        print_line(f"{picture or out}: {what}")
    if failed:
        list_errors(failed, len(files) + len(failed))
        raise typer.Exit(1)


def load_token_files(arguments: Sequence[str]) -> tuple[TokenFiles, dict[Path, TokenFileError]]:
    """Every token file, read and checked, and the errors of the bad ones. Raises TokenFileError, after listing
    those, if nothing is left to decode."""
    from qlip_core import VisualTokens
    from qlip_core.errors import TokenFileError

    files: TokenFiles = []
    failed: dict[Path, TokenFileError] = {}
    for path in token_paths(arguments, failed):
        try:
            files.append((path, VisualTokens.load(path)))
        except TokenFileError as error:
            failed[path] = error
    if not files:
        if len(failed) == 1:
            raise next(iter(failed.values()))
        list_errors(failed, len(failed))
        raise TokenFileError(f"none of the {len(failed)} token files could be read")
    if not any(len(part) for _, part in files):
        list_errors(failed, len(files) + len(failed))
        raise TokenFileError(f"{files[0][0]}: holds no images: nothing to decode")
    return files, failed


def token_paths(arguments: Sequence[str], failed: dict[Path, TokenFileError]) -> list[Path]:
    """All files that the arguments stand for; folders that cannot be read go to `failed`. Raises
    TokenFileError for a folder or a glob without token files, and for an empty name."""
    from qlip_core.errors import ImageError, TokenFileError
    from qlip_core.images import walk_files

    def fail(folder: str, error: ImageError) -> None:
        failed[Path(folder)] = TokenFileError(str(error))

    paths: list[Path] = []
    for argument in arguments:
        if not argument:
            raise TokenFileError("the name of a token file is empty")
        matches = [standard_input() if argument == "-" else argument]
        if not os.path.exists(argument) and glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True))
            if not matches:
                raise TokenFileError(f"{argument}: no file matches this pattern")
        before = len(paths) + len(failed)
        for match in matches:
            if not os.path.isdir(match):
                paths.append(Path(match))
            elif "**" not in argument:  # which matches the files in it, too
                paths += map(Path, walk_files(Path(match), fail, frozenset({".qlip"})))
        if len(paths) + len(failed) == before:
            raise TokenFileError(f"{argument}: no .qlip files in this folder")
    return paths


def list_errors(failed: Mapping[Path, TokenFileError], count: int) -> None:
    """List the bad files on stderr."""
    if failed:
        note(f"{len(failed)} of {count} token files could not be read:")
    for error in failed.values():
        note(f"  {error}")


def wishes(files: TokenFiles) -> list[str]:
    """The preferred names of the images: their own, or their file's with a number."""
    return [
        name
        for path, part in files
        for name in part.names or (f"{path.stem}-{i:05}" for i in range(1, len(part) + 1))
    ]


def check_fit(network: Model, path: Path, tokens: VisualTokens, any_model: bool) -> None:
    """Raises TokenFileError, naming the file, if the model cannot decode its tokens."""
    from qlip_core.errors import TokenFileError

    try:
        network.decode(tokens[:0], any_model=any_model)
    except TokenFileError as error:
        raise TokenFileError(f"{path}: {error}") from None
