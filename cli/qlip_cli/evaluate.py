"""`qlip eval`: how good a model is, with the protocol of each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip_cli import options
from qlip_cli.inputs import read_entries
from qlip_cli.options import BackendName, BatchSize, Device, Dtype, Force, Json, Revision
from qlip_cli.results import (
    EMOJI,
    ModelArgument,
    Out,
    Saving,
    count_of,
    metrics_of,
    show,
    stored,
    torch_device,
)
from qlip_cli.terminal import print_json, print_table, progress

if TYPE_CHECKING:
    from qlip_core.evaluation import Examples

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure a model. Every result says how it was measured, and is only compared with results measured alike.",
    epilog="Example: qlip eval recon bundled emoji",
)

DataArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        show_default=False,
        help='Folder of images, shards ("x/{000..099}.tar"), parquet, or "emoji".',
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, show_default=False, help="Use the first N images only."),
]
Classes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Names of the classes: lines of label<TAB>name."),
]


@app.command(epilog="Example: qlip eval recon bundled photos/ --out results")
def recon(
    model: ModelArgument,
    data: DataArgument,
    lpips: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help='Also LPIPS: safetensors of VGG16 and the linear weights, or "random" (not LPIPS).',
        ),
    ] = None,
    inception: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help='Also rFID: safetensors of FID\'s Inception-V3, or "random" (not FID).',
        ),
    ] = None,
    shown: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="How many of the best, the median and the worst to show."
        ),
    ] = 4,
    limit: Limit = None,
    out: Out = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    force: Force = False,
    json: Json = False,
) -> None:
    """PSNR, SSIM, bit usage; with --lpips LPIPS, with --inception rFID.

    With --out, also a picture of the best, the median and the worst reconstructions.
    """
    saving = Saving(out, ["reconstruction"], force, picture=shown > 0)
    network = options.load_model(model, revision, backend, device, dtype)

    from qlip_core.evaluation import evaluate_reconstruction
    from qlip_core.evaluation.emoji import HELD_OUT, reconstruction_examples

    distance, features = metrics_of(lpips, inception, torch_device(network))
    if data == EMOJI:
        examples: Examples = reconstruction_examples(network.config.image_size, limit or HELD_OUT)
    else:
        examples = stored(data, limit)
    with progress("reconstructing", count_of(examples)) as advance:
        result = evaluate_reconstruction(
            network,
            examples,
            batch_size=batch_size,
            lpips=distance,
            inception=features,
            shown=shown if out is not None else 0,
            progress=advance,
        )
    show([("reconstruction", result)], saving, json)


@app.command("zero-shot", epilog="Example: qlip eval zero-shot bundled emoji")
def zero_shot(
    model: ModelArgument,
    data: DataArgument,
    templates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Texts for a class, one a line, {} for its name; averaged."
        ),
    ] = None,
    classes: Classes = None,
    limit: Limit = None,
    out: Out = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    force: Force = False,
    json: Json = False,
) -> None:
    """Classification by class names: top-1 and top-5.

    An image's class is the folder it lies in, else "label" in its metadata, else its caption. With
    "emoji" there are three results: names that training saw, on new renderings (not zero-shot), names that
    it never saw (zero-shot), and those things by descriptions instead of names.
    """
    names = ["zero-shot"]
    if data == EMOJI:
        names = ["seen-names", "zero-shot-unseen-names", "zero-shot-unseen-described"]
    saving = Saving(out, names, force)
    texts = read_entries(templates) if templates is not None else ["{}"]
    network = options.load_model(model, revision, backend, device, dtype)

    from qlip_core.evaluation import emoji, evaluate_zero_shot

    sets: list[tuple[Examples, Sequence[str] | None, Mapping[str, str] | None]]
    if data == EMOJI:
        size, count = network.config.image_size, limit or emoji.HELD_OUT
        unseen = emoji.UNSEEN_CLASS_NAMES
        described = emoji.unseen_class_examples(size, count, title=emoji.DESCRIBED_TITLE)
        sets = [
            (emoji.seen_class_examples(size, count), emoji.CLASS_NAMES_100, None),
            (emoji.unseen_class_examples(size, count), unseen, None),
            (described, unseen, emoji.unseen_descriptions()),
        ]
    else:
        sets = [(stored(data, limit, classes), None, None)]
    results = []
    for name, (examples, classes_of_set, descriptions) in zip(names, sets):
        with progress("classifying", count_of(examples)) as advance:
            result = evaluate_zero_shot(
                network,
                examples,
                classes_of_set,
                templates=texts,
                wordings=descriptions,
                batch_size=batch_size,
                progress=advance,
            )
        results.append((name, result))
    show(results, saving, json)


@app.command(epilog="Example: qlip eval retrieval bundled 'coco/*.tar'")
def retrieval(
    model: ModelArgument,
    data: DataArgument,
    limit: Limit = None,
    out: Out = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    force: Force = False,
    json: Json = False,
) -> None:
    """R@1, R@5 and R@10 between pictures and captions, both ways.

    With "emoji" there are two results, captions of seen names and captions of unseen names.
    """
    names = ["seen-names", "zero-shot-unseen-names"] if data == EMOJI else ["retrieval"]
    files = [f"retrieval-{name}" if data == EMOJI else name for name in names]
    saving = Saving(out, files, force)
    network = options.load_model(model, revision, backend, device, dtype)

    from qlip_core.evaluation import emoji, evaluate_retrieval

    sets: list[Examples]
    if data == EMOJI:
        size, count = network.config.image_size, limit or emoji.CAPTIONS
        sets = [
            emoji.seen_caption_examples(size, count),
            emoji.unseen_caption_examples(size, count),
        ]
    else:
        sets = [stored(data, limit)]
    results = []
    for name, examples in zip(files, sets):
        with progress("embedding", count_of(examples)) as advance:
            result = evaluate_retrieval(network, examples, batch_size=batch_size, progress=advance)
        results.append((name, result))
    show(results, saving, json)


@app.command("linear-probe", epilog="Example: qlip eval linear-probe bundled train/ --test val/")
def linear_probe(
    model: ModelArgument,
    data: DataArgument,
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="What to test on (default: a fifth of DATA, by key)."),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", show_default=False, help="cls, patches, both (default: all three)."
        ),
    ] = None,
    classes: Classes = None,
    limit: Limit = None,
    out: Out = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    force: Force = False,
    json: Json = False,
) -> None:
    """Accuracy of a linear classifier on the encoder's last layer.

    Classes as for zero-shot. With "emoji": 100 seen names, fitted to plain renderings of training and
    tested on held-out ones.
    """
    saving = Saving(out, ["linear-probe"], force)
    network = options.load_model(model, revision, backend, device, dtype)

    from qlip_core.evaluation import evaluate_linear_probe
    from qlip_core.evaluation.emoji import HELD_OUT, probe_examples
    from qlip_core.evaluation.examples import Part
    from qlip_core.evaluation.linear_probe import FEATURES

    train_on: Examples
    test_on: Examples
    if data == EMOJI:
        train_on, test_on = probe_examples(network.config.image_size, limit or HELD_OUT)
    elif test is not None:
        train_on, test_on = stored(data, limit, classes), stored(test, limit, classes)
    else:
        whole = stored(data, limit, classes)
        train_on, test_on = Part(whole, test=False), Part(whole, test=True)
    with progress("extracting features", None) as advance:
        result = evaluate_linear_probe(
            network,
            train_on,
            test_on,
            features=features or FEATURES,
            batch_size=batch_size,
            progress=advance,
        )
    show([("linear-probe", result)], saving, json)


@app.command(epilog="Example: qlip eval compare a/reconstruction.json b/reconstruction.json")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B.json", show_default=False)],
    json: Json = False,
) -> None:
    """Show two results side by side.

    If they were measured differently, say what differs instead.
    """
    from qlip_core.evaluation import Result
    from qlip_core.evaluation import compare as compared
    from qlip_core.evaluation.protocol import score_text

    a, b = Result.load(first), Result.load(second)
    rows = compared(a, b)
    if json:
        print_json(
            {
                "a": a.protocol.to_dict(),
                "b": b.protocol.to_dict(),
                "scores": {name: [x, y] for name, x, y in rows},
            }
        )
        return
    print_table(
        [(name, score_text(name, x), score_text(name, y)) for name, x, y in rows],
        ("score", str(first), str(second)),
    )
