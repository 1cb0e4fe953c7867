"""Speed of drawing sub-tokens, against the framework's own matrix-vector product over the same weights.

    python benchmarks/generate.py [--backend torch] [--size B] [--tokens 64] [--rounds 3] [--threads 2]

All figures of a line come from the same run, measured in turns, medians over `--rounds`, because the
ratios are what matters: one picture (batch 1, float32) in sub-tokens a second, and that as a share of
what the plain products of a step allow, with the weights as a checkpoint holds them ([out, in]);
beside it the share of the bandwidth that summing the same weights reaches. Then bfloat16 against
float32, 8 pictures against one, guidance against none, and a plain loop over `transformers`' Llama of the
same shape with its static cache, if that is installed. Weights are random: nothing here depends on them.

MLX on Linux: preload a tuned BLAS, as in
    LD_PRELOAD=/lib/x86_64-linux-gnu/libopenblas.so.0 python benchmarks/generate.py --backend mlx
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from qlip_core.backends import Backend, choose_device, get_backend
from qlip_core.generator.architecture import init_weights, parameter_count
from qlip_core.generator.config import PRESETS, GeneratorConfig
from qlip_core.generator.network import Captions, Draw, GeneratorNetwork
from qlip_core.generator.sampling import Sampling, guidance_scales, step_keys

CHUNK = 16  # sub-tokens between two that the device is waited for
Timed = Callable[[], float]  # runs once, gives seconds


def step_weights(config: GeneratorConfig, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The matrices that one sub-token is multiplied by."""
    out = [w for name, w in weights.items() if "_proj.weight" in name]
    return [*out, weights["lm_head.weight"][: config.visual_vocab_size]]


def order_of(config: GeneratorConfig, batch: int, tokens: int, sampling: Sampling) -> Draw:
    shape = (batch, config.prefix_length, config.condition_size)
    features = np.random.default_rng(0).standard_normal(shape, np.float32)
    captions = Captions(features, np.ones(shape[:2], bool), np.zeros(batch, bool))
    steps = tokens + CHUNK
    scales = guidance_scales(sampling, steps)
    return Draw(captions, sampling, step_keys(0, range(batch), steps), scales, CHUNK)


def drawing(network: GeneratorNetwork, order: Draw) -> Timed:
    """Seconds from the moment the first chunk is there, so without the prefix."""

    def run() -> float:
        chunks = network.draw(order)
        next(chunks)
        start = time.perf_counter()
        for _ in chunks:
            pass
        return time.perf_counter() - start

    return run


def in_turns(rounds: int, **timed: Timed) -> dict[str, np.ndarray]:
    """Seconds of each in every round, [rounds]; one round before them warms up."""
    for run in timed.values():
        run()
    seconds = [[run() for run in timed.values()] for _ in range(rounds)]
    return dict(zip(timed, np.array(seconds).T))


def median(seconds: np.ndarray) -> float:
    return float(np.median(seconds))


# -- the framework's own -----------------------------------------------------------------------


def torch_products(
    matrices: list[np.ndarray], device: str, dtype: str, times: int
) -> dict[str, Timed]:
    import torch
    import torch.nn.functional as F

    held = [torch.from_numpy(m).to(device, getattr(torch, dtype)) for m in matrices]
    inputs = [torch.randn(1, m.shape[1], device=device, dtype=m.dtype) for m in held]

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    def timed(work: Callable[[], object]) -> Timed:
        def run() -> float:
            with torch.inference_mode():
                wait()
                start = time.perf_counter()
                for _ in range(times):
                    work()
                wait()
                return time.perf_counter() - start

        return run

    return {
        "products": timed(lambda: [F.linear(x, m) for x, m in zip(inputs, held)]),
        "reads": timed(lambda: [m.sum() for m in held]),
    }


def mlx_products(
    matrices: list[np.ndarray], device: str, dtype: str, times: int
) -> dict[str, Timed]:
    import mlx.core as mx

    kind = getattr(mx, dtype)
    held = [mx.array(m, kind) for m in matrices]
    inputs = [mx.random.normal((1, m.shape[1])).astype(kind) for m in held]
    mx.eval(held, inputs)

    def timed(work: Callable[[], list[mx.array]]) -> Timed:
        def run() -> float:
            start = time.perf_counter()
            for _ in range(times):
                mx.eval(work())
            return time.perf_counter() - start

        return run

    return {
        "products": timed(lambda: [x @ m.T for x, m in zip(inputs, held)]),
        "reads": timed(lambda: [m.sum() for m in held]),
    }


