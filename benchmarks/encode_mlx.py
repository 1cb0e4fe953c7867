"""How fast the MLX backend encodes and decodes on the CPU, against PyTorch in the same run.

    python benchmarks/encode_mlx.py [--batch 8] [--rounds 7] [--blas /path/to/libblas.so.3]
    python benchmarks/encode_mlx.py --device gpu       # Metal or CUDA, by dtype, without PyTorch

B-16 with random weights, float32. MLX's Linux build comes with an untuned BLAS; preload a tuned one to
replace it when the process starts (Debian's package libopenblas0-pthread):

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3 OPENBLAS_NUM_THREADS=1 qlip ...

One BLAS thread, because the backend already runs a part of the batch on each core. The script does
this for its MLX process if it finds that library, and reports the rate that a 2048-cube product then
reaches. Each library runs in its own process; rounds alternate between them, so that other load on the
machine affects both, and the table shows medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qlip_core.architecture import ArrayWeights, init_weights
from qlip_core.backends import get_backend
from qlip_core.bsq import bits_to_codes
from qlip_core.config import PRESETS

CONFIG = PRESETS["qlip-b-16-256"]
SIDE = 2048
OPENBLAS = (
    "/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3",
    "/usr/lib/aarch64-linux-gnu/openblas-pthread/libblas.so.3",
)

Paths = dict[str, tuple[Callable[[], object], float]]  # name -> what to call, work of a call


# -- in a process of its own -------------------------------------------------------------------


def paths(backend: str, device: str, dtype: str, batch: int) -> Paths:
    generator = np.random.default_rng(0)
    size = (batch, 3, CONFIG.image_size, CONFIG.image_size)
    pixels = generator.standard_normal(size, np.float32)
    codes = bits_to_codes(generator.integers(0, 2, (batch, CONFIG.num_patches, CONFIG.code_dim)))
    network = get_backend(backend).network(
        CONFIG, ArrayWeights(CONFIG, init_weights(CONFIG)), device=device, dtype=dtype
    )
    product = torch_product() if backend == "torch" else mlx_product(device)
    return {
        "product": product,
        "encode": (lambda: network.encode(pixels), batch),
        "decode": (lambda: network.decode(codes), batch),
    }


def torch_product() -> tuple[Callable[[], object], float]:
    import torch

    a = torch.randn(SIDE, SIDE)
    return lambda: torch.mm(a, a), 2 * SIDE**3


def mlx_product(device: str) -> tuple[Callable[[], object], float]:
    """One product on each core, as the backend works."""
    import mlx.core as mx

    on = mx.gpu if device == "gpu" else mx.cpu
    cores = len(os.sched_getaffinity(0)) if device == "cpu" and sys.platform == "linux" else 1
    streams = [mx.new_stream(on) for _ in range(cores)]
    a = mx.random.normal((SIDE, SIDE), stream=on)
    mx.eval(a)
    return lambda: mx.eval([mx.matmul(a, a, stream=s) for s in streams]), cores * 2 * SIDE**3


def serve(backend: str, device: str, dtype: str, batch: int) -> None:
    """Time every path once for each line on stdin, after a warm-up."""
    calls = paths(backend, device, dtype, batch)
    for call, _ in calls.values():
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        rates = {}
        for name, (call, work) in calls.items():
            start = time.perf_counter()
            call()
            rates[name] = work / (time.perf_counter() - start)
        print(json.dumps(rates), flush=True)


# -- the run -----------------------------------------------------------------------------------


def measure(workers: dict[str, list[str]], blas: str | None, rounds: int) -> dict[str, dict]:
    """Median rates by worker and path; `workers` are the arguments of their processes."""
    running: dict[str, tuple[subprocess.Popen[str], Iterator[str]]] = {}
    for name, arguments in workers.items():
        environment = dict(os.environ)
        if blas and "torch" not in arguments:
            environment |= {"LD_PRELOAD": blas, "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        running[name] = process, iter(process.stdout)
    for name, (_, lines) in running.items():
        if next(lines, "").strip() != "ready":
            raise SystemExit(f"{name} did not start")
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, (process, lines) in running.items():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            rates[name].append(json.loads(next(lines)))
    for process, _ in running.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return {
        name: {path: statistics.median(r[path] for r in measured) for path in measured[0]}
        for name, measured in rates.items()
    }


def report(rates: dict[str, dict]) -> None:
    print(f"{'':16}{'encode':>10}{'decode':>10}  images/s{'product':>12} GFLOP/s")
    for name, values in rates.items():
        encode, decode, product = (values[path] for path in ("encode", "decode", "product"))
        print(f"{name:16}{encode:10.2f}{decode:10.2f}{'':10}{product / 1e9:12.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    found = next((path for path in OPENBLAS if Path(path).exists()), None)
    parser.add_argument("--blas", default=found, help="library to preload; '' for none")
    parser.add_argument("--serve", nargs=3, metavar=("BACKEND", "DEVICE", "DTYPE"))
    options = parser.parse_args()
    if options.serve:
        backend, device, dtype = options.serve
        serve(backend, device, dtype, options.batch)
        return
    batch = ["--batch", str(options.batch)]
    if options.device == "gpu":
        dtypes = ("float32", "bfloat16", "float16", "int8", "int4")
        workers = {dtype: ["mlx", "gpu", dtype, *batch] for dtype in dtypes}
        report(measure(workers, None, options.rounds))
        return
    print(f"batch {options.batch}, float32, MLX with {options.blas or 'its own BLAS'}")
    workers = {name: [name, "cpu", "float32", *batch] for name in ("torch", "mlx")}
    rates = measure(workers, options.blas, options.rounds)
    report(rates)
    for path in ("encode", "decode"):
        print(f"{path}: mlx is {rates['mlx'][path] / rates['torch'][path]:.2f} of torch")


if __name__ == "__main__":
    main()
