"""Processes and devices: this process's place in the job, how a module is spread over them, how a job ends.

Model files are single-device code; everything about several processes is applied from here. A job of
one process needs none of it and takes the same path. torchrun starts the processes and sets each one's
rank in its environment.
"""

# torch's own engines use _foreach_* and HashStore, but it does not re-export them.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from qlip_core.errors import BackendError, QlipError
from qlip_torch.train.recipe import EngineRecipe

TIMEOUT = timedelta(minutes=10)
_LOOK_UP = 1.0  # seconds between checks that the launcher is still there


class PeerError(QlipError):
    """Another process of the job has stopped, so this one cannot go on."""


@dataclass(frozen=True)
class World:
    """This process among those of the job. `group` is None where it is alone."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    # For the thread that writes checkpoints, whose messages must not mix with training's.
    checkpoint_group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks, without gradients."""
        if self.group is None:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values / self.size

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.group is None:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return bool(value.item())

    def barrier(self) -> None:
        if self.checkpoint_group is not None:
            dist.barrier(group=self.checkpoint_group)

    @property
    def loss_group(self) -> dist.ProcessGroup | None:
        """The group for losses over the global batch; None if this process is alone."""
        return self.group if self.size > 1 else None


# -- a job's beginning and end -----------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device of a recipe's `engine.device`; "auto" is this rank's GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(f"device {name!r}: torch finds no CUDA device here")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        device = torch.device("cuda", index)
    elif device.type != "cpu":
        raise BackendError(f"device {name!r}: training runs on cuda or cpu")
    return device


@contextmanager
def joined(engine: EngineRecipe, stop: StopRequest | None = None) -> Iterator[World]:
    """Join the job that torchrun started, or run alone; leave it cleanly at the end. `stop` notes signals until
    the job is left: torchrun sends SIGTERM to a process that is about to tell why it ends."""
    device = choose_device(engine.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 and engine.parallel == "ddp":
        with stop or nullcontext():
            yield World(0, 1, device)
        return
    failed = threading.Event()
    # Only under torchrun: whoever starts processes by hand may well end before them.
    if size > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(), failed), daemon=True).start()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise BackendError(
            f"the processes of the job cannot connect ({_line(error)}): start them with torchrun"
        ) from error
    with ExitStack() as afterwards:
        try:
            checkpoints = dist.new_group(backend="gloo", timeout=TIMEOUT)
            assert isinstance(checkpoints, dist.ProcessGroup)
            if stop is not None:
                afterwards.enter_context(stop)
            yield World(dist.get_rank(), size, device, dist.group.WORLD, checkpoints)
            # No rank destroys its group while another may still be waiting for it.
            dist.barrier(group=checkpoints)
        except BaseException as error:
            failed.set()
            if not (isinstance(error, RuntimeError) and lost_a_peer(error)):
                raise
            raise peer_error(error) from error
        finally:
            dist.destroy_process_group()


def _end_with(launcher: int, failed: threading.Event) -> None:
    """Stop as after SIGTERM, with a checkpoint, once the launcher is gone, so that a restarted job does not
    run into its old processes. A process that has `failed` ends anyway."""
    while not failed.wait(_LOOK_UP):
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def peer_error(error: BaseException) -> PeerError:
    """The error that a rank raises when an `error` shows that it `lost_a_peer`."""
    rank, size = os.environ.get("RANK", 0), os.environ.get("WORLD_SIZE", 1)
    return PeerError(
        f"process {rank} of {size} stopped because another process of the job did; see its message "
        f"({_line(error)})"
    )


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error is a collective's that says another rank is gone."""
    if isinstance(error, OSError) and error.filename is not None:
        return False  # a file's error, whose path may contain one of the signs below
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "gloo", "broken pipe", "nccl")
    return any(sign in text for sign in signs)