def plain_loop(config: GeneratorConfig, tokens: int) -> Timed | None:
    """transformers' Llama of the same shape: its static cache, one position a call, greedy."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
    except ImportError:
        return None
    import torch

    shape = LlamaConfig(
        vocab_size=config.visual_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.sequence_length,
    )
    model = LlamaForCausalLM(shape).eval()
    prefix = torch.zeros(1, config.prefix_length, dtype=torch.int64)

    def run() -> float:
        with torch.inference_mode():
            cache = StaticCache(config=shape, max_cache_len=config.sequence_length)
            last = model(prefix, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            for _ in range(tokens):
                last = model(last, past_key_values=cache, use_cache=True).logits.argmax(-1)
            return time.perf_counter() - start

    return run


# -- the table ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="torch", choices=("torch", "mlx"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="B", choices=tuple(PRESETS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    backend = get_backend(args.backend)
    device = choose_device(backend, args.device)
    config = PRESETS[args.size]
    weights = init_weights(config)
    matrices = step_weights(config, weights)
    gigabytes = sum(m.nbytes for m in matrices) / 1e9
    print(
        f"{args.size}: {parameter_count(config) / 1e6:.0f} M parameters, {args.tokens} of "
        f"{config.tokens_per_image} sub-tokens; {backend.name} {backend.version()}, {device}; "
        f"a sub-token reads {gigabytes * 1e3:.0f} MB in float32"
    )
    with scope(args.backend, device, args.threads):
        report(args, backend, device, config, weights, matrices, gigabytes)


def scope(backend: str, device: str, threads: int) -> AbstractContextManager[object]:
    if backend == "mlx":
        import mlx.core as mx

        return mx.stream(mx.gpu if device == "gpu" else mx.cpu)
    import torch

    torch.set_num_threads(threads)
    return nullcontext()


def half_is_fast(backend: str, device: str) -> bool:
    """Whether bfloat16 is worth a measurement: torch emulates it on CPUs without AVX-512 BF16 or AMX."""
    if backend != "torch" or device != "cpu":
        return True
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def report(
    args: argparse.Namespace,
    backend: Backend,
    device: str,
    config: GeneratorConfig,
    weights: dict[str, np.ndarray],
    matrices: list[np.ndarray],
    gigabytes: float,
) -> None:
    products = torch_products if args.backend == "torch" else mlx_products
    plain, tokens = config.sampling, args.tokens
    unguided = Sampling(top_k=plain.top_k)

    def network(dtype: str) -> GeneratorNetwork:
        return backend.generator(config, weights, device=device, dtype=dtype)

    wide = network("float32")
    one = drawing(wide, order_of(config, 1, tokens, unguided))
    own = products(matrices, device, "float32", tokens)
    took = in_turns(args.rounds, one=one, **own)
    limit = tokens / median(took["products"])
    print(f"one picture, float32     {tokens / median(took['one']):8.1f} sub-tokens/s")
    print(f"  of the plain products  {median(took['products'] / took['one']):8.0%}"
          f"  ({limit:.1f} a second, {gigabytes * limit:.1f} GB/s)")  # fmt: skip
    print(f"  of the read bandwidth  {median(took['reads'] / took['one']):8.0%}"
          f"  ({gigabytes * tokens / median(took['reads']):.1f} GB/s)")  # fmt: skip
    del own

    def line(name: str, other: Timed, pictures: int = 1) -> None:
        took = in_turns(args.rounds, one=one, other=other)
        times = pictures * median(took["one"] / took["other"])
        rate = pictures * tokens / median(took["other"])
        print(f"{name:25}{times:8.2f} x its sub-tokens/s ({rate:.1f})")

    if half_is_fast(args.backend, device):
        line("bfloat16", drawing(network("bfloat16"), order_of(config, 1, tokens, unguided)))
    else:
        print(
            "bfloat16                 not measured: this CPU computes it without instructions for it"
        )
    line("8 pictures at once", drawing(wide, order_of(config, 8, tokens, unguided)), 8)
    line("guided", drawing(wide, order_of(config, 1, tokens, plain)))
    if args.backend == "torch" and device == "cpu":
        loop = plain_loop(config, tokens)
        if loop is None:
            print("transformers' Llama: not installed")
        else:
            line("transformers' Llama", loop)


if __name__ == "__main__":
    main()
