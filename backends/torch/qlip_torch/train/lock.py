"""One run at a time in a folder: two that write there would destroy each other's record.

The system lets go of the lock when the process that holds it ends, however it ends.
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
# The data processes of a trainer that was killed hold its lock until they see that it is gone.
_PATIENCE = 5.0


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be. Goes on without where the system or the file system has no
    locks. Raises RecipeError, naming the other process, where a run holds it already."""
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
