"""Runs an iterator ahead in a thread, so that reading continues while its consumer is busy."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

_LOOK_UP = 0.1  # seconds between checks that the consumer is still there
_PATIENCE = 5.0


class _End:
    """The thread's last item: the error that ended the iterator, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def in_background(source: Generator[T, None, None], ahead: int) -> Generator[T, None, None]:
    """The items of `source` in order, at most `ahead` of them waiting; its errors are raised here.

    When the consumer stops early `source` is closed, in its own thread.
    """
    items: queue.Queue[T | _End] = queue.Queue(ahead)
    stopped = threading.Event()

    def hand_over(item: T | _End) -> None:
        while not stopped.is_set():
            try:
                items.put(item, timeout=_LOOK_UP)
                return
            except queue.Full:
                continue

    def run() -> None:
        error = None
        try:
            for item in source:
                hand_over(item)
                if stopped.is_set():
                    break
        except BaseException as caught:
            error = caught
        finally:
            source.close()
            hand_over(_End(error))

    # A daemon: a read that hangs must not keep an interrupted program alive.
    thread = threading.Thread(target=run, name="background", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join(_PATIENCE)
