"""BSQ's entropies, factorised against direct: time and peak memory of forward and backward.

    python benchmarks/bsq_entropy.py [--tokens 4096] [--bits 28] [--sizes 1,2,4,7,14] [--big]

The direct form takes the softmax over the 2^g corners of each group (SPEC 1.3 as written); the
factorised one is what training uses. Each case runs in a fresh process, so that its peak is its
own: the resident set's growth over the inputs on CPU, the allocator's peak on CUDA. Both forms are
also compared: the table's last column is the largest difference of their gradients, relative to
the largest gradient. `--big` adds g = 14 at 512 x 1024 tokens, factorised only (direct: 69 GB for
one copy of the probabilities).
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from qlip_torch.train.objectives import bsq_entropy

INV_TEMPERATURE = 100.0


def direct(u: torch.Tensor, size: int) -> torch.Tensor:
    """per_sample - codebook by softmax over corners: u [T, L] to a scalar."""
    length = u.shape[-1]
    groups = u.reshape(-1, length // size, size)
    shifts = torch.arange(size - 1, -1, -1, device=u.device)
    bits = torch.arange(2**size, device=u.device).unsqueeze(-1) >> shifts & 1
    corners = (2 * bits - 1).to(u.dtype) / math.sqrt(length)
    log_p = (2 * INV_TEMPERATURE * groups @ corners.T).log_softmax(-1)
    p = log_p.exp()
    per_sample = -(p * log_p).sum((-1, -2)).mean()
    mean = p.mean(0)
    codebook = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
    return per_sample - codebook


def factorised(u: torch.Tensor, size: int) -> torch.Tensor:
    terms = bsq_entropy(u, size, INV_TEMPERATURE)
    return terms.per_sample - terms.codebook


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(form: str, tokens: int, bits: int, size: int, device: str, threads: int) -> dict:
    """Seconds (best of 3), bytes above the input, and the gradient's sample for comparison."""
    torch.set_num_threads(threads)
    function = {"direct": direct, "factorised": factorised}[form]
    torch.manual_seed(0)
    u = torch.empty(tokens, bits, device=device)
    for part in u.split(1024):  # in place, so that making the input leaves no peak behind
        part.copy_(F.normalize(torch.randn(part.shape), dim=-1))
    u.requires_grad_()
    function(u[:2], size).backward()  # the libraries' own memory is not the objective's
    u.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes(device)
    seconds = []
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        u.grad = None
        function(u, size).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert u.grad is not None
    return {
        "seconds": min(seconds),
        "bytes": peak_bytes(device) - before,
        "grad": u.grad[:64].flatten().tolist(),
    }


def run_case(form: str, args: argparse.Namespace, tokens: int, size: int) -> dict | None:
    """Run the case in its own process; None if it ran out of memory."""
    case = [form, tokens, args.bits, size, args.device, args.threads]
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if done.returncode > 0 and "memory" not in done.stderr.lower():
            raise RuntimeError(done.stderr)
        return None
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="BSQ entropies, factorised against direct")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=28)
    parser.add_argument("--sizes", default="1,2,4,7,14")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--big", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*json.loads(args.case))))
        return

    print(f"{args.tokens} tokens, {args.bits} bits, {args.device}, forward and backward, float32")
    print(f"{'g':>3} {'direct':>22} {'factorised':>22} {'time':>7} {'memory':>7} {'grad diff':>10}")
    for size in map(int, args.sizes.split(",")):
        slow = run_case("direct", args, args.tokens, size)
        fast = run_case("factorised", args, args.tokens, size)
        assert fast is not None
        row = f"{size:>3} {shown(slow):>22} {shown(fast):>22}"
        if slow is not None:
            largest = max(map(abs, slow["grad"]))
            difference = max(abs(a - b) for a, b in zip(slow["grad"], fast["grad"]))
            memory = slow["bytes"] / max(fast["bytes"], 1)
            row += f" {slow['seconds'] / fast['seconds']:>6.1f}x {memory:>6.1f}x"
            row += f" {difference / largest:>10.1e}"
        print(row, flush=True)
    if args.big:
        big = run_case("factorised", args, 512 * 1024, 14)
        print(f"g 14 at 512 x 1024 tokens: {shown(big)}")


def shown(case: dict | None) -> str:
    if case is None:
        return "out of memory"
    return f"{case['seconds'] * 1e3:9.1f} ms {case['bytes'] / 2**20:6.0f} MB"


if __name__ == "__main__":
    main()
