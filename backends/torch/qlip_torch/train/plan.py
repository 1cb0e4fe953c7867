"""What a stage will cost, printed before it starts: parameters, images, steps, memory per device.

Memory is an estimate. It counts weights, gradients, optimizer state and activations. Activations are what
one image's forward keeps for backward in the run's precision, found with meta tensors (shapes without
contents), which takes a second for any size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlip_core.architecture import PARTS, parameter_count
from qlip_core.config import QLIPConfig
from qlip_core.errors import RecipeError
from qlip_torch.model import QLIP
from qlip_torch.perceptual import Lpips
from qlip_torch.train import objectives
from qlip_torch.train.discriminator import Discriminator
from qlip_torch.train.distributed import World
from qlip_torch.train.precision import Precision
from qlip_torch.train.recipe import (
    EngineRecipe,
    Recipe,
    Stage1Recipe,
    Stage2Recipe,
    StageRecipe,
    StepsRecipe,
)
from qlip_torch.train.stage1 import Stage1Network, freeze
from qlip_torch.train.stage2 import PARTS as STAGE2_PARTS
from qlip_torch.train.stage2 import Stage2Network
from qlip_torch.train.throughput import forward_flops, matmul_rate, size_text

# Share of activations that a compiled block keeps, since it recomputes pointwise operations. Measured for B-16
# on an H100 (docs/performance.md), where the figure without compilation agreed with this file's to 1 %.
_COMPILED = 0.6


@dataclass(frozen=True)
class Cost:
    """What any run costs on `devices` devices. Bytes are per device."""

    steps: int
    batch: int
    micro_batch: int
    micro_batches: int
    devices: int
    meant_for: int
    warmup: int
    precision: str
    state_bytes: int
    activation_bytes: int
    flops: float
    """Model FLOPs of one image's training step."""
    rate: float
    """FLOP/s of matrix products on such a device; 0 if not measured."""

    @property
    def images(self) -> int:
        return self.steps * self.batch

    @property
    def bytes(self) -> int:
        return self.state_bytes + self.activation_bytes

    def step_line(self, passes: str = "") -> str:
        """How a step is shared out; `passes` says what several micro-batches mean."""
        rows = self.micro_batches * self.micro_batch
        split = ""
        if self.micro_batches > 1:
            split = f", as {self.micro_batches} micro-batches of {self.micro_batch:,}{passes}"
        each = " each" if self.devices > 1 else ""
        return f"  on {devices_text(self.devices)} in {self.precision}: {rows:,} images{each} per step{split}"

    def last_lines(self, table: str) -> list[str]:
        """A very rough duration (runs reach a fifth to two thirds of the products' rate), and warnings if the
        warm-up, a value of the recipe's `table`, leaves no steps or if the number of devices is not the one it
        is meant for."""
        out = []
        if self.warmup >= self.steps:
            out.append(
                f"  the warm-up of {self.warmup:,} steps leaves none after it: learning rates end at "
                f"{self.steps / self.warmup:.2g} of the recipe's; set {table}.warmup"
            )
        if self.rate:
            seconds = self.images * self.flops / (self.rate / 3 * self.devices)
            units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
            name, unit = next(pair for pair in units if seconds >= 2 * pair[1] or pair[1] == 1)
            length = f"about {seconds / unit:,.1f} {name}"
            if seconds < 2:
                length = "a second or two"
            if seconds > 36525 * 86400:
                length = "more than a century"
            out.append(
                f"  takes {length} at a third of the {self.rate / 1e12:.2g} TFLOP/s that matrix products reach "
                "on this device"
            )
        if self.devices != self.meant_for:
            out.append(
                f"  the recipe is meant for {devices_text(self.meant_for)}: on {self.devices} the mathematics "
                "is the same, the time is not"
            )
        return out


def devices_text(count: int) -> str:
    return "1 device" if count == 1 else f"{count:,} devices"


