"""How far from the answer sheet rounding alone may take each element of a result: Σ count · u · |term|.

A companion of `reference`: a function here takes the arguments of the one of that name there, and `dtype`, that of the
sums, 'float32' or 'float64'; it returns the same tuple with bounds in place of results. The terms are summed in extended
precision. `u` is the unit roundoff of `dtype`; a count says how many roundings a term meets on its way into the result,
in whichever engine it meets more of them. docs/errors.md derives every count; none was fitted to what was measured.

The rounding of the result to its own dtype is not in the bound: `hw3gpu._cli.measure` adds it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import reference
from .reference import Array, Extended, _extended, _ieee, _one_hot, _per_channel, _sigmoid, _softmax, _standard_normal

# docs/errors.md, "What an operation costs": roundings of
EXP = 4  # exp x, and 2 |x| more, for x is the rounded difference of a logit and the maximum, times log2 e
LOG = 14  # log(1 + x), x = Σ exp - 1
CAP = 12  # τ tanh(z / τ)
ARRAY_LOG = 8  # the logarithm of NumPy, PyTorch and CuPy
RSTD = 3  # 1 / sqrt(variance + eps), given the variance
VARIANCE = 6  # each (x - mean)², beside its sum
# docs/errors.md, "Sums": additions that a number meets in the first sum it goes into, and how many numbers each more stands for
FIRST_SUM = 32
ROW, ROW_OF_FLOAT64, CHANNEL, CHANNEL_OF_FLOAT64 = 256, 16, 64, 4


def unit_roundoff(dtype: str) -> float:
    """u of an accumulation dtype."""
    return 2.0**-53 if dtype == "float64" else 2.0**-24


def _result(counted: Any, dtype: str, sheet: Any = 0.0) -> Array:
    """u · Σ count |term|, and what a number below the normal ones may lose, which a GPU may take for 0.

    `sheet`: counted in the same way, what the answer sheet itself rounds where its terms are larger than the kernels'.
    """
    tiny = 2.0**-1022 if dtype == "float64" else 2.0**-126
    bound = unit_roundoff(dtype) * counted + float(np.finfo(np.longdouble).eps) / 2 * sheet
    return np.asarray(bound, dtype=np.float64) + tiny


def _additions(n: int, run: int) -> int:
    """The most additions that one of n terms goes through."""
    return min(max(n - 1, 0), FIRST_SUM + n // run)


def _of_a_row(n: int, dtype: str, last: bool = True) -> int:
    """Rows along an axis that is not the last one are gone through in shorter pieces."""
    return _additions(n, ROW if last and dtype == "float32" else ROW_OF_FLOAT64)


def sum_of_products(magnitude: Any, n: int, *, dtype: str) -> Array:
    """Of a sum of n products, Σ |products| given, in any order: what a convolution or a matrix product is."""
    return _result((n + 1.0) * _extended(magnitude), dtype)


def _sum(terms: Any, axis: Any = -1) -> Any:
    return np.sum(terms, axis=axis, keepdims=True)


def _times(a: Any, b: Any) -> Any:
    """a b with 0 · ∞ = 0: what a probability of 0 is multiplied by does not count."""
    with np.errstate(invalid="ignore"):
        return np.where(a == 0.0, 0.0, a * b)


# Softmax and cross entropy: docs/errors.md, section 1 --------------------------------------------------------------


class _Exponentials(NamedTuple):
    """Of rows of logits: `below` = max z - z, `p`, the roundings of each exp(z - max z) and of their sum."""

    below: Extended
    p: Extended
    each: Extended
    total: Extended


def _exponentials(z: Extended, axis: int, additions: int) -> _Exponentials:
    below = np.max(z, axis=axis, keepdims=True, initial=-np.inf) - z
    p = _softmax(z, axis)
    each = np.where(below == 0.0, 0.0, EXP + 2.0 * below)  # exp 0 is exact
    return _Exponentials(below, p, each, _sum(_times(p, each), axis) + additions)


def _of_p(e: _Exponentials) -> Extended:
    """p counted: an exponential, the sum, and 1 / sum and a product."""
    return _times(e.p, e.each + e.total + 3.0)


@_ieee
def softmax(z: Any, axis: int = -1, *, dtype: str) -> Array:
    z = _extended(z)
    last = axis % z.ndim == z.ndim - 1
    e = _exponentials(z, axis, _of_a_row(z.shape[axis], dtype, last))
    return _result(_of_p(e), dtype)


@_ieee
def softmax_backward(dy: Any, y: Any, axis: int = -1, *, dtype: str) -> Array:
    dy, y = abs(_extended(dy)), abs(_extended(y))
    additions = _of_a_row(y.shape[axis], dtype, axis % y.ndim == y.ndim - 1)
    return _result(y * (2.0 * dy + (additions + 3.0) * _sum(dy * y, axis)), dtype)


@_ieee
def softmax_jacobian(z: Any, *, dtype: str) -> Array:
    z = _extended(z)
    e = _exponentials(z, -1, _of_a_row(z.shape[-1], dtype))
    of_p = _of_p(e)
    products = of_p[..., :, None] * e.p[..., None, :]
    products = products + np.swapaxes(products, -1, -2) + 2.0 * e.p[..., :, None] * e.p[..., None, :]
    return _result(products + np.eye(z.shape[-1]) * (of_p + e.p)[..., None, :], dtype)


@_ieee
def cross_entropy(y: Any, y_hat: Any, *, dtype: str) -> Array:
    y, y_hat = np.broadcast_arrays(_extended(y), _extended(y_hat))
    additions = _of_a_row(y.shape[-1], dtype)
    return _result((ARRAY_LOG + 1.0 + additions) * np.sum(_times(y, abs(np.log(y_hat))), axis=-1), dtype)


class _Row(NamedTuple):
    """A counted loss, its gradient by the logits (capped ones, if they are), and what the sheet rounds in both."""

    loss: Extended
    dz: Extended
    sheet_loss: Extended
    sheet_dz: Extended


def _row(
    z: Extended, q: Extended, target: NDArray[np.bool_] | None, additions: int, of_weight: float, z_loss: float, of_cap: float
) -> _Row:
    """Of Σ q (lse - z) + ζ lse² and p (Σ q + 2 ζ lse) - q over the last axis.

    `target`: where the class of a row is, None for probabilities. `of_weight`: the roundings of Σ q and of each q, 0 where
    q is the class's weight itself. `of_cap`: those of each logit.
    """
    top = abs(np.max(z, axis=-1, keepdims=True, initial=-np.inf))
    e = _exponentials(z, -1, additions)
    of_logits = _times(of_cap, abs(z) + top) if of_cap else 0.0 * e.below
    each = np.where(e.below == 0.0, 0.0, e.each + of_logits)
    e = e._replace(each=each, total=_sum(_times(e.p, each)) + additions)

    # Σ exp - 1 is kept: the first maximum, whose exponential is that 1, has no error
    first = np.arange(z.shape[-1]) == np.argmin(e.below, axis=-1)[..., None]
    of_excess = _sum(np.where(first, 0.0, _times(e.p, 2.0 * additions + each)))
    log_total = -np.log(np.max(e.p, axis=-1, keepdims=True, initial=0.0))
    lse, of_lse = top + log_total, of_excess + LOG * log_total + (1.0 + of_cap) * (top + log_total)
    weight, inner = _sum(abs(q)), _sum(_times(abs(q), e.below))

    of_log = of_excess + (LOG + 2.0 + of_weight) * log_total
    loss = weight * of_log + (of_weight + 4.0) * inner + _sum(_times(abs(q), of_logits))
    of_p = e.each + e.total + 3.0
    dz = weight * _times(e.p, of_p + of_weight + 1.0) + (2.0 + of_weight) * abs(q)
    if z_loss:
        loss = loss + z_loss * lse * (2.0 * of_lse + 3.0 * lse)
        dz = dz + 2.0 * z_loss * _times(e.p, of_lse + (of_p + 3.0) * lse)
    # the sheet rounds lse = max z + log Σ exp(z - max z) before it subtracts z, and p before it subtracts q
    sheet = loss + 2.0 * weight * (1.0 + log_total) + 3.0 * _sum(_times(abs(q), top + abs(z))), dz
    if target is not None:
        dz = np.where(target, _at_target(e, target, weight, additions, of_weight, 2.0 * z_loss * _times(e.p, of_lse + lse)), dz)
    return _Row(loss[..., 0], dz, sheet[0][..., 0], sheet[1])


def _at_target(
    e: _Exponentials, target: NDArray[np.bool_], weight: Extended, additions: int, of_weight: float, pull: Any
) -> Any:
    """The gradient at the class is -q_t (Σ of the other p), without the difference p_t - 1: so much less is its error.

    p_t's own counts where it is not the largest. With smoothing, Σ q - q_t is a difference of rounded sums.
    """
    others = np.where(target, 0.0, e.p)
    each = _times(e.p, 2.0 * additions + e.each)
    of_others = _sum(np.where(target, 0.0, each)) + _sum(np.where(target & (e.below > 0.0), 2.0 * each, 0.0))
    of_others = of_others + _sum(others) * (e.total + 7.0)
    return weight * (of_others + (of_weight + 4.0 if of_weight else 0.0)) + (e.each + e.total + 6.0) * pull


@_ieee
def softmax_cross_entropy(z: Any, y: Any, *, dtype: str) -> reference.SoftmaxCrossEntropy:
    z = _extended(z)
    soft = np.shape(y) == z.shape
    q = _extended(y) if soft else _one_hot(y, z.shape[-1])
    additions = _of_a_row(z.shape[-1], dtype)
    row = _row(z, q, None if soft else q == 1.0, additions, additions if soft else 0.0, 0.0, 0.0)
    return reference.SoftmaxCrossEntropy(_result(row.loss, dtype, row.sheet_loss), _result(row.dz, dtype, row.sheet_dz))


@_ieee
def cross_entropy_with_options(
    logits: Any, target: Any, weight: Any = None, ignore_index: int = -100, label_smoothing: float = 0.0,
    reduction: str = "mean", upstream: Any = None, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, token_weight: Any = None, normalizer: float | None = None, *, dtype: str,
) -> reference.CrossEntropyWithOptions:  # fmt: skip
    logits, target = _extended(logits), np.asarray(target)
    axis = 1 if logits.ndim > 1 else 0
    z = reference._capped(logit_scale * np.moveaxis(logits, axis, -1), softcap)
    n_classes, hard = z.shape[-1], np.issubdtype(target.dtype, np.integer)
    kept = target != ignore_index if hard else np.ones(z.shape[:-1], dtype=bool)
    y = _one_hot(np.where(kept, target, 0), n_classes) if hard else abs(np.moveaxis(_extended(target), axis, -1))
    w = np.ones(n_classes, np.longdouble) if weight is None else abs(_extended(weight))
    q = w * ((1.0 - label_smoothing) * y + label_smoothing / n_classes)

    additions = _of_a_row(n_classes, dtype, axis == logits.ndim - 1)
    of_weight = 0.0 if hard and not label_smoothing else additions + 4.0
    of_scaling = 0.0 if math.frexp(logit_scale)[0] == 0.5 else 2.0  # the scale and the product with it, exact for powers of two
    of_logits = of_scaling if softcap is None else CAP + of_scaling
    row = _row(z, q, y == 1.0 if hard else None, additions, of_weight, z_loss, of_logits)
    of_loss: Any
    of_dz: Any
    of_loss, of_dz = (_times(kept, row.loss), _times(kept, row.sheet_loss)), (row.dz, row.sheet_dz)

    # what the sheet finds for each row, before the reduction
    given = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    given |= {"softcap": softcap, "logit_scale": logit_scale}
    sheet = reference.cross_entropy_with_options(logits, target, **given, reduction="none")
    dz = abs(np.moveaxis(_extended(sheet.dlogits), axis, -1)) / logit_scale
    terms = dz if hard and not label_smoothing else np.where(y == 1.0, dz, _sum(q) * _softmax(z, -1) + q)
    if softcap is not None:
        share = (z / softcap) ** 2
        of_dz = tuple((1.0 - share) * v for v in of_dz)
        before_cap = _sum(q) * _softmax(z, -1) + q
        of_dz = of_dz[0] + (4.0 * (1.0 - share) + 2.0 * of_logits * share) * before_cap, of_dz[1] + 4.0 * before_cap

    token_weights = np.ones(kept.shape, np.longdouble) if token_weight is None else abs(_extended(token_weight))
    scale = abs(_extended(1.0 if upstream is None else upstream)) * token_weights * logit_scale
    of_scale: Any = 4.0 + of_scaling
    losses = _times(token_weights, abs(_extended(sheet.loss)))
    of_loss = tuple(_times(token_weights, of) for of in of_loss)
    if token_weight is not None:
        of_scale += 2.0
        of_loss = tuple(of + 2.0 * losses for of in of_loss)
    divisor: Any = 1.0
    of_sum = _additions(kept.size, ROW) + 2.0
    if reduction != "none":
        losses = np.sum(losses)
        of_loss = tuple(np.sum(of) + of_sum * losses for of in of_loss)
    if normalizer is not None:
        divisor = np.longdouble(normalizer)
        of_scale += 2.0
        of_loss = tuple((of + 2.0 * losses) / divisor for of in of_loss)
    elif reduction == "mean":
        counted = _times(kept, _sum(w * y)[..., 0]) if hard else kept.astype(np.longdouble)
        divisor = np.sum(token_weights * counted)
        of_scale += of_sum
        of_loss = tuple((of + (of_sum + 1.0) * losses) / divisor for of in of_loss)
    scale = np.broadcast_to(scale / divisor, kept.shape)[..., None]
    of_dz = tuple(np.where(kept[..., None], scale * (v + of_scale * terms), 0.0) for v in of_dz)
    loss, dlogits = _result(of_loss[0], dtype, of_loss[1]), _result(of_dz[0], dtype, of_dz[1])
    return reference.CrossEntropyWithOptions(loss, np.moveaxis(dlogits, -1, axis))


@_ieee
def token_log_probs(
    logits: Any, target: Any, temperature: float = 1.0, ignore_index: int = -100, axis: int = -1,
    upstream: tuple[Any, Any, Any] = (1.0, 0.0, 0.0), *, dtype: str,
) -> reference.TokenLogProbs:  # fmt: skip
    z, target = np.moveaxis(_extended(logits), axis, -1), np.asarray(target)
    kept = (target != ignore_index)[..., None]
    at_target = _one_hot(np.where(kept[..., 0], target, 0), z.shape[-1]) == 1.0
    of_beta = 0.0 if math.frexp(temperature)[0] == 0.5 else 2.0  # 1/T and the product with it, exact for powers of two
    beta = 1.0 / np.longdouble(temperature)
    additions = _of_a_row(z.shape[-1], dtype, axis % z.ndim == z.ndim - 1)
    e = _exponentials(z * beta, -1, additions)
    each = np.where(e.below == 0.0, 0.0, e.each + of_beta * e.below)
    e = e._replace(each=each, total=_sum(_times(e.p, each)) + additions)

    # the first maximum, whose exponential is the 1 of Σ exp - 1 and whose difference is 0, has no error
    first = np.arange(z.shape[-1]) == np.argmin(e.below, axis=-1)[..., None]
    log_total = -np.log(np.max(e.p, axis=-1, keepdims=True, initial=0.0))
    of_log = _sum(np.where(first, 0.0, _times(e.p, 2.0 * additions + each))) + LOG * log_total
    mean = _sum(_times(e.p, e.below))
    of_mean = _sum(_times(_times(e.p, e.below), 2.0 * additions + each + e.total + of_beta + 4.0))
    below_t = _sum(np.where(at_target, e.below, 0.0))
    top = abs(np.max(z, axis=-1, keepdims=True, initial=-np.inf)) * beta
    log_prob = of_log + (of_beta + 2.0) * below_t + log_total
    entropy = of_log + of_mean + log_total + mean
    lse = of_log + (of_beta + 1.0) * top + log_total

    g, h, u = (beta * abs(np.broadcast_to(_extended(of), kept.shape[:-1])[..., None]) for of in upstream)
    of_entropy = h * ((of_beta + 4.0) * e.below + of_mean + (of_beta + 5.0) * mean)

    def of_sum(lead: Any) -> Any:
        """p (lead - h (d - mean))."""
        return _times(e.p, (e.each + e.total + 4.0) * (lead + h * (e.below + mean)) + (of_beta + 2.0) * lead + of_entropy)

    others = _sum(np.where(at_target, 0.0, e.p))
    of_target = _at_target(e, at_target, g, additions, 0.0, 0.0) + (of_beta + 2.0) * g * others + of_sum(u)
    dz = np.where(at_target, of_target, of_sum(g + u))
    # the sheet rounds log p before it multiplies, and 1 - p_t
    of_sheet = 3.0 * (1.0 + log_total + e.below)
    sheet_dz = dz + _times(_times(e.p, g + u + h * (1.0 + mean)), of_sheet) + np.where(at_target, g, 0.0)
    sheet = of_sheet.max(axis=-1, keepdims=True, initial=0.0, where=np.isfinite(of_sheet))
    rows = (_result(_times(kept, v)[..., 0], dtype, _times(kept, v + sheet)[..., 0]) for v in (log_prob, entropy, lse))
    log_prob, entropy, lse = rows
    dlogits, of_sheet = (np.moveaxis(_times(kept, v), -1, axis) for v in (dz, sheet_dz))
    return reference.TokenLogProbs(log_prob, entropy, lse, _result(dlogits, dtype, of_sheet))


class _Pair(NamedTuple):
    """Of two softmaxes: u = log(q/p), the roundings of u beside those that all classes share, of each p and q, and of the
    difference of the maxima."""

    p: Extended
    q: Extended
    u: Extended
    of_u: Extended
    of_p: Extended
    of_q: Extended
    of_shift: Extended


def _shared(pair: _Pair, additions: float, divergence: Extended) -> Extended:
    """The error of κ, which all u of a row share: that of Σ p y, or that of the logarithms where rows are far apart."""
    apart = _sum(_times(pair.p, pair.of_u)) + (additions + 4.0) * _sum(_times(pair.p, abs(pair.u)))
    logs = 2.0 * LOG + _sum(_times(pair.p, pair.of_p)) + _sum(_times(pair.q, pair.of_q))
    return np.where(divergence < 0.2, apart, apart + logs + pair.of_shift)


def _relative_entropy(p: Extended, q: Extended, x: Extended, of_p: Any, of_q: Any, of_x: Any, additions: float) -> Any:
    """Of Σ p φ(x), x = log(q/p) with `of_x` roundings, those of p and q given: the error, and what the sheet rounds."""
    step = np.where(p == 0.0, 0.0, abs(q - p))
    near = (of_p + additions + 12.0) * _times(p, np.expm1(x) - x)
    far = (of_q + additions + 4.0) * q + (of_p + additions + 4.0) * _times(p, 1.0 + abs(x))
    terms = np.where(abs(x) < 0.6, near, 0.0) + np.where(abs(x) > 0.4, far, 0.0)
    # about the shift of a lane, which is that of one of its classes: as many times x² as it has classes
    lanes = additions * _times(p, np.where(abs(x) < 0.6, x * x, 0.0))
    return _sum(terms + lanes + _times(step, of_x))


@_ieee
def distillation_loss(
    student: Any, teacher: Any, temperature: float = 1.0, kind: str = "forward", beta: float = 0.5, mask: Any = None,
    axis: int = -1, reduction: str = "mean", upstream: Any = None, *, dtype: str,
) -> reference.Distillation:  # fmt: skip
    z_q, z_p = (np.moveaxis(_extended(z), axis, -1) / np.longdouble(temperature) for z in (student, teacher))
    if kind == "reverse":
        z_p, z_q = z_q, z_p
    of_scale = 0.0 if math.frexp(temperature)[0] == 0.5 else 2.0
    additions = float(_of_a_row(z_p.shape[-1], dtype, axis in (-1, np.ndim(student) - 1)))
    of: list[Extended] = []
    for z in (z_p, z_q):
        e = _exponentials(z, -1, int(additions))
        each = e.each + of_scale * np.where(np.isinf(e.below), 0.0, e.below)
        each = np.where(e.p == 0.0, 0.0, each)
        of.append(np.asarray(each + _sum(_times(e.p, each)) + additions + 3.0))
    log_p, log_q = (reference._log_softmax(z, 1.0) for z in (z_p, z_q))
    p, q = np.exp(log_p), np.exp(log_q)
    u = np.where((p == 0.0) | (q == 0.0), 0.0, log_q - log_p)
    apart = np.where((p == 0.0) | (q == 0.0), 0.0, abs(z_q - z_p))
    of_u = (1.0 + of_scale) * apart + 3.0 * abs(u)
    tops = [np.max(z, axis=-1, keepdims=True, initial=-np.inf) for z in (z_p, z_q)]
    pair = _Pair(p, q, u, of_u, of[0], of[1], np.asarray(of_scale * abs(tops[1] - tops[0])))
    rounded = np.where((p == 0.0) | (q == 0.0), 0.0, 4.0 * (1.0 + abs(log_p) + abs(log_q)))  # of u, by the sheet

    if kind == "jensen_shannon":
        found = _mixture(pair, beta, additions, rounded)
    else:
        loss = reference._relative_entropy(p, q, u)
        shared = _shared(pair, additions, loss)
        of_loss = _relative_entropy(p, q, u, of[0], of[1], of_u, additions)
        near = _times(p, abs(np.expm1(u)) * (of[0] + 12.0) + np.exp(u) * (of_u + shared))
        far = (of[0] + 4.0) * p + (of[1] + 4.0) * q
        of_other = np.where(abs(u) < 0.6, near, 0.0) + np.where((abs(u) > 0.4) | (p == 0.0) | (q == 0.0), far, 0.0)
        of_base = _times(p, (of[0] + 6.0) * abs(u + loss) + of_u + shared + of_loss + 2.0 * (abs(u) + loss))
        in_sheet = _sum(_times(abs(q - p), rounded)) + 4.0 * loss
        found = (of_loss, in_sheet), (of_base, _times(p, rounded + in_sheet)), (of_other, _times(p + q, rounded + 1.0))
    rows, of_base, of_other = found

    kept = np.ones(p.shape[:-1], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    sheet = reference.distillation_loss(student, teacher, temperature, kind, beta, mask, axis, "none")
    row = tuple(np.where(kept, v[..., 0], 0.0) for v in rows)
    scale, of_g = abs(_extended(1.0 if upstream is None else upstream)), 4.0
    if reduction != "none":
        of_sum, losses = _additions(kept.size, ROW) + 3.0, np.sum(abs(_extended(sheet.loss)))
        row = tuple(np.asarray(np.sum(v) + of_sum * losses) for v in row)
    if reduction == "mean":
        row, scale = tuple(v / np.sum(kept) for v in row), scale / np.sum(kept)
    scale = np.broadcast_to(scale / np.longdouble(temperature), kept.shape)[..., None]
    results = [_result(row[0], dtype, row[1])]
    of_student, of_teacher = (of_base, of_other) if kind == "reverse" else (of_other, of_base)
    for (counted, by_sheet), d in ((of_student, sheet.dstudent), (of_teacher, sheet.dteacher)):
        exact = abs(np.moveaxis(_extended(d), axis, -1)) * of_g
        bound = np.where(kept[..., None], scale * counted + exact * scale * temperature, 0.0)
        results.append(np.moveaxis(_result(bound, dtype, _times(kept[..., None], scale * by_sheet)), -1, axis))
    return reference.Distillation(*results)


def _mixture(pair: _Pair, beta: float, additions: float, rounded: Extended) -> Any:
    """Of β KL(p‖M) + (1 - β) KL(q‖M) and of the gradients of both logits: each the error, and what the sheet rounds."""
    p, q, u = pair.p, pair.q, pair.u
    b, g = np.longdouble(beta), 1 - np.longdouble(beta)
    mixture = b * p + g * q
    u = np.where(p == 0.0, np.inf, np.where(q == 0.0, -np.inf, u))
    u = np.where((p == 0.0) & (q == 0.0), 0.0, u)
    v, w = np.log1p(g * np.expm1(u)), np.log1p(b * np.expm1(-u))
    of_p, of_q = (reference._relative_entropy(of, mixture, x) for of, x in ((p, v), (q, w)))
    shared = _shared(pair, additions, b * of_p + g * of_q)
    far = np.where(abs(u) > 0.4, pair.of_p + pair.of_q + 3.0, 0.0)
    found = []
    for of, x, own, weight, other, divergence in (
        (p, v, pair.of_p, b, g * q, of_p), (q, w, pair.of_q, g, b * p, of_q),
    ):  # fmt: skip
        share = np.where(mixture == 0.0, 0.0, other / np.where(mixture == 0.0, 1.0, mixture))
        of_x = (LOG + 8.0) * _times(of, abs(x)) / np.where(of == 0.0, 1.0, of) + share * (pair.of_u + far)
        of_m = pair.of_p + pair.of_q
        of_row = _relative_entropy(of, mixture, np.where(of == 0.0, 0.0, x), own, of_m, of_x, additions)
        of_d = (own + 6.0) * abs(x + divergence) + of_x + share * shared + of_row + 2.0 * (abs(x) + divergence)
        in_sheet = _sum(_times(abs(mixture - of), share * rounded + 4.0)) + 4.0 * divergence
        d_sheet = share * rounded + 4.0 * (1.0 + abs(x)) + in_sheet
        found.append((weight * of_row, weight * in_sheet, weight * _times(of, of_d), weight * _times(of, d_sheet)))
    of_base, of_other = found
    rows = of_base[0] + of_other[0], of_base[1] + of_other[1]
    return rows, of_base[2:], of_other[2:]


# Batch normalisation: docs/errors.md, section 2 --------------------------------------------------------------------


def _of_a_channel(m: int, dtype: str) -> int:
    return _additions(m, CHANNEL if dtype == "float32" else CHANNEL_OF_FLOAT64)


def _of_rstd(var: Any, eps: float, additions: int) -> Any:
    """The roundings of 1 / sqrt(variance + eps) where the variance has its own."""
    return RSTD + (additions + VARIANCE) / 2.0 * np.where(var == 0.0, 0.0, var / (var + eps))


@_ieee
def batch_norm(
    x: Any, gamma: Any = None, beta: Any = None, *, eps: float = 1e-5, channel_axis: int | None = 1, dtype: str
) -> reference.BatchNorm:
    x = _extended(x)
    axes, shape, m = _per_channel(x, channel_axis)
    gamma, beta = abs(_extended(1.0 if gamma is None else gamma)), abs(_extended(0.0 if beta is None else beta))
    mean = np.asarray(np.sum(x, axis=axes) / m)
    distance = abs(x - mean.reshape(shape))
    spread = np.asarray(np.sum(distance, axis=axes) / m)
    var = np.asarray(np.sum(distance**2, axis=axes) / m)
    rstd = np.asarray(1.0 / np.sqrt(var + eps))

    additions = _of_a_channel(m, dtype)
    of_rstd = _of_rstd(var, eps, additions)
    of_mean = 2.0 * spread + unit_roundoff(dtype) * abs(mean)  # the mean is kept in two parts
    x_hat = distance * rstd.reshape(shape)
    of_x_hat = x_hat * (of_rstd + 3.0).reshape(shape) + (of_mean * rstd).reshape(shape)
    y = gamma.reshape(shape) * (of_x_hat + 2.0 * x_hat) + beta.reshape(shape)
    counted = y, of_mean, (additions + VARIANCE) * var, rstd * of_rstd, of_x_hat
    return reference.BatchNorm(*(_result(value, dtype) for value in counted))


@_ieee
def batch_norm_backward(
    dy: Any, x: Any, mean: Any, var: Any, gamma: Any = None, *,
    eps: float = 1e-5, channel_axis: int | None = 1, dtype: str, own_statistics: bool = False,
) -> reference.BatchNormGradients:  # fmt: skip
    """`own_statistics`: mean and variance are exact here, and the kernels' own there; else both are given the same."""
    dy, x, mean, var = map(_extended, (dy, x, mean, var))
    axes, shape, m = _per_channel(x, channel_axis)
    gamma = abs(_extended(1.0 if gamma is None else gamma))
    rstd = 1.0 / np.sqrt(var + eps)
    centred = x - mean.reshape(shape)
    distance = abs(centred)
    totals, products = (np.asarray(np.sum(v, axis=axes)) for v in (abs(dy), abs(dy) * distance))

    additions = _of_a_channel(m, dtype) if dtype == "float64" else 3.0  # in float32 they are compensated, or in float64
    of_rstd, of_products = np.asarray(RSTD + 0.0 * var), (additions + 3.0) * products
    if own_statistics:
        spread = np.asarray(np.sum(distance, axis=axes)) / m
        of_rstd = _of_rstd(var, eps, _of_a_channel(m, dtype))
        of_products = of_products + 2.0 * spread * abs(np.sum(dy, axis=axes))
    of_dgamma = rstd * (of_products + (of_rstd + 1.0) * products)
    of_dbeta = additions * totals

    scale = gamma * rstd
    # scale ((dy - b) - (x - mean) k), b = dbeta / m, k = rstd dgamma / m
    terms = abs(dy) + (totals / m).reshape(shape) + distance * (rstd**2 * products / m).reshape(shape)
    inner = ((of_dbeta + totals) / m).reshape(shape)
    inner = inner + distance * (rstd * (of_dgamma + (of_rstd + 5.0) * rstd * products) / m).reshape(shape)
    of_dx = scale.reshape(shape) * (inner + terms * (of_rstd + 4.0).reshape(shape))
    of_dvar = 0.5 * scale * rstd * (of_dgamma + (2.0 * of_rstd + 5.0) * rstd * products)
    of_dmean = scale * (of_dbeta + (of_rstd + 4.0) * totals)
    dx_hat = abs(dy) * gamma.reshape(shape)
    results = [_result(v, dtype) for v in (of_dx, of_dgamma, of_dbeta, of_dvar, of_dmean, dx_hat)]
    # Σ (x - mean), which the kernels count as 0, where the mean given is a rounded one: no rounding of theirs
    off_centre = abs(np.asarray(np.sum(centred, axis=axes))) / m
    slope = scale * rstd**2 * products / m
    results[0] = results[0] + np.asarray(slope * off_centre, dtype=np.float64).reshape(shape)
    results[4] = results[4] + np.asarray(m * slope * off_centre, dtype=np.float64)
    return reference.BatchNormGradients(*results)


