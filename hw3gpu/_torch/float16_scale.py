"""The power of two by which linear cross entropy multiplies dz before it is rounded to float16.

dz of a forward pass is made before the upstream gradient, and with it any loss scale, is known. Of small class weights, of
confident rows or of a small slope of the softcap it would be subnormal or 0, of large weights infinite. With s a power of two,
s dz and its products stay in float16's range, and 1/s is applied where numbers are held in float32. For one row of logits

    |dz|₁ ≤ A = 2 |W'| (1 - p_t) + |2 ζ lse|,   W' = W + 2 ζ lse        a class, not smoothed
    |dz|₁ ≤ A = |W'| + |q|₁                                             else

times the logits' scale, and for a chunk, with a the sums of A over the positions of each row,

    |s dz W| ≤ s max(a) max|W_cd|,   |s dzᵀ x| ≤ s |a|₂ max_d |x_d|₂  (Cauchy, Schwarz)

s is the largest power of two for which these and s max(a) are at most 2¹⁵. Everything is computed on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cross_entropy_formula import Options
    from .linear_chunks import Problem

_LARGEST = 15  # 2¹⁵, half of float16's range
_LEAST, _MOST = 2.0**-100, 2.0**100  # so that s and 1/s are normal numbers of float32


def largest_element(W: Tensor) -> Tensor:
    """max |W_cd|, in float32."""
    if not W.numel():
        return W.new_zeros((), dtype=torch.float32)
    low, high = W.aminmax()
    return torch.maximum(-low, high).float()


def of_chunk(
    part: Problem, loss: Tensor, numbers: Tensor, options: Options, largest: Tensor, factors: Tensor | None = None
) -> Tensor:
    """1/s, (1,) in float32, of a chunk's problem, the loss and the numbers of its rows; `largest` is max |W_cd|. factors: what
    dz of each row is multiplied by, (n, S)."""
    a = _row_norms(part, loss, numbers, options)
    a = a if factors is None else a * factors.abs()
    a = options.logit_scale * torch.where(a.isfinite(), a, 0).sum(1)
    most, beside = a.max(), torch.linalg.vector_norm(part.x, dim=0, dtype=torch.float32)
    products = torch.stack([most * largest, torch.linalg.vector_norm(a) * (beside.max() if len(beside) else 0)])
    # where a product is infinite whatever s is, the others keep their digits
    limit = torch.maximum(torch.where(products.isfinite(), products, 0).max(), most).clamp(_LEAST, _MOST)
    exponent = limit.frexp().exponent - _LARGEST
    return ((exponent + 127) << 23).view(torch.float32).reshape(1)


def _row_norms(part: Problem, loss: Tensor, numbers: Tensor, options: Options) -> Tensor:
    """A of every row, (n, S)."""
    m, excess, W = numbers[:3].unbind()
    lse = m + excess.log1p()
    pull = 2 * options.z_loss * lse
    whole = (W + pull).abs()
    soft, epsilon, weight = part.target.is_floating_point(), options.label_smoothing, part.weight
    if not soft and not epsilon:
        others = -torch.expm1((options.z_loss * lse.square() - loss) / W)
        return 2 * whole * torch.where(W == 0, 1, others.clamp(0, 1)) + pull.abs()
    mean_weight = 1.0 if weight is None else weight.abs().mean()
    if not soft:
        return whole + W.abs() + 2 * epsilon * mean_weight
    y = part.target if weight is None else part.target * weight[:, None]
    of_target = torch.linalg.vector_norm(y, 1, dim=1, dtype=torch.promote_types(y.dtype, torch.float32))
    return whole + (1 - epsilon) * of_target.float() + epsilon * mean_weight
