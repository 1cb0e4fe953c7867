"""Inception-V3 as FID papers use it: TensorFlow's network of 2015-12-05, 2048 features after the last pooling.

Weights are one safetensors file with the names of pytorch-fid's port, `pt_inception-2015-12-05-6726825d.pth`
(torchvision's names: `Conv2d_1a_3x3.conv.weight` … `Mixed_7c.branch_pool.bn.running_var`; its classifier
`fc` may be present and is ignored). pytorch-fid publishes a pickle, which this program never reads. Convert
it once, outside: `safetensors.torch.save_file(torch.load(path, "cpu", weights_only=True), "out.safetensors")`.

It differs from torchvision's network in its pooling: averages exclude the padding, and the very last
block pools by maximum.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlip_core.files import sha256_of
from qlip_torch.weight_files import fitted, read_weights, weight_files

log = logging.getLogger(__name__)

SIDE = 299
_IGNORED = ("fc.", "AuxLogits.")


class Convolution(nn.Module):
    """Convolution without a bias, batch normalisation and ReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        size: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _row(channels: int, out: int) -> Convolution:
    return Convolution(channels, out, (1, 7), padding=(0, 3))


def _column(channels: int, out: int) -> Convolution:
    return Convolution(channels, out, (7, 1), padding=(3, 0))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """[B, C, 35, 35] -> [B, 224 + pooled, 35, 35]."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 64)
        self.branch5x5_1 = Convolution(channels, 48)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(channels, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """[B, 288, 35, 35] -> [B, 768, 17, 17]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(channels, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """[B, 768, 17, 17] -> the same; `width` channels inside the 7x7 branches."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 192)
        self.branch7x7_1 = Convolution(channels, width)
        self.branch7x7_2 = _row(width, width)
        self.branch7x7_3 = _column(width, 192)
        self.branch7x7dbl_1 = Convolution(channels, width)
        self.branch7x7dbl_2 = _column(width, width)
        self.branch7x7dbl_3 = _row(width, width)
        self.branch7x7dbl_4 = _column(width, width)
        self.branch7x7dbl_5 = _row(width, 192)
        self.branch_pool = Convolution(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """[B, 768, 17, 17] -> [B, 1280, 8, 8]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(channels, 192)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(channels, 192)
        self.branch7x7x3_2 = _row(192, 192)
        self.branch7x7x3_3 = _column(192, 192)
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """[B, C, 8, 8] -> [B, 2048, 8, 8]; `maximum` says how its pooling branch pools."""

    def __init__(self, channels: int, *, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = Convolution(channels, 320)
        self.branch3x3_1 = Convolution(channels, 384)
        self.branch3x3_2a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Convolution(channels, 448)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Convolution(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """uint8 images [B, 3, H, W] as float 0 to 255 -> features [B, 2048]; frozen, in evaluation mode.

    Resized to 299 x 299 bilinearly without antialiasing, and scaled to [-1, 1], as pytorch-fid does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, maximum=False)
        self.Mixed_7c = BlockE(2048, maximum=True)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def build_inception(source: str, seed: int = 0) -> tuple[Inception, str]:
    """(the network, what its weights are: a SHA-256, or "random").

    source: a safetensors file, a folder or hub id that holds one, or "random" (seeded, with a warning:
    for tests and machines without weights). Raises CheckpointError if weights are missing, unexpected,
    of the wrong shape or not finite.
    """
    model = Inception()
    if source == "random":
        _randomise(model, seed)
        log.warning(
            "Inception with RANDOM weights: the distance is not FID and not comparable to any published figure"
        )
        return model, f"random (seed {seed}), NOT FID"
    files = weight_files(source, "Inception weights")
    tensors = {n: t for path in files for n, t in read_weights(path).items()}
    # Batch norm's step counters are of no use here, and ports drop them.
    counters = "num_batches_tracked"
    shapes = {n: t.shape for n, t in model.state_dict().items() if not n.endswith(counters)}
    found = {
        n: t for n, t in tensors.items() if not (n.startswith(_IGNORED) or n.endswith(counters))
    }
    model.load_state_dict(fitted(found, shapes, f"Inception weights {source}"), strict=False)
    return model, sha256_of(files)


def _randomise(model: Inception, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
