"""`qlip generate`: pictures of prompts."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip_cli import options
from qlip_cli.inputs import read_entries
from qlip_cli.options import BackendName, BatchSize, Device, Dtype, Force, Json, ModelName, Revision
from qlip_cli.outputs import (
    PICTURES,
    PictureFolder,
    decode_into,
    is_folder,
    output_file,
    picture_file,
    save_picture,
    writing,
)
from qlip_cli.provenance import text_chunks
from qlip_cli.terminal import count_text, note, print_json, print_line, progress

if TYPE_CHECKING:
    import numpy as np

    from qlip_core import Model, VisualTokens
    from qlip_core.generator.sampling import Sampling

MOST = 1_000_000  # pictures that one command draws: their tokens and names are kept until the end
_GAP = 2  # white pixels between the pictures of a sheet


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", hidden=True, show_default=False),
    ] = None,
    output: Annotated[
        str | None,
        options.output(
            "Picture for one image, folder for several (default: PROMPT-SEED.png, or generated)."
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
    grid: Annotated[bool, typer.Option("--grid", help="All pictures on one sheet.")] = False,
    save_tokens: Annotated[
        bool, typer.Option("--save-tokens", help="Also write OUT.qlip, for `qlip decode`.")
    ] = False,
    prompts_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one a line; -: from stdin.")
    ] = None,
    generator: options.GeneratorFolder = None,
    model: ModelName = None,
    revision: Revision = None,
    backend: BackendName = "auto",
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 8,
    force: Force = False,
    json: Json = False,
) -> None:
    """Draw pictures from prompts.

    PROMPT is what to draw, in quotes; an empty one draws without a caption. One picture becomes a PNG,
    several a folder of PNGs, or with --grid one sheet. Settings that are not given are the generator's own.
    Each PNG tells how it was drawn: `qlip info PICTURE.png`.
    """
    wanted = collect_prompts(prompts, prompts_file)
    from qlip_core.generator.sampling import check_seed

    check_seed(seed)
    count = number * len(wanted)
    check_count(count, output, grid)
    all_prompts = [prompt for prompt in wanted for _ in range(number)]
    if save_tokens:
        from qlip_core.tokens import names_text

        names_text(all_prompts)  # what cannot be saved is said before any work
    names = picture_names(all_prompts, seed)
    sheet_name = f"{slug(wanted[0]) if len(wanted) == 1 else 'sheet'}-{seed}.png"
    default = names[0] if count == 1 else sheet_name if grid else "generated"
    given = default if output is None else output
    if grid and count > 1 and is_folder(given):
        given = str(Path(given, sheet_name))
    out = Path(given)
    single = (count == 1 or grid) and not is_folder(given)
    picture = picture_file(out, [], force=force) if single else None
    if picture is not None and picture.suffix.lower() != ".png":
        note(f"{picture}: only a PNG keeps the prompt, seed and settings")
    folder = None if single else PictureFolder(out, names, force=force)
    target = picture or out
    tokens_file = token_path(target, force) if save_tokens else None

    network = options.load_model(model, revision, backend, device, dtype, generator)
    sampling = settings_of(
        network, temperature, top_k, top_p, cfg_scale, cfg_schedule, cfg_interval
    )
    if picture is not None and count > 1:
        check_sheet(count, number, network.config.image_size)
    tokens = draw(network, wanted, number, seed, sampling, batch_size)
    facts = facts_of(network, seed, sampling)
    records = [
        {"prompt": prompt, "number": index} | facts
        for prompt, index in zip(tokens.names, numbers_of(tokens.names))
    ]
    if picture is not None and count > 1:
        sheet = sheet_of(network.decode(tokens, batch_size=batch_size), number)
        save_picture(picture, sheet, text_chunks({"prompts": list(tokens.names)} | facts))
    elif picture is not None:
        save_picture(picture, network.decode(tokens)[0], text_chunks(records[0]))
    elif folder is not None:
        with progress("decoding", len(tokens)) as advance:
            decode_into(
                folder, network, [tokens], batch_size, advance, lambda i: text_chunks(records[i])
            )
    if tokens_file is not None:
        with writing(tokens_file):
            tokens.save(tokens_file)

    if json:
        files = [str(picture)] if picture else [str(out / name) for name in names]
        document = {"output": str(target), "files": files, "images": count}
        document["tokens"] = str(tokens_file) if tokens_file else None
        print_json(document | {"drawn": records})
    else:
        side = network.config.image_size
        print_line(f"{target}: {count_text(count, 'picture')}, {side}x{side} pixels, seed {seed}")
        if tokens_file is not None:
            print_line(f"{tokens_file}: their tokens")


def collect_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file. Raises TextError if there are none."""
    from qlip_core.errors import TextError

    lines = [] if file is None else read_entries(file)
    if file is not None and not lines:
        raise TextError(f"{file}: no prompts in it; write one on each line")
    prompts = [*(given or []), *lines]
    if not prompts:
        raise TextError(
            'no prompts: give some, as in `qlip generate "a cat"`, or --prompts-file FILE '
            '(an empty one, "", draws without a prompt)'
        )
    return prompts


