"""A normalising flow of affine couplings with a condition, and the positional encoding that CFlow gives it as one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConditionalFlow(nn.Module):
    """`blocks` of: affine coupling, scale and offset of every channel, fixed random rotation; of vectors of `channels` given a condition.

    A coupling keeps x₁, the larger half, and maps x₂ to x₂·exp(`clamp`·tanh(s/10)) + t/10, where (s, t) = W₂·relu(W₁·[x₁, c] + b₁) + b₂
    with twice as many hidden units as inputs: Real NVP (Dinh et al. 2017, arXiv 1605.08803) with the clamping, the 1/10 and the scale
    0.1·softplus of FrEIA's AllInOneBlock, which CFlow's official code is made of. The blocks' weights are stacked, since an optimiser is
    quicker with few large tensors. First weights come from torch's global stream: see `seeded`.
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
        # by the signs of r they are uniform among the orthogonal matrices; with reflections, which have |det| = 1 as well
        self.register_buffer("rotation", q * r.diagonal(dim1=1, dim2=2).sign()[:, None])

    def project(self, condition: Tensor) -> Tensor:
        """What conditions (N, condition) add to the hidden units of every block, (blocks, N, hidden): the same for all vectors there."""
        return condition @ self.weight_condition.mT + self.bias_hidden[:, None]

    def forward(self, x: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Latent vectors (…, N, channels) of x (…, N, channels), and log |det ∂z/∂x| (…, N); `projected` is from `project`."""
        scale, log_det = self._scale()
        # scale, offset and rotation are one affine map
        mixing, shift = scale[:, :, None] * self.rotation.mT, self.offset[:, None] @ self.rotation.mT  # (K, C, C), (K, 1, C)
        rows = zip(self.weight_kept, self.weight_out, self.bias_out, mixing, shift, projected, strict=True)
        for weight_kept, weight_out, bias_out, mix, move, added in rows:
            kept, moved = x.split([x.shape[-1] - self.moved, self.moved], dim=-1)
            log_scale, push = self._coupling(kept @ weight_kept.T + added, weight_out, bias_out)
            log_det = log_det + log_scale.sum(-1)
            x = torch.cat([kept, torch.addcmul(push, moved, log_scale.exp())], -1) @ mix + move
        return x, log_det

    def inverse(self, z: Tensor, projected: Tensor) -> Tensor:
        """The vectors (…, N, channels) whose latent vectors are z."""
        scale, _ = self._scale()
        rows = zip(self.weight_kept, self.weight_out, self.bias_out, scale, self.offset, self.rotation, projected, strict=True)
        for weight_kept, weight_out, bias_out, stretch, offset, rotation, added in reversed(list(rows)):
            kept, moved = ((z @ rotation - offset) / stretch).split([z.shape[-1] - self.moved, self.moved], dim=-1)
            log_scale, push = self._coupling(kept @ weight_kept.T + added, weight_out, bias_out)
            z = torch.cat([kept, (moved - push) * (-log_scale).exp()], -1)
        return z

    def _coupling(self, before: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        # half precision would be too coarse for the sum of a determinant
        s, t = F.linear(before.relu_(), weight, bias).to(bias.dtype).chunk(2, dim=-1)  # (…, N, moved) each
        return self.clamp * torch.tanh(0.1 * s), 0.1 * t

    def _scale(self) -> tuple[Tensor, Tensor]:
        scale = 0.1 * F.softplus(self.stretch, beta=0.5)  # (K, C)
        return scale, scale.log().sum()


def log_likelihood(z: Tensor, log_det: Tensor) -> Tensor:
    """log N(z; 0, I) + log |det ∂z/∂x| in nats, (…,), of latent vectors z (…, C)."""
    return log_det - 0.5 * (z.to(log_det.dtype).square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))


def positional_encoding(dim: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(height·width, dim): sin and cos, by turns, of the column in the first half and of the row in the other, at dim/4 frequencies.

    The frequencies fall from 1 to nearly 10⁻⁴, as in Vaswani et al. 2017. `dim` is a multiple of 4.
    """
    frequency = 1e4 ** (-torch.arange(0, dim // 2, 2, device=device) / (dim // 2))  # (dim/4,)
    column = torch.arange(width, device=device)[:, None] * frequency  # (w, dim/4)
    row = torch.arange(height, device=device)[:, None] * frequency  # (h, dim/4)
    waves = [torch.stack([angle.sin(), angle.cos()], -1).flatten(1) for angle in (column, row)]  # (w, dim/2), (h, dim/2)
    grid = (height, width, dim // 2)
    return torch.cat([waves[0].expand(grid), waves[1][:, None].expand(grid)], -1).flatten(0, 1)


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    # the first weights of torch's linear layers
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan_in))