def planned_for(meant_for: int, steps: StepsRecipe, here: int) -> tuple[int, list[str]]:
    """The number of devices that a dry run on `here` processes plans for, and lines that say so. With fewer
    processes than the recipe is meant for, it plans for the recipe's, unless the batch does not divide over them."""
    try:
        steps.micro_batches(meant_for)
    except RecipeError:
        return here, []
    if here >= meant_for:
        return here, []
    return meant_for, [
        f"  this is the plan for the {meant_for} devices that the recipe is meant for, each like this one; "
        f"what is built now is for {devices_text(here)}"
    ]


def planned_on(
    meant_for: int, engine: EngineRecipe, steps: StepsRecipe, world: World, *, dry: bool
) -> tuple[int, list[str], float] | None:
    """On the first rank: the number of devices planned for, lines that say so, and the rate of matrix products
    on each; None on the others. Raises RecipeError, on every rank, if the batch does not divide over them."""
    steps.micro_batches(world.size)
    if not world.is_first:
        return None
    devices, notes = planned_for(meant_for, steps, world.size) if dry else (world.size, [])
    precision = Precision.of(engine, world.device)
    with precision.products():
        return devices, notes, matmul_rate(world.device, precision.dtype)


def state_bytes(engine: EngineRecipe, present: int, trained: int, ema: float, devices: int) -> int:
    """Bytes of float32 weights and, for trained ones, of gradient, two moments and the moving average, if any."""
    total = 4 * (present + trained * (4 if ema else 3))
    if engine.parallel == "fsdp":
        total //= devices
    return 0 if engine.cpu_offload else total


@dataclass(frozen=True)
class Plan(Cost):
    """The cost of a stage."""

    stage: int
    parameters: dict[str, int]
    trained: int
    discriminator: int
    loss_bytes: int

    @property
    def bytes(self) -> int:
        return super().bytes + self.loss_bytes

    def lines(self) -> list[str]:
        """The plan, to print."""
        parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in self.parameters.items())
        return [
            f"stage {self.stage}: {sum(self.parameters.values()) / 1e6:.1f} M parameters ({parts}), "
            f"{self.trained / 1e6:.1f} M trained"
            + (f", discriminator {self.discriminator / 1e6:.1f} M" if self.discriminator else ""),
            f"  {self.steps:,} steps of {self.batch:,} images = {self.images:,} images, "
            f"{self.images * self.flops:.2e} FLOPs",
            self.step_line(" in two passes, features cached"),
            f"  memory per device about {size_text(self.bytes)}: weights, gradients and optimizer "
            f"{size_text(self.state_bytes)}, activations {size_text(self.activation_bytes)}, "
            f"losses {size_text(self.loss_bytes)}",
            *self.last_lines(f"stage{self.stage}"),
        ]


def make_plan(
    recipe: Recipe,
    config: QLIPConfig,
    stage: int,
    device: torch.device,
    devices: int,
    rate: float = 0.0,
) -> Plan:
    """The plan of a stage."""
    settings = recipe.stage1 if stage == 1 else recipe.stage2
    micro_batches = settings.micro_batches(devices)
    micro_batch = settings.batch // devices // micro_batches
    counts = parameter_count(config)
    present = {name: counts[name] for name in (PARTS if stage == 1 else STAGE2_PARTS)}
    trained = sum(counts[name] for name in parts_of(settings)[0])
    half = Precision.of(recipe.engine, device).half
    extra = _extra_networks(config, settings) if isinstance(settings, Stage2Recipe) else []
    discriminator = sum(_count(module) for module in extra if isinstance(module, Discriminator))
    state = state_bytes(recipe.engine, sum(present.values()), trained, settings.ema, devices)
    state += 16 * discriminator
    state += sum(4 * _count(module) for module in extra if isinstance(module, Lpips))
    image = activation_bytes(config, settings, half=half, engine=recipe.engine)
    if recipe.engine.compile and not recipe.engine.activation_checkpointing:
        image = int(image * _COMPILED)
    rows, patches = settings.batch // devices, config.num_patches
    losses = 3 * 4 * rows * patches * config.code_dim + objectives.ENTROPY_BYTES
    if stage == 1:
        losses += 3 * 4 * min(rows, objectives.CHUNK_ROWS) * settings.batch
    else:  # the frozen encoder's features of the other micro-batches
        losses += 4 * (rows - micro_batch) * patches * config.vision_config.hidden_size
    return Plan(
        stage=stage,
        parameters=present,
        trained=trained,
        discriminator=discriminator,
        steps=settings.steps,
        batch=settings.batch,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        devices=devices,
        meant_for=recipe.devices,
        warmup=settings.warmup,
        precision="bfloat16" if half else "float32",
        state_bytes=state,
        activation_bytes=image * micro_batch,
        loss_bytes=losses,
        flops=forward_flops(config).training(*parts_of(settings)),
        rate=rate,
    )


