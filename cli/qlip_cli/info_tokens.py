"""`qlip info` for token files and token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlip_cli.terminal import print_facts, print_json, print_line, size_text

_FIRST = 5  # names shown of a token file


def tokens_kind(path: Path) -> str:
    """ "file" for a `.qlip` file, whatever its name; "shard" for one that `qlip tokenize` wrote, "shards" for a
    folder of them; else ""."""
    from qlip_core.data import token_format
    from qlip_core.data.token_shards import visible_shards
    from qlip_core.errors import CheckpointError
    from qlip_core.tensorfile import TensorFile
    from qlip_core.tokens import FORMAT

    if path.suffix == ".qlip":
        return "file"
    if path.is_dir():
        first = next(iter(sorted(visible_shards(path))), None)
        return "shards" if first and tokens_kind(first) == "shard" else ""
    if not path.is_file():
        return ""
    try:
        said = TensorFile(path).metadata.get("format", "")
    except CheckpointError:
        return ""
    return {FORMAT: "file", token_format.FORMAT: "shard"}.get(said, "")


def describe_shard(path: Path, json: bool) -> None:
    from qlip_core.data.token_format import read_header

    header = read_header(path)
    settings, origin = header.settings, header.origin
    h, w = settings.grid
    document = {
        "token_shard": str(path),
        "images": header.count,
        "grid": [h, w],
        "length": settings.length,
        "bytes_per_image": settings.row_bytes,
        "file_bytes": header.size,
        "model": settings.model,
        "dtype": settings.dtype,
        "augmentation": settings.augmentation,
        "source": origin.source,
        "shard": origin.shard,
        "number": origin.number,
        "of": origin.of,
        "skipped": header.skipped,
    }
    if json:
        print_json(document)
        return
    flipped = ", each with its mirror image" if settings.flips else ""
    print_line(str(path))
    print_facts(
        [
            ("images", f"{header.count:,}{flipped}"),
            ("code", f"{h}x{w} patches of {settings.length} bits, computed in {settings.dtype}"),
            ("size", f"{size_text(settings.row_bytes)} per image, {size_text(header.size)} in all"),
            ("made by", settings.model),
            ("from", f"{origin.shard} (shard {origin.number + 1} of {origin.of})"),
            ("left out", _left_out(header.skipped)),
        ],
        indent=2,
    )


def describe_shards(path: Path, json: bool) -> None:
    """A folder that `qlip tokenize` wrote, or is still writing."""
    from qlip_core.data.token_shards import TokenShards

    found = TokenShards(path, partial=True)
    settings, origin = found.settings, found.headers[0].origin
    h, w = settings.grid
    skipped = found.skipped
    document: dict[str, Any] = {
        "token_shards": str(path),
        "images": len(found),
        "shards": len(found.headers),
        "of": origin.of,
        "complete": len(found.headers) == origin.of,
        "grid": [h, w],
        "length": settings.length,
        "bytes_per_image": settings.row_bytes,
        "file_bytes": sum(header.size for header in found.headers),
        "model": settings.model,
        "dtype": settings.dtype,
        "augmentation": settings.augmentation,
        "source": origin.source,
        "skipped": skipped,
    }
    if json:
        print_json(document)
        return
    flipped = ", each with its mirror image" if settings.flips else ""
    rest = (
        "complete" if document["complete"] else f"of {origin.of}: `qlip tokenize` has not finished"
    )
    size = f"{size_text(settings.row_bytes)} per image, {size_text(document['file_bytes'])} in all"
    print_line(str(path))
    print_facts(
        [
            ("images", f"{len(found):,}{flipped}"),
            ("shards", f"{len(found.headers)}, {rest}"),
            ("code", f"{h}x{w} patches of {settings.length} bits, computed in {settings.dtype}"),
            ("size", size),
            ("made by", settings.model),
            ("from", origin.source),
            ("left out", _left_out(skipped)),
        ],
        indent=2,
    )


def _left_out(skipped: dict[str, Any]) -> str:
    counts = skipped["counts"].items()
    return ", ".join(f"{reason}: {count}" for reason, count in counts) or "nothing"


def describe_tokens(path: Path, json: bool) -> None:
    from qlip_core import VisualTokens

    tokens = VisualTokens.load(path)
    h, w = tokens.grid
    document = {
        "tokens": str(path),
        "images": len(tokens),
        "grid": [h, w],
        "length": tokens.length,
        "bytes_per_image": tokens.packed.shape[1],
        "file_bytes": path.stat().st_size,
        "model": tokens.model or None,
        "names": list(tokens.names),
    }
    if json:
        print_json(document)
        return
    shown = list(tokens.names[:_FIRST])
    more = f" and {len(tokens.names) - _FIRST:,} more" if len(tokens.names) > _FIRST else ""
    print_line(str(path))
    print_facts(
        [
            ("images", f"{len(tokens):,}"),
            ("code", f"{h}x{w} patches of {tokens.length} bits"),
            ("size", f"{size_text(document['bytes_per_image'])} per image, "
                     f"{size_text(document['file_bytes'])} in all"),
            ("made by", tokens.model or "not stated: any model of these sizes decodes it"),
            ("names", ", ".join(shown) + more if shown else "none"),
        ],
        indent=2,
    )  # fmt: skip
