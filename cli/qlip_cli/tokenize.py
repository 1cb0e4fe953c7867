"""`qlip tokenize`: a whole set of captioned pictures to token shards, by any number of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip_cli import options
from qlip_cli.options import (
    BackendName,
    BatchSize,
    Device,
    Dtype,
    Force,
    Json,
    ModelName,
    Revision,
    Shards,
)
from qlip_cli.outputs import check_folder
from qlip_cli.terminal import count_text, note, print_facts, print_json, progress, size_text

if TYPE_CHECKING:
    from qlip_core.data.tokenizing import Report

_SHOWN = 20  # bad samples named on the terminal


def tokenize(
    shards: Shards,
    output: Annotated[
        Path, options.output("Folder for the token shards, one for each input shard.")
    ],
    no_captions: Annotated[
        bool,
        typer.Option(
            "--no-captions", help="Also take pictures without a caption, with an empty one."
        ),
    ] = False,
    augmentation: Annotated[
        str,
        typer.Option(metavar="NAME", help="none, or flip: also the mirror image of each picture."),
    ] = "none",
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Number of this process among --world-size, from 0 (default: torchrun's).",
        ),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Number of processes that share the work, on any machines.",
        ),
    ] = None,
    shard_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images per shard when SHARDS is a folder.")
    ] = 10_000,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="Threads that decode images (default: one more than the cores, at most 16).",
        ),
    ] = None,
    model: ModelName = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 32,
    force: Force = False,
    json: Json = False,
) -> None:
    """Tokenize a set of captioned pictures, once, to train on.

    Existing shards are left as they are: after an interruption, run the same command again.
    Samples that cannot be used are left out, listed and counted, and the exit status is 1 (under torchrun
    0, since any other would make it stop the other processes).
    """
    own_rank, processes = place(rank, world_size, os.environ)
    check_folder(output)

    from qlip_core.data.samples import Limits
    from qlip_core.data.shards import open_source
    from qlip_core.data.tokenizing import tokenize as tokenize_set

    source = open_source(shards, Limits(caption=not no_captions))
    network = options.load_model(model, revision, backend, own_device(backend, device), dtype)
    start = time.perf_counter()
    with progress("tokenizing", None) as advance:
        report = tokenize_set(
            network,
            source,
            output,
            augmentation=augmentation,
            rank=own_rank,
            world_size=processes,
            batch_size=batch_size,
            shard_size=shard_size,
            workers=workers,
            force=force,
            progress=advance,
        )
    seconds = time.perf_counter() - start
    if processes == 1:
        check_some_good(report)
    if json:
        print_json(document(report, output, own_rank, processes, seconds))
    else:
        print_facts(facts(report, output, own_rank, processes, seconds))
    list_skipped(report)
    raise typer.Exit(exit_code(report))


def place(
    rank: int | None, world_size: int | None, environment: Mapping[str, str]
) -> tuple[int, int]:
    """(rank, world size): from the options, else from torchrun, else alone."""
    from qlip_core.errors import QlipError

    if (rank is None) != (world_size is None):
        missing = "--rank" if rank is None else "--world-size"
        raise QlipError(f"{missing} is missing: name --rank and --world-size together")
    if rank is None or world_size is None:
        given = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if not all(text.isdigit() for text in given):
            raise QlipError(f"RANK={given[0]!r} and WORLD_SIZE={given[1]!r}: expected two numbers")
        rank, world_size = int(given[0]), int(given[1])
    if world_size < 1:
        raise QlipError(f"a world size of {world_size}: at least 1 process does the work")
    if not 0 <= rank < world_size:
        raise QlipError(f"rank {rank} of {world_size}: ranks run from 0 to {world_size - 1}")
    return rank, world_size


def own_device(backend: str, device: str) -> str:
    """With "auto", a separate GPU for each of several processes that torchrun started here."""
    local = os.environ.get("LOCAL_RANK", "")
    if device != "auto" or not local.isdigit():
        return device
    from qlip_core import get_backend

    gpus = [name for name in get_backend(backend).devices() if name.startswith("cuda:")]
    return gpus[int(local) % len(gpus)] if gpus else device


# -- reports -----------------------------------------------------------------------------------


def check_some_good(report: Report) -> None:
    """Raises DataError if no sample could be used."""
    from qlip_core.data.samples import NO_CAPTION
    from qlip_core.errors import DataError

    if report.images:
        return
    if report.failed and not report.skipped.total:
        raise DataError(report.failed[0])
    if report.skipped.total:
        for line in report.skipped.named[:_SHOWN]:
            note(f"  {line}")
        advice = "`qlip data check` shows what is in the set"
        if NO_CAPTION in report.skipped.counts:
            # Existing shards are left as they are, so the option alone would change nothing.
            advice = "--no-captions --force takes pictures without a caption"
        raise DataError(
            f"none of the {report.skipped.total} samples could be used ({reasons(report)}): {advice}"
        )


def reasons(report: Report) -> str:
    """no caption: 3, broken image: 1."""
    counts = sorted(report.skipped.counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason}: {count}" for reason, count in counts)


def document(
    report: Report, out: Path, rank: int, processes: int, seconds: float
) -> dict[str, Any]:
    settings = report.settings
    return {
        "output": str(out),
        "rank": rank,
        "world_size": processes,
        "shards": report.shards,
        "own_shards": report.mine,
        "made_now": report.made,
        "images": report.images,
        "encoded_now": report.encoded,
        "seconds": round(seconds, 3),
        "grid": list(settings.grid),
        "length": settings.length,
        "bytes_per_image": settings.row_bytes,
        "augmentation": settings.augmentation,
        "dtype": settings.dtype,
        "model": settings.model,
        "skipped": report.skipped.to_dict(),
        "failed": list(report.failed),
    }


def facts(
    report: Report, out: Path, rank: int, processes: int, seconds: float
) -> list[tuple[str, str]]:
    settings = report.settings
    h, w = settings.grid
    each = size_text(settings.row_bytes * (2 if settings.flips else 1))
    flips = ", with mirror images" if settings.flips else ""
    kept = report.mine - report.made - len(report.failed)
    shards = f"{count_text(report.made, 'shard')} made" + (
        f", {kept} already there" if kept else ""
    )
    if processes > 1:
        shards += f", of {report.shards} in all (process {rank} of {processes})"
    rows = [
        ("output", str(out)),
        ("shards", shards),
        (
            "images",
            f"{report.images:,}, each {h}x{w} patches of {settings.length} bits, {each}{flips}",
        ),
    ]
    if report.encoded:
        rows.append(("speed", f"{report.encoded / seconds:,.1f} images/s, {seconds:.1f} s"))
    return rows


def list_skipped(report: Report) -> None:
    """List on stderr what could not be used."""
    skipped = report.skipped
    if skipped.total:
        note(
            f"{skipped.total} of {report.images + skipped.total} samples left out ({reasons(report)}):"
        )
        for line in skipped.named[:_SHOWN]:
            note(f"  {line}")
        if skipped.total > _SHOWN:
            note(f"  and {skipped.total - _SHOWN} more, named in the headers of the token shards")
    if report.failed:
        note(
            f"{len(report.failed)} of {report.mine} shards could not be read; run the same command "
            "again to try them again:"
        )
        for line in report.failed:
            note(f"  {line}")


def exit_code(report: Report) -> int:
    """1 if something was left out, but never under torchrun, which would take that for a crash and stop the
    other processes, again at every restart. Readers refuse a set with a missing shard anyway."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return 0
    return 1 if report.failed or report.skipped.total else 0
