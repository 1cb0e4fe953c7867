"""The interface of training for the command line, and how a backend that trains is found: by entry point."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from qlip_core.backends import backend_names, get_backend, is_installed
from qlip_core.errors import BackendError

GROUP = "qlip.trainers"


class Trainer(Protocol):
    """Training by recipe, given as a shipped recipe's name or a path, with "key=value" changes."""

    def train(
        self,
        recipe: str | None,
        changes: Sequence[str],
        *,
        stage: str | None,
        out: Path,
        resume: bool,
        steps: int | None,
        dry_run: bool,
    ) -> dict[str, Any]:
        """Run stages "1", "2" or "all" (None: what the run was started with, else all) in the folder `out`.
        Returns the results and the plans, for JSON."""
        ...

    def train_generator(
        self,
        recipe: str | None,
        changes: Sequence[str],
        *,
        out: Path,
        resume: bool,
        steps: int | None,
        dry_run: bool,
    ) -> dict[str, Any]:
        """Train a generator for a tokenizer in the folder `out` (SPEC section 4)."""
        ...

    def balance(
        self,
        recipe: str,
        changes: Sequence[str],
        *,
        out: Path,
        resume: bool,
        steps: int | None,
        dry_run: bool,
    ) -> dict[str, Any] | None:
        """Find a_r / a_a by training with each objective alone (SPEC section 3); None after a dry run."""
        ...

    def export(self, run: Path, out: Path, *, dtype: str) -> Path:
        """Write the newest checkpoint of a run in the published layout."""
        ...


def toml_string(text: str) -> str:
    """A TOML string: like JSON's, except that TOML has no surrogate pairs and requires DEL to be escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def get_trainer(backend: str = "torch") -> Trainer:
    """The trainer of a backend. Raises BackendError if the backend has none or is not installed."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if backend not in found:
        if backend not in backend_names():
            get_backend(backend)  # raises for an unknown one, listing the backends
        raise BackendError(
            f"backend {backend} is for inference: train with --backend {' or '.join(sorted(found))}"
        )
    if not is_installed(backend):  # its own extra is not enough to train
        raise BackendError(f"training needs {backend}: run `pip install 'qlip[train]'`")
    get_backend(backend)  # raises if it cannot be imported
    try:
        return found[backend].load()
    except ModuleNotFoundError as error:
        raise BackendError(
            f"training needs {error.name}: run `pip install 'qlip[train]'`"
        ) from error
