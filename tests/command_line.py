"""Running the `qlip` command in this process, and pictures for it, shared by tests."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qlip_cli.main import main


@dataclass(frozen=True)
class Run:
    """What a run left: exit status, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The message of a run that ended with `error: ...` in one line, exit 2 and no result."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip("\n")


Qlip = Callable[..., Run]


def runner(model: Path, capsys: pytest.CaptureFixture[str]) -> Qlip:
    """A function that runs `qlip COMMAND --model MODEL --backend numpy ...` and captures it.

    `plain` leaves the two options out.
    """

    def run(command: str, *arguments: str | Path, plain: bool = False) -> Run:
        defaults = [] if plain else ["--model", str(model), "--backend", "numpy"]
        code = main([command, *defaults, *map(str, arguments)])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


def picture(seed: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """A smooth random picture, width x height."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))
