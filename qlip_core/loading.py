"""Images to batches of pixels: threads decode and resize while the model works, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from typing import TypeVar

import numpy as np
from PIL import Image

from qlip_core.errors import ImageError
from qlip_core.images import ImageLike
from qlip_core.preprocessing import Preprocessing

T = TypeVar("T")
OnError = Callable[[int, ImageError], None]
Progress = Callable[[int], None]
"""Called during the work with the number of items done since the last call."""
DEFAULT_BATCH = 16


def default_workers() -> int:
    """Threads that load images. Pillow frees the interpreter's lock while it decodes and resizes."""
    return min(16, (os.cpu_count() or 2) + 1)


def pixel_batches(
    images: Sequence[ImageLike],
    preprocessing: Preprocessing,
    *,
    batch_size: int = DEFAULT_BATCH,
    workers: int | None = None,
    on_error: OnError | None = None,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield (positions in `images`, pixels float32 [b, 3, S, S]) for all images that can be read.

    At most three batches of pixels are in memory. An image that cannot be read raises ImageError, or,
    with `on_error`, is passed to it and left out.
    """
    check_batch_size(batch_size)
    # Pillow reads a file when its pixels are first used, so two threads would read an image given twice at the
    # same time.
    locks = {id(image): Lock() for image in images if isinstance(image, Image.Image)}

    def load(image: ImageLike) -> np.ndarray:
        with locks.get(id(image), nullcontext()):
            return preprocessing(image)

    positions: list[int] = []
    batch: list[np.ndarray] = []
    ahead = 2 * batch_size
    for position, result in _in_order(load, images, workers or default_workers(), ahead):
        try:
            pixels = result.result()
        except ImageError as error:
            if on_error is None:
                raise
            on_error(position, error)
            continue
        positions.append(position)
        batch.append(pixels)
        if len(batch) == batch_size:
            stacked, batch = np.stack(batch), []
            yield positions, stacked
            positions = []
    if batch:
        yield positions, np.stack(batch)


def _in_order(
    work: Callable[[ImageLike], np.ndarray],
    items: Sequence[ImageLike],
    workers: int,
    ahead: int,
) -> Iterator[tuple[int, Future[np.ndarray]]]:
    executor = ThreadPoolExecutor(min(workers, max(1, len(items))), thread_name_prefix="images")
    try:
        waiting: deque[tuple[int, Future[np.ndarray]]] = deque()
        for position, item in enumerate(items):
            waiting.append((position, executor.submit(work, item)))
            if len(waiting) >= ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def slices(array: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Consecutive runs of at most `batch_size` rows."""
    check_batch_size(batch_size)
    for start in range(0, len(array), batch_size):
        yield array[start : start + batch_size]


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError unless it is a positive whole number."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise ValueError(f"batch_size (={batch_size!r}) must be a whole number")
    if batch_size < 1:
        raise ValueError(f"batch_size (={batch_size}) must be at least 1")
