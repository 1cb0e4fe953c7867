"""`qlip reconstruct`: images beside their reconstructions, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip_cli import options
from qlip_cli.inputs import Failures, collect_images
from qlip_cli.options import BackendName, BatchSize, Device, Dtype, Force, Json, ModelName, Revision
from qlip_cli.outputs import output_path, picture_file, save_picture
from qlip_cli.terminal import (
    note,
    print_json,
    print_line,
    print_picture,
    print_table,
    printable,
    progress,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

    Row = tuple[str, str, np.ndarray, np.ndarray]  # name, scores, input, output [S, S, 3]

MAX_ROWS = 32
_GAP = 4
_LINE = 15  # pixels of a line of a label
_NARROW = 300  # narrower pictures have their labels on two lines


def reconstruct(
    images: options.Images,
    output: Annotated[
        str | None,
        options.output("Picture (default: IMAGE-reconstructed.png, or reconstructed.png)."),
    ] = None,
    model: ModelName = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    show: Annotated[
        bool, typer.Option("--show", help="Also draw it here, in the terminal's colours.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Show images beside their reconstructions, with PSNR and SSIM.

    IMAGE is an image file, a folder, a glob or - (standard input). Inputs are shown as the model sees them,
    resized and cropped. Several images are rows with labels, 32 at most; PSNR (dB) and SSIM are printed for
    all.
    """
    files = collect_images(images)
    name = (
        f"{Path(files[0].path).stem}-reconstructed.png" if len(files) == 1 else "reconstructed.png"
    )
    path = picture_file(output_path(output, name), [f.path for f in files], force=force)
    network = options.load_model(model, revision, backend, device, dtype)

    from qlip_core.metrics import psnr, ssim

    failures = Failures(files)
    scores: list[tuple[str, float, float]] = []
    rows: list[Row] = []
    with progress("reconstructing", len(files)) as advance:
        for positions, pixels in network.batches([f.path for f in files], batch_size, failures):
            before = network.preprocessing.to_images(pixels)
            after = network.reconstruct(pixels, batch_size=batch_size)
            near = zip(psnr(before, after).tolist(), ssim(before, after).tolist())
            for i, (decibel, similarity) in enumerate(near):
                label = files[positions[i]].name
                scores.append((label, decibel, similarity))
                if len(rows) < MAX_ROWS:
                    score = f"{decibel:.2f} dB  SSIM {similarity:.4f}"
                    rows.append((label, score, before[i], after[i]))
            advance(len(positions))
    failures.check_some_left()
    picture = picture_of(rows)
    save_picture(path, picture)

    mean = [
        sum(column) / len(scores) for column in ([s[1] for s in scores], [s[2] for s in scores])
    ]
    if json:
        each = [{"image": n, "psnr": finite(p), "ssim": s} for n, p, s in scores]
        print_json(
            {
                "output": str(path),
                "images": each,
                "mean": {"psnr": finite(mean[0]), "ssim": mean[1]},
                "failed": failures.as_json(),
            }
        )
    else:
        if show:
            print_picture(picture)
        table = [(n, f"{p:.2f} dB", f"{s:.4f}") for n, p, s in scores]
        if len(scores) > 1:
            table.append(("mean", f"{mean[0]:.2f} dB", f"{mean[1]:.4f}"))
        print_table(table, ("image", "PSNR", "SSIM"))
        print_line(f"{path}: input on the left, output on the right")
    if len(scores) > len(rows):
        note(f"{path} shows the first {len(rows)} of {len(scores)} images")
    failures.list_errors()
    raise typer.Exit(failures.exit_code())


def finite(value: float) -> float | None:
    """None for infinity, the PSNR of equal images, which JSON does not have."""
    return value if value < float("inf") else None


def picture_of(rows: list[Row]) -> Image.Image:
    """One picture with a row for each image, labelled above; a single row has no label."""
    from PIL import Image, ImageDraw, ImageFont

    side = rows[0][2].shape[0]
    width = 2 * side + _GAP
    lines = 0 if len(rows) == 1 else 2 if width < _NARROW else 1
    step = lines * _LINE + side + _GAP
    sheet = Image.new("RGB", (width, step * len(rows) - _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, (name, scores, before, after) in enumerate(rows):
        label = [name, scores] if lines == 2 else [f"{name}  {scores}"]
        for k, text in enumerate(label[:lines]):
            place = 2, i * step + k * _LINE
            draw.text(place, _shortened(text, width - 4, font), "black", font)
        top = i * step + lines * _LINE
        sheet.paste(Image.fromarray(before), (0, top))
        sheet.paste(Image.fromarray(after), (side + _GAP, top))
    return sheet


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut at the start, since the ends of names and labels say more."""
    from qlip_core.images import drawable

    text = drawable(printable(text))
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text
