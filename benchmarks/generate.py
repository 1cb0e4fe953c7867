"""Speed of drawing sub-tokens, against the framework's own matrix-vector product over the same weights.

    python benchmarks/generate.py [--backend torch] [--size B] [--tokens 64] [--rounds 3] [--threads 2]

All figures of a line come from the same run, measured in turns, medians over `--rounds`, because the
ratios are what matters: one picture (batch 1, float32) in sub-tokens per second, and that as a share of
what the plain products of a step allow, with the weights as a checkpoint holds them ([out, in]);
beside it the share of the bandwidth that summing the same weights reaches. Then bfloat16 against
float32, 8 pictures against one, guidance against none, and a plain loop over `transformers`' Llama of the
same shape with its static cache, if that is installed. Weights are random: nothing here depends on them.

On CUDA another table: bfloat16, sizes and batches, each step's time against what it must at least
take, the larger of bytes (the weights once, and each picture's keys and values so far) over the rate of a copy
and FLOPs over the rate of a product of 8192, both of the same run; and a guided picture of 576 sub-tokens
beside LlamaGen's published loop (an A100) and vLLM's.

    python benchmarks/generate.py --device cuda [--compile | --kernels]

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

CHUNK = 16  # sub-tokens between two waits for the device
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
    """Seconds from when the first chunk is done, which excludes the prefix."""

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
            cache = StaticCache(
                config=shape, max_batch_size=1, max_cache_len=config.sequence_length
            )
            last = model(prefix, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            for _ in range(tokens):
                last = model(last, past_key_values=cache, use_cache=True).logits.argmax(-1)
            return time.perf_counter() - start

    return run


# -- the table ---------------------------------------------------------------------------------


# -- CUDA --------------------------------------------------------------------------------------

# Seconds of a picture of 384 px (576 tokens) with guidance, as LlamaGen's authors give them: (loop, vLLM).
LLAMAGEN = {"L": (13.72, 3.48), "XL": (19.76, 4.84)}


def random_on_cuda(config: GeneratorConfig, compile: bool, kernels: bool) -> GeneratorNetwork:
    """Like `TorchBackend.generator`, with weights created on the device."""
    import torch

    from qlip_torch.backend import on_device
    from qlip_torch.generator import Generator

    with torch.device("meta"):
        model = Generator(config).to(torch.bfloat16)
    model.to_empty(device="cuda")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else parameter.data.fill_(
            1
        )
    model = model.requires_grad_(False).eval().fuse()
    return on_device(model, device="cuda", dtype="bfloat16", compile=compile, kernels=kernels)


def copy_rate() -> float:
    """Bytes per second of a copy on the device, read and written."""
    import torch

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * 2**30 / min(seconds)


def cuda(rounds: int, compile: bool, kernels: bool, seconds: float) -> None:
    import torch

    from qlip_torch.train.throughput import matmul_rate

    copy, product = copy_rate(), matmul_rate("cuda", torch.bfloat16)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16"
        f"{', compiled' if compile else ''}{', our kernels' if kernels else ''}; a copy {copy / 1e12:.2f} TB/s, a product "
        f"{product / 1e12:.0f} TFLOP/s"
    )
    print(f"{'size':5}{'pictures':>9}{'':>10}{'sub-tokens/s':>14}{'ms a step':>11}{'share of limit':>16}"
          f"{'576 sub-tokens':>16}")  # fmt: skip
    began = time.perf_counter()
    for size, batches in (("B", (1, 8, 64)), ("L", (1,)), ("XL", (1, 8, 64))):
        config = PRESETS[size]
        torch.compiler.reset()  # after eight variants of the blocks, torch stops compiling
        network = random_on_cuda(config, compile, kernels)
        for batch in batches:
            # Guided: one picture costs two rows.
            for guided in (False, True) if batch == 1 else (False,):
                if time.perf_counter() - began > seconds:
                    return
                scale = config.sampling.cfg_scale if guided else 1.0
                sampling = Sampling(cfg_scale=scale, top_k=config.sampling.top_k)
                steps = config.tokens_per_image
                run = drawing(network, order_of(config, batch, steps - CHUNK, sampling))
                run()
                took = sorted(run() for _ in range(rounds))[rounds // 2] / (steps - CHUNK)
                rows = batch * (1 + guided)
                limit = max(*least(config, rows, copy, product))
                other = LLAMAGEN.get(size) if guided else None
                print(
                    f"{size:5}{batch:9}{'guided' if guided else '':>10}{batch / took:14.0f}"
                    f"{took * 1e3:11.3f}{limit / took:16.0%}{576 * took:15.2f}s"
                    + (f"  LlamaGen {other[0]} s, vLLM {other[1]} s" if other else ""),
                    flush=True,
                )


def least(config: GeneratorConfig, rows: int, copy: float, product: float) -> tuple[float, float]:
    """Seconds that a step takes at least, on average over a picture: by bytes, and by FLOPs."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    block = config.hidden_size * (
        heads * config.head_dim + config.hidden_size + 3 * config.intermediate_size
    )
    weights = config.num_hidden_layers * block + config.hidden_size * config.visual_vocab_size
    so_far = config.prefix_length + config.tokens_per_image / 2
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * so_far
    # bfloat16: two bytes each; a copy's rate counts bytes read and bytes written.
    return 2 * (weights + rows * cache) / copy, 2 * rows * (weights + cache) / product


# -- the table ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="torch", choices=("torch", "mlx"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="B", choices=tuple(PRESETS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="on CUDA: the blocks, by torch.compile"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="on CUDA: five Triton kernels a layer"
    )
    parser.add_argument(
        "--seconds", type=float, default=600, help="on CUDA: begin no line after so many"
    )
    args = parser.parse_args()
    if args.device.startswith("cuda"):
        return cuda(args.rounds, args.compile, args.kernels, args.seconds)

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
          f"  ({limit:.1f} per second, {gigabytes * limit:.1f} GB/s)")  # fmt: skip
    print(f"  of the read bandwidth  {median(took['reads'] / took['one']):8.0%}"
          f"  ({gigabytes * tokens / median(took['reads']):.1f} GB/s)")  # fmt: skip
    del own

    def line(name: str, other: Timed, pictures: int = 1) -> None:
        took = in_turns(args.rounds, one=one, other=other)
        times = pictures * median(took["one"] / took["other"])
        rate = pictures * tokens / median(took["other"])
        print(f"{name:25}{times:8.2f} x its sub-tokens/s ({rate:.1f})")

    line("bfloat16", drawing(network("bfloat16"), order_of(config, 1, tokens, unguided)))
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
