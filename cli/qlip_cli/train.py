"""`qlip train`: trains models from recipes, on a backend that can train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from qlip_cli.options import Force, Json, quiet_hub
from qlip_cli.outputs import refuse_stdout
from qlip_cli.terminal import note, print_facts, print_json, print_line

if TYPE_CHECKING:
    from qlip_core.training import Trainer

DRY = "dry run: everything was built, nothing trained"
STORED = ("float32", "bfloat16", "float16")

Recipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE", show_default=False, help="Name of a bundled recipe, or the path of any."
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE",
        show_default=False,
        help="Shards, folder or parquet to train on instead of the recipe's; may be repeated.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="DIR", show_default=False, help="Run folder (default: runs/RECIPE)."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the newest checkpoint in DIR.")
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", min=1, show_default=False, help="Steps, of each stage.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        show_default=False,
        help="Change the recipe: stage1.batch=128.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and build everything; train nothing.")
]
TrainerName = Annotated[
    str, typer.Option("--backend", "-b", metavar="NAME", help="Only torch trains.")
]


class TokenizerByDefault(TyperGroup):
    """`qlip train RECIPE` is `qlip train tokenizer RECIPE`, and the group's help begins with that command's."""

    default = "tokenizer"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and args[0] in {*self.commands, *ctx.help_option_names}
        return super().parse_args(ctx, args if named else [self.default, *args])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        command = self.commands[self.default]
        command.format_usage(ctx, formatter)
        command.format_help_text(ctx, formatter)
        command.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)
        command.format_epilog(ctx, formatter)


app = typer.Typer(
    cls=TokenizerByDefault,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a tokenizer, or a generator for one.",
)


@app.command(epilog="Example: qlip train emoji --out runs/mine --steps 200")
def tokenizer(
    recipe: Recipe = None,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="1|2|all",
            show_default=False,
            help="Which stage (default: all; with --resume, as the run was started).",
        ),
    ] = None,
    data: Data = None,
    out: Out = None,
    resume: Resume = False,
    steps: Steps = None,
    changes: Changes = None,
    dry_run: DryRun = False,
    backend: TrainerName = "torch",
    json: Json = False,
) -> None:
    """Train a tokenizer, as `qlip train` alone does.

    Without a recipe it is the small emoji model, both stages, in about ten minutes on two cores.
    For several devices: `torchrun --nproc-per-node 8 -m qlip_cli train RECIPE`.
    """
    if recipe in ("tokenizer", "generator", "balance", "export"):
        raise typer.BadParameter(f"name it before the options: qlip train {recipe}")
    trainer = _trainer(backend, out)
    recipe, run, settings = _request(
        recipe, "emoji", out, resume, [*(changes or []), *_sources(data)]
    )
    result = trainer.train(
        recipe, settings, stage=stage, out=run, resume=resume, steps=steps, dry_run=dry_run
    )
    _print_result(result, [*result["models"].values(), result["report"]], json, dry_run)


@app.command(epilog="Example: qlip train generator --set tokenizer=runs/mine/stage2/model")
def generator(
    recipe: Recipe = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            show_default=False,
            help="Captioned images to train on instead of the recipe's, may be repeated; or token shards, "
            "made by `qlip tokenize`.",
        ),
    ] = None,
    out: Out = None,
    resume: Resume = False,
    steps: Steps = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            show_default=False,
            help="Change the recipe: tokenizer=DIR.",
        ),
    ] = None,
    dry_run: DryRun = False,
    backend: TrainerName = "torch",
    json: Json = False,
) -> None:
    """Train text to image over a tokenizer's tokens.

    `qlip generate --generator DIR` draws with it. Without a recipe it is the bundled one's, for the
    bundled tokenizer: minutes on a GPU.
    """
    trainer = _trainer(backend, out)
    settings = [*(changes or []), *_generator_sources(data)]
    recipe, run, settings = _request(recipe, "generator-emoji", out, resume, settings)
    made = trainer.train_generator(
        recipe, settings, out=run, resume=resume, steps=steps, dry_run=dry_run
    )
    _print_result(made, [made["generator"], made["report"]], json, dry_run)


@app.command(epilog="Example: qlip train balance qlip-b-16-256 --steps 500")
def balance(
    recipe: Recipe = None,
    data: Data = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            show_default=False,
            help="Folder of both runs (default: runs/RECIPE-balance).",
        ),
    ] = None,
    resume: Resume = False,
    steps: Steps = None,
    changes: Changes = None,
    dry_run: DryRun = False,
    backend: TrainerName = "torch",
    json: Json = False,
) -> None:
    """Find the weights of the two objectives.

    Stage 1 is run twice, each time for one of the objectives; a_r / a_a is taken from their final losses.
    """
    trainer = _trainer(backend, out)
    name = _name(recipe, "emoji")
    run = out or Path("runs") / f"{Path(name).stem}-balance"
    found = trainer.balance(
        name,
        [*(changes or []), *_sources(data)],
        out=run,
        resume=resume,
        steps=steps,
        dry_run=dry_run,
    )
    _print_balance(found, json)


@app.command(epilog="Example: qlip train export runs/mine -o model --dtype bfloat16")
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", show_default=False, help="Folder of a run.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", show_default=False, help="Model (default: RUN-model)."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="Stored as float32, bfloat16 or float16.")
    ] = "float32",
    backend: TrainerName = "torch",
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a run's newest checkpoint as a model."""
    from qlip_core.errors import RecipeError

    trainer = _trainer(backend, out)
    if dtype not in STORED:
        raise typer.BadParameter(f'--dtype "{dtype}": models are stored in {", ".join(STORED)}')
    folder = out or Path(f"{Path(os.path.abspath(run)).name}-model")  # "." has no name
    if folder.exists() and not force:
        raise RecipeError(f"{folder}: already exists; name another with -o, or overwrite: --force")
    written = trainer.export(run, folder, dtype=dtype)
    if json:
        print_json({"output": str(written)})
    else:
        print_line(str(written))


