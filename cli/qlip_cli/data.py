"""`qlip data`: the emoji set as shards, and a look through any set before training on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlip_cli.options import Force, Json
from qlip_cli.terminal import note, print_facts, print_json, print_line, progress, size_text

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make and check sets of captioned pictures.",
    epilog="Example: qlip data emoji shards --count 10000",
)


@app.command(epilog="Example: qlip data emoji held-out --split held-out --count 1000")
def emoji(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", show_default=False, help="Folder for the shards.")
    ],
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures.")] = 10_000,
    size: Annotated[int, typer.Option(metavar="PX", help="Side of a picture.")] = 64,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Same seed, same pictures.")] = 0,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="train, held-out, combinations or unseen.")
    ] = "train",
    plain: Annotated[
        bool, typer.Option("--plain", help="One large glyph on a plain background each.")
    ] = False,
    shard_size: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures a shard.")] = 1000,
    font: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Colour-emoji font (default: the first one found)."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Render captioned emoji pictures as WebDataset tars.

    Splits: "train"; "held-out", renderings that training never sees; "combinations" of glyph, background
    and place that training never sees; "unseen", glyphs and names that training never sees.
    """
    from typing import get_args

    from qlip_core.data.emoji_set import Split
    from qlip_core.data.emoji_shards import write_shards
    from qlip_core.errors import DataError

    splits: dict[str, Split] = {name: name for name in get_args(Split)}
    if split not in splits:
        raise DataError(f"--split {split!r}: must be one of {', '.join(splits)}")
    with progress("rendering", count) as advance:
        about = write_shards(
            out,
            count,
            size=size,
            seed=seed,
            split=splits[split],
            plain=plain,
            shard_size=shard_size,
            font=font,
            force=force,
            progress=lambda done: advance(1),
        )
    if json:
        print_json({"output": str(out), **about})
        return
    stored = sum((out / name).stat().st_size for name in about["shards"])
    kind = "plain pictures" if plain else "pictures"
    print_facts(
        [
            ("set", f"{count:,} {kind} of {size}x{size}, split {split}, seed {seed}"),
            ("shards", f"{len(about['shards'])}, {size_text(stored)}"),
            ("font", f"{about['font']['file']} ({about['font']['licence']})"),
            ("output", str(out)),
        ]
    )


@app.command(epilog="Example: qlip data check 'shards/{00000..00099}.tar'")
def check(
    shards: Annotated[
        str,
        typer.Argument(
            metavar="SHARDS",
            show_default=False,
            help="Tars, parquet or a folder, local or by URL; {000..099} and * stand for many.",
        ),
    ],
    json: Json = False,
) -> None:
    """Read a set through as training would: counts, sizes, caption lengths, what is broken.

    The exit status is 1 if anything is broken, or there is no sample.
    """
    from qlip_core.data.check import check as check_set

    with progress("checking", None) as advance:
        report = check_set(shards, progress=lambda done: advance(1))
    if json:
        print_json(report.to_dict())
    else:
        for line in report.lines():
            print_line(line)
    if report.broken.total and json:
        note(f"{report.broken.total} of {report.samples} samples are broken")
    raise typer.Exit(1 if report.broken.total or not report.samples else 0)
