"""LAMB, parameter groups, schedule, EMA and FLOP counts against hand-worked values."""

import copy
import math
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qlip_core.architecture import PARTS
from qlip_core.config import PRESETS
from qlip_core.errors import RecipeError
from qlip_torch.train.ema import Ema
from qlip_torch.train.optimizers import (
    Lamb,
    cosine_warmup,
    group_of,
    parameter_groups,
    set_rates,
)
from qlip_torch.train.throughput import forward_flops, matmul_rate, peak_memory

# --- LAMB ----------------------------------------------------------------------------------------


def lamb_by_formula(
    w: np.ndarray, grads: list[np.ndarray], lr: float, decay: float, adapt: bool
) -> np.ndarray:
    """Algorithm 2 of arXiv 1904.00962 in float64, betas (0.9, 0.95), eps 1e-6."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        r = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        if adapt:
            r = r + decay * w
            norms = np.sqrt((w**2).sum()), np.sqrt((r**2).sum())
            r = r * (norms[0] / norms[1] if min(norms) > 0 else 1.0)
        w = w - lr * r
    return w


def test_first_step_hand_worked():
    # First step: m_hat / sqrt(v_hat) = sign(g). w = (3, 4), norm 5; update (1, -1) + 0.1 w =
    # (1.3, -0.6), norm sqrt(2.05); trust 5 / sqrt(2.05).
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    scale = nn.Parameter(torch.tensor(2.0))
    for p, g in ((w, [[2.0, -7.0]]), (bias, [2.0, -7.0]), (scale, 0.5)):
        p.grad = torch.tensor(g)
    Lamb([w, bias, scale], lr=0.01, weight_decay=0.1).step()
    trust = 5 / math.sqrt(2.05)
    expected = [[3 - 0.01 * trust * 1.3, 4 + 0.01 * trust * 0.6]]
    np.testing.assert_allclose(w.detach(), expected, rtol=1e-6)
    np.testing.assert_allclose(bias.detach(), [2.99, 4.01], rtol=1e-6)
    assert scale.item() == pytest.approx(1.99)


def test_many_steps_equal_the_formula():
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (5,), (2, 3, 2), (), (1, 6)]
    start = [rng.normal(size=s) for s in shapes]
    start[4] = np.zeros((1, 6))  # a zero matrix: trust 1 at first
    grads = [[rng.normal(size=s) * 10.0**i for _ in range(6)] for i, s in enumerate(shapes)]
    params = [nn.Parameter(torch.tensor(w).float()) for w in start]
    groups = [
        {"params": params[:2], "lr": 0.02},
        {"params": params[2:], "lr": 0.005, "weight_decay": 0.3},
    ]
    optimizer = Lamb(groups)
    for step in range(6):
        for p, g in zip(params, grads):
            p.grad = torch.tensor(g[step]).float()
        optimizer.step()
    for i, p in enumerate(params):
        lr, decay = (0.02, 0.05) if i < 2 else (0.005, 0.3)
        expected = lamb_by_formula(start[i], grads[i], lr, decay, adapt=len(shapes[i]) >= 2)
        np.testing.assert_allclose(p.detach(), expected, rtol=2e-5, atol=2e-6)


def test_a_parameter_without_gradient_keeps_its_own_count():
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([a, b], lr=0.1, weight_decay=0.0)
    a.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(b, torch.ones(2, 2))
    b.grad = torch.ones(2, 2)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [2.0, 1.0]
    np.testing.assert_allclose(b.detach(), 0.9, rtol=1e-5)


def test_state_is_float32_for_bfloat16_weights_and_survives_a_round_trip():
    def make() -> tuple[nn.Parameter, Lamb]:
        p = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3).bfloat16())
        return p, Lamb([p], lr=0.1)

    def go(p: nn.Parameter, optimizer: Lamb, steps: range) -> None:
        for step in steps:
            p.grad = torch.full_like(p, step + 1.0)
            optimizer.step()

    p, optimizer = make()
    go(p, optimizer, range(5))
    q, first = make()
    go(q, first, range(2))
    assert first.state[q]["exp_avg"].dtype == first.state[q]["exp_avg_sq"].dtype == torch.float32
    second = Lamb([q], lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[q]["exp_avg"].dtype == torch.float32
    go(q, second, range(2, 5))
    assert torch.equal(p, q)


def test_wrong_settings_are_refused():
    with pytest.raises(RecipeError, match=r"betas=\(0.9, 1.0\)"):
        Lamb([nn.Parameter(torch.ones(1))], betas=(0.9, 1.0))


# --- groups and schedule -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("vision_model.encoder.layers.0.mlp.w1.weight", "visual_encoder"),
        ("vision_model.embeddings.class_embedding", "visual_encoder"),
        ("vision_model.quant_embed.c_fc.weight", "rest"),
        ("vision_model.quant_embed_post.c_proj.bias", "rest"),
        ("vision_decoder.conv_out.weight", "decoder"),
        ("text_model.final_layer_norm.bias", "text_encoder"),
        ("text_projection.weight", "text_encoder"),
        ("visual_projection.weight", "rest"),
        ("logit_scale", "rest"),
    ],
)
def test_group_of(name: str, group: str):
    assert group_of(name) == group


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.vision_model = nn.ModuleDict({k: nn.Linear(2, 2) for k in ("body", "quant_embed")})
        self.vision_decoder = nn.ModuleDict({"norm": nn.LayerNorm(2), "ffn": nn.Linear(2, 2)})
        self.text_projection = nn.Linear(2, 2, bias=False)


RATES = {"rest": 5e-4, "visual_encoder": 2e-4, "text_encoder": 2e-5, "decoder": 2e-3}


def test_parameter_groups_cover_each_parameter_once():
    model = Toy()
    groups = parameter_groups(model, RATES, 0.05)
    found = {
        group["name"]: (group["lr"], group["weight_decay"], len(group["params"]))
        for group in groups
    }
    assert found == {
        "decoder": (2e-3, 0.05, 1),
        "decoder/no_decay": (2e-3, 0.0, 3),
        "rest": (5e-4, 0.05, 1),
        "rest/no_decay": (5e-4, 0.0, 2),
        "text_encoder": (2e-5, 0.05, 1),
        "visual_encoder": (2e-4, 0.05, 1),
        "visual_encoder/no_decay": (2e-4, 0.0, 1),
    }
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_frozen_parameters_are_left_out_and_wrong_names_refused():
    model = Toy()
    model.vision_decoder.requires_grad_(False)
    names = {g["name"] for g in parameter_groups(model, RATES | {"visual_encoder": 0.0}, 0.05)}
    assert names == {"rest", "rest/no_decay", "text_encoder"}
    with pytest.raises(RecipeError, match="'encoder'"):
        parameter_groups(model, {"encoder": 1.0}, 0.05)


def test_cosine_warmup_and_set_rates():
    factors = [cosine_warmup(step, 4, 12) for step in (0, 1, 3, 4, 6, 8, 12, 99)]
    quarter = (1 + math.sqrt(0.5)) / 2
    np.testing.assert_allclose(factors, [0.25, 0.5, 1, 1, quarter, 0.5, 0, 0], atol=1e-12)
    assert cosine_warmup(0, 0, 10) == 1.0
    optimizer = Lamb(parameter_groups(Toy(), RATES, 0.05))
    set_rates(optimizer, 0.5)
    set_rates(optimizer, 0.25)
    by_name = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert by_name["decoder"] == pytest.approx(5e-4)


# --- EMA --------------------------------------------------------------------


def test_ema_hand_worked():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = Ema(model, decay=0.15)
    model.weight.data.fill_(2.0)
    ema.update(model)  # decay min(0.15, 1/10): 0.1 * 1 + 0.9 * 2
    assert ema.shadow["weight"].item() == pytest.approx(1.9)
    ema.update(model)  # decay min(0.15, 2/11): 0.15 * 1.9 + 0.85 * 2
    assert ema.shadow["weight"].item() == pytest.approx(1.985)


def test_ema_is_float32_and_skips_frozen_weights():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)).bfloat16()
    ema = Ema(model, decay=0.999)
    assert sorted(ema.shadow) == ["1.bias", "1.weight"]
    assert ema.shadow["1.weight"].dtype == torch.float32


def test_ema_does_not_alias_float32_weights():
    model = nn.Linear(1, 1)
    ema = Ema(model)
    before = ema.shadow["weight"].clone()
    model.weight.data.add_(1.0)
    assert torch.equal(ema.shadow["weight"], before)


# --- FLOPs, rates, memory ------------------------------------------------------------------------


def test_forward_flops_of_b16_by_hand():
    flops = forward_flops(PRESETS["qlip-b-16-256"])
    block = 4 * 768**2 + 3 * 768 * 2048  # multiply-adds a token
    encoder = 12 * (257 * block + 2 * 257**2 * 768) + 256 * 768 * 768 + 768 * 512
    decoder = 12 * (256 * block + 2 * 256**2 * 768) + 256 * (768 * 2048 + 2048 * 768)
    bottleneck = 256 * (768 * 768 + 768 * 28 + 28 * 768 + 768 * 768)
    text = 12 * (77 * (4 * 512**2 + 2 * 512 * 2048) + 2 * 77**2 * 512) + 512 * 512
    assert flops.encoder == 2 * encoder
    assert flops.decoder == 2 * decoder
    assert flops.bottleneck == 2 * bottleneck
    assert flops.text == 2 * text
    # ViT-B/16 at 256 px: 45 GFLOP to within 5 %.
    assert flops.encoder == pytest.approx(45e9, rel=0.05)
    whole = flops.encoder + flops.bottleneck + flops.decoder + flops.text
    assert flops.training(PARTS, PARTS) == 3 * whole
    behind = ("down", "up", "decoder")
    bottleneck_and_decoder = flops.bottleneck + flops.decoder
    assert (
        flops.training(behind, ("encoder", *behind)) == flops.encoder + 3 * bottleneck_and_decoder
    )
    # Gradients pass through a frozen decoder on their way to the encoder, and not the other way.
    frozen_decoder = flops.training(("encoder", "down", "up"), PARTS[1:])
    assert frozen_decoder == 3 * flops.encoder + 3 * flops.bottleneck + 2 * flops.decoder
    plain = PRESETS["qlip-b-16-256"]
    identity = replace(
        plain,
        vision_config=replace(
            plain.vision_config,
            quantizer="none",
            quantizer_embed_type="identity",
            quantizer_l2_norm=False,
        ),
    )
    assert forward_flops(identity).bottleneck == 0
    locked_image = flops.training(("text",), ("text", "encoder", "down"))
    assert locked_image == 3 * flops.text + flops.encoder + flops.bottleneck / 2


def test_measured_rate_and_memory_have_their_units():
    rate = matmul_rate("cpu", torch.float32, size=128, seconds=0.02)
    assert 1e7 < rate < 1e14
    assert 5e7 < peak_memory("cpu") < 1e12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_moment_of_a_busy_cpu_is_not_the_rate(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products that wait: the first few small ones say nothing of the large."""
    honest, seen = torch.mm, []

    def mm(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(len(a))
        if len(seen) <= 3:
            time.sleep(0.01)
        return honest(a, b, **options) if dtype == torch.float32 else a

    monkeypatch.setattr(torch, "mm", mm)
    matmul_rate("cpu", dtype, size=160, seconds=0.01)
    assert seen[-1] == 160


# --- two processes: sharded equals whole -----------------------------------------------------------


def sharded_model() -> nn.Module:
    torch.manual_seed(1)
    # 5 and 3 do not divide by 2: uneven shards, one of them empty on a rank.
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Linear(3, 1))


