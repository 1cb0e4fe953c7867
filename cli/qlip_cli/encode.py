"""`qlip encode`: images to a token file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qlip_cli import options
from qlip_cli.inputs import Failures, collect_images
from qlip_cli.options import BackendName, BatchSize, Device, Dtype, Force, Json, ModelName, Revision
from qlip_cli.outputs import output_file, writing
from qlip_cli.terminal import count_text, print_json, print_line, progress, size_text


def encode(
    images: options.Images,
    output: Annotated[
        str | None,
        options.output(
            "Token file (default: IMAGE.qlip, FOLDER.qlip, or tokens.qlip for several)."
        ),
    ] = None,
    model: ModelName = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn images into tokens: one .qlip file for all of them.

    IMAGE is an image file, a folder (all images below it), a glob or - (standard input). A folder's images
    keep their paths inside it as names. An image that cannot be read is left out and listed, and the exit
    status is 1.
    """
    files = collect_images(images)
    path = output_file(
        output, default_name(images, len(files)), force=force, inputs=[f.path for f in files]
    )
    from qlip_core.bsq import packed_bytes
    from qlip_core.tokens import VisualTokens, names_text

    names_text([f.name for f in files])  # raises for names that cannot be saved, before any work
    network = options.load_model(model, revision, backend, device, dtype)

    import numpy as np

    config = network.config
    row = packed_bytes(config.num_patches, config.code_dim)
    # Filled in place, so that only each image's packed bits and name stay in memory.
    packed = np.empty((len(files), row), np.uint8)
    names: list[str] = []
    failures = Failures(files)
    with progress("encoding", len(files)) as advance:
        for positions, batch in network.encode_batches(
            [f.path for f in files], batch_size=batch_size, on_error=failures
        ):
            packed[len(names) : len(names) + len(positions)] = batch.packed
            names += [files[i].name for i in positions]
            advance(len(positions))
    failures.check_some_left()
    packed = packed[: len(names)]
    tokens = VisualTokens(packed, config.code_dim, config.grid, network.fingerprint, tuple(names))
    with writing(path):
        tokens.save(path)
    h, w = tokens.grid
    each = tokens.packed.shape[1]
    if json:
        print_json(
            {
                "output": str(path),
                "images": len(tokens),
                "grid": [h, w],
                "length": tokens.length,
                "bytes_per_image": each,
                "model": tokens.model,
                "failed": failures.as_json(),
            }
        )
    else:
        code = f"{h}x{w} patches of {tokens.length} bits, {size_text(each)}"
        print_line(f"{path}: {count_text(len(tokens), 'image')}, each {code}")
    failures.list_errors()
    raise typer.Exit(failures.exit_code())


def default_name(arguments: list[str], count: int) -> str:
    """IMAGE.qlip for one image, FOLDER.qlip for one folder, tokens.qlip otherwise."""
    path = Path(arguments[0])
    if len(arguments) == 1 and os.path.isdir(path):
        return f"{path.resolve().name or 'tokens'}.qlip"
    return f"{path.stem}.qlip" if len(arguments) == 1 and os.path.isfile(path) else "tokens.qlip"
