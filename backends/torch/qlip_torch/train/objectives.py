"""What stage 1 minimises: reconstruction, the quantizer's entropies and commitment, alignment.

Legend: B images, N patches, L bits, g bits per group, G = L/g groups, T = B*N tokens, t the inverse
temperature, u the unit vectors before the sign. Each docstring has the equation. All functions
compute in float32 even under autocast (float64 stays float64, for gradient checks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qlip_core.errors import ConfigError, QlipError
from qlip_torch.train.collectives import gather_rows, mean_over_ranks
from qlip_torch.train.precision import at_least_float32, no_autocast

CHUNK_BYTES, ENTROPY_BYTES = 16 * 2**20, 100 * 2**20
"""Half-group joints of one chunk of tokens, and roughly the total of `bsq_entropy`: backward holds six times
as much."""
CHUNK_ROWS = 2048
"""Rows whose logits `info_nce` makes at a time."""


def mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """`mean((x_hat - x)^2)` over all values of [B, 3, S, S], in the normalised pixel space."""
    _same_shape("mse", reconstruction, target)
    with no_autocast(reconstruction.device):
        return F.mse_loss(at_least_float32(reconstruction), at_least_float32(target))


def commitment(z: Tensor, z_hat: Tensor) -> Tensor:
    """`mean((stop_grad(z_hat) - z)^2)` of the encoder's features and the bottleneck's [B, N, D].

    SPEC 1.3's optional term on the up-projected side: it moves `z` towards what the decoder sees.
    """
    _same_shape("commitment", z_hat, z)
    with no_autocast(z.device):
        return F.mse_loss(at_least_float32(z), at_least_float32(z_hat.detach()))


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """`1 - SSIM` of [B, 3, S, S] in [-1, 1], the mean over images: 0 for equal ones.

    Wang et al. 2004, as `qlip_core.metrics.ssim` measures it (Gaussian window of 11 pixels and deviation
    1.5, no padding, mean over positions and channels), on unrounded values. The paper's perceptual loss is
    LPIPS; this one is for machines without LPIPS' weights.
    """
    _same_shape("ssim", reconstruction, target)
    with no_autocast(reconstruction.device):
        # Shifted to start at 0, because SSIM's first factor compares means by their ratio.
        x, y = ((at_least_float32(image) + 1) / 2 for image in (reconstruction, target))
        rows, columns = (_gaussian_rows(size, x) for size in x.shape[-2:])
        maps = torch.stack((x, y, x * x, y * y, x * y))
        mean_x, mean_y, xx, yy, xy = rows @ maps @ columns.T
        c1, c2 = 0.01**2, 0.03**2
        near = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
        far = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
        return 1 - (near / far).mean()


def _gaussian_rows(size: int, like: Tensor) -> Tensor:
    """The blur of `size` pixels along one axis, as a matrix [size - window + 1, size]."""
    window = min(11, size)
    offsets = torch.arange(window, dtype=like.dtype, device=like.device) - (window - 1) / 2
    kernel = (-(offsets**2) / (2 * 1.5**2)).exp()
    kernel = kernel / kernel.sum()
    out = like.new_zeros(size - window + 1, size)
    for row in range(len(out)):
        out[row, row : row + window] = kernel
    return out


@dataclass(frozen=True)
class BsqEntropy:
    """The terms of `bsq_entropy`, scalars, entropies in nats.

    `total` is minimised; `commitment` is without its weight.
    """

    per_sample: Tensor
    codebook: Tensor
    commitment: Tensor
    total: Tensor


def bsq_entropy(
    u: Tensor,
    group_size: int,
    inv_temperature: float = 100.0,
    gamma_0: float = 1.0,
    gamma_1: float = 1.0,
    beta: float = 0.0,
    *,
    per_bit: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> BsqEntropy:
    """Entropies of BSQ's soft assignment, exact and without the 2^g corners (SPEC 1.3).

    For unit vectors u [..., L], bit i is 1 with probability `p_i = sigmoid(4 t u_i / sqrt(L))` and
    the bits of a group are independent, so with `H` in nats

        per_sample = mean_T sum_i H(p_i)
        codebook   = sum_G H(mean_T p(c)),     mean_T p(c) = A^T B / T
        penalty    = gamma_0 * per_sample - gamma_1 * codebook
        commitment = mean_T |sign(u)/sqrt(L) - u|^2
        total      = penalty / t + beta * commitment

    where A [T, 2^(g//2)] and B [T, 2^(g - g//2)] are the joints of a group's two halves. They are
    computed chunk by chunk and recomputed in backward, so that only u and its gradient grow with T.

    `per_bit` treats every bit as its own group (the "analytical" form). Under data parallelism the
    codebook's mean is over this rank's tokens, or with `group` over every rank's (the same number
    of tokens on each). `chunk_tokens` bounds memory; by default about 100 MiB are used.
    With TF32 switched on, the products `A^T B` use it, as any float32 product does.
    """
    length = u.shape[-1]
    size = 1 if per_bit else group_size
    if size < 1 or length % size:
        raise ConfigError(f"group_size {group_size} does not divide the {length} bits of u")
    with no_autocast(u.device):
        tokens = at_least_float32(u).reshape(-1, length)
        if chunk_tokens is None:
            widths = 2 ** (size // 2) + 2 ** (size - size // 2)
            token_bytes = length // size * widths * tokens.element_size()
            chunk_tokens = max(1, CHUNK_BYTES // token_bytes)
        outputs = _SoftAssignment.apply(tokens, size, inv_temperature, chunk_tokens)
        per_sample, joint, distance = outputs  # type: ignore[misc]
        if group is not None:
            joint = mean_over_ranks(joint, group)
        # At p = 0 the slope of -p log p is infinite and that of p is 0; their product must be 0.
        codebook = -(joint * joint.clamp_min(torch.finfo(joint.dtype).tiny).log()).sum()
        penalty = (gamma_0 * per_sample - gamma_1 * codebook) / inv_temperature
        return BsqEntropy(per_sample, codebook, distance, penalty + beta * distance)


class _SoftAssignment(Function):
    """u [T, L] to (per-sample entropy, mean joints [G, 2^(g//2), 2^(g-g//2)], commitment).

    Only u is kept. In the logit `a_i = 4 t u_i / sqrt(L)`, `d H(p_i) / d a_i = -a_i p_i (1 - p_i)`
    and, for a half's joint A over corners c with bits c_i, `d A_c / d a_i = A_c (c_i - p_i)`.
    """

    @staticmethod
    def forward(ctx, u: Tensor, size: int, inv_temperature: float, chunk: int):
        count, length = u.shape
        ctx.save_for_backward(u)
        ctx.size, ctx.chunk = size, chunk
        ctx.slope = 4 * inv_temperature / math.sqrt(length)
        low = size // 2
        entropy = u.new_zeros(())
        distance = u.new_zeros(())
        joint = u.new_zeros(length // size, 2**low, 2 ** (size - low))
        for part in u.split(chunk):
            logit = part * ctx.slope
            magnitude = logit.abs()
            entropy += (magnitude * torch.sigmoid(-magnitude) + F.softplus(-magnitude)).sum()
            distance += (part - _corner(part)).square().sum()
            left, right = _half_joints(*_bit_probabilities(logit, size))
            joint += left.transpose(1, 2) @ right
        return entropy / count, joint / count, distance / count

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_entropy, grad_joint, grad_distance = grads
        (u,) = ctx.saved_tensors
        count = u.shape[0]
        low = ctx.size // 2
        grad_u = torch.empty_like(u)
        with no_autocast(u.device):
            for part, out in zip(u.split(ctx.chunk), grad_u.split(ctx.chunk)):
                one, zero = _bit_probabilities(part * ctx.slope, ctx.size)
                left, right = _half_joints(one, zero)
                grad_left = (right @ grad_joint.transpose(1, 2)).mul_(left)
                grad_right = (left @ grad_joint).mul_(right)
                grad_logit = torch.cat(
                    (
                        _half_gradient(grad_left, one[..., :low], zero[..., :low]),
                        _half_gradient(grad_right, one[..., low:], zero[..., low:]),
                    ),
                    dim=-1,
                )
                del left, right, grad_left, grad_right
                grad_logit = grad_logit.transpose(0, 1).reshape(part.shape)
                bit_variance = (one * zero).transpose(0, 1).reshape(part.shape)
                grad_logit -= grad_entropy * ctx.slope * part * bit_variance
                torch.add(
                    grad_logit.mul_(ctx.slope / count),
                    (part - _corner(part)) * (2 * grad_distance / count),
                    out=out,
                )
        return grad_u, None, None, None


def _corner(u: Tensor) -> Tensor:
    """sign(u)/sqrt(L), where only u > 0 is positive (SPEC 1.3); NaN stays NaN in `u - corner`."""
    side = u.shape[-1] ** -0.5
    return (u > 0).to(u.dtype).mul_(2 * side).sub_(side)


def _bit_probabilities(logit: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Probabilities of 1 and of 0, [G, C, g] from logits [C, L]; both exact far from 1/2."""
    grouped = logit.view(logit.shape[0], -1, size).transpose(0, 1).contiguous()
    return torch.sigmoid(grouped), torch.sigmoid(-grouped)


def _half_joints(one: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Joints of the first g//2 bits and of the others: [G, C, 2^(g//2)], [G, C, 2^(g-g//2)]."""
    low = one.shape[-1] // 2
    return _joint(one[..., :low], zero[..., :low]), _joint(one[..., low:], zero[..., low:])


def _joint(one: Tensor, zero: Tensor) -> Tensor:
    """Joint distribution of k independent bits, most significant first: [..., k] to [..., 2^k]."""
    joint = one.new_ones(*one.shape[:-1], 1)
    # From the last bit to the first, so that the contiguous axis is the long one.
    for i in reversed(range(one.shape[-1])):
        joint = torch.cat((joint * zero[..., i, None], joint * one[..., i, None]), dim=-1)
    return joint


def _half_gradient(weighted: Tensor, one: Tensor, zero: Tensor) -> Tensor:
    """Gradient at the logits [G, C, k] from `A * dA` [G, C, 2^k].

    `sum_c A_c dA_c (c_i - p_i)`, with the corners of c_i = 1 and c_i = 0 summed separately: their factors
    `1 - p_i` and `-p_i` are each exact, whereas the difference of two full sums would cancel digits.
    """
    k = one.shape[-1]
    shifts = torch.arange(k - 1, -1, -1, device=weighted.device)
    bits = torch.arange(2**k, device=weighted.device).unsqueeze(-1) >> shifts & 1
    bits = bits.to(weighted.dtype)
    return (weighted @ bits) * zero - (weighted @ (1 - bits)) * one


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Symmetric InfoNCE over the global batch, for this rank's rows.

    With unit embeddings I, T [B, D] of all ranks and `l = exp(logit_scale) * I T^T`,

        loss = (mean_i CE(l[i, :], i) + mean_j CE(l[:, j], j)) / 2,

    i and j over this rank's b rows. The mean of the result over ranks is the loss of one process with all
    rows, and the same holds for the gradients of every parameter.

    image, text: [b, D], L2-normalised, the same b on every rank. logit_scale: the parameter itself,
    before exp. `group` None is this rank alone. Logits are computed for `chunk_rows` rows at a time and
    recomputed in backward.
    """
    _same_shape("info_nce", image, text)
    with no_autocast(image.device):
        image, text = at_least_float32(image), at_least_float32(text)
        scale = at_least_float32(logit_scale).exp()
        first, all_image, all_text = 0, image, text
        if group is not None and dist.get_world_size(group) > 1:
            first = dist.get_rank(group) * image.shape[0]
            both = gather_rows(torch.cat((image, text), dim=1), group)
            all_image, all_text = both.split(image.shape[1], dim=1)
        forward = _row_cross_entropy(image * scale, all_text, first, chunk_rows)
        backward = _row_cross_entropy(text * scale, all_image, first, chunk_rows)
        return (forward + backward) / 2


def _row_cross_entropy(queries: Tensor, keys: Tensor, first: int, chunk_rows: int) -> Tensor:
    """Mean over rows i of `CE(queries[i] keys^T, first + i)`: [b, D], [B, D] to a scalar."""
    count = queries.shape[0]
    target = torch.arange(first, first + count, device=queries.device)
    if count <= chunk_rows:
        return F.cross_entropy(queries @ keys.T, target)
    total = queries.new_zeros(())
    for rows, labels in zip(queries.split(chunk_rows), target.split(chunk_rows)):
        total = total + checkpoint(
            _summed_cross_entropy, rows, keys, labels, use_reentrant=False, preserve_rng_state=False
        )
    return total / count


def _summed_cross_entropy(rows: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    with no_autocast(rows.device):
        return F.cross_entropy(rows @ keys.T, labels, reduction="sum")


def _same_shape(what: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise QlipError(
            f"{what} needs two tensors of one shape, got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
