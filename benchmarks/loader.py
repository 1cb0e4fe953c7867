"""The image path alone: JPEG files decoded, resized, cropped and normalised, by worker threads.

    python benchmarks/loader.py [--images 512] [--size 256] [--workers 1,2,4,8,16]

Images are 640 x 480 JPEGs (quality 90) with structure at every scale, so that decoding costs what
photographs cost. Prints images per second, and the ratio to one worker; cores say how far that can go.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from qlip_core.loading import default_workers, pixel_batches
from qlip_core.preprocessing import Preprocessing

_DIFFERENT = 32  # files; the others are links to them, so that writing them costs nothing


def photograph(generator: np.random.Generator) -> Image.Image:
    """640 x 480 with a spectrum that falls like a photograph's: noise at each octave."""
    total = np.zeros((480, 640, 3), np.float32)
    for octave in range(7):
        shape = (480 >> octave) + 1, (640 >> octave) + 1, 3
        noise = generator.integers(0, 256, shape, np.uint8)
        layer = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
        total += (np.asarray(layer, np.float32) - 128) * 2.0 ** (octave - 6)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


def files(folder: Path, count: int) -> Iterator[Path]:
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:06}.jpg"
        if i < _DIFFERENT:
            photograph(generator).save(path, quality=90)
        else:
            path.symlink_to(folder / f"{i % _DIFFERENT:06}.jpg")
        yield path


def rate(paths: list[Path], preprocessing: Preprocessing, workers: int) -> float:
    """Images per second, the better of two passes."""
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        count = 0
        for positions, _ in pixel_batches(paths, preprocessing, batch_size=32, workers=workers):
            count += len(positions)
        best = max(best, count / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=256, help="S, side of the model's image")
    parser.add_argument("--workers", default="1,2,4,8,16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = list(files(Path(folder), args.images))
        preprocessing = Preprocessing(args.size)
        mean = sum(path.stat().st_size for path in paths[:_DIFFERENT]) / min(_DIFFERENT, len(paths))
        print(
            f"{len(paths)} JPEGs of 640x480, {mean / 1000:.0f} kB each, to {args.size}x{args.size}; "
            f"{os.cpu_count()} cores, {default_workers()} workers by default\n"
        )
        print("| workers | images/s | to one worker |\n|---|---|---|")
        rates = {}
        for workers in map(int, args.workers.split(",")):
            rates[workers] = rate(paths, preprocessing, workers)
            ratio = rates[workers] / next(iter(rates.values()))
            print(f"| {workers} | {rates[workers]:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
