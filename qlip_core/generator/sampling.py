"""The rule of sampling: one seed, one picture, on every backend and in any batch.

A step takes `argmax(filtered logits / temperature + Gumbel noise)`, and of equals the lowest value. The
noise of a value is an integer hash of (seed, image, step, value), so each backend computes it on the
device of its logits. The order is guidance, temperature, top-k, top-p, noise.

What does not depend on logits (`step_keys`, `guidance_scales`) is computed here, once per picture, and
passed to the backends. The rest (`hash_values`, `gumbel`, `keep`) is written here in numpy, and each
backend has the same lines for its own arrays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from qlip_core.errors import GenerationError

Integers = TypeVar("Integers", bound=Any)

# Odd multipliers that mix bits well: those of the 32-bit finaliser "lowbias32", and the golden ratio.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
GOLDEN = 0x9E3779B9

SCHEDULES = ("constant", "linear")
MAX_SCALE, MAX_TEMPERATURE = 100.0, 100.0
MIN_TEMPERATURE = 1e-6  # other than 0


@dataclass(frozen=True)
class Sampling:
    """How sub-tokens are chosen.

    `temperature` 0 takes the likeliest value. `top_k` keeps the k largest logits and any equal to the k-th
    (0: all), `top_p` the likeliest values until their probabilities sum to p. `cfg_scale` s is the strength
    of classifier-free guidance, `l_null + s (l_text - l_null)`; 1 is none. `cfg_schedule` "linear" rises from
    1 at the first step to s at the last; guidance is limited to the steps in `cfg_interval`, two shares of
    all steps.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cfg_scale: float = 1.0
    cfg_schedule: str = "constant"
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The settings in JSON types."""
        return asdict(self) | {"cfg_interval": list(self.cfg_interval)}

    def check(self, vocab_size: int) -> None:
        """Raises GenerationError for a setting out of range."""
        _in_range("temperature", self.temperature, 0, MAX_TEMPERATURE)
        # Below it, logits / temperature would exceed float32's range.
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise GenerationError(
                f"temperature (={self.temperature}) must be 0 (the likeliest) or at least "
                f"{MIN_TEMPERATURE:g}"
            )
        _in_range("cfg_scale", self.cfg_scale, 0, MAX_SCALE)
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p (={self.top_p}) must be above 0 and at most 1 (1: all)")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int | np.integer):
            raise GenerationError(f"top_k (={self.top_k!r}) must be an integer")
        if not 0 <= self.top_k <= vocab_size:
            raise GenerationError(
                f"top_k (={self.top_k}) must be 0 (all) to {vocab_size}, the values of a sub-token"
            )
        if self.cfg_schedule not in SCHEDULES:
            raise GenerationError(
                f'cfg_schedule is "{self.cfg_schedule}", expected one of {", ".join(SCHEDULES)}'
            )
        interval = self.cfg_interval
        if (
            not isinstance(interval, Sequence)
            or len(interval) != 2
            or not all(_is_number(x) for x in interval)
        ):
            raise GenerationError(f"cfg_interval (={interval!r}) must be two numbers")
        start, end = interval
        if not 0 <= start <= end <= 1:
            raise GenerationError(
                f"cfg_interval (={start:g} to {end:g}) must lie within 0 to 1, the start first"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:  # NaN is in no range
        raise GenerationError(f"{name} (={value}) must be a number from {low:g} to {high:g}")


def check_seed(seed: object) -> int:
    """A seed as an int of 0 to 2^64 - 1. Raises GenerationError."""
    try:
        if isinstance(seed, bool | np.bool_):
            raise TypeError
        number = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise GenerationError(f"seed (={seed!r}) must be an integer") from None
    if not 0 <= number < 1 << 64:
        raise GenerationError(f"seed (={number}) must be 0 to 2^64 - 1")
    return number


# -- guidance ----------------------------------------------------------------------------------


def guidance_scales(sampling: Sampling, steps: int) -> np.ndarray:
    """Scale s of each step: float32 [steps]; 1 outside the interval."""
    share = np.arange(steps) / max(steps - 1, 1)
    scale = np.full(steps, sampling.cfg_scale)
    if sampling.cfg_schedule == "linear":
        scale = 1 + (sampling.cfg_scale - 1) * share
    start, end = sampling.cfg_interval
    return np.where((share >= start) & (share <= end), scale, 1).astype(np.float32)


# -- noise -------------------------------------------------------------------------------------


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint32 in which every input bit flips every output bit half the time."""
    first, second = (np.uint32(m) for m in MULTIPLIERS)
    x = x ^ (x >> np.uint32(16))
    x = x * first
    x = x ^ (x >> np.uint32(15))
    x = x * second
    return x ^ (x >> np.uint32(16))


