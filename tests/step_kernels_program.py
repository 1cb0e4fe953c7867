"""Draws with the kernels of `qlip_torch.step_kernels` in Triton's interpreter, and with numpy: the same?

A program, because Triton reads TRITON_INTERPRET when it is imported. In float32, which the interpreter
multiplies right (bfloat16 it does not); on the GPU the kernels take bfloat16.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
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

from qlip_torch import generator, sampler, step_kernels
from qlip_torch.step_kernels import FusedStep

if __name__ == "__main__":
    with (
        patch.object(generator, "_reorders", lambda weight: False),  # weights as they lie on a GPU
        patch.object(FusedStep, "suits", lambda self, rows: True),
        # Several pieces of a row and of the cache.
        patch.multiple(step_kernels, _INNER=16, _TILE=32),
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
            # Padded captions with guidance, and one whole caption.
            for chosen, sampling in (
                (captions, SETTINGS["filtered"]),
                (captions[1:2], SETTINGS["plain"]),
            ):
                order = order_of(config, chosen, sampling, list(range(len(chosen))))
                expected = drawn(numpy_of(config, weights), order)
                np.testing.assert_array_equal(drawn(network, order), expected)
    print("same")
