"""Softmax, cross entropy, log-probabilities and divergences: docs/errors.md, section 1."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import reference
from ..reference import Array, Extended, _extended, _ieee, _one_hot, _softmax
from .rounding import ARRAY_LOG, CAP, EXP, LOG, ROW, additions_of, of_a_row, result, sum_of, times


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
    return _Exponentials(below, p, each, sum_of(times(p, each), axis) + additions)


def _of_p(e: _Exponentials) -> Extended:
    """p counted: an exponential, the sum, and 1 / sum and a product."""
    return times(e.p, e.each + e.total + 3.0)


@_ieee
def softmax(z: Any, axis: int = -1, *, dtype: str) -> Array:
    z = _extended(z)
    last = axis % z.ndim == z.ndim - 1
    e = _exponentials(z, axis, of_a_row(z.shape[axis], dtype, last))
    return result(_of_p(e), dtype)


@_ieee
def softmax_backward(dy: Any, y: Any, axis: int = -1, *, dtype: str) -> Array:
    dy, y = abs(_extended(dy)), abs(_extended(y))
    additions = of_a_row(y.shape[axis], dtype, axis % y.ndim == y.ndim - 1)
    return result(y * (2.0 * dy + (additions + 3.0) * sum_of(dy * y, axis)), dtype)


@_ieee
def softmax_jacobian(z: Any, *, dtype: str) -> Array:
    z = _extended(z)
    e = _exponentials(z, -1, of_a_row(z.shape[-1], dtype))
    of_p = _of_p(e)
    products = of_p[..., :, None] * e.p[..., None, :]
    products = products + np.swapaxes(products, -1, -2) + 2.0 * e.p[..., :, None] * e.p[..., None, :]
    return result(products + np.eye(z.shape[-1]) * (of_p + e.p)[..., None, :], dtype)


@_ieee
def cross_entropy(y: Any, y_hat: Any, *, dtype: str) -> Array:
    y, y_hat = np.broadcast_arrays(_extended(y), _extended(y_hat))
    additions = of_a_row(y.shape[-1], dtype)
    return result((ARRAY_LOG + 1.0 + additions) * np.sum(times(y, abs(np.log(y_hat))), axis=-1), dtype)


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
    of_logits = times(of_cap, abs(z) + top) if of_cap else 0.0 * e.below
    each = np.where(e.below == 0.0, 0.0, e.each + of_logits)
    e = e._replace(each=each, total=sum_of(times(e.p, each)) + additions)

    # Σ exp - 1 is kept: the first maximum, whose exponential is that 1, has no error
    first = np.arange(z.shape[-1]) == np.argmin(e.below, axis=-1)[..., None]
    of_excess = sum_of(np.where(first, 0.0, times(e.p, 2.0 * additions + each)))
    log_total = -np.log(np.max(e.p, axis=-1, keepdims=True, initial=0.0))
    lse, of_lse = top + log_total, of_excess + LOG * log_total + (1.0 + of_cap) * (top + log_total)
    weight, inner = sum_of(abs(q)), sum_of(times(abs(q), e.below))

    of_log = of_excess + (LOG + 2.0 + of_weight) * log_total
    loss = weight * of_log + (of_weight + 4.0) * inner + sum_of(times(abs(q), of_logits))
    of_p = e.each + e.total + 3.0
    dz = weight * times(e.p, of_p + of_weight + 1.0) + (2.0 + of_weight) * abs(q)
    if z_loss:
        loss = loss + z_loss * lse * (2.0 * of_lse + 3.0 * lse)
        dz = dz + 2.0 * z_loss * times(e.p, of_lse + (of_p + 3.0) * lse)
    # the sheet rounds lse = max z + log Σ exp(z - max z) before it subtracts z, and p before it subtracts q
    sheet = loss + 2.0 * weight * (1.0 + log_total) + 3.0 * sum_of(times(abs(q), top + abs(z))), dz
    if target is not None:
        dz = np.where(target, _at_target(e, target, weight, additions, of_weight, 2.0 * z_loss * times(e.p, of_lse + lse)), dz)
    return _Row(loss[..., 0], dz, sheet[0][..., 0], sheet[1])


def _at_target(
    e: _Exponentials, target: NDArray[np.bool_], weight: Extended, additions: int, of_weight: float, pull: Any
) -> Any:
    """The gradient at the class is -q_t (Σ of the other p), without the difference p_t - 1: so much less is its error.

    p_t's own counts where it is not the largest. With smoothing, Σ q - q_t is a difference of rounded sums.
    """
    others = np.where(target, 0.0, e.p)
    each = times(e.p, 2.0 * additions + e.each)
    of_others = sum_of(np.where(target, 0.0, each)) + sum_of(np.where(target & (e.below > 0.0), 2.0 * each, 0.0))
    of_others = of_others + sum_of(others) * (e.total + 7.0)
    return weight * (of_others + (of_weight + 4.0 if of_weight else 0.0)) + (e.each + e.total + 6.0) * pull


@_ieee
def softmax_cross_entropy(z: Any, y: Any, *, dtype: str) -> reference.SoftmaxCrossEntropy:
    z = _extended(z)
    soft = np.shape(y) == z.shape
    q = _extended(y) if soft else _one_hot(y, z.shape[-1])
    additions = of_a_row(z.shape[-1], dtype)
    row = _row(z, q, None if soft else q == 1.0, additions, additions if soft else 0.0, 0.0, 0.0)
    return reference.SoftmaxCrossEntropy(result(row.loss, dtype, row.sheet_loss), result(row.dz, dtype, row.sheet_dz))


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

    additions = of_a_row(n_classes, dtype, axis == logits.ndim - 1)
    of_weight = 0.0 if hard and not label_smoothing else additions + 4.0
    of_scaling = 0.0 if math.frexp(logit_scale)[0] == 0.5 else 2.0  # the scale and the product with it, exact for powers of two
    of_logits = of_scaling if softcap is None else CAP + of_scaling
    row = _row(z, q, y == 1.0 if hard else None, additions, of_weight, z_loss, of_logits)
    of_loss: Any
    of_dz: Any
    of_loss, of_dz = (times(kept, row.loss), times(kept, row.sheet_loss)), (row.dz, row.sheet_dz)

    # what the sheet finds for each row, before the reduction
    given = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    given |= {"softcap": softcap, "logit_scale": logit_scale}
    sheet = reference.cross_entropy_with_options(logits, target, **given, reduction="none")
    dz = abs(np.moveaxis(_extended(sheet.dlogits), axis, -1)) / logit_scale
    terms = dz if hard and not label_smoothing else np.where(y == 1.0, dz, sum_of(q) * _softmax(z, -1) + q)
    if softcap is not None:
        share = (z / softcap) ** 2
        of_dz = tuple((1.0 - share) * v for v in of_dz)
        before_cap = sum_of(q) * _softmax(z, -1) + q
        of_dz = of_dz[0] + (4.0 * (1.0 - share) + 2.0 * of_logits * share) * before_cap, of_dz[1] + 4.0 * before_cap

    token_weights = np.ones(kept.shape, np.longdouble) if token_weight is None else abs(_extended(token_weight))
    scale = abs(_extended(1.0 if upstream is None else upstream)) * token_weights * logit_scale
    of_scale: Any = 4.0 + of_scaling
    losses = times(token_weights, abs(_extended(sheet.loss)))
    of_loss = tuple(times(token_weights, of) for of in of_loss)
    if token_weight is not None:
        of_scale += 2.0
        of_loss = tuple(of + 2.0 * losses for of in of_loss)
    divisor: Any = 1.0
    of_sum = additions_of(kept.size, ROW) + 2.0
    if reduction != "none":
        losses = np.sum(losses)
        of_loss = tuple(np.sum(of) + of_sum * losses for of in of_loss)
    if normalizer is not None:
        divisor = np.longdouble(normalizer)
        of_scale += 2.0
        of_loss = tuple((of + 2.0 * losses) / divisor for of in of_loss)
    elif reduction == "mean":
        counted = times(kept, sum_of(w * y)[..., 0]) if hard else kept.astype(np.longdouble)
        divisor = np.sum(token_weights * counted)
        of_scale += of_sum
        of_loss = tuple((of + (of_sum + 1.0) * losses) / divisor for of in of_loss)
    scale = np.broadcast_to(scale / divisor, kept.shape)[..., None]
    of_dz = tuple(np.where(kept[..., None], scale * (v + of_scale * terms), 0.0) for v in of_dz)
    loss, dlogits = result(of_loss[0], dtype, of_loss[1]), result(of_dz[0], dtype, of_dz[1])
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
    additions = of_a_row(z.shape[-1], dtype, axis % z.ndim == z.ndim - 1)
    e = _exponentials(z * beta, -1, additions)
    each = np.where(e.below == 0.0, 0.0, e.each + of_beta * e.below)
    e = e._replace(each=each, total=sum_of(times(e.p, each)) + additions)

    # the first maximum, whose exponential is the 1 of Σ exp - 1 and whose difference is 0, has no error
    first = np.arange(z.shape[-1]) == np.argmin(e.below, axis=-1)[..., None]
    log_total = -np.log(np.max(e.p, axis=-1, keepdims=True, initial=0.0))
    of_log = sum_of(np.where(first, 0.0, times(e.p, 2.0 * additions + each))) + LOG * log_total
    mean = sum_of(times(e.p, e.below))
    of_mean = sum_of(times(times(e.p, e.below), 2.0 * additions + each + e.total + of_beta + 4.0))
    below_t = sum_of(np.where(at_target, e.below, 0.0))
    top = abs(np.max(z, axis=-1, keepdims=True, initial=-np.inf)) * beta
    log_prob = of_log + (of_beta + 2.0) * below_t + log_total
    entropy = of_log + of_mean + log_total + mean
    lse = of_log + (of_beta + 1.0) * top + log_total

    g, h, u = (beta * abs(np.broadcast_to(_extended(of), kept.shape[:-1])[..., None]) for of in upstream)
    of_entropy = h * ((of_beta + 4.0) * e.below + of_mean + (of_beta + 5.0) * mean)

    def of_sum(lead: Any) -> Any:
        """p (lead - h (d - mean))."""
        return times(e.p, (e.each + e.total + 4.0) * (lead + h * (e.below + mean)) + (of_beta + 2.0) * lead + of_entropy)

    others = sum_of(np.where(at_target, 0.0, e.p))
    of_target = _at_target(e, at_target, g, additions, 0.0, 0.0) + (of_beta + 2.0) * g * others + of_sum(u)
    dz = np.where(at_target, of_target, of_sum(g + u))
    # the sheet rounds log p before it multiplies, and 1 - p_t
    of_sheet = 3.0 * (1.0 + log_total + e.below)
    sheet_dz = dz + times(times(e.p, g + u + h * (1.0 + mean)), of_sheet) + np.where(at_target, g, 0.0)
    sheet = of_sheet.max(axis=-1, keepdims=True, initial=0.0, where=np.isfinite(of_sheet))
    rows = (result(times(kept, v)[..., 0], dtype, times(kept, v + sheet)[..., 0]) for v in (log_prob, entropy, lse))
    log_prob, entropy, lse = rows
    dlogits, of_sheet = (np.moveaxis(times(kept, v), -1, axis) for v in (dz, sheet_dz))
    return reference.TokenLogProbs(log_prob, entropy, lse, result(dlogits, dtype, of_sheet))


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
    apart = sum_of(times(pair.p, pair.of_u)) + (additions + 4.0) * sum_of(times(pair.p, abs(pair.u)))
    logs = 2.0 * LOG + sum_of(times(pair.p, pair.of_p)) + sum_of(times(pair.q, pair.of_q))
    return np.where(divergence < 0.2, apart, apart + logs + pair.of_shift)


def _relative_entropy(p: Extended, q: Extended, x: Extended, of_p: Any, of_q: Any, of_x: Any, additions: float) -> Any:
    """Of Σ p φ(x), x = log(q/p) with `of_x` roundings, those of p and q given: the error, and what the sheet rounds."""
    step = np.where(p == 0.0, 0.0, abs(q - p))
    near = (of_p + additions + 12.0) * times(p, np.expm1(x) - x)
    far = (of_q + additions + 4.0) * q + (of_p + additions + 4.0) * times(p, 1.0 + abs(x))
    terms = np.where(abs(x) < 0.6, near, 0.0) + np.where(abs(x) > 0.4, far, 0.0)
    # about the shift of a lane, which is that of one of its classes: as many times x² as it has classes
    lanes = additions * times(p, np.where(abs(x) < 0.6, x * x, 0.0))
    return sum_of(terms + lanes + times(step, of_x))


@_ieee
def distillation_loss(
    student: Any, teacher: Any, temperature: float = 1.0, kind: str = "forward", beta: float = 0.5, mask: Any = None,
    axis: int = -1, reduction: str = "mean", upstream: Any = None, *, dtype: str,
) -> reference.Distillation:  # fmt: skip
    z_q, z_p = (np.moveaxis(_extended(z), axis, -1) / np.longdouble(temperature) for z in (student, teacher))
    if kind == "reverse":
        z_p, z_q = z_q, z_p
    of_scale = 0.0 if math.frexp(temperature)[0] == 0.5 else 2.0
    additions = float(of_a_row(z_p.shape[-1], dtype, axis in (-1, np.ndim(student) - 1)))
    of: list[Extended] = []
    for z in (z_p, z_q):
        e = _exponentials(z, -1, int(additions))
        each = e.each + of_scale * np.where(np.isinf(e.below), 0.0, e.below)
        each = np.where(e.p == 0.0, 0.0, each)
        of.append(np.asarray(each + sum_of(times(e.p, each)) + additions + 3.0))
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
        near = times(p, abs(np.expm1(u)) * (of[0] + 12.0) + np.exp(u) * (of_u + shared))
        far = (of[0] + 4.0) * p + (of[1] + 4.0) * q
        of_other = np.where(abs(u) < 0.6, near, 0.0) + np.where((abs(u) > 0.4) | (p == 0.0) | (q == 0.0), far, 0.0)
        of_base = times(p, (of[0] + 6.0) * abs(u + loss) + of_u + shared + of_loss + 2.0 * (abs(u) + loss))
        in_sheet = sum_of(times(abs(q - p), rounded)) + 4.0 * loss
        found = (of_loss, in_sheet), (of_base, times(p, rounded + in_sheet)), (of_other, times(p + q, rounded + 1.0))
    rows, of_base, of_other = found

    kept = np.ones(p.shape[:-1], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    sheet = reference.distillation_loss(student, teacher, temperature, kind, beta, mask, axis, "none")
    row = tuple(np.where(kept, v[..., 0], 0.0) for v in rows)
    scale, of_g = abs(_extended(1.0 if upstream is None else upstream)), 4.0
    if reduction != "none":
        of_sum, losses = additions_of(kept.size, ROW) + 3.0, np.sum(abs(_extended(sheet.loss)))
        row = tuple(np.asarray(np.sum(v) + of_sum * losses) for v in row)
    if reduction == "mean":
        row, scale = tuple(v / np.sum(kept) for v in row), scale / np.sum(kept)
    scale = np.broadcast_to(scale / np.longdouble(temperature), kept.shape)[..., None]
    results = [result(row[0], dtype, row[1])]
    of_student, of_teacher = (of_base, of_other) if kind == "reverse" else (of_other, of_base)
    for (counted, by_sheet), d in ((of_student, sheet.dstudent), (of_teacher, sheet.dteacher)):
        exact = abs(np.moveaxis(_extended(d), axis, -1)) * of_g
        bound = np.where(kept[..., None], scale * counted + exact * scale * temperature, 0.0)
        results.append(np.moveaxis(result(bound, dtype, times(kept[..., None], scale * by_sheet)), -1, axis))
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
        of_x = (LOG + 8.0) * times(of, abs(x)) / np.where(of == 0.0, 1.0, of) + share * (pair.of_u + far)
        of_m = pair.of_p + pair.of_q
        of_row = _relative_entropy(of, mixture, np.where(of == 0.0, 0.0, x), own, of_m, of_x, additions)
        of_d = (own + 6.0) * abs(x + divergence) + of_x + share * shared + of_row + 2.0 * (abs(x) + divergence)
        in_sheet = sum_of(times(abs(mixture - of), share * rounded + 4.0)) + 4.0 * divergence
        d_sheet = share * rounded + 4.0 * (1.0 + abs(x)) + in_sheet
        found.append((weight * of_row, weight * in_sheet, weight * times(of, of_d), weight * times(of, d_sheet)))
    of_base, of_other = found
    rows = of_base[0] + of_other[0], of_base[1] + of_other[1]
    return rows, of_base[2:], of_other[2:]
