"""Shared by the commands of `qlip eval`: their data, and their results on stdout and in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlip_cli.outputs import check_folder, check_free, save_picture, writing
from qlip_cli.terminal import note, print_facts, print_json, print_line

if TYPE_CHECKING:
    from qlip_core import Model
    from qlip_core.evaluation import Examples, Result
    from qlip_core.evaluation.reconstruction import Features, PairMetric

EMOJI = "emoji"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help='Folder, .safetensors file, hub id, or "bundled" (the model that comes with qlip).',
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        show_default=False,
        help="Folder for the results as JSON (and the picture).",
    ),
]


def stored(data: str, limit: int | None, classes: Path | None = None) -> Examples:
    from qlip_core.evaluation import StoredExamples
    from qlip_core.evaluation.examples import read_classes

    return StoredExamples(data, limit, {} if classes is None else read_classes(classes))


def count_of(examples: Examples) -> int | None:
    return getattr(examples, "count", None) or getattr(examples, "limit", None)


def torch_device(network: Model) -> str:
    """Where the learned metrics run: on the model's device if torch runs it."""
    return network.device if network.backend == "torch" else "cpu"


def metrics_of(
    lpips: str | None, inception: str | None, device: str
) -> tuple[PairMetric | None, Features | None]:
    """The requested learned metrics; they need torch, whatever backend runs the model."""
    if lpips is None and inception is None:
        return None, None
    from qlip_core.evaluation.learned import learned_metrics

    torch = learned_metrics("LPIPS and FID need torch")
    return (
        None if lpips is None else torch.lpips(lpips, device),
        None if inception is None else torch.inception(inception, device),
    )


class Saving:
    """The files of `--out`: checked before any work, written at the end."""

    def __init__(
        self, folder: Path | None, names: Sequence[str], force: bool, *, picture: bool = False
    ) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.picture: Path | None = None
        if folder is None:
            return
        check_folder(folder, "--out", parents=True)
        for name in names:
            self.files[name] = folder / f"{name}.json"
        if picture:
            self.picture = folder / f"{names[0]}.png"
        for path in (*self.files.values(), *([self.picture] if self.picture else [])):
            check_free(path, force=force, option="--out")

    def write(self, name: str, result: Result) -> None:
        if self.folder is None:
            return
        import json

        from qlip_core.files import atomic_file

        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n"
        with writing(self.files[name]), atomic_file(self.files[name]) as file:
            file.write(text.encode())
        if self.picture is not None and result.grid is not None:
            save_picture(self.picture, result.grid)


def show(
    results: Sequence[tuple[str, Result]],
    saving: Saving,
    json: bool,
    pictures: Sequence[Path] = (),
) -> None:
    """Print results to stdout, write their files, list broken examples on stderr; exit 1 if there are any."""
    for name, result in results:
        saving.write(name, result)
    if json:
        print_json({"results": [{"name": name} | result.to_dict() for name, result in results]})
    else:
        for number, (_, result) in enumerate(results):
            if number:
                print_line("")
            protocol = result.protocol
            print_line(f"{protocol.task}: {protocol.dataset}")
            print_facts(
                [
                    ("images", f"{protocol.count:,}"),
                    *result.rows(),
                    *_judges(result),
                    ("model", f"{protocol.model_name} ({protocol.model})"),
                    ("run on", f"{protocol.backend}, {protocol.device}, {protocol.dtype}"),
                    *_drawn(result),
                    ("reference", protocol.reference[:16]),
                ],
                indent=2,
            )
        for path in (*saving.files.values(), saving.picture, *pictures):
            if path is not None and path.exists():
                print_line(str(path))
    broken = 0
    for _, result in results:
        counts = result.failed.get("counts", {})
        broken += sum(counts.values())
        for text in result.failed.get("named", []):
            note(f"broken: {text}")
    if broken:
        note(f"{broken} examples could not be used")
    raise typer.Exit(1 if broken else 0)


def _judges(result: Result) -> list[tuple[str, str]]:
    """What scored the drawn pictures, and why any score is missing."""
    judged, left_out = (result.details.get(key, {}) for key in ("judged_by", "left_out"))
    said = [(f"{name} by", str(who)) for name, who in judged.items()]
    return said + [("left out", f"{name}: {why}") for name, why in left_out.items()]


def _drawn(result: Result) -> list[tuple[str, str]]:
    """What drew the pictures and how, if they were drawn."""
    facts, settings = dict(result.protocol.drawn_by), result.protocol.settings
    if not facts:
        return []
    who = f"{facts.pop('generator_name')} ({facts.pop('generator')})"
    how = {"seed": settings["seed"], "of each prompt": settings["pictures_of_each_prompt"]} | facts
    return [("generator", who), ("drawn with", ", ".join(f"{k} {v}" for k, v in how.items()))]
