"""Memory of long runs: the training loader's, and that of `qlip eval recon`, for few pictures and for many.

    python benchmarks/loader_memory.py [--samples 10000,100000] [--pictures 500,5000]

The loader reads tars of 48-pixel JPEGs with captions, shuffled, in the process itself (no workers);
`qlip eval recon` reads a folder of small JPEGs through the tiny model. Each count runs in a process of its own,
and its peak is the resident set's. Exits 1 if the last count needs more than 1.1 times the memory of the first.
"""

from __future__ import annotations

import argparse
import io
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from encode_memory import GROWTH, folder_of, peak
from PIL import Image

import qlip_core as qlip
from qlip_core.architecture import init_weights
from qlip_core.data.tars import write_tar

SIDE, BATCH = 32, 50
_DIFFERENT = 50  # pictures; the others are copies of them
_SHARDS = 20


def samples(count: int, shard: int, jpegs: list[bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for n in range(shard, count, _SHARDS):
        yield f"{n:06}", {"jpg": jpegs[n % len(jpegs)], "txt": f"picture {n}".encode()}


def make_tars(folder: Path, count: int) -> Path:
    generator = np.random.default_rng(0)
    jpegs = []
    for _ in range(_DIFFERENT):
        noise = generator.integers(0, 256, (8, 8, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(noise).resize((48, 48)).save(out, "jpeg")
        jpegs.append(out.getvalue())
    folder.mkdir()
    for shard in range(_SHARDS):
        write_tar(folder / f"{shard:03}.tar", samples(count, shard, jpegs))
    return folder


def _megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def load(tars: str, count: int) -> tuple[float, float]:
    """(peak MB, seconds) of one pass of the training loader. Call it in a fresh process."""
    from qlip_torch.train.data import DataConfig, Source, make_loader

    def ids(texts: Sequence[str]) -> np.ndarray:
        return np.zeros((len(texts), 8), np.int64)

    start = time.perf_counter()
    data = DataConfig(sources=(Source(tars),), workers=0)
    with make_loader(data, image_size=SIDE, tokenizer=ids, batch_size=BATCH) as loader:
        for _ in range(count // BATCH):
            next(loader)
    return _megabytes(), time.perf_counter() - start


def compare(
    what: str, counts: Sequence[int], measure: Callable[[int], tuple[float, float]]
) -> float:
    """Last peak over the first."""
    print(f"| {what} | peak MB | images per second |\n|---|---|---|")
    peaks = []
    for count in counts:
        megabytes, seconds = measure(count)
        peaks.append(megabytes)
        print(f"| {count:,} | {megabytes:.1f} | {count / seconds:.0f} |", flush=True)
    growth = peaks[-1] / peaks[0]
    print(f"\nlast to first: {growth:.3f} (at most {GROWTH})\n", flush=True)
    return growth


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", default="10000,100000", help="of the loader")
    parser.add_argument("--pictures", default="500,5000", help="of the evaluation")
    parser.add_argument("--backend", default="numpy", help="of the evaluation")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = qlip.PRESETS["tiny"]
        model = qlip.save_checkpoint(root / "tiny", config, init_weights(config))

        def loading(count: int) -> tuple[float, float]:
            tars = make_tars(root / f"tars{count}", count)
            with get_context("spawn").Pool(1) as pool:
                return pool.apply(load, (str(tars), count))

        def evaluating(count: int) -> tuple[float, float]:
            command = ["eval", "recon", str(model), str(folder_of(root, count)), "--shown", "0"]
            with get_context("spawn").Pool(1) as pool:
                return pool.apply(peak, ([*command, "--backend", args.backend],))

        growths = [
            compare("samples, training loader", list(map(int, args.samples.split(","))), loading),
            compare(
                f"pictures, `qlip eval recon` ({args.backend})",
                list(map(int, args.pictures.split(","))),
                evaluating,
            ),
        ]
    sys.exit(0 if max(growths) <= GROWTH else 1)


if __name__ == "__main__":
    main()
