"""Fixtures shared by all tests: the official tiny checkpoint, and one of our own with a tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes run tests (pyproject.toml): a thread each, or they would wait for one another.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import numpy as np
import pytest
from configurations import random_weights
from safetensors.numpy import load_file

import qlip_core as qlip

OFFICIAL = Path(__file__).parent / "fixtures" / "official_tiny"

# A vocabulary in CLIP's layout: 256 byte symbols, each also at the end of a word, a few merges.
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("i", "n</w>"), ("a", "n")]


@pytest.fixture(scope="session", autouse=True)
def plain_output() -> Iterator[None]:
    """Without the colours that a system may ask for wherever output goes, as some do that run tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def official() -> Path:
    return OFFICIAL


@pytest.fixture(scope="session")
def expected() -> dict[str, np.ndarray]:
    """Inputs, and what the published implementation computes from them in float32."""
    return load_file(OFFICIAL / "expected.safetensors")


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes, in CLIP's order of the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt, 520 tokens: start 518, end 519."""
    folder = tmp_path_factory.mktemp("tokenizer")
    symbols = byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    lines = ["#version: 0.2", *(" ".join(m) for m in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "special_tokens_map.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<|startoftext|>"},
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A checkpoint folder of the tiny preset with random weights and a tokenizer."""
    config = qlip.PRESETS["tiny"]
    text = replace(config.text_config, vocab_size=520, bos_token_id=518, eos_token_id=519)
    config = replace(config, text_config=text)
    card = "---\nlicense: cc-by-4.0\nnote: random weights, for tests\n---\n# tiny\n"
    return qlip.save_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny",
        config,
        random_weights(config, seed=1),
        tokenizer_from=tokenizer_folder,
        card=card,
    )
