"""How the processes that prepare batches start and end, whatever happens to the trainer."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CAN_BLOCK = hasattr(signal, "pthread_sigmask")  # not on Windows


def start_worker(worker: int) -> None:
    """What a worker does first.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group. The trainer finishes its step and saves,
    then stops its workers itself; a second SIGTERM comes from a trainer that has waited too long.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL)
    )
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    # torch itself checks only between batches, and can then wait for ever on its full result queue. Both checks
    # are needed: the trainer may be gone before this line runs, so that the parent never changes; and its pipe
    # alone does not tell, since workers forked later hold it open as well.
    parent, trainer = os.getppid(), multiprocessing.parent_process()
    while os.getppid() == parent and trainer is not None and trainer.is_alive():
        time.sleep(1.0)
    os._exit(1)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Wraps the start of workers.

    Signals are blocked until a worker has its own handlers. `tokenizers`, which warns about a fork after it
    has used threads, is told not to use them. Existing objects are frozen, so that a worker's garbage
    collector does not free a GPU tensor, which would crash the worker.
    """
    name = "TOKENIZERS_PARALLELISM"
    silent = name not in os.environ
    before = None
    if _CAN_BLOCK:
        if multiprocessing.get_start_method() != "fork":
            # It would be started along with the first worker, and unblock the signals.
            resource_tracker.ensure_running()
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
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_death(error: BaseException) -> bool:
    """Whether an error is torch's that a worker is gone, raised when the system tells, wherever the trainer is."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
