"""`qlip train`: trains models from recipes, on a backend that can train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip_cli.options import Force, Json, quiet_hub
from qlip_cli.outputs import refuse_stdout
from qlip_cli.terminal import note, print_facts, print_json, print_line

if TYPE_CHECKING:
    from qlip_core.training import Trainer

DRY = "dry run: everything was built, nothing trained"
GENERATOR, BALANCE, EXPORT = "generator", "balance", "export"
STORED = ("float32", "bfloat16", "float16")


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[generator|balance|export] [RECIPE|RUN]", show_default=False, hidden=True
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="1|2|all",
            show_default=False,
            help="Which stage (default: all; with --resume, as the run was started).",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            show_default=False,
            help="Shards, folder or parquet to train on instead of the recipe's; may be repeated. "
            "For a generator also token shards.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Run folder (default: runs/RECIPE)."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in DIR.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Steps of each stage.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: stage1.batch=128."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and build everything; train nothing.")
    ] = False,
    backend: Annotated[
        str, typer.Option("--backend", "-b", metavar="NAME", help="Only torch trains.")
    ] = "torch",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="Of an export: float32, bfloat16 or float16.")
    ] = "float32",
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a tokenizer, or a generator for one.

    RECIPE is the name of a bundled recipe or the path of any. `qlip train` alone trains the small emoji model,
    both stages, in about ten minutes on two cores.
    `qlip train generator` trains text to image over a tokenizer (--set tokenizer=DIR), from captioned
    images or from token shards (--data, made by `qlip tokenize`); `qlip generate --generator` draws with it.
    `qlip train balance RECIPE` finds the weights of the two objectives; `qlip train export RUN -o DIR`
    writes a run's newest checkpoint as a model (--dtype says how it is stored). For several devices:
    `torchrun --nproc-per-node 8 -m qlip_cli train RECIPE`.
    """
    from qlip_core.errors import RecipeError
    from qlip_core.training import get_trainer

    quiet_hub()
    if out is not None:
        refuse_stdout(out, "name a folder with -o")
    trainer = get_trainer(backend)
    mode, rest = "", list(words or [])
    if rest and rest[0] in (GENERATOR, BALANCE, EXPORT):
        mode = rest.pop(0)
    if len(rest) > 1:
        raise typer.BadParameter(f"one recipe at a time, got {' '.join(rest)}")
    if mode == EXPORT:
        for option, given in (
            ("--stage", stage is not None),
            ("--data", bool(data)),
            ("--resume", resume),
            ("--steps", steps is not None),
            ("--set", bool(changes)),
            ("--dry-run", dry_run),
        ):
            if given:
                raise typer.BadParameter(f"{option} is for training, not for `qlip train export`")
        if dtype not in STORED:
            raise typer.BadParameter(f'--dtype "{dtype}": models are stored in {", ".join(STORED)}')
        return _export(trainer, rest, out, dtype, force, json)
    if dtype != "float32" or force:
        raise typer.BadParameter("--dtype and --force are for `qlip train export`")
    if mode in (GENERATOR, BALANCE) and stage is not None:
        why = {GENERATOR: "a generator has one", BALANCE: "the probes are of stage 1"}[mode]
        raise typer.BadParameter(f"--stage is for the tokenizer's training: {why}")
    recipe = rest[0] if rest else None
    if recipe == "":
        raise typer.BadParameter("the recipe's name is empty")
    default = "generator-emoji" if mode == GENERATOR else "emoji"
    sources = _generator_sources(data) if mode == GENERATOR else _sources(data)
    settings = [*(changes or []), *sources]
    name = recipe or default
    run = out or Path("runs") / (Path(name).stem + ("-balance" if mode == BALANCE else ""))
    how: Any = {"out": run, "resume": resume, "steps": steps, "dry_run": dry_run}
    if mode == BALANCE:
        return _print_balance(trainer.balance(name, settings, **how), json)
    if resume and recipe is None:
        if settings:
            raise RecipeError("a run is resumed with its own recipe: leave out --set and --data")
    else:
        recipe = name
    if mode == GENERATOR:
        made = trainer.train_generator(recipe, settings, **how)
        return _print_result(made, [made["generator"], made["report"]], json, dry_run)
    result = trainer.train(recipe, settings, stage=stage, **how)
    _print_result(result, [*result["models"].values(), result["report"]], json, dry_run)


def _export(
    trainer: Trainer, words: list[str], out: Path | None, dtype: str, force: bool, json: bool
) -> None:
    from qlip_core.errors import RecipeError

    if not words:
        raise typer.BadParameter("export needs the run folder to export")
    folder = out or Path(f"{Path(words[0]).name}-model")
    if folder.exists() and not force:
        raise RecipeError(f"{folder}: already exists; name another with -o, or overwrite: --force")
    written = trainer.export(Path(words[0]), folder, dtype=dtype)
    if json:
        print_json({"output": str(written)})
    else:
        print_line(str(written))


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
