"""One Gaussian per position: its two exact forms, and the Mahalanobis distance to it.

With N samples X (N, d) about their mean, Σ = XᵀX/(N-1) + ε·I. Where N > d the d×d inverse Cholesky factor is smaller; where N ≤ d
Woodbury's identity turns the same inverse into an (N, d) factor: Σ⁻¹ = (I - WᵀW)/ε with W = L⁻¹X and
LLᵀ = XXᵀ + ε(N-1)·I.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

BLOCKS = 4  # of rows of a triangular matrix in an export
CHUNK = 256  # positions at a time, so that temporaries stay small


def merge_moments(count: int, mean: Tensor, scatter: Tensor, rows: Tensor) -> int:
    """Fold samples (P, n, d) into means (P, d) and scatters Σ(x-μ)(x-μ)ᵀ (P, d, d), both in place; returns the new count.

    Chan, Golub, LeVeque 1979: about each batch's own mean, so that nothing large cancels.
    """
    n = rows.shape[1]
    fresh = rows.mean(1)  # (P, d)
    delta = fresh - mean  # (P, d)
    # the between-batch term is one more row, so that a single product updates the scatter
    centred = rows.new_empty(len(rows), n + 1, rows.shape[2])  # (P, n+1, d), filled in place: a concatenation would copy it once more
    torch.sub(rows, fresh[:, None], out=centred[:, :n])
    torch.mul(delta, (count * n / (count + n)) ** 0.5, out=centred[:, n])
    scatter.baddbmm_(centred.mT, centred)
    mean.add_(delta, alpha=n / (count + n))
    return count + n


def cholesky_factor(scatter: Tensor, count: int, epsilon: float) -> Tensor:
    """Overwrite scatters (P, d, d) of `count` samples by L⁻¹, where LLᵀ = scatter/(count-1) + ε·I."""
    for chunk in scatter.split(CHUNK):
        covariance = chunk / max(count - 1, 1)
        covariance.diagonal(dim1=1, dim2=2).add_(epsilon)
        lower = torch.linalg.cholesky(covariance)
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        # an expanded right-hand side would be solved twenty times slower
        chunk.copy_(torch.linalg.solve_triangular(lower, eye.expand_as(lower).contiguous(), upper=False))
    return scatter


def scatter_of(factor: Tensor, count: int, epsilon: float) -> Tensor:
    """The inverse of `cholesky_factor`: scatters (P, d, d) from L⁻¹ (P, d, d)."""
    scatter = torch.empty_like(factor)
    for chunk, out in zip(factor.split(CHUNK), scatter.split(CHUNK), strict=True):
        wide = chunk.double()  # the difference below would lose what float32 holds of small variances
        eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
        lower = torch.linalg.solve_triangular(wide, eye.expand_as(wide).contiguous(), upper=False)
        out.copy_((lower @ lower.mT - epsilon * eye) * max(count - 1, 1))
    return scatter


def woodbury_factor(rows: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite samples (N, P, d) by W; returns (means (P, d), W (N, P, d), L (P, N, N))."""
    count, positions = rows.shape[:2]
    mean = rows.mean(0)  # (P, d)
    rows -= mean
    lower = rows.new_empty(positions, count, count)
    for chunk, out in zip(rows.split(CHUNK, dim=1), lower.split(CHUNK), strict=True):
        x = chunk.transpose(0, 1)  # (p, N, d)
        gram = x @ x.mT  # (p, N, N)
        gram.diagonal(dim1=1, dim2=2).add_(epsilon * max(count - 1, 1))
        out.copy_(torch.linalg.cholesky(gram))
        chunk.copy_(torch.linalg.solve_triangular(out, x, upper=False).transpose(0, 1))
    return mean, rows, lower


def samples_of(mean: Tensor, factor: Tensor, lower: Tensor) -> Tensor:
    """The inverse of `woodbury_factor`: samples (N, P, d)."""
    return (lower @ factor.transpose(0, 1)).transpose(0, 1) + mean