@_ieee
def batch_norm_inference(
    x: Any, mean: Any, var: Any, gamma: Any = None, beta: Any = None,
    eps: float = 1e-5, channel_axis: int | None = 1, *, dtype: str,
) -> Array:  # fmt: skip
    x, mean, var = map(_extended, (x, mean, var))
    _, shape, _ = _per_channel(x, channel_axis)
    gamma, beta = abs(_extended(1.0 if gamma is None else gamma)), abs(_extended(0.0 if beta is None else beta))
    x_hat = abs(x - mean.reshape(shape)) / np.sqrt(var + eps).reshape(shape)
    return _result(gamma.reshape(shape) * x_hat * (RSTD + 4.0) + beta.reshape(shape), dtype)


@_ieee
def batch_norm_inference_backward(
    dy: Any, x: Any, mean: Any, var: Any, gamma: Any = None,
    eps: float = 1e-5, channel_axis: int | None = 1, *, dtype: str,
) -> reference.BatchNormInferenceGradients:  # fmt: skip
    given = dy, x, mean, var, gamma
    trained = batch_norm_backward(*given, eps=eps, channel_axis=channel_axis, dtype=dtype)
    constant = reference.batch_norm_inference_backward(*given, eps, channel_axis)
    dx = _result((RSTD + 3.0) * abs(_extended(constant.dx)), dtype)
    return reference.BatchNormInferenceGradients(dx, trained.dgamma, trained.dbeta)


