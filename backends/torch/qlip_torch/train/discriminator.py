"""StyleGAN2's discriminator and its losses (arXiv 1912.04958), stage 2's adversarial term.

Legend: x [B, 3, S, S], in any normalisation that real and fake images share. Weights have an
equalised learning rate: stored as N(0, 1), scaled by 1/sqrt(fan_in) when used.
R1 differentiates twice, so do not compile the discriminator, and replicate it (DDP) rather than
shard it; it is small.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip_core.errors import QlipError
from qlip_torch.train.precision import at_least_float32, no_autocast

FIR = (1.0, 3.0, 3.0, 1.0)
SLOPE = 0.2
SMALLEST_SIDE = 8


class EqualConv(nn.Module):
    """Convolution with an equalised learning rate and an optional bias: [B, I, ...] to [B, O, ...]."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale = 1 / math.sqrt(inputs * kernel**2)
        self.stride = stride
        # A strided convolution follows a blur, which has already padded.
        self.padding = kernel // 2 if stride == 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        return F.conv2d(x, weight, self.bias, stride=self.stride, padding=self.padding)


class EqualLinear(nn.Module):
    """Linear layer with an equalised learning rate: [B, I] to [B, O]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class Blur(nn.Module):
    """The FIR filter [1, 3, 3, 1] / 8 in both directions, so that halving does not alias."""

    def __init__(self, padding: int, stride: int = 1) -> None:
        super().__init__()
        row = torch.tensor(FIR) / sum(FIR)
        self.register_buffer("kernel", torch.outer(row, row), persistent=False)
        self.padding, self.stride = padding, stride

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.get_buffer("kernel").to(x.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=channels)


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU times sqrt(2), which keeps the variance near 1."""
    return F.leaky_relu(x, SLOPE) * math.sqrt(2)


class DownBlock(nn.Module):
    """Residual block that halves the resolution: [B, I, s, s] to [B, O, s // 2, s // 2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = EqualConv(inputs, inputs, 3)
        self.down = nn.Sequential(Blur(padding=2), EqualConv(inputs, outputs, 3, stride=2))
        self.skip = nn.Sequential(
            Blur(padding=1, stride=2), EqualConv(inputs, outputs, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = activate(self.down(activate(self.conv(x))))
        return (y + self.skip(x)) / math.sqrt(2)


def minibatch_deviation(x: Tensor, group_size: int = 4) -> Tensor:
    """Append one channel, the mean deviation over groups of images: [B, C, s, s] to [B, C+1, s, s].

    A group's size is the largest divisor of B up to `group_size`; image i is in group i mod (B / size).
    """
    batch, _, height, width = x.shape
    size = max(d for d in range(1, min(group_size, batch) + 1) if batch % d == 0)
    groups = x.float().view(size, batch // size, -1)
    deviation = (groups.var(0, correction=0) + 1e-8).sqrt().mean(1)
    channel = deviation.repeat(size).view(batch, 1, 1, 1).expand(-1, 1, height, width)
    return torch.cat((x, channel.to(x.dtype)), dim=1)


class Discriminator(nn.Module):
    """Real or generated: x [B, 3, S, S] to float32 logits [B]. S is at least 8, not necessarily a power of 2.

    A stage at side s has `base_channels / s` channels, a multiple of 8 from 16 to `max_channels`;
    sides are halved, rounding down, until they are at most 4. 28.9 M parameters at 256 px.
    """

    def __init__(
        self, image_size: int, base_channels: int = 32768, max_channels: int = 512
    ) -> None:
        super().__init__()
        if image_size < SMALLEST_SIDE:
            raise QlipError(
                f"the discriminator needs image_size of at least {SMALLEST_SIDE}, got {image_size}"
            )

        def width(side: int) -> int:
            return min(max(base_channels // side // 8 * 8, 16), max_channels)

        self.image_size = image_size
        self.from_rgb = EqualConv(3, width(image_size), 1)
        blocks, side = [], image_size
        while side > 4:
            blocks.append(DownBlock(width(side), width(side // 2)))
            side //= 2
        self.blocks = nn.Sequential(*blocks)
        channels = width(side)
        self.conv = EqualConv(channels + 1, channels, 3)
        self.hidden = EqualLinear(channels * side**2, channels)
        self.out = EqualLinear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise QlipError(
                f"this discriminator takes {self.image_size} px, got {list(x.shape[-2:])}"
            )
        x = self.blocks(activate(self.from_rgb(x)))
        x = activate(self.conv(minibatch_deviation(x)))
        return self.out(activate(self.hidden(x.flatten(1)))).float().squeeze(-1)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: `mean(softplus(-D(x_hat)))`, logits [B] to a float32 scalar."""
    return F.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """`mean(softplus(-D(x))) + mean(softplus(D(x_hat)))`, logits [B] to a float32 scalar."""
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def r1_is_due(step: int, interval: int = 16) -> bool:
    """Whether this step, counted from 0, adds the lazy penalty."""
    return step % interval == 0


def r1_penalty(
    discriminator: nn.Module, real: Tensor, weight: float = 10.0, interval: int = 16
) -> Tensor:
    """`interval * weight / 2 * mean_B |d D(x) / d x|^2` on real images [B, 3, S, S], in float32.

    Added once every `interval` steps (`r1_is_due`); the factor `interval` compensates for that (arXiv
    1912.04958, appendix B). weight is R1's gamma.
    """
    with no_autocast(real.device):
        real = at_least_float32(real.detach()).requires_grad_()
        # The minibatch deviation makes D mix images; like StyleGAN, take the gradient of the sum.
        (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean() * (weight / 2 * interval)
