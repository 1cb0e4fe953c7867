"""The rule of sampling: noise that is the same bits everywhere, filters and guidance by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch

from qlip_core.errors import GenerationError
from qlip_core.generator import sampling
from qlip_core.generator.sampling import Sampling, check_seed, guidance_scales, step_keys
from qlip_mlx import sampler as on_mlx
from qlip_torch import sampler as on_torch

SEEDS = (0, 1, 2**31, 2**40 + 3, 2**64 - 1)


def word(x: int) -> int:
    """The 32-bit finaliser in plain integers: the definition, once more."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def hash_by_hand(seed: int, image: int, step: int, value: int) -> int:
    keys = []
    for key in (0x243F6A88, 0x85A308D3):
        for part in (seed & 0xFFFFFFFF, seed >> 32, image, step):
            key = word((key ^ part) + 0x9E3779B9 & 0xFFFFFFFF)
        keys.append(key)
    first = word(value * 0x9E3779B9 + keys[0] & 0xFFFFFFFF)
    return word(first ^ keys[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_bits_are_the_same_everywhere(seed: int) -> None:
    images, steps, count = [0, 7, 2**32 - 1], 3, 5000
    keys = step_keys(seed, images, steps)
    values = np.arange(count, dtype=np.uint32)
    for step in range(steps):
        hashed = sampling.hash_values(keys[step], values)
        for row, image in enumerate(images):
            for value in (0, 1, 4095, count - 1):
                assert hashed[row, value] == hash_by_hand(seed, image, step, value)
        tensor = on_torch.hash_values(torch.from_numpy(keys.view(np.int32))[step], count)
        np.testing.assert_array_equal(tensor.numpy().view(np.uint32), hashed)
        np.testing.assert_array_equal(
            np.array(on_mlx.hash_values(mx.array(keys)[step], count)), hashed
        )
        noise = sampling.gumbel(hashed)
        np.testing.assert_allclose(on_torch.gumbel(tensor).numpy(), noise, rtol=0, atol=2e-6)
        ours = np.array(on_mlx.gumbel(mx.array(hashed)))
        np.testing.assert_allclose(ours, noise, rtol=0, atol=2e-6)


def test_noise_at_the_ends_of_its_range() -> None:
    ends = np.array([0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    noise = sampling.gumbel(ends)
    exact = -np.log(-np.log1p(-np.minimum((ends >> 1) / 2**31 + 2**-32, 1 - 2**-24)))
    np.testing.assert_allclose(noise, exact, atol=2e-6)
    assert noise[0] == pytest.approx(32 * np.log(2), abs=1e-5) and np.isfinite(noise).all()
    signed = torch.from_numpy(ends.view(np.int32))
    np.testing.assert_allclose(on_torch.gumbel(signed).numpy(), noise, atol=2e-6)
    np.testing.assert_allclose(np.array(on_mlx.gumbel(mx.array(ends))), noise, atol=2e-6)


def test_noise_is_gumbel_noise() -> None:
    keys = step_keys(0, range(16), 64).reshape(-1, 2)
    noise = sampling.gumbel(sampling.hash_values(keys, np.arange(1024, dtype=np.uint32)))
    million = noise.size
    assert noise.mean() == pytest.approx(0.5772, abs=5 * 1.2825 / million**0.5)
    assert noise.std() == pytest.approx(1.2825, abs=0.006)
    # Neighbouring values, steps and images are not correlated.
    by_place = noise.reshape(64, 16, 1024)
    for axis in range(3):
        a, b = (np.delete(by_place, i, axis).ravel() for i in (0, -1))
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / million**0.5


def test_drawn_shares_are_the_probabilities() -> None:
    """Chi-squared over 40,000 choices among six values."""
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], np.float32))
    keys = step_keys(11, range(200), 200).reshape(-1, 2)
    chosen = sampling.choose(np.broadcast_to(logits, (len(keys), 6)), keys, Sampling())
    expected = np.exp(logits) * len(keys)
    chi = ((np.bincount(chosen, minlength=6) - expected) ** 2 / expected).sum()
    assert chi < 20.5  # 5 degrees of freedom: exceeded once in a thousand


def all_kept(rows: np.ndarray, top_k: int, top_p: float) -> list[np.ndarray]:
    """`keep` of numpy, PyTorch and MLX."""
    return [
        sampling.keep(rows, top_k, top_p),
        on_torch.keep(torch.from_numpy(rows), top_k, top_p).numpy(),
        np.array(on_mlx.keep(mx.array(rows), top_k, top_p)),
    ]


def kept(logits: list[float], top_k: int = 0, top_p: float = 1.0) -> list[int]:
    """Which values survive, the same on all three."""
    row = np.array([logits], np.float32)
    results = all_kept(row, top_k, top_p)
    for result in results:
        np.testing.assert_array_equal(result, results[0])
        finite = np.isfinite(result)
        np.testing.assert_array_equal(result[finite], row[finite])
    return np.flatnonzero(np.isfinite(results[0][0])).tolist()


def test_filters_by_hand() -> None:
    shares = [float(np.log(p)) for p in (0.1, 0.4, 0.05, 0.25, 0.2)]
    assert kept(shares) == [0, 1, 2, 3, 4]
    assert kept(shares, top_k=2) == [1, 3]
    assert kept(shares, top_k=5) == [0, 1, 2, 3, 4]
    # Values are added until p is reached: 0.4; 0.4 + 0.25; ...
    assert kept(shares, top_p=0.39) == [1]
    assert kept(shares, top_p=0.41) == [1, 3]
    assert kept(shares, top_p=0.8) == [1, 3, 4]
    assert kept(shares, top_p=1e-9) == [1]
    # After top-k the rest is the whole: 0.4/0.65 = 0.615.
    assert kept(shares, top_k=2, top_p=0.61) == [1]
    assert kept(shares, top_k=2, top_p=0.62) == [1, 3]
    # Equals stay or go together.
    assert kept([1.0, 3.0, 2.0, 2.0], top_k=2) == [1, 2, 3]
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.3) == [0, 1, 2, 3]


