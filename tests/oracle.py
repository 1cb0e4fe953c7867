"""The numpy reference in float64, which every backend is held to, and how near is near enough."""

from __future__ import annotations

import numpy as np
import pytest
from configurations import CONFIGURATIONS

from qlip_core import reference
from qlip_core.architecture import ArrayWeights
from qlip_core.backends import Network
from qlip_core.bsq import bits_to_codes
from qlip_core.config import QLIPConfig

TOLERANCE = 1e-4  # of embeddings and pixels, absolute
SURE = 1e-5  # bits are equal wherever |u| is above this

each_configuration = pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


def reference_network(config: QLIPConfig, weights) -> Network:
    return reference.BACKEND.network(
        config, ArrayWeights(config, weights), device="cpu", dtype="float64"
    )


def codes_of(config: QLIPConfig, u: np.ndarray) -> np.ndarray:
    return bits_to_codes(u > 0) if config.quantizes else u


def assert_same_latents(network: Network, oracle: Network, pixels: np.ndarray) -> None:
    u = oracle.latents(pixels)
    np.testing.assert_allclose(network.latents(pixels), u, rtol=0, atol=SURE)
    sure = np.abs(u) > SURE
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(network.encode(pixels)[sure], (u > 0)[sure])
