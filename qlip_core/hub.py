"""From the name of a model to files on this machine: a folder, a file, or a Hugging Face id."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from qlip_core.errors import CheckpointError

BUNDLED = Path(__file__).parent / "models" / "emoji"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ("*.json", "*.safetensors", "merges.txt", "README.md", "LICENSE*")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def find_model(model: str | Path | None, revision: str | None = None) -> Path:
    """The folder or `.safetensors` file of a model; None or "bundled": the one that ships with qlip.

    A hub id is downloaded once and then found in the cache, even without a network. Raises
    CheckpointError if the model does not exist.
    """
    if model is None or (str(model) == "bundled" and not Path(model).exists()):
        if not BUNDLED.is_dir():
            raise CheckpointError(
                "no model named, and this build of qlip has none of its own: name a folder or a hub id, "
                "such as nvidia/QLIP-B-16-256"
            )
        if revision is not None:
            raise CheckpointError("a revision is only for hub ids, and this is the bundled model")
        return BUNDLED
    if model == "":  # Path("") would be the current folder
        raise CheckpointError("the name of the model is empty: leave it out for the bundled one")
    path = Path(model).expanduser()
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path}: pickled weights are never loaded; convert them to safetensors"
        )
    if path.exists():
        if not (path.is_dir() or path.is_file()):
            raise CheckpointError(f"{path}: a device or a pipe; copy it to a file first")
        if revision is not None:
            raise CheckpointError(
                f"{path}: a revision is only for hub ids, and this is a local path"
            )
        return path
    name = str(model)
    if _HUB_ID.fullmatch(name) and path.suffix != ".safetensors":
        return from_hub(name, revision)
    raise CheckpointError(f"{name}: no such folder or file, and not a hub id (owner/name)")


def from_hub(name: str, revision: str | None = None, wanted: Sequence[str] = _WANTED) -> Path:
    """A folder with the files of the repository `name` whose names match `wanted`.

    Raises CheckpointError, which says what to do, if the hub does not provide them.
    """
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such folder or file, and not a hub id (owner/name)")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: no such folder; to fetch it from the hub run `pip install 'qlip[hub]'`"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{name}: the hub has no revision {revision!r} of it") from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name}: gated on the hub; accept its terms there, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{name}: no such folder here and no such model on the hub (or a private one: "
            "run `hf auth login`)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise CheckpointError(
            f"{name}: not in the local cache, and the hub cannot be reached: check the network, "
            "or give a folder"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name}: the hub download failed ({line})") from None


def hub_id(path: Path) -> str | None:
    """The id of a model in the hub's cache, else None."""
    for part in path.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return None


def model_name(path: Path) -> str:
    """A name for a model, from its folder: "bundled", its hub id, or the folder's name."""
    if path.is_relative_to(BUNDLED):
        return "bundled"
    return hub_id(path) or Path(os.path.abspath(path)).name  # absolute, for "."
