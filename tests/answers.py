"""Softmax and its loss held to the answer sheet, with PyTorch as the measure of what error is allowed."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

import hw3gpu
from hw3gpu import _error_bounds, reference
from hw3gpu._core.arrays import accumulate_dtype
from hw3gpu._core.torch_internals import softmax_backward as torch_softmax_backward
from layouts import to_torch
from measure import close, max_error

# name: (shape, axis, memory layout)
CASES = {
    "V = 1": ((5, 1), -1, "contiguous"),
    "V = 10": ((3, 10), -1, "contiguous"),
    "V = 1000": ((2, 1000), -1, "contiguous"),
    "V = 1001": ((3, 1001), -1, "contiguous"),
    "many short rows": ((70, 7), -1, "contiguous"),
    "one row": ((33,), -1, "contiguous"),
    "axis in the middle": ((2, 10, 7), 1, "contiguous"),
    "axis first": ((6, 5), 0, "contiguous"),
    "(N, C, H, W)": ((2, 5, 3, 4), 1, "contiguous"),
    "channels-last": ((2, 5, 3, 4), 1, "channels-last"),
    "sliced": ((4, 21), -1, "sliced"),
    "off 16 bytes": ((3, 64), -1, "shifted"),
    "backwards": ((3, 64), -1, "reversed"),
    "one number": ((1, 1, 1), 1, "contiguous"),
    "beyond one program": ((2, 33333), -1, "contiguous"),
    "beyond one program, aligned": ((1, 36864), -1, "contiguous"),
    "beyond one program, axis in the middle": ((1, 5000, 3), 1, "contiguous"),
}
LONG = 33333


def first_tile_minus_infinity(V):
    z = np.linspace(-3, 3, V)
    z[: V - 300] = -np.inf
    return z


def all_but_one(V):
    z = np.full(V, -np.inf)
    z[V // 2] = -7.25
    return z


def one_far_above(V):
    z = np.linspace(-1, 1, V)
    z[V // 3] = 300.0
    return z


def late_maximum(V):
    """Each tile's maximum is above the last one's: every merge of the running sum is rescaled."""
    return np.linspace(-60, 60, V)


HARD = {
    "first tile all -inf": first_tile_minus_infinity,
    "all -inf but one": all_but_one,
    "every other -inf": lambda V: np.where(np.arange(V) % 2, np.linspace(-2, 2, V), -np.inf),
    "near -200": lambda V: -200.0 + np.linspace(-1, 1, V),
    "near +1e4": lambda V: 1e4 + 40 * np.sin(np.arange(V)),
    "-1e4 to +1e4": lambda V: np.linspace(-1e4, 1e4, V),
    "p near 1": one_far_above,
    "rising": late_maximum,
    "all equal": lambda V: np.full(V, 0.3),
}


def forward_and_check(kit, z, dtype, axis=-1):
    """softmax(z), held to the answer sheet."""
    y = hw3gpu.softmax(z, axis)
    sheet, bound = (of.softmax(kit.numpy(z), axis, **more) for of, more in judges(z))
    close(kit.numpy(y), sheet, max_error(values(F.softmax(to_torch(z), axis)), sheet, dtype), dtype, bound, "y")
    return y


def backward_and_check(kit, dy, y, dtype, axis=-1):
    dz = hw3gpu.softmax_backward(dy, y, axis)
    sheet, bound = (of.softmax_backward(kit.numpy(dy), kit.numpy(y), axis, **more) for of, more in judges(y))
    theirs = torch_softmax_backward(to_torch(dy), to_torch(y), axis, to_torch(y).dtype)
    close(kit.numpy(dz), sheet, max_error(values(theirs), sheet, dtype), dtype, bound, "dz")
    return dz


def judges(x):
    """The answer sheet and the bounds beside it, with the arguments that these take more, for x."""
    return (reference, {}), (_error_bounds, {"dtype": accumulate_dtype(x)})


def values(tensor):
    return tensor.detach().double().cpu().numpy()


def torch_fused(z, y):
    """PyTorch's loss and gradient for vectors y, in the precision of z."""
    z = z.detach().requires_grad_()
    # cross_entropy wants its classes second, and gives NaN for 0 · ∞
    log_p = F.log_softmax(z, -1)
    loss = -torch.where(y == 0, 0.0, y * log_p).sum(-1)
    with torch.no_grad():
        dz = F.softmax(z, -1) * y.sum(-1, keepdim=True) - y
    return loss.detach(), dz


def fused_and_check(kit, z, y, dtype):
    """`softmax_cross_entropy`, held to the answer sheet and to PyTorch in the precision of the sums, rounded once."""
    result = hw3gpu.softmax_cross_entropy(z, y)
    acc = accumulate_dtype(z)
    z_t = to_torch(z).to(getattr(torch, acc))
    y_t = to_torch(y)
    hard = y_t.ndim < z_t.ndim
    if hard:
        y_t = F.one_hot(y_t.long(), z_t.shape[-1])
    given = kit.numpy(z), kit.numpy(y).astype(np.int64) if hard else kit.numpy(y)
    sheet, bound = (of.softmax_cross_entropy(*given, **more) for of, more in judges(z))
    loss, dz = torch_fused(z_t, y_t.to(z_t.dtype))
    close(kit.numpy(result.loss), sheet.loss, max_error(values(loss), sheet.loss, acc), acc, bound.loss, "loss")
    theirs = values(dz.to(getattr(torch, dtype)))
    close(kit.numpy(result.dz), sheet.dz, max_error(theirs, sheet.dz, dtype), dtype, bound.dz, "dz")
    return result


def probabilities(rng, shape):
    y = rng.random(shape) + 0.01
    return y / y.sum(-1, keepdims=True)


def ones(kit, shape, dtype="float32"):
    return kit.array(np.ones(shape), dtype)
