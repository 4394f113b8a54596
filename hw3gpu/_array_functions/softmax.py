"""S4 to S7: softmax, its Jacobian, cross entropy, and both fused row by row (docs/derivations.md, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._core import arrays, check, dispatch, outputs
from .._core.dlpack import interchange

Array = Any


@dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """What `softmax_cross_entropy` computed: loss per row, z's shape without its last axis, in float32 for half precision
    and in z's dtype otherwise; dz = ∂L/∂z of each row, z's shape, dtype and kind."""

    loss: Array
    dz: Array


@interchange
def softmax(z: Array, axis: int = -1) -> Array:
    """S_j = exp(z_j) / Σ_k exp(z_k) along `axis` (docs/derivations.md, section 3.1).

    z: NumPy, CuPy or torch array of float16, bfloat16, float32 or float64; the result has its shape, dtype and kind. A
    logit of -inf has probability 0; a row of nothing but -inf, or with +inf or NaN, gives NaN.

    Raises TypeError for kinds and dtypes, ValueError for an axis that z does not have.
    """
    _floating_array(z, "z")
    axis = check.axis(axis, "axis", z, "z")
    y, y_folded = outputs.output_like(z, axis)
    which = dispatch.backend(z)
    with dispatch.launch_scope(z):
        dispatch.softmax(which).forward(*map(dispatch.kernel_view(which), (outputs.fold(z, axis), y_folded)))
    return y


@interchange
def softmax_backward(dy: Array, y: Array, axis: int = -1) -> Array:
    """∂ℓ/∂z = y (∂ℓ/∂y - Σ_k ∂ℓ/∂y_k y_k) for y = softmax(z) along `axis` (docs/derivations.md, section 3.2).

    dy, y: arrays of one shape, dtype and kind; so is the result. Raises as `softmax` does.
    """
    _floating_array(y, "y")
    arrays.same_kind(dy, "dy", y, "y")
    check.same_dtype(dy, "dy", y, "y")
    check.same_shape(dy, "dy", y, "y")
    axis = check.axis(axis, "axis", y, "y")
    dz, dz_folded = outputs.output_like(y, axis)
    which = dispatch.backend(y)
    operands = outputs.fold(dy, axis), outputs.fold(y, axis), dz_folded
    with dispatch.launch_scope(y):
        dispatch.softmax(which).backward(*map(dispatch.kernel_view(which), operands))
    return dz


@interchange
def softmax_jacobian(z: Array) -> Array:
    """∂S_i/∂z_j = S_i (δ_ij - S_j), shape (…, N, N) for z of shape (…, N) (docs/derivations.md, section 3.2).

    z as for `softmax`. Raises TypeError for kinds and dtypes, ValueError where z has no axis.
    """
    _floating_array(z, "z")
    check.rank_at_least(z, "z", 1, "the logits along the last axis")
    check.rank_at_most(z, "z", 60)  # and one more in the result: NumPy and torch have 64
    s = softmax(arrays.cast(z, arrays.accumulate_dtype(z)))
    jacobian = -(s[..., :, None] * s[..., None, :])
    i = range(s.shape[-1])
    jacobian[..., i, i] += s
    return arrays.cast(jacobian, arrays.dtype_name(z))


@interchange
def cross_entropy(y: Array, y_hat: Array) -> Array:
    """L = -Σ_i y_i log ŷ_i along the last axis, with 0 · log 0 = 0 (docs/derivations.md, section 3.3).

    y: ground truth vectors (…, N); y_hat: predicted probabilities of the same shape, dtype and kind. The loss has one
    number a row, in float32 for half precision. Raises TypeError for kinds and dtypes, ValueError for shapes.
    """
    _floating_array(y_hat, "y_hat")
    arrays.same_kind(y, "y", y_hat, "y_hat")
    check.same_dtype(y, "y", y_hat, "y_hat")
    check.rank_at_least(y_hat, "y_hat", 1, "the classes along the last axis")
    check.same_shape(y, "y", y_hat, "y_hat")
    xp = arrays.namespace(y_hat)
    acc = arrays.accumulate_dtype(y_hat)
    y, y_hat = arrays.cast(y, acc), arrays.cast(y_hat, acc)
    with np.errstate(all="ignore"):  # the log of 0 is -inf, of what is no probability NaN, on every kind of array
        return 0.0 - (y * xp.log(xp.where(y == 0, xp.ones_like(y), y_hat))).sum(-1)


@interchange
def softmax_cross_entropy(z: Array, y: Array) -> SoftmaxCrossEntropy:
    """Loss and gradient of cross entropy on softmax(z), row by row, without the probabilities ever being stored.

    z: logits (…, N), NumPy, CuPy or torch, float16, bfloat16, float32 or float64. y: ground truth, of z's kind: vectors
    (…, N) of any floating dtype, or integer classes (…). dz = ŷ Σ_i y_i - y, which is ŷ - y where Σ_i y_i = 1
    (docs/derivations.md, section 3.4).

    Raises TypeError for kinds and dtypes, ValueError for shapes and for classes outside 0…N-1, naming the row.
    """
    _floating_array(z, "z")
    check.rank_at_least(z, "z", 1, "the logits along the last axis")
    arrays.same_kind(y, "y", z, "z")
    hard = y.ndim == z.ndim - 1
    if hard:
        check.integer(y, "y")
        check.shape(y, "y", tuple(z.shape[:-1]), "one class per row of z")
    else:
        check.floating(y, "y")
        check.same_shape(y, "y", z, "z")
    N = z.shape[-1]
    dz, dz_folded = outputs.output_like(z, -1)
    rows = dz_folded.shape[0]
    loss = outputs.empty((rows, 1), arrays.accumulate_dtype(z), z)
    invalid = outputs.empty((1,), "int64", z)
    invalid[0] = rows
    if N == 0:
        loss[:] = 0
        invalid[0] = 0
    which = dispatch.backend(z)
    operands = outputs.fold(z, -1), y.reshape(rows, 1) if hard else outputs.fold(y, -1), None, loss, dz_folded, invalid
    with dispatch.launch_scope(z):
        dispatch.cross_entropy(which).forward_backward(
            *map(dispatch.kernel_view(which), operands), ignore_index=_NO_CLASS, label_smoothing=0.0
        )
    if hard:
        row = int(invalid[0])
        if arrays.dtype_name(y) == "int64":  # _NO_CLASS is skipped by the kernels, but here as wrong as any other class
            skipped = y.reshape(-1) == _NO_CLASS
            row = min(row, int(arrays.cast(skipped, "uint8").argmax())) if bool(skipped.any()) else row
        if row < rows:
            raise ValueError(f"y: expected classes in 0…{N - 1}, got {int(y.reshape(-1)[row])} in row {row}")
    return SoftmaxCrossEntropy(loss.reshape(tuple(z.shape[:-1])), dz)


_NO_CLASS = -(2**62)  # no target is ignored


def _floating_array(x: Array, name: str) -> None:
    arrays.kind(x, name)
    check.floating(x, name)