def step_keys(seed: int, images: Sequence[int], steps: int) -> np.ndarray:
    """Hash keys of each step's noise, uint32 [steps, B, 2], from seed, number of the image and step."""
    numbers = np.asarray(images, np.uint32)[None, :, None]
    step = np.arange(steps, dtype=np.uint32)[:, None, None]
    # Two keys for each step, so that two steps' noise is never the same sequence at different offsets.
    key = np.array([0x243F6A88, 0x85A308D3], np.uint32)[None, None]
    for word in (np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32), numbers, step):
        key = mix((key ^ word) + np.uint32(GOLDEN))
    return key


def hash_values(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Keys uint32 [B, 2] and token values uint32 [V] -> hashes uint32 [B, V]."""
    x = mix(values * np.uint32(GOLDEN) + keys[:, :1])
    return mix(x ^ keys[:, 1:])


def gumbel(hashed: np.ndarray) -> np.ndarray:
    """uint32 -> float32 noise, -log(-log(1 - u)), u in (0, 1) from the upper 31 bits.

    u is the same float32 everywhere: an int32 rounded to nearest, times a power of two, plus one. 1 - u is
    computed inside log1p, so that small u, which make large noise, keep all their bits.
    """
    u = (hashed >> np.uint32(1)).astype(np.int32).astype(np.float32)
    u = np.minimum(u * np.float32(2**-31) + np.float32(2**-32), np.float32(1 - 2**-24))
    return -np.log(-np.log1p(-u))


# -- a step ------------------------------------------------------------------------------------


SHARE_BITS = 30  # bits of p in top-p's integer arithmetic


def largest_odds(values: int) -> int:
    """The integer odds of the likeliest of `values` values: a power of two such that all sum to at most 2^57."""
    return 1 << min(40, 57 - (values - 1).bit_length())


def share_of(total: Integers, p: float) -> Integers:
    """p times `total` (int64 below 2^58, of any backend), rounded down, without overflowing int64."""
    share, low = round(p * (1 << SHARE_BITS)), (1 << SHARE_BITS) - 1
    return (total >> SHARE_BITS) * share + (((total & low) * share) >> SHARE_BITS)


def keep(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Logits float32 [B, V], already divided by the temperature, with -inf for what the filters drop.

    Both filters drop what is below a threshold, so equal logits are kept or dropped together. top-k's is the
    k-th largest; top-p's the smallest of those k whose larger ones' probabilities sum to less than p.
    Probabilities are summed as integers, because a float32 sum depends on its order, which over thousands
    of values decides how much of the tail is kept.
    """
    V = logits.shape[-1]
    k = min(top_k, V) if top_k else V
    if k == V and top_p >= 1:
        return logits
    largest = np.sort(logits, axis=-1)[:, ::-1][:, :k]
    threshold = largest[:, -1:]
    if top_p < 1:
        odds = np.exp(largest - largest[:, :1]) * np.float32(largest_odds(k))
        odds = odds.astype(np.int64)
        upto = np.cumsum(odds, axis=-1)
        limit = share_of(upto[:, -1:], top_p)
        count = np.maximum((upto - odds < limit).sum(-1, keepdims=True), 1)
        threshold = np.take_along_axis(largest, count - 1, axis=-1)
    return np.where(logits >= threshold, logits, np.float32(-math.inf))


def choose(logits: np.ndarray, keys: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Guided logits float32 [B, V] and a step's keys uint32 [B, 2] -> values int64 [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    kept = keep(logits / np.float32(sampling.temperature), sampling.top_k, sampling.top_p)
    values = np.arange(logits.shape[-1], dtype=np.uint32)
    return (kept + gumbel(hash_values(keys, values))).argmax(-1)