def parts_of(settings: StageRecipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts of the model that a stage trains, and those that it runs."""
    if not isinstance(settings, Stage1Recipe):
        return settings.trained, STAGE2_PARTS
    return settings.trained, tuple(p for p in PARTS if p == "down" or p not in settings.idle)


def _extra_networks(config: QLIPConfig, stage: Stage2Recipe) -> list[nn.Module]:
    out: list[nn.Module] = []
    if stage.lpips:
        out.append(Lpips("for measuring"))
    if stage.gan:
        settings = stage.discriminator
        out.append(Discriminator(config.image_size, settings.base_channels, settings.max_channels))
    return out


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- activations -------------------------------------------------------------------------------


class Kept:
    """Bytes that autograd keeps, counted separately inside and outside blocks."""

    def __init__(self) -> None:
        self.outside = 0
        self.blocks: list[int] = []
        self.inputs = 0
        self._inside = False
        # References, so that no new tensor reuses the address of a freed one.
        self._seen: dict[tuple[int, int], torch.UntypedStorage] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.numel())
        if key not in self._seen and not isinstance(tensor, nn.Parameter):
            self._seen[key] = storage
            size = tensor.numel() * tensor.element_size()
            if self._inside:
                self.blocks[-1] += size
            else:
                self.outside += size
        return tensor

    @contextlib.contextmanager
    def watching(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        def enter(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inside = torch.is_grad_enabled()
            self.blocks.append(0)
            self.inputs += inputs[0].numel() * inputs[0].element_size() * self._inside

        def leave(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._inside = False

        hooks = [b.register_forward_pre_hook(enter) for b in blocks]
        hooks += [b.register_forward_hook(leave) for b in blocks]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def total(self, checkpointing: bool) -> int:
        if checkpointing:
            return self.outside + self.inputs + max(self.blocks, default=0)
        return self.outside + sum(self.blocks)


def activation_bytes(
    config: QLIPConfig,
    settings: StageRecipe,
    *,
    half: bool,
    engine: EngineRecipe,
) -> int:
    """Bytes kept for backward by one more image in a micro-batch: those of two images minus those of one."""
    with FakeTensorMode():
        first = isinstance(settings, Stage1Recipe)
        extra = _extra_networks(config, settings) if isinstance(settings, Stage2Recipe) else []
        model = QLIP(config, PARTS if first else STAGE2_PARTS)
        if first:
            freeze(model, settings)
        precision = Precision(half, torch.device("cpu"))
        kept = []
        for count in (1, 2):
            found = Kept()
            pixels = torch.zeros(count, 3, config.image_size, config.image_size)
            with found.watching(model.blocks()):
                if first:
                    ids = torch.zeros(
                        count, config.text_config.max_position_embeddings, dtype=torch.int64
                    )
                    network = Stage1Network(model, precision, aligns=settings.align > 0)
                    outputs = network(pixels, ids, settings.decodes)
                else:
                    network = Stage2Network(model, precision)
                    outputs = network(*network.encode(pixels), True)
                    reconstruction, real = outputs.reconstruction, outputs.real
                    for module in extra:
                        with precision.autocast():
                            if isinstance(module, Lpips):
                                module(reconstruction, real)
                            else:
                                module(reconstruction)
            kept.append(found.total(engine.activation_checkpointing))
            del outputs
    return kept[1] - kept[0]