class StopRequest:
    """Notes SIGTERM and Ctrl-C; the loop checks for them between steps, and stops with a checkpoint.

    If that takes over `grace` seconds (a checkpoint hangs, a rank waits for a dead one), the process ends
    without one. A second Ctrl-C ends it at once. Only the main thread can receive signals; in any other
    this never asks to stop.
    """

    def __init__(self, grace: float) -> None:
        self.signal: int | None = None
        self._grace = grace
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, the shells' convention: 130 after Ctrl-C, 143 after SIGTERM, also if another
        process of the job got it."""
        return 128 + (self.signal or signal.SIGTERM)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(130)
        if self.signal is None:
            self.signal = number
            self._timer = threading.Timer(self._grace, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def _give_up(self) -> None:
        sys.stderr.write(f"qlip: no checkpoint within {self._grace:.0f} s of the signal; ending\n")
        sys.stderr.flush()
        os._exit(self.exit_code)


# -- a module over the processes ---------------------------------------------------------------


@dataclass(frozen=True)
class Parallel:
    """A module as the engine runs it, and how accumulation tells it which backward averages gradients."""

    module: nn.Module
    syncing: Callable[[bool], AbstractContextManager[None]]


def prepare_blocks(
    blocks: Iterable[nn.Module], engine: EngineRecipe, *, random: bool = False
) -> None:
    """Apply torch.compile and activation checkpointing block by block, in place; names do not change.

    `random`: the blocks have dropout, which the second forward of checkpointing must repeat.
    """
    if engine.compile:
        # The gradient probe runs several backwards through one forward's saved tensors, which code that donates
        # (may overwrite) them refuses.
        functorch_config.donated_buffer = False
    for block in blocks:
        forward: Callable[..., Any] = _compiled(block) if engine.compile else block.forward
        if engine.activation_checkpointing:
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=random)
        block.forward = forward


def _compiled(block: nn.Module) -> Callable[..., Any]:
    """The block's forward, compiled; but uncompiled while a module inside has a hook, since code compiled
    without the hook ignores it."""
    plain = block.forward
    # For fixed shapes: the towers share this code, and torch would otherwise treat the second tower's lengths as
    # dynamic. A stage has no other shapes.
    compiled = torch.compile(plain, dynamic=False)
    inside = [module for module in block.modules() if module is not block]

    def forward(*args: Any, **kwargs: Any) -> Any:
        hooked = any(module._forward_hooks for module in inside)
        return (plain if hooked else compiled)(*args, **kwargs)

    return forward


def parallelize(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    engine: EngineRecipe,
    world: World,
    *,
    apart: Sequence[str] = (),
    methods: Sequence[str] = (),
    half: bool = False,
) -> Parallel:
    """DDP or FSDP2 over all ranks. `apart` names parameters whose gradients the caller averages itself,
    `methods` the module's methods besides `forward` that are called, without gradients.

    With FSDP2 each of `blocks` is a unit, gathered in bfloat16 if `half`; the rest (embeddings,
    bottleneck, projections) stays float32. It averages at every backward, so that gradients stay sharded.
    """
    if world.group is None:
        return Parallel(module, lambda last: nullcontext())
    kept = [module.get_parameter(name) for name in apart]
    if engine.parallel == "fsdp":
        _shard(module, blocks, engine, world, kept, methods, half)
        return Parallel(module, lambda last: nullcontext())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(apart))
    # Buffers are tables that each rank computes for itself; from torch 2.13 the option has another name.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    no_buffers: dict[str, Any] = {option: False}
    wrapped = DistributedDataParallel(
        module,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **no_buffers,
    )
    return Parallel(wrapped, lambda last: nullcontext() if last else wrapped.no_sync())


def _shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    engine: EngineRecipe,
    world: World,
    apart: list[nn.Parameter],
    methods: Sequence[str],
    half: bool,
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(world.device.type, (world.size,))
    on_cuda = world.device.type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=on_cuda) if engine.cpu_offload else OffloadPolicy()
    # Inputs are not cast, so that the residual stream keeps the dtype autocast gives it.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=offload,
        ignored_params=set(apart),
    )
    for name in methods:
        register_fsdp_forward_method(module, name)


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Average over ranks the gradients of parameters that no engine averages, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world.group is None or not gradients:
        return
    flat = world.mean(torch.cat([g.reshape(-1) for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, world: World) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit`. Returns the norm before, float32.

    Unlike torch's own, it accepts sharded and whole parameters together.
    """
    sharded, whole = _gradients(parameters)
    norm = _norm(sharded, whole, world)
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradients in (sharded, whole):
        for device in {g.device for g in gradients}:
            torch._foreach_mul_([g for g in gradients if g.device == device], scale.to(device))
    return norm


def gradient_norm(parameters: Iterable[nn.Parameter], world: World) -> Tensor:
    """The joint norm of all gradients, float32."""
    return _norm(*_gradients(parameters), world)


def _gradients(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's parts of the sharded gradients, and the whole ones."""
    found = [p.grad for p in parameters if p.grad is not None]
    sharded = [grad.to_local() for grad in found if isinstance(grad, DTensor)]
    return sharded, [grad for grad in found if not isinstance(grad, DTensor)]


def _norm(sharded: list[Tensor], whole: list[Tensor], world: World) -> Tensor:
    square = _square(sharded, world.device)
    if world.group is not None and sharded:
        dist.all_reduce(square, group=world.group)
    return (square + _square(whole, world.device)).sqrt()


def _square(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.float().to(device) for norm in norms]).square().sum()
