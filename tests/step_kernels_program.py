"""Draws with the kernels of `qlip_torch.step_kernels` in Triton's interpreter, and with numpy: the same?

A program, because Triton reads TRITON_INTERPRET when it is imported. In float32, which the interpreter
multiplies right (bfloat16 it does not); on the GPU the kernels take bfloat16.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from test_generator import (
    CONFIGS,
    SETTINGS,
    captions_of,
    drawn,
    numpy_of,
    order_of,
    weights_of,
    without_recording,
)

from qlip_core.generator.sampling import Sampling, choose, gumbel, hash_values
from qlip_torch import generator, sampler, step_kernels
from qlip_torch.step_kernels import FusedStep


def test_choice() -> None:
    """Among many values, with signs, zeros and equals at the threshold."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.standard_normal((3, 1000)).astype(np.float32), 1)
    keys = rng.integers(0, 2**32, (3, 2), np.uint32)
    noise = torch.from_numpy(gumbel(hash_values(keys, np.arange(1000, dtype=np.uint32))))[None]
    count = torch.tensor([5])
    for top_k in (1, 2, 300, 500, 999, 1000):
        sampling = Sampling(temperature=0.9, top_k=top_k)
        drawn = torch.zeros(3, 7, dtype=torch.int64)
        FusedStep.choose(torch.from_numpy(logits), noise, None, count, count, drawn, sampling)
        np.testing.assert_array_equal(drawn[:, 5], choose(logits, keys, sampling))
    drawn, scales = torch.zeros(1, 7, dtype=torch.int64), torch.full((7,), 3.0)
    greedy = Sampling(temperature=0, cfg_scale=3)
    both = torch.from_numpy(logits[:2])
    FusedStep.choose(both, None, scales, count, count, drawn, greedy)
    guided = logits[1:2] + np.float32(3) * (logits[:1] - logits[1:2])
    np.testing.assert_array_equal(drawn[:, 5], choose(guided, keys[:1], greedy))


if __name__ == "__main__":
    test_choice()
    with (
        patch.object(generator, "_reorders", lambda weight: False),  # weights as they lie on a GPU
        patch.object(FusedStep, "suits", lambda self, rows: True),
        # Several pieces of a row and of the cache.
        patch.multiple(step_kernels, _INNER=8, _TILE=32),
        patch.object(sampler.Recording, "_record", without_recording),
    ):
        for name in ("separate rows", "qk norm"):
            # The interpreter takes a second a step: two patches are enough.
            config = replace(CONFIGS[name], grid=(1, 2), num_hidden_layers=2)
            weights, captions = weights_of(config), captions_of(config)
            model = generator.load(config, weights)
            fused = FusedStep(model, model.rope("cpu"))
            network = sampler.TorchGenerator(model, device="cpu", dtype="float32", fused=fused)
            network.records = True
            # Padded captions with guidance, and one whole caption; all but the first chosen by a kernel.
            for chosen, sampling in (
                (captions, SETTINGS["filtered"]),
                (captions, Sampling(0.7, cfg_scale=3, cfg_schedule="linear", top_k=7)),
                (captions[1:2], SETTINGS["plain"]),
            ):
                order = order_of(config, chosen, sampling, list(range(len(chosen))))
                expected = drawn(numpy_of(config, weights), order)
                np.testing.assert_array_equal(drawn(network, order), expected)
    print("same")
