"""`qlip eval generate`: how good the pictures are that a model draws from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip_cli import options
from qlip_cli.generate import cuts_as_notes, facts_of, settings_of
from qlip_cli.inputs import read_entries
from qlip_cli.options import BackendName, BatchSize, Device, Dtype, Force, Json, Revision
from qlip_cli.outputs import output_path, picture_file, save_picture, writing
from qlip_cli.provenance import text_chunks
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
from qlip_cli.terminal import note, progress

if TYPE_CHECKING:
    from qlip_core import Model
    from qlip_core.evaluation import Examples, PromptSet, RealPictures, Result
    from qlip_core.evaluation.clip_score import Towers
    from qlip_core.evaluation.reconstruction import Features

_EMOJI_PROMPTS = ("seen", "seen-names", "combinations")
_SHEET = 400  # pictures on a sheet; more would be too large to view, and take much memory


def evaluate_generate(
    model: ModelArgument = "bundled",
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            show_default=False,
            help='Real pictures for gFID, whose captions are the prompts (default: "emoji").',
        ),
    ] = EMOJI,
    generator: options.GeneratorFolder = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Prompts, one a line; prompt<TAB>name also says what should be in the picture.",
        ),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Names to choose among, one a line (default: those in the prompts).",
        ),
    ] = None,
    number: options.Number = 1,
    seed: options.Seed = 0,
    cfg_scale: options.CfgScale = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    cfg_schedule: options.CfgSchedule = None,
    cfg_interval: options.CfgInterval = None,
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default=False,
            help="QLIP or CLIP that computes CLIPScore (default: the model itself, which flatters it).",
        ),
    ] = None,
    inception: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help='Also gFID: safetensors of FID\'s Inception-V3, or "random" (not FID).',
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="OUT.png", show_default=False, help=f"Sheet of the first {_SHEET} pictures."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="Use the first N prompts and N real pictures only.",
        ),
    ] = None,
    out: Out = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 8,
    force: Force = False,
    json: Json = False,
) -> None:
    """Text to image: CLIPScore, prompt accuracy; with --inception gFID.

    CLIPScore is the mean cosine of picture and prompt, negative ones counting 0. Prompt accuracy is the
    share of pictures in which the model's own zero-shot classifier finds the thing that the prompt names.
    By default there are three results: 100 names of trained things on backgrounds, the names alone,
    and combinations of name and background never trained.
    """
    own = prompts is None and data == EMOJI
    files = ["generation"] if not own else [f"generation-{kind}" for kind in _EMOJI_PROMPTS]
    saving = Saving(out, files, force)
    sheet = None
    if grid is not None:
        path = output_path(grid, f"sheet-{seed}.png")
        sheet = picture_file(path, [], force=force, option="--grid", made=out)
    among = read_entries(names) if names is not None else []
    from qlip_core.errors import DataError
    from qlip_core.evaluation import emoji, evaluate_generation, read_prompts
    from qlip_core.evaluation.prompts import captions_of
    from qlip_core.generator.sampling import check_seed

    check_seed(seed)
    if names is not None and prompts is None:
        raise DataError(
            "--names goes with --prompts: captions name nothing, emoji prompts have 100 names"
        )
    if names is not None and not among:
        raise DataError(f"{names}: no names in it")
    sets: list[PromptSet] = [] if prompts is None else [read_prompts(prompts, among)]
    network = options.load_model(model, revision, backend, device, dtype, generator)
    sampling = settings_of(
        network, temperature, top_k, top_p, cfg_scale, cfg_schedule, cfg_interval
    )
    if own:
        sets = [emoji.seen_prompts(), emoji.seen_name_prompts(), emoji.combination_prompts()]
    elif prompts is None:
        sets = [captions_of(stored(data, limit))]
    sets = [each.first(limit) for each in sets]

    where = torch_device(network)
    towers = None if clip is None else _towers(clip, backend, device, where)
    _, features = metrics_of(None, inception, where)
    real = None if features is None else _real(network, data, limit, features, batch_size)
    results: list[tuple[str, Result]] = []
    left = _SHEET if sheet is not None else 0
    for name, each in zip(files, sets):
        count = number * len(each.prompts)
        with progress("drawing", count) as advance, cuts_as_notes():
            result = evaluate_generation(
                network,
                each,
                sampling=sampling,
                seed=seed,
                n=number,
                towers=towers,
                real=real,
                batch_size=batch_size,
                shown=left,
                progress=advance,
            )
        results.append((name, result))
        left = max(0, left - count)
    if sheet is not None:
        facts = facts_of(network, seed, sampling)
        with writing(sheet):
            sheet.parent.mkdir(parents=True, exist_ok=True)
        _save_sheet(sheet, [each for _, each in results], facts)
    show(results, saving, json, [] if sheet is None else [sheet])


def _towers(source: str, backend: str, device: str, torch_device: str) -> Towers:
    """What computes CLIPScore: a QLIP, on the backend of the one that draws, or a CLIP, which needs torch."""
    from qlip_core.evaluation.clip_score import QlipTowers, is_plain_clip

    if not is_plain_clip(source):
        return QlipTowers(options.load_model(source, None, backend, device, "float32"))
    from qlip_core.evaluation.learned import learned_metrics

    options.quiet_hub()
    needs = f"{source}: a CLIP that is not a QLIP needs torch and transformers"
    return learned_metrics(needs, "t5").clip(source, torch_device)


def _real(
    network: Model, data: str, limit: int | None, features: Features, batch_size: int
) -> RealPictures:
    """The real pictures for gFID: those of DATA, or held-out emoji scenes."""
    from qlip_core.evaluation import emoji, real_pictures

    if data == EMOJI:
        size, count = network.config.image_size, limit or emoji.HELD_OUT
        examples: Examples = emoji.reconstruction_examples(size, count)
    else:
        examples = stored(data, limit)
    with progress("reading real pictures", count_of(examples)) as advance:
        return real_pictures(network, examples, features, batch_size=batch_size, progress=advance)


def _save_sheet(path: Path, results: Sequence[Result], facts: dict[str, Any]) -> None:
    """Save the results' grids one below the other, with a record of how they were drawn for `qlip info`."""
    import numpy as np

    grids = [result.grid for result in results if result.grid is not None]
    width = max(grid.shape[1] for grid in grids)
    rows = [
        np.pad(grid, ((0, 0), (0, width - grid.shape[1]), (0, 0)), constant_values=255)
        for grid in grids
    ]
    prompts = [each["prompt"] for result in results for each in result.details["pictures"]]
    if len(prompts) > _SHEET:
        note(f"{path}: the first {_SHEET} of {len(prompts):,} pictures")
    record = {"prompts": prompts[:_SHEET]} | facts
    save_picture(path, np.concatenate(rows), text_chunks(record))
