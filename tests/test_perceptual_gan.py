"""LPIPS, the discriminator and the adversarial losses, against numpy and hand-worked values."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from qlip_core.errors import CheckpointError, QlipError
from qlip_torch.perceptual import Lpips, build_perceptual, clip_to_signed
from qlip_torch.train.discriminator import (
    Blur,
    Discriminator,
    EqualConv,
    EqualLinear,
    discriminator_loss,
    generator_loss,
    minibatch_deviation,
    r1_is_due,
    r1_penalty,
)
from qlip_torch.train.distributed import World
from qlip_torch.train.precision import Precision
from qlip_torch.train.recipe import DiscriminatorRecipe, Stage2Recipe
from qlip_torch.train.stage2 import Adversary

CONVOLUTIONS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
TAPS = {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    return build_perceptual("random", seed=3)


def pictures(count: int, side: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def published_names(model: Lpips) -> dict[str, torch.Tensor]:
    tensors = {f"features.{k}": v.clone() for k, v in model.features.state_dict().items()}
    for k, weight in enumerate(model.linear):
        tensors[f"lin{k}.model.1.weight"] = weight.data.clone().view(1, -1, 1, 1)
    return tensors


def lpips_by_formula(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor):
    """LPIPS written out from its tensors by their published names, in float64."""

    def features(image: torch.Tensor) -> list[np.ndarray]:
        shift = torch.tensor([-0.030, -0.088, -0.188]).double().view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).double().view(3, 1, 1)
        h, taken = (image.double() - shift) / scale, []
        for n in CONVOLUTIONS:
            if n in (5, 10, 17, 24):
                h = F.max_pool2d(h, 2, 2)
            w, b = weights[f"features.{n}.weight"], weights[f"features.{n}.bias"]
            h = F.conv2d(h, w.double(), b.double(), padding=1).clamp(min=0)
            if n in TAPS:
                taken.append(h.numpy())
        return taken

    total = 0.0
    for k, (fx, fy) in enumerate(zip(features(x), features(y))):
        fx = fx / np.sqrt((fx**2).sum(1, keepdims=True) + 1e-30)
        fy = fy / np.sqrt((fy**2).sum(1, keepdims=True) + 1e-30)
        w = weights[f"lin{k}.model.1.weight"].double().numpy()
        total = total + (w * (fx - fy) ** 2).sum(1).mean((1, 2))
    return total


# --- LPIPS ---------------------------------------------------------------------------------------


def test_lpips_equals_the_formula(lpips: Lpips):
    x, y = pictures(2, 40, 0), pictures(2, 40, 1)
    expected = lpips_by_formula(published_names(lpips), x, y)
    np.testing.assert_allclose(lpips.distances(x, y), expected, rtol=2e-5)
    assert lpips(x, y).item() == pytest.approx(float(np.mean(expected)), rel=2e-5)
    assert lpips.distances(x, x).abs().max().item() == 0.0


def test_lpips_gradient_is_the_slope_of_its_value(lpips: Lpips):
    model = build_perceptual("random", seed=3).double()
    x = pictures(1, 16, 4).double().requires_grad_()
    y = pictures(1, 16, 5).double()
    direction = pictures(1, 16, 6).double()
    (grad,) = torch.autograd.grad(model(x, y), x)
    eps = 1e-6
    with torch.no_grad():
        slope = (model(x + eps * direction, y) - model(x - eps * direction, y)) / (2 * eps)
    assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)
    assert not any(p.requires_grad for p in lpips.parameters())


def test_lpips_gradient_is_finite_where_features_vanish(lpips: Lpips):
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    dead = build_perceptual("random")
    for p in dead.features.parameters():
        p.data.zero_()
    dead(x, torch.ones_like(x)).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_lpips_is_float32_under_autocast(lpips: Lpips):
    x, y = pictures(1, 32, 0), pictures(1, 32, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = lpips(x, y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(lpips(x, y).item(), rel=0.02)


def test_random_weights_are_seeded_named_and_announced(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        first = build_perceptual("random", seed=1)
    assert "RANDOM weights" in caplog.text
    assert first.name == "random(seed=1)"
    again, other = build_perceptual("random", seed=1), build_perceptual("random", seed=2)
    x, y = pictures(1, 16, 0), pictures(1, 16, 1)
    assert first(x, y).item() == again(x, y).item() != other(x, y).item()


@pytest.mark.parametrize("split", [False, True])
def test_weights_by_published_names(lpips: Lpips, tmp_path: Path, split: bool):
    tensors = published_names(lpips)
    if split:
        vgg = {k: v for k, v in tensors.items() if k.startswith("features")}
        save_file(vgg | {"classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg.safetensors")
        lin = {k: v for k, v in tensors.items() if k.startswith("lin")}
        save_file(lin, tmp_path / "lin.safetensors")
        source = f"{tmp_path / 'vgg.safetensors'}, {tmp_path / 'lin.safetensors'}"
    else:
        save_file(tensors, tmp_path / "all.safetensors")
        source = str(tmp_path)
    loaded = build_perceptual(source)
    x, y = pictures(1, 16, 0), pictures(1, 16, 1)
    assert loaded(x, y).item() == lpips(x, y).item()
    assert loaded.name == source


def test_wrong_weights_are_refused_by_name(lpips: Lpips, tmp_path: Path):
    tensors = published_names(lpips)
    del tensors["features.28.bias"]
    tensors["lin2.model.1.weight"] = torch.zeros(1, 255, 1, 1)
    tensors["surplus"] = torch.zeros(1)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as error:
        build_perceptual(str(tmp_path / "w.safetensors"))
    for part in ("missing features.28.bias", "unexpected surplus", "[1, 255, 1, 1], not [1, 256"):
        assert part in str(error.value)
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match="pickled weights are never loaded"):
        build_perceptual(str(tmp_path / "pickle.pth"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match="not safetensors"):
        build_perceptual(str(tmp_path / "cut.safetensors"))
    with pytest.raises(CheckpointError, match="no such folder or file"):
        build_perceptual("nowhere/at/all")
    tensors = published_names(lpips)
    tensors["features.0.bias"][3] = math.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"features\.0\.bias holds NaN"):
        build_perceptual(str(tmp_path / "nan.safetensors"))


def test_too_small_pictures_are_refused(lpips: Lpips):
    with pytest.raises(QlipError, match="at least 16 px"):
        lpips(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_clip_space_to_signed():
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    pixels = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3).expand(1, 3, 2, 3)
    signed = clip_to_signed((pixels - mean) / std)
    torch.testing.assert_close(signed, pixels * 2 - 1, rtol=0, atol=2e-7)


# --- discriminator -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 64, 128, 256, 392, 96, 100])
def test_discriminator_takes_any_side(side: int):
    torch.manual_seed(0)
    model = Discriminator(side, base_channels=1024, max_channels=32)
    x = pictures(2, side, 0).requires_grad_()
    logits = model(x)
    assert logits.shape == (2,)
    assert logits.dtype == torch.float32
    (grad,) = torch.autograd.grad(logits.sum(), x)
    # Every pixel counts, borders included.
    assert (grad.abs().sum((0, 1)) > 0).all()
    with pytest.raises(QlipError, match=f"takes {side} px"):
        model(torch.zeros(1, 3, side + 2, side + 2))


def test_discriminator_size_at_256_is_stylegans():
    with torch.device("meta"):
        model = Discriminator(256)
    assert sum(p.numel() for p in model.parameters()) == 28_864_129


def test_equalised_layers_hand_worked():
    linear = EqualLinear(4, 1)
    linear.weight.data.fill_(2.0)
    linear.bias.data.fill_(0.5)
    assert linear(torch.ones(1, 4)).item() == pytest.approx(4 * 2 / math.sqrt(4) + 0.5)
    conv = EqualConv(1, 1, 3)
    conv.weight.data.fill_(1.0)
    centre = conv(torch.ones(1, 1, 3, 3))[0, 0, 1, 1]
    assert centre.item() == pytest.approx(9 / 3)


def test_blur_keeps_the_mean_and_spreads_by_the_filter():
    x = torch.zeros(1, 2, 6, 6)
    x[:, :, 2, 3] = 64.0
    y = Blur(padding=2)(x)
    row = np.array([1, 3, 3, 1])
    assert y.shape == (1, 2, 7, 7)
    np.testing.assert_allclose(y[0, 1, 1:5, 2:6], np.outer(row, row))
    assert y[0, 0].sum().item() == pytest.approx(64.0)


def test_minibatch_deviation_hand_worked():
    # Groups of 2 of 4 images: (0, 2) and (1, 3).
    x = torch.tensor([1.0, 10.0, 5.0, 10.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    y = minibatch_deviation(x, group_size=2)
    assert y.shape == (4, 4, 2, 2)
    torch.testing.assert_close(y[:, :3], x)
    np.testing.assert_allclose(y[:, 3, 0, 0], [2.0, 1e-4, 2.0, 1e-4], rtol=1e-4)
    # 5 has no divisor from 2 to 4: each image alone.
    np.testing.assert_allclose(minibatch_deviation(torch.randn(5, 1, 2, 2))[:, 1], 1e-4, rtol=1e-3)


def test_adversarial_losses_hand_worked():
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])
    softplus = lambda v: math.log1p(math.exp(v))  # noqa: E731
    assert generator_loss(fake).item() == pytest.approx((softplus(-1) + softplus(1)) / 2)
    expected = (softplus(0) + softplus(-2)) / 2 + (softplus(1) + softplus(-1)) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)
    fake.requires_grad_()
    generator_loss(fake).backward()
    assert fake.grad is not None
    sigmoid = 1 / (1 + np.exp(-np.array([1.0, -1.0])))
    np.testing.assert_allclose(fake.grad, -(1 - sigmoid) / 2, rtol=1e-6)


class Square(nn.Module):
    """D(x) = a * sum(x^2): slope 2 a x, so R1 is known with its gradient in a."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * x.square().sum((1, 2, 3))


