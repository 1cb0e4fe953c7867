"""`qlip info`: what a model is, what a token file holds, how a picture was drawn."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip_cli import options
from qlip_cli.info_tokens import describe_shard, describe_shards, describe_tokens, tokens_kind
from qlip_cli.options import Device, Json, ModelName, Revision
from qlip_cli.provenance import is_png, read_record
from qlip_cli.terminal import (
    count_text,
    print_facts,
    print_json,
    print_line,
    print_table,
    size_text,
)

if TYPE_CHECKING:
    from qlip_core import Checkpoint, QLIPConfig
    from qlip_core.generator.config import GeneratorConfig

_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def info(
    target: Annotated[
        str | None,
        typer.Argument(metavar="MODEL|GENERATOR|TOKENS|PICTURE.png", hidden=True),
    ] = None,
    model: ModelName = None,
    revision: Revision = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            show_default=False,
            help="Also say how the model runs there.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            show_default=False,
            help="And in which type; for int8 and int4, what stays unquantized.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Describe a model, a token file or how a picture was drawn.

    Also a generator, or a folder of token shards. Without an argument, the model that comes with qlip. No
    weights are loaded unless --backend or --dtype ask how the model runs.
    """
    from qlip_core.errors import QlipError

    if target is not None and model is not None:
        raise QlipError(f"two models named, {target} and --model {model}: name one")
    if target is not None and (describe := describer(Path(target))):
        describe(Path(target), json)
        return
    from qlip_cli.outputs import PICTURES

    if target is not None and Path(target).is_file() and Path(target).suffix.lower() in PICTURES:
        raise QlipError(f"{target}: not a PNG, and only PNGs record how they were drawn")
    options.quiet_hub()
    from qlip_core import open_checkpoint

    name = target if target is not None else model
    checkpoint = open_checkpoint(name, revision)
    document = model_document(checkpoint)
    if backend is not None or dtype is not None:
        document["runs"] = how_it_runs(name, revision, backend, device, dtype)
    if json:
        print_json(document)
    else:
        print_model(document)


def describer(path: Path) -> Callable[[Path, bool], None] | None:
    """The function that describes `path`, by what it is; None if it must be a model."""
    if kind := tokens_kind(path):
        return {"file": describe_tokens, "shard": describe_shard, "shards": describe_shards}[kind]
    if is_png(path):
        return describe_picture
    return describe_generator if is_generator(path) else None


# -- pictures ----------------------------------------------------------------------------------


def describe_picture(path: Path, json: bool) -> None:
    """What `qlip generate` wrote into a PNG."""
    record = read_record(path)
    if json:
        print_json({"picture": str(path)} | record)
        return
    print_line(str(path))
    print_facts(facts_of_record(record), indent=2)


def facts_of_record(record: dict[str, Any]) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            facts += facts_of_record(value)
        elif isinstance(value, list):
            facts.append((key, ", ".join(map(str, value))))
        else:
            facts.append((key, str(value)))
    return facts


# -- generators --------------------------------------------------------------------------------


def is_generator(path: Path) -> bool:
    """Whether a folder's config is a generator's."""
    from qlip_core.generator.config import MODEL_TYPE
    from qlip_core.strict import peek_json

    return peek_json(path / "config.json").get("model_type") == MODEL_TYPE


def describe_generator(path: Path, json: bool) -> None:
    from qlip_core.generator.checkpoint import open_generator

    config = open_generator(path).config
    sizes = generator_sizes(config)
    made_for = {"tokenizer": config.tokenizer or None, "text_tower": config.text_tower or None}
    t5 = {"t5_model": config.t5_model} if config.conditioner == "t5" else {}
    if json:
        print_json({"generator": str(path), "grid": list(config.grid)} | sizes | t5 | made_for)
        return
    h, w = config.grid
    wide = f"{config.hidden_size} wide, {config.num_attention_heads} heads"
    conditioner = f"{config.t5_model} (T5)" if t5 else config.conditioner
    print_line(str(path))
    print_facts(
        [
            ("generator", generator_text(sizes)),
            ("layers", f"{config.num_hidden_layers}, {wide}"),
            ("pictures", f"{h}x{w} patches of {config.code_dim} bits"),
            ("captions", f"by {conditioner}, at most {config.prefix_length} tokens"),
            ("tokenizer", config.tokenizer or "not stated: any of these sizes"),
            *([("text tower", config.text_tower)] if config.text_tower else []),
            *facts_of_record(sizes["sampling"]),
        ],
        indent=2,
    )


def generator_sizes(config: GeneratorConfig) -> dict[str, Any]:
    from qlip_core.generator.architecture import parameter_count

    return {
        "parameters": parameter_count(config),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "conditioner": config.conditioner,
        "prefix_length": config.prefix_length,
        "tokens_per_image": config.tokens_per_image,
        "values_per_token": config.visual_vocab_size,
        "sampling": config.sampling.to_dict(),
    }


def generator_text(generator: dict[str, Any] | None) -> str:
    if generator is not None and "problem" in generator:
        return f"unusable: {generator['problem']}"
    if generator is None:
        return "none: this model draws nothing from text"
    return (
        f"{count_short(generator['parameters'])} parameters, {generator['tokens_per_image']} tokens of "
        f"{generator['values_per_token']:,} values after at most {generator['prefix_length']} of text"
    )


# -- models ------------------------------------------------------------------------------------


