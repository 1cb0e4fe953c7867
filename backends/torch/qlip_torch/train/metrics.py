"""A run's progress: one live line, metrics as JSON lines, and TensorBoard if it is installed.

`metrics.jsonl` has one object a line; docs/training.md has the table of its fields.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from qlip_core.files import naming, write_text
from qlip_torch.train.stage import StepReport
from qlip_torch.train.throughput import matmul_rate, peak_memory, size_text

METRICS = "metrics.jsonl"
# Without a terminal, a line is written every so many seconds, for the log of a batch job.
QUIET_SECONDS = 60.0


@dataclass(frozen=True)
class Speed:
    """What an image costs and what the device can do, to compute utilisation."""

    flops: float
    """Model FLOPs of one image's training step."""
    rate: float
    """Measured FLOP/s of matrix products on one device."""
    ranks: int

    @classmethod
    def measure(cls, flops: float, device: torch.device, dtype: torch.dtype, ranks: int) -> Speed:
        return cls(flops, matmul_rate(device, dtype), ranks)

    def utilisation(self, images_per_second: float) -> float:
        return self.flops * images_per_second / (self.rate * self.ranks)


class Metrics:
    """The record of a stage, kept by the first rank only."""

    def __init__(
        self,
        folder: str | Path,
        every: int,
        *,
        stage: int | str,
        steps: int,
        start: int,
        batch: int,
        code_dim: int,
        speed: Speed,
        device: torch.device,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._every, self._steps, self._batch = every, steps, batch
        self._stage = stage if isinstance(stage, str) else f"stage {stage}"
        self._code_dim, self._speed, self._device = code_dim, speed, device
        _forget_after(self.folder / METRICS, start)
        before = read_metrics(self.folder)
        self._seconds = before[-1]["seconds"] if before else 0.0
        self._file = (self.folder / METRICS).open("a", encoding="utf-8")
        self._board = _tensorboard(self.folder, start)
        self._terminal = sys.stderr.isatty()
        self._shown = -math.inf
        self._step, self._time = start, time.perf_counter()
        self._begin = (start, self._time)
        self._rate, self._waited = 0.0, 0.0
        self._reported = 0

    def record(
        self,
        done: int,
        report: StepReport,
        position: Callable[[], dict[str, Any]] | None = None,
        waited: float = 0.0,
        always: bool = False,
    ) -> None:
        """Record a step, `done` steps in: a line of JSON every so many steps, and the live line. `position`
        returns the data's position, which counts and names the samples skipped on this rank; `waited` is the
        seconds that this step waited for data; `always` writes the line of JSON in any case."""
        now = time.perf_counter()
        self._waited += waited
        last = done == self._steps
        if done % self._every == 0 or last or report.layer_norms or always:
            elapsed = max(now - self._time, 1e-9)
            self._seconds += elapsed
            self._rate = (done - self._step) * self._batch / elapsed
            values = self._values(done, report) | {"data_wait": min(self._waited / elapsed, 1.0)}
            self._step, self._time, self._waited = done, now, 0.0
            if position is not None and (skipped := self._skipped(position().get("bad"))):
                values["skipped"] = skipped
            self._write(done, values)
            self._plot(done, values)
        if self._terminal or now - self._shown > QUIET_SECONDS or last:
            self._shown = now
            self._show(done, report)

    def _skipped(self, bad: dict[str, Any] | None) -> dict[str, int]:
        """Counts by reason so far; prints the named ones that are new."""
        if not bad:
            return {}
        for named in bad["named"][self._reported :]:
            sys.stderr.write(("\n" if self._terminal else "") + f"skipped: {named}\n")
        self._reported = max(self._reported, len(bad["named"]))
        return bad["counts"]

    def leave_out(self, seconds: float) -> None:
        """Exclude these seconds (spent on pictures) from training time and images per second."""
        self._time += seconds

    def _values(self, done: int, report: StepReport) -> dict[str, Any]:
        values: dict[str, Any] = {
            "images": done * self._batch,
            "terms": report.terms,
            "total": report.total,
            "gradient_norm": report.gradient_norm,
            "rate": report.rate,
            "learning_rates": report.learning_rates,
            "seconds": self._seconds,
            "images_per_second": self._rate,
            "utilisation": self._speed.utilisation(self._rate),
            "memory": peak_memory(self._device),
        }
        if report.logit_scale is not None:
            values["logit_scale"] = report.logit_scale
        if report.bits is not None:
            values["bits"] = {
                "low": report.bits.low,
                "high": report.bits.high,
                "dead": report.bits.dead,
                "entropy": self._entropy(report),
            }
        if report.layer_norms:
            values["layer_norms"] = report.layer_norms
        return values

    def _entropy(self, report: StepReport) -> float:
        """Entropy of the mean soft code as a share of its L bits."""
        return report.terms["codebook_entropy"] / math.log(2) / self._code_dim

    def amend(self, values: dict[str, Any]) -> None:
        """Add values to the last line of JSON."""
        begin, done, before = self._last
        self._file.truncate(begin)
        self._write(done, {**before, **values})
        self._plot(done, values)

    def _write(self, done: int, values: dict[str, Any]) -> None:
        self._last = (self._file.seek(0, os.SEEK_END), done, values)
        with naming(self._file.name):
            self._file.write(json.dumps({"step": done, **values}) + "\n")
            self._file.flush()

    def _plot(self, done: int, values: dict[str, Any]) -> None:
        if self._board is not None:
            for name, value in _flat(values):
                self._board.add_scalar(f"{self._stage.replace(' ', '')}/{name}", value, done)

    def line(self, done: int, report: StepReport, width: int | None = None) -> str:
        """The live line, most important first: as many of its parts as fit into `width` (None: all)."""
        pieces = [
            f"{self._stage}  {done}/{self._steps}",
            f"  ETA {self._remaining(done)}",
            f"  {self._rate:.0f} img/s",
            f"  loss {_short(report.total)}",
        ]
        if report.bits is not None:
            bits = report.bits
            pieces.append(f"  bits {bits.low:.2f}-{bits.high:.2f}")
            if not bits.healthy:
                pieces.append(" (healthy 0.30-0.70)")
            if bits.dead:
                pieces.append(f", {bits.dead:.0%} dead")
            pieces.append(f", entropy {self._entropy(report):.0%}")
        pieces += [
            f"  {self._speed.utilisation(self._rate):.0%} of peak",
            f"  {size_text(peak_memory(self._device))}",
            *(f"  {name} {_short(report.terms[name])}" for name in _shown(report)),
        ]
        lengths = accumulate(len(piece) for piece in pieces)
        return "".join(
            piece for piece, end in zip(pieces, lengths) if width is None or end <= width
        )

    def _remaining(self, done: int) -> str:
        start, began = self._begin
        each = (time.perf_counter() - began) / max(done - start, 1)
        return duration(each * (self._steps - done))

    def _show(self, done: int, report: StepReport) -> None:
        if self._terminal:
            width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
            sys.stderr.write("\r" + self.line(done, report, width).ljust(width))
        else:
            sys.stderr.write(self.line(done, report) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self._terminal and self._shown > -math.inf:
            sys.stderr.write("\n")
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a stage's `metrics.jsonl`, without an incomplete last one; [] if there is no file."""
    path = Path(folder) / METRICS
    return list(_lines(path)) if path.is_file() else []


def duration(seconds: float) -> str:
    """123 h, 3 h 05 min, 12 min 04 s, 9 s."""
    whole = round(seconds)
    if whole >= 360000:
        return f"{whole // 3600:,} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _forget_after(path: Path, step: int) -> None:
    """Drop lines after the step that a run resumes from; they will be written again."""
    if not path.is_file():
        return
    kept = [json.dumps(line) for line in _lines(path) if line["step"] <= step]
    write_text(path, "".join(f"{line}\n" for line in kept))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the line being written when a run was killed
            return


def _shown(report: StepReport) -> list[str]:
    return [name for name in report.terms if not name.endswith("_entropy")]


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def _flat(values: dict[str, Any], where: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{name}/")
        else:
            yield f"{where}{name}", value


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # Hides the steps after the one that the run resumes from, as `_forget_after` drops them.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