def test_lazy_r1_hand_worked():
    model = Square()
    x = pictures(3, 4, 0)
    norm = x.square().sum((1, 2, 3)).mean().item()
    penalty = r1_penalty(model, x)
    penalty.backward()
    assert penalty.item() == pytest.approx(16 * 10 / 2 * (2 * 0.5) ** 2 * norm, rel=1e-5)
    assert model.a.grad is not None
    assert model.a.grad.item() == pytest.approx(16 * 10 / 2 * 8 * 0.5 * norm, rel=1e-5)
    assert [step for step in range(40) if r1_is_due(step)] == [0, 16, 32]


def test_r1_of_a_few_images_at_a_time_is_r1_of_all(monkeypatch: pytest.MonkeyPatch):
    discriminator = DiscriminatorRecipe(base_channels=256, r1_weight=10.0)
    recipe = Stage2Recipe(discriminator=discriminator)
    device = torch.device("cpu")
    adversary = Adversary(discriminator, recipe, 16, Precision(False, device), World(0, 1, device))
    adversary.module = model = Square()
    real, made = pictures(5, 16, 0), pictures(5, 16, 1)
    found = []
    for rows in (2, 16):
        monkeypatch.setattr("qlip_torch.train.stage2.R1_ROWS", rows)
        model.a.grad = None
        terms = adversary.backward(real, made, 0, share=0.5)
        assert model.a.grad is not None
        found.append((terms["r1"].item(), model.a.grad.item()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[1][0] == pytest.approx(r1_penalty(model, real).item(), rel=1e-6)


def test_r1_reaches_the_discriminators_weights_under_autocast():
    torch.manual_seed(0)
    model = Discriminator(16, base_channels=256, max_channels=16)
    x = pictures(4, 16, 0)
    expected = r1_penalty(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = r1_penalty(model, x)
    assert penalty.item() == expected.item() > 0
    penalty.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all()
        for name, p in model.named_parameters()
        if "weight" in name
    )


def test_the_two_players_learn():
    # A discriminator told apart black from white in a few steps has working gradients.
    torch.manual_seed(0)
    model = Discriminator(8, base_channels=128, max_channels=16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    noise = pictures(8, 8, 0) * 0.1
    real, fake = noise + 0.5, noise - 0.5
    for step in range(17):
        loss = discriminator_loss(model(real), model(fake))
        if r1_is_due(step):
            loss = loss + r1_penalty(model, real, weight=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert discriminator_loss(model(real), model(fake)).item() < 0.2
    fake.requires_grad_()
    (grad,) = torch.autograd.grad(generator_loss(model(fake)), fake)
    assert (grad.sum((1, 2, 3)) < 0).all()  # brighter is more real