def train(model: nn.Module, batch: torch.Tensor) -> Ema:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "lr": 0.02}, {"params": plain, "lr": 0.05, "weight_decay": 0.0}]
    optimizer, ema = Lamb(groups), Ema(model, 0.9)
    for _ in range(4):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        ema.update(model)
    return ema


def rows() -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(2))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def worker(rank: int, store: str, out: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = sharded_model()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    ema = train(model, rows()[rank * 4 : rank * 4 + 4])
    assert all(isinstance(shadow, DTensor) for shadow in ema.shadow.values())
    result = {f"model.{k}": full(p.detach()) for k, p in model.named_parameters()}
    result |= {f"ema.{k}": full(shadow) for k, shadow in ema.shadow.items()}
    if rank == 0:
        torch.save(result, out)
    dist.barrier()
    dist.destroy_process_group()


def test_lamb_and_ema_sharded_over_two_processes_equal_one(tmp_path: Path):
    store, out = str(tmp_path / "store"), str(tmp_path / "result.pt")
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), store, out]) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    got = torch.load(out, weights_only=True)
    model = sharded_model()
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    ema = train(model, rows())
    for k, p in model.named_parameters():
        torch.testing.assert_close(got[f"model.{k}"], p.detach(), rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(got[f"ema.{k}"], ema.shadow[k], rtol=2e-5, atol=2e-6)
        assert (p - start[k]).abs().max() > 1e-3


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2], sys.argv[3])