def picture_names(prompts: list[str], seed: int) -> list[str]:
    """a-cat-0.png for seed 0; with several pictures of a prompt a-cat-0-1.png, a-cat-0-2.png, ...; all
    different."""
    stems = [f"{slug(prompt)}-{seed}" for prompt in prompts]
    counts = Counter(stems)
    # Taken by the one picture of a prompt: "a cat 1" has the name that a second "a cat" would get.
    taken = {stem for stem, count in counts.items() if count == 1}
    so_far: Counter[str] = Counter()
    out = []
    for stem in stems:
        name = stem
        if counts[stem] > 1:
            while name == stem or name in taken:
                so_far[stem] += 1
                name = f"{stem}-{so_far[stem]}"
            taken.add(name)
        out.append(f"{name}.png")
    return out


def check_count(count: int, output: str | None, grid: bool) -> None:
    """Raises GenerationError for more pictures than one command draws, or several into one picture's name."""
    from qlip_core.errors import GenerationError

    if count > MOST:
        raise GenerationError(
            f"{count:,} pictures: one command draws at most {MOST:,}; draw them in parts, each with a seed "
            "of its own"
        )
    if output is None or count == 1 or grid or is_folder(output):
        return
    if Path(output).suffix.lower() in PICTURES:
        raise GenerationError(
            f"{output}: is the name of one picture, and these are {count}: name a folder, or add --grid "
            "for one sheet"
        )


def slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60]
    while len(words.encode()) > 60:
        words = words[:-1]
    return words.strip("-_") or "picture"


def token_path(target: Path, force: bool) -> Path:
    """Where the tokens of a picture or a folder go: beside it, with the suffix .qlip."""
    from qlip_core.errors import QlipError

    target = target.resolve() if not target.name or target.name == ".." else target
    if not target.name:
        raise QlipError(
            f"{target}: tokens go beside the pictures' folder, and this one has no place beside it; name "
            "another with -o"
        )
    stem = target.stem if target.suffix.lower() in PICTURES else target.name
    return output_file(target.with_name(f"{stem}.qlip"), "", force=force)


def settings_of(
    network: Model,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    cfg_scale: float | None,
    cfg_schedule: str | None,
    cfg_interval: tuple[float, float] | None,
) -> Sampling:
    """The generator's settings, with those of the command line instead, checked before any work."""
    from qlip_core.generator.generate import merged

    config = network.generator_config
    sampling = merged(
        config.sampling,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        cfg_scale=cfg_scale,
        cfg_schedule=cfg_schedule,
        cfg_interval=cfg_interval,
    )
    sampling.check(config.visual_vocab_size)
    return sampling


