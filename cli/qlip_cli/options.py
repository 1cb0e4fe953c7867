"""Options that several commands share, and the loading of the model they name.

qlip_core is imported inside functions here and in every command, so that help needs no numpy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qlip_core import Model

Images = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE", hidden=True),
]
Shards = Annotated[
    str,
    typer.Argument(
        metavar="SHARDS",
        show_default=False,
        help="Tars, parquet or a folder, local or by URL; {000..099} and * stand for many.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        show_default=False,
        help="Folder, .safetensors file or hub id (default: bundled, the model that comes with qlip).",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default=False,
        help="Branch, tag or commit of a hub id.",
    ),
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        help="auto, torch, mlx or numpy.",
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="One that `qlip doctor` lists."),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="TYPE",
        help="float32, bfloat16, float16; mlx also int8, int4.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Images at a time."),
]
Force = Annotated[
    bool,
    typer.Option("--force", "-f", help="Overwrite what exists."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document."),
]

# -- of drawing from text ----------------------------------------------------------------------

Number = Annotated[
    int, typer.Option("-n", "--number", metavar="N", min=1, help="Pictures of each prompt.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="The same seed draws the same picture.")]
CfgScale = Annotated[
    float | None,
    typer.Option(
        metavar="S", show_default=False, help="Strength of guidance by the prompt; 1: none."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T", show_default=False, help="Randomness; 0: always the likeliest token."
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(metavar="K", show_default=False, help="Choose among the K likeliest; 0: all."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        show_default=False,
        help="Choose among the likeliest whose chances sum to P; 1: all.",
    ),
]
CfgSchedule = Annotated[
    str | None, typer.Option(metavar="NAME", show_default=False, help="constant or linear.")
]
CfgInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="A B", show_default=False, help="Guide only from share A to share B of the tokens."
    ),
]
GeneratorFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        show_default=False,
        help="A generator, or a model that has one (default: the model's own).",
    ),
]


def output(what: str) -> typer.models.OptionInfo:
    """`-o OUT`, described by each command in its own words."""
    return typer.Option("--output", "-o", metavar="OUT", show_default=False, help=what)


def load_model(
    model: str | None,
    revision: str | None,
    backend: str,
    device: str,
    dtype: str,
    generator: Path | None = None,
) -> Model:
    """`qlip_core.load`, without the hub's progress bars if stderr is not a terminal."""
    quiet_hub()
    import qlip_core

    return qlip_core.load(
        model, backend=backend, device=device, dtype=dtype, revision=revision, generator=generator
    )


def quiet_hub() -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
