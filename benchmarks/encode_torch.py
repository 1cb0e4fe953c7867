"""How fast the PyTorch backend encodes and decodes, against the machine's own matrix product.

    python benchmarks/encode_torch.py                  # CPU, B-16, batch 8, float32 and bfloat16
    python benchmarks/encode_torch.py --device cuda    # B-16, B-8 and L-14: bfloat16 compiled, float32

Weights are random. "share" is the model's FLOPs per second (2 per multiply-add, products only) over the
rate of a plain 2048-cube product (8192 on CUDA) in the same dtype. Every round measures the product
and each path once, in turn, so that other load on the machine affects all of them; the table shows
medians over the rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from qlip_core.architecture import ArrayWeights, init_weights
from qlip_core.bsq import bits_to_codes
from qlip_core.config import PRESETS, QLIPConfig, VisionConfig
from qlip_torch import TorchBackend

# -- what the model costs ----------------------------------------------------------------------


def tower_flops(config: VisionConfig, tokens: int) -> int:
    """Of the products of all blocks, one image."""
    width, hidden = config.hidden_size, config.intermediate_size
    linears = 4 * width * width + (3 if config.swiglu else 2) * width * hidden
    attention = 2 * tokens * width
    return config.num_hidden_layers * 2 * tokens * (linears + attention)


def encode_flops(config: QLIPConfig) -> int:
    vision, n = config.vision_config, config.num_patches
    width = vision.hidden_size
    ends = 3 * vision.patch_size**2 * width + width * width + width * config.code_dim
    return tower_flops(vision, n + 1) + 2 * n * ends


def decode_flops(config: QLIPConfig) -> int:
    decoder, n = config.decoder_config, config.num_patches
    width, hidden = decoder.hidden_size, decoder.intermediate_size
    ends = config.code_dim * width + width * width + hidden * (width + 3 * decoder.patch_size**2)
    return tower_flops(decoder, n) + 2 * n * ends


# -- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """Something to time: `work` is what one call does, in FLOPs or images."""

    name: str
    call: Callable[[], object]
    work: float


def measure(paths: list[Path], rounds: int, device: str) -> dict[str, float]:
    """Median rate of each path, in work per second."""
    rates: dict[str, list[float]] = {path.name: [] for path in paths}
    for attempt in range(rounds + 1):
        for path in paths:
            seconds = _seconds(path.call, device)
            if attempt:  # the first round warms up
                rates[path.name].append(path.work / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def _seconds(call: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def product(side: int, dtype: str, device: str) -> Path:
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    repeats = 20 if device != "cpu" else 2

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, a)

    return Path(f"product {dtype}", multiply, repeats * 2 * side**3)


def rival(config: QLIPConfig, pixels: np.ndarray) -> Path | None:
    """transformers' CLIP vision tower (SDPA, its default) of this size; None if not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import CLIPVisionConfig, CLIPVisionModel

    vision = config.vision_config
    theirs = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=4 * vision.hidden_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    model = CLIPVisionModel(theirs).eval()
    batch = torch.from_numpy(pixels)

    @torch.inference_mode()
    def forward() -> None:
        model(pixel_values=batch)

    return Path("transformers CLIP", forward, len(pixels))


# -- reports -----------------------------------------------------------------------------------


def inputs(config: QLIPConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    pixels = generator.standard_normal((batch, 3, config.image_size, config.image_size), np.float32)
    bits = generator.integers(0, 2, (batch, config.num_patches, config.code_dim))
    return pixels, bits_to_codes(bits)


def cpu(batch: int, rounds: int) -> None:
    config = PRESETS["qlip-b-16-256"]
    weights = ArrayWeights(config, init_weights(config))
    pixels, codes = inputs(config, batch)
    paths, bits = [], {}
    dtypes = ("float32", "bfloat16")
    for dtype in dtypes:
        network = TorchBackend().network(config, weights, device="cpu", dtype=dtype)
        bits[dtype] = network.encode(pixels)
        paths += [
            product(2048, dtype, "cpu"),
            Path(f"encode {dtype}", partial(network.encode, pixels), batch),
            Path(f"decode {dtype}", partial(network.decode, codes), batch),
        ]
    other = rival(config, pixels)
    rates = measure([*paths, other] if other else paths, rounds, "cpu")
    print(f"B-16, batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':18}{'images/s':>10}{'GFLOP/s':>10}{'product':>10}{'share':>8}")
    for dtype in dtypes:
        limit = rates[f"product {dtype}"]
        for name, flops in (("encode", encode_flops(config)), ("decode", decode_flops(config))):
            rate = rates[f"{name} {dtype}"]
            print(
                f"{name} {dtype:11}{rate:10.2f}{rate * flops / 1e9:10.1f}{limit / 1e9:10.1f}"
                f"{rate * flops / limit:8.2f}"
            )
    for name in ("encode", "decode"):
        ratio = rates[f"{name} bfloat16"] / rates[f"{name} float32"]
        print(f"{name}: bfloat16 {ratio:.2f} times float32")
    same = np.mean(bits["float32"] == bits["bfloat16"])
    print(f"bits of bfloat16 equal to float32's: {100 * same:.2f} % (random weights)")
    if other is None:
        print("transformers is not installed: its CLIP tower was not measured")
    else:
        theirs, ours = rates[other.name], rates["encode float32"]
        print(f"{other.name}: {theirs:.2f} images/s; encode is {ours / theirs:.2f} times that")


def cuda(batch: int, rounds: int, limit_s: float) -> None:
    print(f"{torch.cuda.get_device_name()}, batch {batch}, torch {torch.__version__}")
    print(f"{'':40}{'images/s':>10}{'TFLOP/s':>10}{'share':>8}{'bits equal':>12}{'compile':>9}")
    began = time.perf_counter()
    for preset in ("qlip-b-16-256", "qlip-b-8-256", "qlip-l-14-392"):
        if time.perf_counter() - began > limit_s:
            return
        config = PRESETS[preset]
        weights = ArrayWeights(config, init_weights(config))
        pixels, codes = inputs(config, batch)
        expected = None
        for dtype, compile in (
            ("float32", False),
            ("bfloat16", True),
            ("bfloat16", False),
            ("float16", True),
        ):
            if time.perf_counter() - began > limit_s:
                return
            torch.compiler.reset()  # after eight variants of the blocks, torch stops compiling
            backend = TorchBackend(compile=compile)
            network = backend.network(config, weights, device="cuda:0", dtype=dtype)
            start = time.perf_counter()
            bits = network.encode(pixels)
            network.decode(codes)
            first = time.perf_counter() - start
            expected = bits if expected is None else expected
            limit = product(8192, dtype, "cuda")
            paths = [
                limit,
                Path("encode", partial(network.encode, pixels), batch),
                Path("decode", partial(network.decode, codes), batch),
            ]
            rates = measure(paths, rounds, "cuda")
            label = f"{dtype} {'compiled' if compile else 'eager'}"
            flops = {"encode": encode_flops(config), "decode": decode_flops(config)}
            for name, work in flops.items():
                print(
                    f"{preset:14} {name} {label:18}{rates[name]:10.1f}"
                    f"{rates[name] * work / 1e12:10.1f}{rates[name] * work / rates[limit.name]:8.2f}"
                    f"{100 * np.mean(bits == expected):11.2f}%{first:8.1f}s",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="images a call (8 on the CPU, 128 on CUDA)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=600, help="on CUDA: begin nothing after so many"
    )
    options = parser.parse_args()
    if options.device == "cpu":
        cpu(options.batch or 8, options.rounds)
    else:
        cuda(options.batch or 128, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
