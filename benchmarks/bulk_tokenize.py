"""`qlip tokenize` from end to end, against the bare model on pixels that are ready.

    python benchmarks/bulk_tokenize.py [--size mid] [--images 256] [--backend torch] [--dtype float32]

End to end means tars of 640 x 480 JPEGs read, decoded, resized, encoded, packed and written. Weights are
random. Every round runs both in turn, so that other load on the machine affects both alike; the share is
that of the medians over the rounds, and the goal 90 %. Exits 1 below it.

"mid" is B-16's shape with 6 layers of width 384: if a model is much cheaper than decoding a JPEG (about 6 ms
of a core), overlap does not help, and the number of cores decides.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from loader import photograph

import qlip_core as qlip
from qlip_core.architecture import init_weights
from qlip_core.config import PRESETS, QLIPConfig, TextConfig
from qlip_core.data.shards import open_source
from qlip_core.data.tars import write_tar
from qlip_core.data.tokenizing import tokenize

GOAL = 0.9
_DIFFERENT = 32  # pictures; the others are copies of them
_SHARDS = 4
_PRESETS = {"tiny": "tiny", "b-16": "qlip-b-16-256", "b-8": "qlip-b-8-256", "l-14": "qlip-l-14-392"}


def config_of(size: str) -> QLIPConfig:
    """A preset with a small text tower, which is not used here, or "mid"."""
    if size != "mid":
        config = PRESETS[_PRESETS[size]]
    else:
        base = PRESETS["qlip-b-16-256"]
        small = {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "hidden_size_post_q": 384,
        }
        vision, decoder = (
            replace(base.vision_config, **small),
            replace(base.decoder_config, **small),
        )
        config = replace(base, vision_config=vision, decoder_config=decoder)
    text = TextConfig(vocab_size=600, num_hidden_layers=1, bos_token_id=598, eos_token_id=599)
    return config if size == "tiny" else replace(config, text_config=text)


def samples(images: int, shard: int, jpegs: list[bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for n in range(shard, images, _SHARDS):
        yield f"{n:06d}", {"jpg": jpegs[n % len(jpegs)], "txt": f"picture {n}".encode()}


def make_tars(folder: Path, images: int) -> str:
    generator = np.random.default_rng(0)
    jpegs = []
    for _ in range(min(images, _DIFFERENT)):
        out = io.BytesIO()
        photograph(generator).save(out, "jpeg", quality=90)
        jpegs.append(out.getvalue())
    folder.mkdir()
    for shard in range(_SHARDS):
        write_tar(folder / f"{shard:03d}.tar", samples(images, shard, jpegs))
    return str(folder)


def bare(model: qlip.Model, pixels: np.ndarray, images: int) -> float:
    """Images per second of the encoder alone, over the same number of them."""
    start = time.perf_counter()
    batches = max(1, images // len(pixels))
    for _ in range(batches):
        model.network.encode(pixels)
    return batches * len(pixels) / (time.perf_counter() - start)


def end_to_end(model: qlip.Model, tars: str, out: Path, batch_size: int) -> float:
    """Images per second of `qlip tokenize`, without the time to start its process."""
    start = time.perf_counter()
    report = tokenize(model, open_source(tars), out, batch_size=batch_size)
    return report.encoded / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="mid", choices=["mid", *_PRESETS])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = config_of(args.size)
        path = qlip.save_checkpoint(root / "model", config, init_weights(config))
        model = qlip.load(path, backend=args.backend, device=args.device, dtype=args.dtype)
        tars = make_tars(root / "tars", args.images)
        shape = args.batch_size, 3, config.image_size, config.image_size
        pixels = np.random.default_rng(1).standard_normal(shape, np.float32)
        bare(model, pixels, 2 * args.batch_size)  # weights are read, kernels chosen
        print(
            f"{args.size}, {model.backend} on {model.device}, {model.dtype}, batch {args.batch_size}, "
            f"{args.images} JPEGs of 640x480\n\n| round | bare model, images/s | end to end | share |"
            "\n|---|---|---|---|"
        )
        rates = []
        for number in range(args.rounds):
            alone = bare(model, pixels, args.images)
            whole = end_to_end(model, tars, root / f"out{number}", args.batch_size)
            rates.append((alone, whole))
            share = 100 * whole / alone
            print(f"| {number + 1} | {alone:.1f} | {whole:.1f} | {share:.0f} % |", flush=True)
    alone, whole = (statistics.median(column) for column in zip(*rates))
    print(f"\nshare of the medians: {100 * whole / alone:.1f} % (goal {100 * GOAL:.0f} %)")
    sys.exit(0 if whole / alone >= GOAL else 1)


if __name__ == "__main__":
    main()
