"""Lets only one run write to a folder at a time: two would destroy each other's records.

The system releases the lock when the process that holds it ends, however it ends.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlip_core.errors import RecipeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
# After a trainer is killed, its data processes hold the lock until they notice.
_PATIENCE = 5.0


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock the folder, which is created if needed. If the system or the file system has no locks, go on without.
    Raises RecipeError, naming the other process, if a run already holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise RecipeError(
                        f"{folder}: {holder} is training there: wait for it or stop it, or choose "
                        "another folder (--out)"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