@_ieee
def activation(p: Any, kind: str, *, dtype: str) -> Array:
    """Of a(p), p exact."""
    p = _extended(p)
    y = abs(_extended(reference.activation(p, kind)))
    if kind == "silu":
        return _result(_times(y, 6.0 + _times(_sigmoid(-p), EXP + abs(p))), dtype)
    if kind == "hardswish":
        return _result(5.0 * y, dtype)
    if kind == "gelu":
        return _result(_times(abs(p), _of_distribution(p)) + 2.0 * y, dtype)
    return _result(0.0 * y, dtype)


@_ieee
def activation_backward(dy: Any, p: Any, kind: str, *, dtype: str) -> Array:
    """Of dy a'(p), p exact."""
    dy, p = abs(_extended(dy)), _extended(p)
    if kind == "silu":
        sigma, rest, e = _sigmoid(p), _sigmoid(-p), EXP + abs(p)
        product = _times(rest, abs(p))
        of_product = _times(product, _times(sigma, e) + 7.0)
        counted = _times(sigma, _times(abs(1.0 + product * np.sign(p)), _times(rest, e) + 9.0) + of_product)
    elif kind == "hardswish":
        counted = np.where(abs(p) < 3.0, abs(p) + 2.0, 0.0) + 1.0
    elif kind == "gelu":
        density, distribution = _standard_normal(p)
        product = _times(density, abs(p))
        counted = _of_distribution(p) + _times(product, EXP + 1.5 * p * p + 4.0) + 2.0 * (distribution + product)
    else:
        counted = 0.0 * p
    return _result(_times(counted, dy), dtype)


