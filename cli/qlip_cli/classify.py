"""`qlip classify`: which of some labels fits an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip_cli import options
from qlip_cli.inputs import Failures, collect_images, read_entries
from qlip_cli.options import BackendName, BatchSize, Device, Dtype, Json, ModelName, Revision
from qlip_cli.terminal import print_bars, print_json, print_line, print_table, progress

if TYPE_CHECKING:
    import numpy as np

    from qlip_core import Model

_CHARTS = 10  # images; more are one line each


def classify(
    images: options.Images,
    labels: Annotated[
        list[str] | None,
        typer.Option("--labels", "-l", metavar="A,B,...", help="Labels, separated by commas."),
    ] = None,
    labels_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Labels, one a line (may hold commas).")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            "-t",
            metavar="TEXT",
            help="Text for a label, as in 'a photo of {}'; several are averaged.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Labels to show.")] = 10,
    model: ModelName = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    json: Json = False,
) -> None:
    """Say which of several labels fits an image best.

    IMAGE is an image file, a folder, a glob or - (standard input). The probabilities of an image sum to 1
    over the labels.
    """
    files = collect_images(images)
    choices = collect_labels(labels or [], labels_file)
    network = options.load_model(model, revision, backend, device, dtype)
    classes = embed(network, choices, template or ["{}"], 4 * batch_size)

    from qlip_core.model import softmax

    failures = Failures(files)
    results: list[tuple[str, list[tuple[str, float]]]] = []
    with progress("classifying", len(files)) as advance:
        for positions, pixels in network.batches([f.path for f in files], batch_size, failures):
            vectors = network.embed_images(pixels, batch_size=batch_size)
            logits = network.logit_scale * vectors @ classes.T
            for position, shares in zip(positions, softmax(logits).tolist()):
                ranked = sorted(zip(choices, shares), key=lambda choice: -choice[1])
                # Saves memory with thousands of labels and thousands of images.
                results.append((files[position].name, ranked if json else ranked[:top]))
            advance(len(positions))
    failures.check_some_left()

    if json:
        found = [
            {"image": name, "label": ranked[0][0], "probabilities": dict(ranked)}
            for name, ranked in results
        ]
        print_json({"labels": choices, "images": found, "failed": failures.as_json()})
    elif len(results) > _CHARTS:
        rows = [(name, *ranked[0]) for name, ranked in results]
        print_table(
            [(name, label, f"{100 * share:.1f} %") for name, label, share in rows],
            ("image", "label", "probability"),
        )
    else:
        for i, (name, ranked) in enumerate(results):
            if i:
                print_line("")
            print_line(name)
            print_bars(ranked)
    failures.list_errors()
    raise typer.Exit(failures.exit_code())


def embed(network: Model, labels: list[str], templates: list[str], batch_size: int) -> np.ndarray:
    """`Model.embed_labels` with a bar that counts the labels."""
    import numpy as np

    step = max(1, batch_size // len(templates))
    rows = []
    with progress("embedding labels", len(labels)) as advance:
        for start in range(0, len(labels), step):
            some = labels[start : start + step]
            rows.append(network.embed_labels(some, templates, batch_size=batch_size))
            advance(len(some))
    return np.concatenate(rows)


def collect_labels(given: list[str], file: Path | None) -> list[str]:
    """All labels once, in order. Raises TextError if there are none, or the file cannot be read."""
    from qlip_core.errors import TextError

    labels = [label.strip() for text in given for label in text.split(",")]
    if file is not None:
        labels += read_entries(file)
    labels = list(dict.fromkeys(label for label in labels if label))
    if not labels:
        raise TextError('no labels: give them with --labels "a cat,a dog" or --labels-file FILE')
    return labels
