"""A normalising flow of affine couplings with a condition, and CFlow's positional encoding as one."""

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConditionalFlow(nn.Module):
    """`blocks` of affine coupling, scale and offset of each channel, and fixed random rotation; of vectors of `channels` given a condition.

    A coupling keeps x₁, the larger half, and maps x₂ to x₂·exp(`clamp`·tanh(s/10)) + t/10, where (s, t) = W₂·relu(W₁·[x₁, c] + b₁) + b₂
    with twice as many hidden units as inputs: Real NVP (Dinh et al. 2017, arXiv 1605.08803) with the clamping, the 1/10 and the scale
    0.1·softplus of FrEIA's AllInOneBlock, which CFlow's official code uses. The blocks' weights are stacked, since optimisers are faster
    with few large tensors. First weights come from torch's global stream: see `seeded`.
    """

    def __init__(self, channels: int, condition: int, blocks: int, clamp: float):
        super().__init__()
        moved = channels // 2
        kept, hidden = channels - moved, 2 * (channels - moved + condition)
        self.moved, self.clamp = moved, clamp
        self.weight_kept = _uniform(blocks, hidden, kept, fan_in=kept + condition)  # W₁ for x₁ …
        self.weight_condition = _uniform(blocks, hidden, condition, fan_in=kept + condition)  # … and for c
        self.bias_hidden = _uniform(blocks, hidden, fan_in=kept + condition)
        self.weight_out = _uniform(blocks, 2 * moved, hidden, fan_in=hidden)
        self.bias_out = _uniform(blocks, 2 * moved, fan_in=hidden)
        self.stretch = nn.Parameter(torch.full((blocks, channels), 2 * math.log(math.expm1(5))))  # a scale of 1
        self.offset = nn.Parameter(torch.zeros(blocks, channels))
        q, r = torch.linalg.qr(torch.randn(blocks, channels, channels))
        # with the signs of r they are uniform among the orthogonal matrices, reflections included
        self.register_buffer("rotation", q * r.diagonal(dim1=1, dim2=2).sign()[:, None])

    def project(self, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What columns (w, a) and rows (h, b) of a grid, a + b = condition, add to the hidden units: (K, w, hidden), (K, h, hidden).

        A place adds the sum of its column's and its row's part. The products with W₁ are taken here, as a grid has far fewer columns and
        rows than places.
        """
        of_columns, of_rows = self.weight_condition.split([columns.shape[1], rows.shape[1]], dim=2)  # (K, hidden, a), (K, hidden, b)
        return columns @ of_columns.mT, rows @ of_rows.mT + self.bias_hidden[:, None]

    def forward(self, x: Tensor, tables: Sequence[Tensor], places: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Latent vectors (…, N, channels) of x (…, N, channels), and log |det ∂z/∂x| (…, N).

        tables: (K, n, hidden) each, from `project`. places (N,): the row of each table that is added for a vector.
        """
        scale = 0.1 * F.softplus(self.stretch, beta=0.5)  # (K, C)
        log_det = scale.log().sum()
        # scale, offset and rotation are one affine map
        mixing, shift = scale[:, :, None] * self.rotation.mT, self.offset[:, None] @ self.rotation.mT  # (K, C, C), (K, 1, C)
        blocks = zip(self.weight_kept, self.weight_out, self.bias_out, mixing, shift, *tables, strict=True)
        for weight_kept, weight_out, bias_out, mix, move, *block_tables in blocks:
            kept, moved = x.split([x.shape[-1] - self.moved, self.moved], dim=-1)
            # gathered block by block: those of all blocks together would not stay in a processor's cache
            added = reduce(torch.add, map(F.embedding, places, block_tables))  # (N, hidden)
            # half precision would be too coarse for the sum of a determinant
            out = F.linear(affine(kept, weight_kept.T, added).relu_(), weight_out, bias_out).to(bias_out.dtype)
            s, t = out.chunk(2, dim=-1)  # (…, N, moved) each
            log_scale = self.clamp * torch.tanh(0.1 * s)
            log_det = log_det + log_scale.sum(-1)
            x = affine(torch.cat([kept, torch.addcmul(0.1 * t, moved, log_scale.exp())], -1), mix, move)
        return x, log_det


def affine(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """x·W + b, in one pass over the result where x has two dimensions."""
    return torch.addmm(offset, x, weight) if x.ndim == 2 else x @ weight + offset


def log_likelihood(z: Tensor, log_det: Tensor) -> Tensor:
    """log N(z; 0, I) + log |det ∂z/∂x| in nats, (…,), of latent vectors z (…, C)."""
    return log_det - 0.5 * (z.to(log_det.dtype).square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))


def positional_encoding(dim: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """(length, dim): alternating sin and cos of 0 … length − 1 at dim/2 frequencies from 1 to nearly 10⁻⁴ (Vaswani et al. 2017)."""
    frequency = 1e4 ** (-torch.arange(0, dim, 2, device=device) / dim)  # (dim/2,)
    angle = torch.arange(length, device=device)[:, None] * frequency  # (length, dim/2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    # as torch's linear layers
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan_in))