def _of_distribution(p: Extended) -> Extended:
    """Φ = ½ (1 + erf(p / √2)): 4 for erf, 2 for p / √2, 2 for the sum and its half."""
    density, distribution = _standard_normal(p)
    return 4.0 * abs(distribution - 0.5) + 2.0 * _times(density, abs(p)) + 2.0 * distribution


# Points and the trace: docs/errors.md, section 3 -------------------------------------------------------------------


def moments(points: Any) -> reference.Moments:
    """The kernels' sums are float64's whatever the dtype of the points."""
    x = _extended(points)
    n = x.shape[0]
    additions = min(n - 1, 128)
    distance = abs(x - np.sum(x, axis=0) / n)
    mean = (additions + 4.0) * np.sum(distance, axis=0) / n + 2.0 * abs(np.sum(x, axis=0)) / n
    covariance = (additions + 8.0) * (distance.T @ distance) / n
    return reference.Moments(_result(mean, "float64"), _result(covariance, "float64"))


def _of_eigenvalues(covariance: Array) -> float:
    """p(m) ε ‖Σ‖, p(m) = m: how far each eigenvalue of LAPACK's and of cuSOLVER's may lie from the true one."""
    return covariance.shape[-1] * 2.0 * unit_roundoff("float64") * float(np.linalg.norm(covariance, 2))