def _trainer(backend: str, out: Path | None) -> Trainer:
    from qlip_core.training import get_trainer

    quiet_hub()
    if out is not None:
        refuse_stdout(out, "name a folder with -o")
    return get_trainer(backend)


def _name(recipe: str | None, default: str) -> str:
    if recipe == "":
        raise typer.BadParameter("the recipe's name is empty")
    return recipe or default


def _request(
    recipe: str | None, default: str, out: Path | None, resume: bool, settings: list[str]
) -> tuple[str | None, Path, list[str]]:
    """(recipe, run folder, changes) of a run; recipe None: the resumed run's own."""
    from qlip_core.errors import RecipeError

    name = _name(recipe, default)
    if resume and recipe is None and settings:
        raise RecipeError("a run is resumed with its own recipe: leave out --set and --data")
    run = out or Path("runs") / Path(name).stem
    return (None if resume and recipe is None else name), run, settings


def _print_balance(found: dict[str, Any] | None, json: bool) -> None:
    if not _first():
        return
    if found is None:
        note(DRY)
    elif json:
        print_json(found)
    else:
        print_facts([(k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in found.items()])


def _print_result(
    result: dict[str, Any], paths: list[str | None], json: bool, dry_run: bool
) -> None:
    if not _first():
        return
    if json:
        print_json(result)
    elif dry_run:
        note(DRY)
    else:
        for path in paths:
            if path:
                print_line(path)


def _first() -> bool:
    """Whether this is the process, of those that torchrun started, that prints."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _sources(data: list[str] | None, where: str = "data") -> list[str]:
    """--data as changes to the recipe."""
    from qlip_core.training import toml_string

    if not data:
        return []
    tables = ", ".join(f"{{ location = {toml_string(d)}, weight = 1.0 }}" for d in data)
    return [f"{where}.sources=[{tables}]"]


def _generator_sources(data: list[str] | None) -> list[str]:
    """The same for a generator: one set of token shards, or images."""
    from qlip_core.data.token_shards import is_token_set
    from qlip_core.training import toml_string

    shards = [d for d in data or [] if is_token_set(d)]
    if not shards:
        return [*_sources(data, "data.images"), *(['data.tokens=""'] if data else [])]
    if data != shards[:1]:
        raise typer.BadParameter("--data names token shards: then it is one set, and nothing else")
    return [f"data.tokens={toml_string(shards[0])}"]
