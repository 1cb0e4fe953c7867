"""Training objectives against hand-worked values, direct forms and one process against two."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from qlip_core import metrics
from qlip_core.errors import ConfigError, QlipError
from qlip_torch.train.objectives import bsq_entropy, commitment, info_nce, mse, ssim


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def direct_entropies(u: torch.Tensor, size: int, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """SPEC 1.3 as written: softmax over the 2^g corners of each group."""
    length = u.shape[-1]
    groups = u.reshape(-1, length // size, size)
    bits = torch.arange(2**size).unsqueeze(-1) >> torch.arange(size - 1, -1, -1) & 1
    corners = (2 * bits - 1).to(u.dtype) / math.sqrt(length)
    log_p = (2 * t * groups @ corners.T).log_softmax(-1)
    per_sample = -(log_p.exp() * log_p).sum((-1, -2)).mean()
    mean = log_p.exp().mean(0)
    return per_sample, -torch.special.xlogy(mean, mean).sum()


# --- reconstruction and commitment -------------------------------------------------------------


def test_mse_is_the_mean_over_every_value_in_float32():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = mse(x, torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx((1 + 16) / 4)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, [[0.5, 0], [0, 2.0]])
    assert mse(x.bfloat16(), x.bfloat16()).dtype == torch.float32


def test_commitment_moves_only_the_encoder_side():
    z = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
    z_hat = torch.tensor([[[0.0, 4.0]]], requires_grad=True)
    loss = commitment(z, z_hat)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 4) / 2)
    assert z.grad is not None
    np.testing.assert_allclose(z.grad, [[[1.0, -2.0]]])
    assert z_hat.grad is None


def test_ssim_is_the_metric_of_evaluation_and_its_slope():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 20, 24, 3), dtype=np.uint8)
    b[0] = a[0]
    x, y = (torch.from_numpy(p).double().permute(0, 3, 1, 2) / 127.5 - 1 for p in (a, b))
    assert ssim(x, y).item() == pytest.approx(1 - metrics.ssim(a, b).mean(), abs=1e-12)
    assert ssim(x, x).item() == pytest.approx(0, abs=1e-12)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda made: ssim(made, y), (x,), nondet_tol=0)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(QlipError, match=r"mse needs two tensors of one shape, got \[2, 3\]"):
        mse(torch.zeros(2, 3), torch.zeros(3))


# --- binary spherical quantization ---------------------------------------------------------------


def test_bsq_entropies_of_a_hand_worked_pair():
    # L = 2, t chosen so that the logits 4 t u / sqrt(2) are +-ln 3: every bit is 3/4 or 1/4.
    t = math.log(3) / 2
    side = math.sqrt(0.5)
    u = torch.tensor([[side, side], [side, -side]], dtype=torch.float64)
    assert 4 * t * side / math.sqrt(2) == pytest.approx(math.log(3))
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    # mean joint: the first bit 3/4, the second (3/4 + 1/4)/2 = 1/2, independent after averaging.
    terms = bsq_entropy(u, 2, t, gamma_0=2.0, gamma_1=0.5, beta=3.0)
    assert terms.per_sample.item() == pytest.approx(2 * quarter)
    assert terms.codebook.item() == pytest.approx(quarter + math.log(2))
    penalty = 2 * 2 * quarter - 0.5 * (quarter + math.log(2))
    # |u_i| is already 1/sqrt(L): nothing to commit to.
    assert terms.commitment.item() == pytest.approx(0.0, abs=1e-15)
    assert terms.total.item() == pytest.approx(penalty / t)


def test_bsq_commitment_value_and_gradient():
    u = torch.tensor([[0.6, -0.8], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    terms = bsq_entropy(u, 1, 1.0, gamma_0=0.0, gamma_1=0.0, beta=2.0)
    corner = np.array([[1, -1], [-1, 1]]) / math.sqrt(2)  # a bit is 1 only if u > 0
    difference = np.array([[0.6, -0.8], [0.0, 1.0]]) - corner
    expected = (difference**2).sum(-1).mean()
    terms.total.backward()
    assert terms.commitment.item() == pytest.approx(expected)
    assert terms.total.item() == pytest.approx(2 * expected)
    assert u.grad is not None
    np.testing.assert_allclose(u.grad, 2 * 2 * difference / 2, atol=1e-15)


def test_entropies_equal_the_published_ones(expected: dict[str, np.ndarray]):
    terms = bsq_entropy(torch.tensor(expected["u"]), group_size=14)
    # The published code adds 1e-8 to probabilities, which its codebook entropy feels (SPEC 2).
    assert terms.codebook.item() == pytest.approx(expected["codebook_entropy"].item(), abs=6e-3)
    assert terms.total.item() == pytest.approx(expected["quant_loss"].item(), abs=6e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 9])
@pytest.mark.parametrize("t", [1.0, 10.0, 100.0])
def test_factorised_equals_direct_with_gradients(size: int, t: float):
    u = unit(3, 11, 2 * size, seed=size).requires_grad_()
    terms = bsq_entropy(u, size, t, chunk_tokens=5)
    per_sample, codebook = direct_entropies(u, size, t)
    assert terms.per_sample.item() == pytest.approx(per_sample.item(), rel=1e-11, abs=1e-14)
    assert terms.codebook.item() == pytest.approx(codebook.item(), rel=1e-11, abs=1e-13)
    weights = (0.7, -1.3)
    ours = torch.autograd.grad(
        weights[0] * terms.per_sample + weights[1] * terms.codebook, u, retain_graph=True
    )
    direct = torch.autograd.grad(weights[0] * per_sample + weights[1] * codebook, u)
    torch.testing.assert_close(ours[0], direct[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [14, 18])
def test_large_groups_equal_direct_in_float32(size: int):
    u = unit(7, size, seed=size).requires_grad_()
    narrow = u.detach().float().requires_grad_()
    per_sample, codebook = direct_entropies(u, size, 20.0)
    terms = bsq_entropy(narrow, size, 20.0)
    assert terms.per_sample.item() == pytest.approx(per_sample.item(), rel=2e-6)
    assert terms.codebook.item() == pytest.approx(codebook.item(), rel=2e-6)
    ours = torch.autograd.grad(terms.per_sample - terms.codebook, narrow)[0]
    direct = torch.autograd.grad(per_sample - codebook, u)[0]
    torch.testing.assert_close(ours.double(), direct, rtol=1e-4, atol=1e-5)


def test_every_group_size_to_18_stays_within_its_bounds():
    for size in range(1, 19):
        u = unit(4, 2 * size, seed=size, dtype=torch.float32)
        terms = bsq_entropy(u, size, 5.0)
        # Averaging raises entropy; no group of 4 tokens' joints exceeds g bits of it.
        assert terms.per_sample <= terms.codebook <= 2 * size * math.log(2) + 1e-4, size


def test_gradcheck():
    u = unit(6, 6, seed=3).requires_grad_()

    def function(u: torch.Tensor) -> torch.Tensor:
        return bsq_entropy(u, 3, 4.0, 1.0, 1.5, 0.3, chunk_tokens=4).total

    assert torch.autograd.gradcheck(function, (u,))


def test_saturated_bits_give_finite_terms_and_tiny_exact_gradients():
    # At t = 100, p of the far corners underflows float32; log and its slope must stay finite.
    u = torch.full((2, 28), 28**-0.5).requires_grad_()
    terms = bsq_entropy(u, 14, 400.0, beta=1.0)
    terms.total.backward()
    assert math.isfinite(terms.total.item())
    assert u.grad is not None
    assert torch.isfinite(u.grad).all()
    # With one distinct token both entropies are the same sum, so their gradients cancel.
    torch.testing.assert_close(u.grad, torch.zeros_like(u), rtol=0, atol=1e-8)


def test_nan_is_not_swallowed():
    u = unit(3, 4, dtype=torch.float32)
    u[1, 2] = math.nan
    terms = bsq_entropy(u, 2, beta=1.0)
    assert all(math.isnan(v) for v in (terms.per_sample, terms.codebook, terms.commitment))


def test_per_bit_is_group_size_one():
    u = unit(9, 12, seed=5)
    terms = bsq_entropy(u, 6, 10.0, per_bit=True)
    p = torch.sigmoid(4 * 10.0 * u / math.sqrt(12)).mean(0)
    expected = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).sum()
    assert terms.codebook.item() == pytest.approx(expected.item(), rel=1e-12)
    assert terms.codebook.item() == bsq_entropy(u, 1, 10.0).codebook.item()
    assert terms.codebook.item() != pytest.approx(bsq_entropy(u, 6, 10.0).codebook.item())


def test_chunks_do_not_change_the_result():
    u = unit(50, 10, dtype=torch.float64)
    whole = bsq_entropy(u, 5, 30.0, chunk_tokens=50)
    for chunk in (1, 7, 49):
        part = bsq_entropy(u, 5, 30.0, chunk_tokens=chunk)
        assert part.total.item() == pytest.approx(whole.total.item(), rel=1e-12)


def test_autocast_changes_nothing_of_the_entropies():
    u = unit(20, 12, dtype=torch.float32).requires_grad_()
    plain = bsq_entropy(u, 6)
    (expected,) = torch.autograd.grad(plain.total, u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = bsq_entropy(u, 6)
        (grad,) = torch.autograd.grad(terms.total, u)
    assert terms.total.dtype == torch.float32
    assert torch.equal(terms.total, plain.total)
    assert torch.equal(grad, expected)


MEMORY_SCRIPT = """
import resource, torch
from qlip_torch.train.objectives import bsq_entropy
torch.set_num_threads(1)
u = torch.empty(128 * 1024, 28)
for part in u.split(1024):
    part.copy_(torch.nn.functional.normalize(torch.randn(part.shape), dim=-1))