def points_with_moments(mean: Any, covariance: Any, points: Any, *, dtype: str) -> reference.Moments:
    """How far the exact moments of `points`, each rounded to `dtype`, may lie from `mean` and `covariance`."""
    x, covariance = abs(_extended(points)), np.asarray(covariance, dtype=np.float64)
    n, m = x.shape
    distance = abs(_extended(points) - _extended(mean))
    roundoff = unit_roundoff(dtype) + (m + 8.0) * unit_roundoff("float64")
    values = abs(np.linalg.eigvalsh(covariance))
    # those that count as 0, by the docstring of the function
    left_out = float(np.max(values, where=values <= 2.0 * m * unit_roundoff(dtype) * values.max(), initial=0.0))
    of_products = (x.T @ distance + distance.T @ x) / n
    bound = roundoff * of_products + 2.0 * _of_eigenvalues(covariance) + left_out
    mean_bound = np.asarray(roundoff * np.sum(x, axis=0) / n, dtype=np.float64)
    return reference.Moments(mean_bound, np.asarray(bound, dtype=np.float64))


def minimize_trace(covariance: Any, k: int, *, dtype: str) -> tuple[float, Array]:
    """Of the value, and of the projector Φ Φᵀ formed in `dtype` from Φ rounded to it. The sheet's own error counts too."""
    covariance = np.asarray(covariance, dtype=np.float64)
    sheet, of_eigenvalues = reference.minimize_trace(covariance, k), 2.0 * _of_eigenvalues(covariance)
    m = covariance.shape[-1]
    gap = np.inf if k == m else sheet.eigenvalues[k] - sheet.eigenvalues[k - 1]
    phi = abs(sheet.phi)
    projector = (k + 3.0) * unit_roundoff(dtype) * (phi @ phi.T) + 2.0 * of_eigenvalues / gap
    return k * of_eigenvalues, projector + 2.0 * m * unit_roundoff("float64")
