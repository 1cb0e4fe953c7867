"""How long a user waits for the smallest things: `qlip --help`, and one image through the tiny model.

    python benchmarks/startup.py [--runs 9] [--backends numpy,mlx]

Each run is a fresh process, as from a shell. The median is what counts; the least shows what the machine
can do when nothing else runs. `import numpy` and an empty Python are listed too, since no start can be
faster.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import qlip_core as qlip
from qlip_core.architecture import init_weights

QLIP = ["-c", "import sys; from qlip_cli.main import main; sys.exit(main())"]


def seconds(arguments: list[str], runs: int) -> list[float]:
    """Wall-clock seconds of `runs` processes, after one that fills the disk cache."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--backends", default="numpy,mlx")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = qlip.PRESETS["tiny"]
        model = qlip.save_checkpoint(root / "tiny", config, init_weights(config))
        image = root / "one.png"
        noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
        Image.fromarray(noise).save(image)
        cases: list[tuple[str, list[str], float | None]] = [
            ("python, nothing", ["-c", "pass"], None),
            ("import numpy", ["-c", "import numpy"], None),
            ("qlip --help", [*QLIP, "--help"], 0.4),
        ]
        for backend in args.backends.split(","):
            command = ["encode", str(image), "-o", str(root / "one.qlip"), "--force"]
            command += ["--model", str(model), "--backend", backend]
            goal = 1.5 if backend in ("numpy", "mlx") else None
            cases.append((f"qlip encode, {backend}", [*QLIP, *command], goal))
        print(f"| {args.runs} runs | median s | least s | goal s |\n|---|---|---|---|")
        for name, arguments, goal in cases:
            times = seconds(arguments, args.runs)
            row = f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} |"
            print(f"{row} {'' if goal is None else goal} |", flush=True)


if __name__ == "__main__":
    main()