u.requires_grad_()
bsq_entropy(u[:2], 14).total.backward()
u.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bsq_entropy(u, 14).total.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_beyond_u_and_its_gradient_does_not_grow_with_tokens():
    # 128 Ki tokens at g = 14: the half-groups' joints alone would be 268 MB, and 17 GB direct.
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True
    )
    gradient = 128 * 1024 * 28 * 4
    assert int(done.stdout) < gradient + 120 * 2**20


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="group_size 5 does not divide the 28 bits"):
        bsq_entropy(torch.zeros(2, 28), 5)


# --- alignment -----------------------------------------------------------------------------------


def test_info_nce_hand_worked():
    # logits = 2 * [[1, 0.6], [0, 0.8]]
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    loss = info_nce(image, text, torch.tensor(math.log(2.0), dtype=torch.float64))
    e = math.exp
    rows = [-math.log(e(2) / (e(2) + e(1.2))), -math.log(e(1.6) / (e(0) + e(1.6)))]
    columns = [-math.log(e(2) / (e(2) + e(0))), -math.log(e(1.6) / (e(1.2) + e(1.6)))]
    assert loss.item() == pytest.approx((sum(rows) + sum(columns)) / 4, rel=1e-12)


def test_info_nce_gradients_and_chunks():
    image, text = unit(7, 4, seed=1).requires_grad_(), unit(7, 4, seed=2).requires_grad_()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(info_nce, (image, text, scale))

    def chunked(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return info_nce(image, text, scale, chunk_rows=3)

    inputs = (image, text, scale)
    whole, parts = info_nce(*inputs), chunked(*inputs)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(whole, inputs), torch.autograd.grad(parts, inputs)):
        torch.testing.assert_close(a, b)


