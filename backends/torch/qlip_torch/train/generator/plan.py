"""What a generator's training will cost, printed before it starts: parameters, sub-tokens, memory per device.

FLOPs are model FLOPs as in qlip_torch.train.throughput; the frozen tokenizer's are left out. Memory is an
estimate: weights, gradients and optimizer state are counted; activations are found with one block on meta
tensors (without contents) and multiplied by `num_hidden_layers`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qlip_core.generator.architecture import parameter_count
from qlip_core.generator.config import GeneratorConfig
from qlip_torch.generator import Generator
from qlip_torch.train.generator.recipe import GeneratorRecipe
from qlip_torch.train.generator.stage import LossNetwork
from qlip_torch.train.plan import Cost, Kept, state_bytes
from qlip_torch.train.precision import Precision
from qlip_torch.train.throughput import size_text


@dataclass(frozen=True)
class GeneratorPlan(Cost):
    """The cost of a generator's training."""

    config: GeneratorConfig
    parameters: int

    def lines(self) -> list[str]:
        """The plan, to print."""
        config = self.config
        return [
            f"generator: {self.parameters / 1e6:.1f} M parameters, {config.num_hidden_layers} layers "
            f"{config.hidden_size} wide; a prefix of {config.prefix_length} and "
            f"{config.tokens_per_image} sub-tokens of {config.group_size} bits per picture",
            f"  {self.steps:,} steps of {self.batch:,} images = {self.images:,} images, "
            f"{self.images * config.tokens_per_image:,} sub-tokens, "
            f"{self.images * self.flops:.2e} FLOPs",
            self.step_line(),
            f"  memory per device about {size_text(self.bytes)}: weights, "
            f"gradients and optimizer {size_text(self.state_bytes)}, activations "
            f"{size_text(self.activation_bytes)}; the frozen tokenizer comes on top",
            *self.last_lines("training"),
        ]


def make_plan(
    recipe: GeneratorRecipe,
    config: GeneratorConfig,
    device: torch.device,
    devices: int,
    rate: float = 0.0,
) -> GeneratorPlan:
    """The plan of a run whose generator is `config`, fitted to its tokenizer."""
    training = recipe.training
    micro_batches = training.micro_batches(devices)
    micro_batch = training.batch // devices // micro_batches
    half = Precision.of(recipe.engine, device).half
    count = parameter_count(config)
    image = activation_bytes(config, half, recipe.engine.activation_checkpointing)
    return GeneratorPlan(
        config=config,
        parameters=count,
        steps=training.steps,
        batch=training.batch,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        devices=devices,
        meant_for=recipe.devices,
        warmup=training.warmup,
        precision="bfloat16" if half else "float32",
        state_bytes=state_bytes(recipe.engine, count, count, training.ema, devices),
        activation_bytes=image * micro_batch,
        flops=3 * forward_flops(config),
        rate=rate,
    )


def forward_flops(config: GeneratorConfig) -> float:
    """FLOPs of one picture's forward: 2 per multiply-add of linears and of attention's two products
    (the whole square), the caption's projector and the logits included."""
    width, d, S = config.hidden_size, config.head_dim, config.sequence_length
    heads = config.num_attention_heads * d
    projections = width * (2 * heads + 2 * config.num_key_value_heads * d)
    block = projections + 3 * width * config.intermediate_size + 2 * S * heads
    logits = config.tokens_per_image * width * config.visual_vocab_size
    prefix = config.prefix_length * width * (config.condition_size + width)
    return 2.0 * (config.num_hidden_layers * S * block + logits + prefix)


def activation_bytes(config: GeneratorConfig, half: bool, checkpointing: bool) -> int:
    """Bytes kept for backward by one more image in a micro-batch: those of two images minus those of one."""
    with FakeTensorMode():
        model = Generator(dataclasses.replace(config, num_hidden_layers=1))
        network = LossNetwork(model, Precision(half, torch.device("cpu")))
        totals = []
        for rows in (1, 2):
            found = Kept()
            shape = rows, config.prefix_length
            with found.watching(model.blocks()):
                loss = network(
                    torch.zeros(*shape, config.condition_size),
                    torch.ones(shape, dtype=torch.bool),
                    torch.zeros(rows, dtype=torch.bool),
                    torch.zeros(rows, config.tokens_per_image, dtype=torch.int64),
                )
            block, layers = found.blocks[0], config.num_hidden_layers
            kept = block + layers * found.inputs if checkpointing else layers * block
            totals.append(found.outside + kept)
            del loss
    return totals[1] - totals[0]
