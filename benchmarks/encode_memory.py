"""Peak memory of `qlip encode`, for few images and for many: it must not grow with their number.

    python benchmarks/encode_memory.py [--counts 1000,10000] [--backend numpy]

Small JPEGs through the tiny model, each count in a process of its own; the peak is the resident
set's, as the system reports it of a child that has ended. Exits 1 if the last count needs more than
1.1 times the memory of the first.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

import qlip_core as qlip
from qlip_core.architecture import init_weights

GROWTH = 1.1
_DIFFERENT = 50  # files; the others are links to them
QLIP = ["-c", "import sys; from qlip_cli.main import main; sys.exit(main())"]


def folder_of(root: Path, count: int) -> Path:
    folder = root / str(count)
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:06}.jpg"
        if i < _DIFFERENT:
            noise = generator.integers(0, 256, (12, 16, 3), np.uint8)
            Image.fromarray(noise).resize((160, 120)).save(path)
        else:
            path.symlink_to(folder / f"{i % _DIFFERENT:06}.jpg")
    return folder


def peak(arguments: list[str]) -> tuple[float, float]:
    """(MB, seconds) of one command. Call it in a fresh process, because children share one maximum."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *QLIP, *arguments], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", default="1000,10000")
    parser.add_argument("--backend", default="numpy")
    args = parser.parse_args()
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = qlip.PRESETS["tiny"]
        model = qlip.save_checkpoint(root / "tiny", config, init_weights(config))
        print(f"| images ({args.backend}) | peak MB | images/s |\n|---|---|---|")
        for count in map(int, args.counts.split(",")):
            command = ["encode", str(folder_of(root, count)), "-o", str(root / f"{count}.qlip")]
            command += ["--model", str(model), "--backend", args.backend]
            with get_context("spawn").Pool(1) as pool:
                megabytes, seconds = pool.apply(peak, (command,))
            peaks.append(megabytes)
            print(f"| {count} | {megabytes:.1f} | {count / seconds:.0f} |", flush=True)
    growth = peaks[-1] / peaks[0]
    print(f"\nlast to first: {growth:.3f} (at most {GROWTH})")
    sys.exit(0 if growth <= GROWTH else 1)


if __name__ == "__main__":
    main()
