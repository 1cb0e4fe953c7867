"""`qlip embed`: images and texts to unit vectors of one space."""

from __future__ import annotations

import json as jsonlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip_cli import options
from qlip_cli.inputs import Failures, collect_images, read_entries
from qlip_cli.options import BackendName, BatchSize, Device, Dtype, Force, Json, ModelName, Revision
from qlip_cli.outputs import is_folder, output_file, writing
from qlip_cli.terminal import count_text, print_json, print_line, progress

if TYPE_CHECKING:
    import numpy as np

MAX_PRINTED = 16


def embed(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", hidden=True),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", metavar="TEXT", help="A text; repeatable.")
    ] = None,
    texts_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts, one a line.")
    ] = None,
    output: Annotated[
        str | None,
        options.output("A .npy or .safetensors file."),
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
    """Turn images and texts into unit vectors of one space.

    IMAGE is an image file, a folder, a glob or - (standard input). The dot product of two vectors says how
    well they fit. Without -o up to 16 vectors are printed as JSON. A .safetensors file holds the tensor
    `embeddings` [B, P] and the names in its metadata; beside a .npy file the names go to a .json of the same
    name. Images come first, then texts.
    """
    from qlip_core.errors import QlipError

    files = collect_images(images) if images else []
    texts = [*(text or []), *(read_entries(texts_file) if texts_file else [])]
    count = len(files) + len(texts)
    if not count:
        raise QlipError("nothing to embed: name images, or give --text TEXT")
    if output is None and count > MAX_PRINTED:
        raise QlipError(f"{count} vectors are too many to print: name a file with -o")
    outputs = check_outputs(output, [f.path for f in files], force) if output is not None else []
    network = options.load_model(model, revision, backend, device, dtype)

    import numpy as np

    failures = Failures(files)
    rows: list[np.ndarray] = []
    text_rows: list[np.ndarray] = []
    names: list[str] = []
    with progress("embedding", count) as advance:
        # Texts first, so that a missing tokenizer is reported before any image is read.
        for start in range(0, len(texts), 4 * batch_size):
            some = texts[start : start + 4 * batch_size]
            text_rows.append(network.embed_texts(some, batch_size=len(some)))
            advance(len(some))
        for positions, pixels in network.batches([f.path for f in files], batch_size, failures):
            rows.append(network.embed_images(pixels, batch_size=batch_size))
            names += [files[i].name for i in positions]
            advance(len(positions))
    kinds = ["image"] * len(names)
    if not texts:
        failures.check_some_left()
    names += texts
    kinds += ["text"] * len(texts)
    vectors = np.concatenate([*rows, *text_rows])

    if not outputs:
        items = [
            # The shortest decimals that convert back to the same float32.
            {"name": name, "kind": kind, "embedding": [float(str(x)) for x in vector]}
            for name, kind, vector in zip(names, kinds, vectors)
        ]
        print_json(
            {"model": network.fingerprint, "embeddings": items, "failed": failures.as_json()}
        )
    else:
        metadata = {"names": names, "kinds": kinds, "model": network.fingerprint}
        save(outputs, vectors, metadata)
        if json:
            shape = {"vectors": len(vectors), "width": vectors.shape[1]}
            print_json({"output": str(outputs[0]), **shape, "failed": failures.as_json()})
        else:
            what = f"{count_text(len(vectors), 'vector')} of {vectors.shape[1]} numbers"
            beside = f"; names in {outputs[1]}" if len(outputs) > 1 else ""
            print_line(f"{outputs[0]}: {what}{beside}")
    failures.list_errors()
    raise typer.Exit(failures.exit_code())


def check_outputs(output: str, inputs: list[str], force: bool) -> list[Path]:
    """The files that will be written: one, or a .npy and its .json."""
    from qlip_core.errors import QlipError

    path = Path(output)
    if is_folder(output):
        raise QlipError(f"{path}: is a folder; name a .npy or .safetensors file in it with -o")
    if path.suffix not in (".npy", ".safetensors"):
        raise QlipError(f"{path}: embeddings are written as .npy or .safetensors")
    paths = [path] if path.suffix == ".safetensors" else [path, path.with_suffix(".json")]
    return [output_file(each, each.name, force=force, inputs=inputs) for each in paths]


def save(outputs: list[Path], vectors: np.ndarray, metadata: dict) -> None:
    """Write float32 [B, P] with its names, both or neither. No pickle in either format."""
    import numpy as np

    from qlip_core.files import atomic_file
    from qlip_core.tensorfile import write_tensors

    with writing(outputs[0]):
        if outputs[0].suffix == ".safetensors":
            strings = {
                key: value if isinstance(value, str) else jsonlib.dumps(value)
                for key, value in metadata.items()
            }
            write_tensors(outputs[0], {"embeddings": vectors}, metadata=strings)
            return
        with atomic_file(outputs[0]) as numbers, atomic_file(outputs[1]) as names:
            np.save(numbers, vectors, allow_pickle=False)
            names.write(jsonlib.dumps(metadata, indent=2).encode())
            for file in (numbers, names):  # both are on disk before either becomes visible
                file.flush()
                os.fsync(file.fileno())
