"""How the processes that prepare batches begin and end, whatever happens to the trainer."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start_worker(worker: int) -> None:
    """What a worker does first.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group. The trainer wants to finish its step
    and save, then stops its workers by itself; a second SIGTERM is from a trainer tired of waiting.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL)
    )
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    # torch's own watch looks only between batches, and then can wait for ever on its full result queue.
    # The trainer may be gone before this line runs, so a change of parent alone would be missed; and its
    # pipe alone, since workers forked later hold it open as well.
    parent, trainer = os.getppid(), multiprocessing.parent_process()
    while os.getppid() == parent and trainer is not None and trainer.is_alive():
        time.sleep(1.0)
    os._exit(1)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Around the start of workers.

    Until a worker has its own handlers, signals wait; and `tokenizers`, which warns of a fork after it
    used its threads, is told that the child will not. What lies about when a worker is forked is frozen
    for its garbage collector: a tensor of the GPU that it let go of would take the worker down.
    """
    name = "TOKENIZERS_PARALLELISM"
    silent = name not in os.environ
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    if silent:
        os.environ[name] = "false"
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if silent:
            del os.environ[name]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