def test_info_nce_is_float32_under_autocast():
    image, text = unit(8, 16, seed=1).float(), unit(8, 16, seed=2).float()
    scale = torch.tensor(3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(image, text, scale)
    assert torch.equal(loss, info_nce(image, text, scale))


# --- two processes -------------------------------------------------------------------------------

ROWS, WIDTH, BITS = 5, 6, 10


def towers(seed: int = 7) -> torch.nn.ModuleDict:
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict(
        {
            "image": torch.nn.Linear(WIDTH, 4),
            "text": torch.nn.Linear(WIDTH, 4),
            "bits": torch.nn.Linear(WIDTH, BITS),
        }
    ).double()
    model.register_parameter("logit_scale", torch.nn.Parameter(torch.tensor(1.7).double()))
    return model


def losses(model: torch.nn.ModuleDict, batch: torch.Tensor, group) -> dict[str, torch.Tensor]:
    image = F.normalize(model["image"](batch[:, 0]), dim=-1)
    text = F.normalize(model["text"](batch[:, 1]), dim=-1)
    u = F.normalize(model["bits"](batch[:, 0]), dim=-1)
    scale = model.get_parameter("logit_scale")
    return {
        "align": info_nce(image, text, scale, group, chunk_rows=3),
        "bsq": bsq_entropy(u, 5, 8.0, beta=0.5, group=group).total,
    }


def pairs() -> torch.Tensor:
    return torch.randn(2 * ROWS, 2, WIDTH, generator=torch.Generator().manual_seed(9)).double()


def worker(rank: int, store: str, out: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    result: dict[str, torch.Tensor] = {}
    for name in ("align", "bsq"):
        model = towers()
        # Every parameter takes part only in some losses: reduce by hand, as DDP's mean does.
        loss = losses(model, pairs()[rank * ROWS : (rank + 1) * ROWS], dist.group.WORLD)[name]
        loss.backward()
        for key, value in [("loss", loss.detach())] + [
            (key, p.grad) for key, p in model.named_parameters() if p.grad is not None
        ]:
            value = value.clone()
            dist.all_reduce(value)
            result[f"{name}/{key}"] = value / 2
    if rank == 0:
        torch.save(result, out)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    command = [sys.executable, __file__]
    store, out = str(tmp_path / "store"), str(tmp_path / "result.pt")
    processes = [subprocess.Popen([*command, str(rank), store, out]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    got = torch.load(out, weights_only=True)
    compared = 0
    for name in ("align", "bsq"):
        model = towers()
        loss = losses(model, pairs(), None)[name]
        loss.backward()
        torch.testing.assert_close(got[f"{name}/loss"], loss.detach(), rtol=1e-12, atol=1e-14)
        for key, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(got[f"{name}/{key}"], p.grad, rtol=1e-10, atol=1e-13)
                compared += 1
    assert compared == 5 + 2


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2], sys.argv[3])