@pytest.mark.parametrize("spread", [1, 4, 10])
def test_top_p_keeps_the_same_of_thousands_of_values(spread: float) -> None:
    """At g = 14, where float32's sum of the likelihoods would depend on its order."""
    rows = np.random.default_rng(0).standard_normal((16, 1 << 14)).astype(np.float32) * spread
    ordered = np.sort(rows.astype(np.float64))[:, ::-1]
    odds = np.exp(ordered - ordered[:, :1])
    before = np.cumsum(odds, 1) - odds
    for top_p in (0.5, 0.95, 0.999, 0.99999):
        exact = (before < top_p * odds.sum(1, keepdims=True)).sum(1)
        numpy, on_torchs, on_mlxs = (np.isfinite(result) for result in all_kept(rows, 0, top_p))
        np.testing.assert_array_equal(on_torchs, numpy)
        np.testing.assert_array_equal(on_mlxs, numpy)
        assert abs(numpy.sum(1) - exact).max() <= 1


@pytest.mark.parametrize("bits", [1, 14, 17, 20, 24])
def test_top_ps_sums_stay_in_their_range(bits: int) -> None:
    total = np.array(sampling.largest_odds(1 << bits), np.int64) << bits
    assert total.item() >> 4 <= 1 << 53 and total.item() <= 1 << 57
    for top_p in (1e-9, 0.1, 0.9, 1 - 2**-30):
        assert sampling.share_of(total, top_p) == pytest.approx(
            top_p * total.item(), rel=1e-9, abs=1e9
        )


def test_the_lowest_of_equals_is_chosen() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 0.0]], np.float32)
    greedy = Sampling(temperature=0)
    keys = step_keys(0, [0], 1)[0]
    assert sampling.choose(logits, keys, greedy).tolist() == [1]
    assert on_torch.choose(torch.from_numpy(logits), None, greedy).tolist() == [1]
    assert np.array(on_mlx.choose(mx.array(logits), None, greedy)).tolist() == [1]


def test_guidance_by_schedule() -> None:
    np.testing.assert_array_equal(guidance_scales(Sampling(cfg_scale=3), 4), [3, 3, 3, 3])
    rising = Sampling(cfg_scale=3, cfg_schedule="linear")
    np.testing.assert_array_equal(guidance_scales(rising, 5), [1, 1.5, 2, 2.5, 3])
    within = Sampling(cfg_scale=3, cfg_interval=(0.25, 0.5))
    np.testing.assert_array_equal(guidance_scales(within, 5), [1, 3, 3, 1, 1])
    np.testing.assert_array_equal(guidance_scales(rising, 1), [1])


def test_seeds() -> None:
    assert [check_seed(s) for s in (0, np.int64(5), 2**64 - 1)] == [0, 5, 2**64 - 1]
    for bad in (2**64, -1, 1.0, "1", None, True):
        with pytest.raises(GenerationError, match="seed"):
            check_seed(bad)
    different = {step_keys(seed, [image], 2)[step, 0].tobytes()
                 for seed in SEEDS for image in (0, 1) for step in (0, 1)}  # fmt: skip
    assert len(different) == 4 * len(SEEDS)