def mahalanobis_cholesky(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Distances √((x-μ)ᵀΣ⁻¹(x-μ)) of samples (P, B, d) from L⁻¹ (P, d, d): (P, B)."""
    x = x - mean[:, None]
    if torch.compiler.is_exporting():  # in blocks of rows, without most of the zeros above the diagonal of L⁻¹
        ends = [round(x.shape[2] * i / BLOCKS) for i in range(BLOCKS + 1)]
        blocks = [(x[..., :end] @ factor[:, start:end, :end].mT.contiguous()) for start, end in pairwise(ends)]
        return sum(block.square().sum(2) for block in blocks).sqrt()
    return (x @ factor.mT).norm(dim=2)


def mahalanobis_woodbury(x: Tensor, mean: Tensor, factor: Tensor, epsilon: float) -> Tensor:
    """The same distances from W (N, P, d): (P, B)."""
    y = x - mean[:, None]  # (P, B, d)
    squared = y.square().sum(2) - (y @ factor.permute(1, 2, 0)).square().sum(2)  # (P, B)
    return squared.div(epsilon).clamp_min(0).sqrt()


def left_out_cholesky(distance: Tensor, count: int) -> Tensor:
    """Squared distances of training samples, from theirs (any shape) to the Gaussian of all `count`, had each been replaced by the worst.

    With the leverage h = distance²/(N-1), c = N/(N-1) and the same ridge, the Gaussian of the N-1 others is at (N-1) c² h/(1 - ch)
    (Sherman and Morrison). One more sample in their place, wherever it is, adds at most 1/N: with a = yᵀAy, b = yᵀAz, q = zᵀAz of the
    sample y and the new one z about the mean of m others, the inverse of whose scatter and ridge is A, y then is at
    a - 2b/(m+1) + q/(m+1)² - m/(m+1) (b - q/(m+1))²/(1 + qm/(m+1)), which is largest for b = -1/m, where it is a + 1/(m(m+1)).
    """
    c = count / (count - 1)
    h = distance.square() / (count - 1)
    return c**2 * h / (1 - c * h).clamp_min(torch.finfo(h.dtype).eps) * (count - 1) + 1 / count


def left_out_woodbury(lower: Tensor, rows: Tensor, epsilon: float) -> Tensor:
    """`left_out_cholesky` of the samples `rows` (B,) from L (P, N, N) of `woodbury_factor`: (P, B).

    With the diagonal of K⁻¹, K = LLᵀ, h = 1 - ε(N-1)K⁻¹, and c²h/(1 - ch) becomes 1/r - c with r = 1 - 1/N - h. The vector of ones is an
    eigenvector of K with its least eigenvalue ε(N-1), which accounts for the 1/N: another eigenvalue s in its place leaves the rest as it
    is, and r = ε(N-1) (K⁻¹ - 1/(Ns)) without a difference of nearly equal numbers.
    """
    count = lower.shape[1]
    out = []
    for chunk in lower.split(CHUNK):
        gram = chunk.double() @ chunk.double().mT  # (p, N, N)
        more = gram.diagonal(dim1=1, dim2=2).mean(1)  # (p,)
        gram = gram + (more / count)[:, None, None]
        unit = torch.eye(count, dtype=gram.dtype, device=gram.device)[:, rows].expand(len(gram), -1, -1)  # (p, N, B)
        inverse = torch.cholesky_solve(unit, torch.linalg.cholesky(gram)).gather(1, rows.expand(len(gram), 1, -1))[:, 0]  # (p, B)
        ridge = epsilon * (count - 1)
        rest = ridge * (inverse - 1 / (count * (ridge + more))[:, None])  # (p, B)
        out.append(((count - 1) / rest - count + 1 / count).to(lower.dtype))
    return torch.cat(out)


def pack_triangle(factor: Tensor) -> Tensor:
    """The lower triangles of matrices (P, d, d), row by row: (P, d (d + 1) / 2)."""
    row, column = torch.tril_indices(*factor.shape[1:])
    return factor[:, row, column]


def unpack_triangle(packed: Tensor) -> Tensor:
    """The inverse of `pack_triangle`: lower triangular matrices (P, d, d)."""
    dim = (math.isqrt(8 * packed.shape[1] + 1) - 1) // 2
    factor = packed.new_zeros(len(packed), dim, dim)
    row, column = torch.tril_indices(dim, dim)
    factor[:, row, column] = packed
    return factor
