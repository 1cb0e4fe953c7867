"""Checkpoints of a run: written whole or not at all, a few kept, found by `latest`, resumed exactly.

    checkpoints/step-00001000/   tensors (torch.distributed.checkpoint), state.json, rank-00000.json, …
    checkpoints/latest           the name of the newest complete one

A checkpoint is written under a temporary name and renamed when every rank has written its share; then
`latest` is replaced. So whenever a run is killed, `latest` names a complete one. All ranks must see the
file system they are on. They serve to resume a run; `export` turns one into a model.
"""

# torch.distributed.checkpoint does not say that it re-exports its own functions.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import base64
import json
import pickle
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from qlip_core.errors import CheckpointError
from qlip_core.files import write_text
from qlip_torch.train.distributed import World, lost_a_peer, peer_error
from qlip_torch.train.workers import is_death

LATEST, STATE = "latest", "state.json"
# Written by `qlip_torch.train.loop.save`, and added here.
_OF_THE_RUN = ("stage", "recipe", "config", "tokenizer", "numbers", "step", "ranks")
_OF_A_RANK = ("data", "random")
_MISSING_GROUP = "torch.distributed is disabled"
# torch 2.9's own writing calls what it has deprecated; 2.13's does not.
_OLD_STORAGE = "TypedStorage is deprecated"


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint holds besides tensors: the run's state, and the own state of each rank that wrote it."""

    state: dict[str, Any]
    ranks: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of one stage of a run, in `folder`."""

    def __init__(self, folder: str | Path, *, keep: int, background: bool, world: World) -> None:
        self.folder = Path(folder)
        self._keep, self._background, self._world = keep, background, world
        self._pending: tuple[Future[Any], Path, Path] | None = None
        self._thread: ThreadPoolExecutor | None = None

    # -- writing -----------------------------------------------------------------------------------

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], own: dict[str, Any]
    ) -> None:
        """Write a checkpoint after `step` steps; with `background`, return once tensors are copied.

        Every rank must call it. `state` is the same on all ranks, `own` is this rank's.
        """
        self.wait()
        name = f"step-{step:08d}"
        part, final = self.folder / f".{name}.part", self.folder / name
        if self._world.is_first:
            self._clear(part)
            part.mkdir(parents=True)
        self._world.barrier()
        own = {**own, "random": _random_state(self._world.device)}
        _write(part / f"rank-{self._world.rank:05d}.json", own)
        if self._world.is_first:
            _write(part / STATE, {**state, "step": step, "ranks": self._world.size})
        self._pending = self._write_tensors(part, tensors), part, final
        if not self._background:
            self.wait()

    def _write_tensors(self, part: Path, tensors: dict[str, Tensor]) -> Future[Any]:
        writer = dcp.FileSystemWriter(part)
        if self._world.group is not None:
            group = self._world.checkpoint_group
            if not self._background:
                done: Future[Any] = Future()
                try:
                    done.set_result(dcp.save(tensors, storage_writer=writer, process_group=group))
                except BaseException as error:  # raised where the result is taken
                    done.set_exception(error)
                return done
            found = dcp.async_save(tensors, storage_writer=writer, process_group=group)
            assert isinstance(found, Future)
            return found
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        return self._thread.submit(_save_alone, copies, writer)

    def poll(self) -> None:
        """Finish a checkpoint whose tensors have been written, without waiting. Local to each rank."""
        if self._pending is not None and self._pending[0].done():
            self._finish()

    def wait(self) -> None:
        """Finish the checkpoint that is being written, if any."""
        if self._pending is not None:
            self._finish()

    def close(self) -> None:
        """Wait, then end the thread. Must happen before process groups are destroyed."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    def _finish(self) -> None:
        assert self._pending is not None
        future, part, final = self._pending
        self._pending = None
        try:
            future.result()
        # CheckpointException, raised if torch's writing fails on a rank or alone, is no Exception.
        except (dcp.CheckpointException, OSError, RuntimeError) as error:
            if is_death(error):  # of a data process, told while the trainer waits here
                raise
            if self._world.is_first:
                self._clear(part)
            lost = [cause for cause in _causes(error) if lost_a_peer(cause)]
            if lost and self._world.size > 1:
                raise peer_error(lost[0]) from None
            kept = self.latest()
            way = (
                f"{kept.name} is kept: free some space, then continue from it with --resume"
                if kept is not None
                else "there is no earlier one: free some space, then start again with --resume"
            )
            raise CheckpointError(
                f"{final}: the checkpoint cannot be written ({_cause(error)}); {way}"
            ) from None
        # The first rank finishes last: it writes the table of all ranks' shares.
        if not self._world.is_first:
            return
        self._clear(final)
        part.rename(final)
        write_text(self.folder / LATEST, final.name + "\n")
        self._rotate(final)

    def _rotate(self, newest: Path) -> None:
        # Complete checkpoints of later steps are left from before the run was resumed at an earlier one.
        older = [path for path in _complete(self.folder) if path.name < newest.name]
        later = [path for path in _complete(self.folder) if path.name > newest.name]
        for path in [*later, *older[: max(0, len(older) + 1 - self._keep)]]:
            self._clear(path)
        # Half written or half removed when a run was killed.
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _clear(self, path: Path) -> None:
        """Remove a folder; it is renamed first, so that a damaged one never has its name."""
        if path.exists():
            doomed = path.with_name(f".{path.name.strip('.')}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed)

    # -- reading -----------------------------------------------------------------------------------

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return latest_checkpoint(self.folder)

    def load(self, path: Path, tensors: dict[str, Tensor]) -> Resumed:
        """Read a checkpoint into `tensors`, in place, whatever number of ranks wrote it.

        Every rank must call it. Raises CheckpointError if it is damaged or does not fit.
        """
        read_checkpoint(path, tensors, self._world.checkpoint_group)
        state = read_state(path)
        ranks = [_read(path / f"rank-{r:05d}.json", _OF_A_RANK) for r in range(state["ranks"])]
        try:
            _restore_random_state(ranks, self._world)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            what = f"the state of random numbers cannot be set ({_cause(error)})"
            raise _damaged(path / f"rank-{self._world.rank:05d}.json", what) from None
        return Resumed(state, ranks)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest complete one, else None."""
    folder = Path(folder)
    try:
        named = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        named = None
    complete = _complete(folder)
    if named in complete:
        return named
    return complete[-1] if complete else None


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json: step, stage, recipe, config, ... Raises CheckpointError if it is damaged."""
    return _read(path / STATE, _OF_THE_RUN)


def read_checkpoint(
    path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Read these tensors of a checkpoint, in place; with `group`, each rank reads its share of them.

    Raises CheckpointError if it is damaged or has no such tensors.
    """
    # Checked before torch reads it, because torch logs a traceback for any error.
    sizes = tensor_sizes(path)
    for name, tensor in tensors.items():
        if sizes.get(name) != list(tensor.shape):
            raise CheckpointError(
                f"{path}: {name} is {sizes.get(name, 'absent')}, not {list(tensor.shape)}; was it written "
                "by another recipe?"
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_MISSING_GROUP)
            dcp.load(
                tensors, storage_reader=_Reader(path), process_group=group, no_dist=group is None
            )
    except (dcp.CheckpointException, OSError, ValueError) as error:
        raise _damaged(path / "*.distcp", f"the tensors cannot be read ({_cause(error)})") from None


def tensor_sizes(path: Path) -> dict[str, list[int]]:
    """The shapes of a checkpoint's tensors, by name. Raises CheckpointError if it is damaged."""
    try:
        table = _Reader(path).read_metadata().state_dict_metadata
        return {name: list(entry.size) for name, entry in table.items()}
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged(path / ".metadata", f"cannot be read ({_cause(error)})") from None


def _damaged(file: Path, what: str) -> CheckpointError:
    """The error for a checkpoint's `file`, and how to continue: from the newest complete one before it."""
    folder = file.parent
    older = [path.name for path in _complete(folder.parent) if path.name < folder.name]
    way = (
        f"remove {folder} to continue from the one before it, {older[-1]}"
        if older
        else "there is no earlier checkpoint to continue from"
    )
    return CheckpointError(f"{file}: {what}; {way}")


def _causes(error: BaseException) -> list[BaseException]:
    """The error of each rank; torch wraps them in one exception."""
    failures = list(getattr(error, "failures", {}).values())
    return [inner for inner, _ in failures] or [error]


def _cause(error: BaseException) -> str:
    """The last line of the error's message."""
    inner = _causes(error)[0]
    return (str(inner).strip() or type(inner).__name__).splitlines()[-1]


def _read(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object that has these keys. Raises CheckpointError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read ({_cause(error)})") from None
    missing = [key for key in keys if not isinstance(values, dict) or key not in values]
    if missing:
        raise _damaged(path, f"is damaged, without {', '.join(missing)}")
    return values


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def _save_alone(tensors: dict[str, Tensor], writer: dcp.FileSystemWriter) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_MISSING_GROUP)
        warnings.filterwarnings("ignore", message=_OLD_STORAGE)
        dcp.save(tensors, storage_writer=writer, no_dist=True)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


# -- random numbers ----------------------------------------------------------------------------


def _random_state(device: torch.device) -> dict[str, str]:
    out = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(s.numpy().tobytes()).decode() for name, s in out.items()}


def _restore_random_state(ranks: list[dict[str, Any]], world: World) -> None:
    """Restore this rank's state; ranks beyond those that wrote the checkpoint keep the one they started with."""
    if world.rank >= len(ranks):
        return
    states = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in ranks[world.rank]["random"].items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and world.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], world.device)


# -- reading without trust ---------------------------------------------------------------------

# All names that the table of a checkpoint of plain tensors refers to.
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "StorageMeta",
        "TensorProperties",
        "MetadataIndex",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}
# The table names the folder it was written to, which is not used. Its class depends on the system and on the
# version of Python that wrote it, and may not exist here.
_PATHS = {
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "WindowsPath")
}


class _Unpickler(pickle.Unpickler):
    """Reads the table of a checkpoint and refuses anything else, so that no code in it can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PATHS:
            return PurePath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED or is_dtype:
            return super().find_class(module, name)
        raise ValueError(f"its table refers to {module}.{name}: not a checkpoint of this program")


class _Reader(dcp.FileSystemReader):
    """torch's reader without its unrestricted unpickling; it reads tensors with weights_only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