def model_document(checkpoint: Checkpoint) -> dict[str, Any]:
    from qlip_core.bsq import packed_bytes
    from qlip_core.hub import hub_id

    config = checkpoint.config
    groups = config.code_dim // config.group_size
    code: dict[str, Any] = {"quantizer": config.vision_config.quantizer}
    if config.quantizes:
        code |= {
            "bits_per_patch": config.code_dim,
            "bits_per_token": config.group_size,
            "tokens_per_patch": groups,
            "tokens_per_image": config.num_patches * groups,
            "bytes_per_image": packed_bytes(config.num_patches, config.code_dim),
            "compression_ratio": config.compression_ratio,
        }
    towers = towers_of(config)
    return {
        "model": hub_id(checkpoint.folder) or str(checkpoint.folder),
        "image_size": config.image_size,
        "patch_size": config.vision_config.patch_size,
        "grid": list(config.grid),
        "code": code,
        "towers": towers,
        "parameters": sum(tower["parameters"] for tower in towers),
        "embedding_width": config.projection_dim,
        "stored_dtypes": sorted(_STORED[name] for name in checkpoint.stored_dtypes),
        "stored_bytes": checkpoint.stored_bytes,
        "tokenizer": checkpoint.tokenizer is not None,
        "generator": generator_document(checkpoint),
        "fingerprint": checkpoint.fingerprint,
        "license": checkpoint.license,
        "note": checkpoint.note,
    }


def generator_document(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Sizes and settings of the generator in the model's folder; None if there is none. One that does not fit
    the model has a `problem` instead."""
    from qlip_core.errors import QlipError
    from qlip_core.generator.load import find_generator

    try:
        found = find_generator(checkpoint, None)
    except QlipError as error:
        return {"problem": str(error)}
    return None if found is None else generator_sizes(found.config)


def towers_of(config: QLIPConfig) -> list[dict[str, Any]]:
    """Layers, width, heads and parameters of the three towers and the bottleneck."""
    from qlip_core.architecture import parameter_count

    count = parameter_count(config)
    named = (
        ("text encoder", config.text_config, count["text"]),
        ("visual encoder", config.vision_config, count["encoder"]),
        ("bottleneck", None, count["down"] + count["up"]),
        ("visual decoder", config.decoder_config, count["decoder"]),
    )
    return [
        {
            "name": name,
            "layers": tower.num_hidden_layers if tower else None,
            "width": tower.hidden_size if tower else None,
            "heads": tower.num_attention_heads if tower else None,
            "mlp_width": tower.intermediate_size if tower else None,
            "parameters": parameters,
        }
        for name, tower, parameters in named
    ]


def how_it_runs(
    name: str | None, revision: str | None, backend: str | None, device: str, dtype: str | None
) -> dict[str, Any]:
    """The chosen backend, device and dtype, and what weight quantization leaves unchanged."""
    model = options.load_model(name, revision, backend or "auto", device, dtype or "float32")
    out: dict[str, Any] = {"backend": model.backend, "device": model.device, "dtype": model.dtype}
    if model.dtype in ("int8", "int4"):
        # Only MLX's network has such weights, and thus a list of the unquantized ones.
        out["unquantized"] = model.network.unquantized()  # type: ignore[attr-defined]
    return out


def print_model(document: dict[str, Any]) -> None:
    side, patch, (h, w) = document["image_size"], document["patch_size"], document["grid"]
    code = document["code"]
    facts = [("images", f"{side}x{side} pixels, {h}x{w} patches of {patch}x{patch}")]
    if code["quantizer"] == "none":
        facts.append(("code", "continuous: this model has no quantizer, so no tokens"))
    else:
        per_patch = f"{code['tokens_per_patch']} x {code['bits_per_token']} bits"
        facts += [
            ("code", f"{code['bits_per_patch']} bits per patch ({per_patch})"),
            ("tokens", f"{count_text(code['tokens_per_image'], 'token')} per image, each one of "
                       f"{2 ** code['bits_per_token']:,}"),
            ("size", f"{size_text(code['bytes_per_image'])} per image, "
                     f"{code['compression_ratio']:.1f} times less than its RGB pixels"),
        ]  # fmt: skip
    stored = f"{'/'.join(document['stored_dtypes'])}, {size_text(document['stored_bytes'])}"
    facts += [
        ("parameters", f"{count_short(document['parameters'])}, stored as {stored}"),
        ("embedding", f"{document['embedding_width']} numbers"),
        ("tokenizer", "present" if document["tokenizer"] else "absent: token ids only, no strings"),
        ("generator", generator_text(document["generator"])),
        ("fingerprint", document["fingerprint"]),
        ("licence", document["license"] or "not stated"),
    ]
    if document["note"]:
        facts.append(("note", document["note"]))
    print_line(document["model"])
    print_facts(facts, indent=2)
    print_line("")
    columns = ("layers", "width", "heads", "mlp_width")
    print_table(
        [
            (t["name"], *(str(t[c] or "") for c in columns), count_short(t["parameters"]))
            for t in document["towers"]
        ],
        ("tower", "layers", "width", "heads", "MLP", "parameters"),
        indent=2,
    )
    if runs := document.get("runs"):
        print_line("")
        lines = [("runs on", f"{runs['backend']}, {runs['device']}, {runs['dtype']}")]
        if "unquantized" in runs:
            names = (re.sub(r"\.layers\.\d+\.", ".layers.*.", name) for name in runs["unquantized"])
            lines.append(("unquantized", ", ".join(dict.fromkeys(names)) or "nothing"))
        print_facts(lines, indent=2)


def count_short(count: int) -> str:
    """239.4 M, 61.2 k, 512."""
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return str(count)
