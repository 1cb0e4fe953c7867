"""`qlip data`: the emoji set as shards, and a look through any set before training on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from qlip_cli.options import Force, Json, Shards
from qlip_cli.outputs import refuse_stdout
from qlip_cli.terminal import note, print_facts, print_json, print_line, progress, size_text

if TYPE_CHECKING:
    from qlip_core.data.check import Report

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
    shard_size: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures per shard.")] = 1000,
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
    from qlip_core.data.emoji_set import Split
    from qlip_core.data.emoji_shards import write_shards
    from qlip_core.errors import DataError

    refuse_stdout(out, "name a folder")
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
            progress=advance,
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
    shards: Shards,
    json: Json = False,
) -> None:
    """Read a set as training would, and say what is in it.

    Reports counts, sizes, caption lengths and what is broken. The exit status is 1 if anything is broken, or
    there is no sample.
    """
    from qlip_core.data.check import check as check_set

    with progress("checking", None) as advance:
        report = check_set(shards, progress=advance)
    if json:
        print_json(report.to_dict())
    else:
        for line in report_lines(report):
            print_line(line)
    if report.broken.total and json:
        note(f"{report.broken.total} of {report.samples} samples are broken")
    raise typer.Exit(1 if report.broken.total or not report.samples else 0)


def report_lines(report: Report) -> list[str]:
    """The report as text, one fact per line."""
    from qlip_core.data.check import MAX_KEYS

    shards = "" if report.shards is None else f" in {_many(report.shards, 'shard')}"
    out = [
        f"{report.location}: {report.kind}{shards}",
        f"samples     {report.samples}, good {report.good}, broken {report.broken.total}",
        f"images      {size_text(report.image_bytes)}, "
        + (", ".join(f"{k} {n}" for k, n in report.formats.most_common()) or "none"),
    ]
    for name, histogram, unit in (
        ("width", report.width, "px"),
        ("height", report.height, "px"),
        ("captions", report.caption_characters, "characters"),
        ("", report.caption_words, "words"),
    ):
        if found := histogram.to_dict():
            out.append(
                f"{name:<11} {found['min']} to {found['max']} {unit}, median {found['median']}"
            )
    full = report.keys_checked == MAX_KEYS
    within = f" (against the first {MAX_KEYS} keys)" if full else ""
    named = f": {', '.join(report.duplicate_examples)}" if report.duplicates else ""
    out.append(f"duplicates  {_many(report.duplicates, 'key')} seen before{within}{named}")
    for reason, count in sorted(report.broken.counts.items(), key=lambda item: -item[1]):
        out.append(f"broken      {reason}: {count}")
    out += [f"  {name}" for name in report.broken.named]
    unnamed = report.broken.total - len(report.broken.named)
    if unnamed:
        out.append(f"  and {unnamed} more")
    return out


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")