def draw(
    network: Model, prompts: list[str], number: int, seed: int, sampling: Sampling, batch_size: int
) -> VisualTokens:
    """All tokens, with a bar that counts them, and a note for every prompt that was cut."""
    from qlip_core import VisualTokens

    note_untrained_words(network, prompts)
    steps = network.generator_config.tokens_per_image
    with progress("drawing", number * len(prompts) * steps) as advance, cuts_as_notes():
        batches = network.generate_batches(
            prompts, sampling, seed=seed, n=number, batch_size=batch_size, progress=advance
        )
        return VisualTokens.concatenate([tokens for _, tokens in batches])


def note_untrained_words(network: Model, prompts: list[str]) -> None:
    """The bundled generator draws something for any word, but only what it was trained on as meant."""
    from qlip_core.generator.load import require_generator
    from qlip_core.hub import BUNDLED

    if require_generator(network.checkpoint, network.generator).folder.parent != BUNDLED:
        return
    from qlip_core.data.captions import untrained_words

    if words := untrained_words(prompts):
        more = f" and {len(words) - 5} more" if len(words) > 5 else ""
        note(
            f"warning: the bundled model was never trained on {', '.join(words[:5])}{more}: it knows English names "
            "of emoji, colours and places"
        )


@contextmanager
def cuts_as_notes() -> Iterator[None]:
    """Turns the core's warnings of cut prompts into notes, one line each, as they come."""
    from qlip_core.generator.generate import PromptCut

    with warnings.catch_warnings():
        warnings.simplefilter("always", PromptCut)
        show = warnings.showwarning

        def show_as_note(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, PromptCut):
                note(f"warning: {message}")
            else:
                show(message, category, *where)

        warnings.showwarning = show_as_note
        yield


def facts_of(network: Model, seed: int, sampling: Sampling) -> dict[str, Any]:
    """What a picture follows from, besides its prompt and its number."""
    import qlip_core
    from qlip_core.generator.checkpoint import FOLDER
    from qlip_core.generator.load import require_generator
    from qlip_core.hub import model_name

    generator = require_generator(network.checkpoint, network.generator)
    folder = generator.folder.absolute()  # in a model's, it is called by the model
    of_model = folder.parent if folder.name == FOLDER else folder
    return {
        "seed": seed,
        "settings": sampling.to_dict(),
        "model": model_name(network.checkpoint.folder),
        "fingerprint": network.fingerprint,
        "generator": model_name(of_model),
        "generator_fingerprint": generator.fingerprint,
        "backend": network.backend,
        "device": network.device,
        "dtype": network.dtype,
        "qlip": qlip_core.__version__,
    }


def numbers_of(prompts: tuple[str, ...]) -> Iterator[int]:
    """The number of each picture among those of its prompt, from 0."""
    so_far: dict[str, int] = {}
    for prompt in prompts:
        yield so_far.setdefault(prompt, 0)
        so_far[prompt] += 1


def sheet_size(count: int, number: int, side: int) -> tuple[int, int, int]:
    """(columns, width, height): a row for each prompt, or, with one picture a prompt or one prompt, as near to
    a square as it goes."""
    columns = number if 1 < number < count else math.ceil(math.sqrt(count))
    step = side + _GAP
    return columns, columns * step - _GAP, math.ceil(count / columns) * step - _GAP


def check_sheet(count: int, number: int, side: int) -> None:
    """Raises GenerationError for a sheet that is more than Pillow opens without complaint."""
    from PIL import Image

    from qlip_core.errors import GenerationError

    _, width, height = sheet_size(count, number, side)
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise GenerationError(
            f"--grid: {count:,} pictures make a sheet of {width:,}x{height:,} pixels, and a sheet has at most "
            f"{most:,}: draw fewer on it, or leave out --grid for a folder"
        )


def sheet_of(pictures: np.ndarray, number: int) -> np.ndarray:
    """Pictures uint8 [B, S, S, 3] on one sheet, laid out by `sheet_size`."""
    import numpy as np

    count, side = pictures.shape[:2]
    columns, width, height = sheet_size(count, number, side)
    step = side + _GAP
    sheet = np.full((height, width, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * step, i % columns * step
        sheet[y : y + side, x : x + side] = picture
    return sheet
