"""The answer sheet: every result of the assignment in NumPy float64, formula by formula.

Each function converts its arguments to float64, evaluates the formula as docs/derivations.md states it and returns
float64: no fusing, no reordering, no sharing of work. It is slow on purpose, and it is the judge of every kernel. So
that a float64 kernel is not charged with the judge's own rounding, sections 2 and 3 and the moments of points are
evaluated in NumPy's longdouble (80 bits on x86; elsewhere it may be no wider than float64) and rounded once.

The letters are the assignment's: ``m`` values x_1…x_m of one variable in batch normalisation, ``N`` classes in the
softmax, ``n`` points x_1…x_n in R^m. Numbers in parentheses are the tags of docs/derivations.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BatchNorm",
    "BatchNormGradients",
    "BatchNormInferenceGradients",
    "CrossEntropyStatistics",
    "CrossEntropyWithOptions",
    "Distillation",
    "Moments",
    "SoftmaxCrossEntropy",
    "TokenLogProbs",
    "TraceMinimum",
    "VocabParallelLinearCrossEntropy",
    "activation",
    "activation_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "conv2d_output_shape",
    "cross_entropy",
    "cross_entropy_statistics",
    "cross_entropy_with_options",
    "distillation_loss",
    "helmert",
    "log_sum_exp",
    "minimize_trace",
    "moments",
    "points_with_moments",
    "softmax",
    "softmax_backward",
    "softmax_cross_entropy",
    "softmax_jacobian",
    "token_log_probs",
    "vocab_parallel_linear_cross_entropy",
]

Array = NDArray[np.float64]
Extended = NDArray[np.longdouble]
_PI = np.longdouble("3.14159265358979323846264338327950288")

# 0/0, log 0 and overflow mean here what IEEE 754 says they do: a NaN or an infinity in the answer, no warning.
_ieee = np.errstate(divide="ignore", invalid="ignore", over="ignore")


def _float64(array: Any) -> Array:
    return np.asarray(array, dtype=np.float64)


def _extended(array: Any) -> Extended:
    return _float64(array).astype(np.longdouble)


# Convolution: docs/derivations.md, section 1 -----------------------------------------------------------------------


def conv2d_output_shape(
    input_shape: Any, output_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> tuple[int, int, int, int]:
    """(B, W, H, C_in) to (B, W', H', C_out), (1.2): a pair's first entry belongs to W, its second to H."""
    b, w, h, _ = (int(size) for size in input_shape)
    (k1, k2), (s1, s2), (p1, p2), (d1, d2) = (
        (int(entry) for entry in np.broadcast_to(pair, 2)) for pair in (kernel_size, stride, padding, dilation)
    )
    w_out = (w + 2 * p1 - d1 * (k1 - 1) - 1) // s1 + 1
    h_out = (h + 2 * p2 - d2 * (k2 - 1) - 1) // s2 + 1
    return b, w_out, h_out, int(output_channels)


# Batch normalisation: docs/derivations.md, section 2 ---------------------------------------------------------------


class BatchNorm(NamedTuple):
    """``y`` and ``x_hat`` of the shape of ``x``; ``mean``, ``var`` (1/m) and ``rstd`` (C,), or () for one variable."""

    y: Array
    mean: Array
    var: Array
    rstd: Array
    x_hat: Array


class BatchNormGradients(NamedTuple):
    """Derivatives of the loss: ``dx`` and ``dx_hat`` of the shape of ``x``, the others (C,), or () for one variable."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dvar: Array
    dmean: Array
    dx_hat: Array


class BatchNormInferenceGradients(NamedTuple):
    """Derivatives of the loss where the statistics are constants."""

    dx: Array
    dgamma: Array
    dbeta: Array


def _per_channel(x: Array, channel_axis: int | None) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The axes a channel sums over, the shape that lays a (C,) vector along ``x``, and m, the values in a channel."""
    axes = tuple(i for i in range(x.ndim) if channel_axis is None or i != channel_axis % x.ndim)
    shape = tuple(1 if i in axes else -1 for i in range(x.ndim))
    return axes, shape, int(np.prod([x.shape[i] for i in axes], dtype=np.int64))


def _counted(x: Array, channel_axis: int | None, mask: Any) -> tuple[tuple[int, ...], tuple[int, ...], int, Any]:
    """As `_per_channel`, with m the number of values that count, at least 1 with a mask; and where a value counts, along ``x``.
    ``mask`` has the shape of ``x`` without its channels; None: all count."""
    axes, shape, m = _per_channel(x, channel_axis)
    if mask is None:
        return axes, shape, m, np.bool_(True)
    positions = np.broadcast_to(np.asarray(mask, dtype=bool), [x.shape[i] for i in axes])
    counts = np.expand_dims(positions, tuple({*range(x.ndim)} - {*axes}))
    return axes, shape, max(int(np.count_nonzero(positions)), 1), np.broadcast_to(counts, x.shape)


@_ieee
def batch_norm(
    x: Any, gamma: Any = None, beta: Any = None, *, eps: float = 1e-5, channel_axis: int | None = 1, mask: Any = None
) -> BatchNorm:
    """Normalise over a mini-batch, (2.1) to (2.4).

    ``channel_axis=None`` takes all elements of ``x`` as the values x_1…x_m of one variable; ``gamma`` and ``beta`` are
    then scalars, and (C,) otherwise. None stands for gamma = 1 and beta = 0. With m = 0 the statistics are NaN.

    ``mask``, a bool for each position of ``x`` without its channels: the values that count, (2.17) to (2.19). ``y`` and
    ``x_hat`` are 0 elsewhere, whatever ``x`` is there; where no value counts ``mean`` and ``var`` are 0.
    """
    x = _extended(x)
    axes, shape, m, counts = _counted(x, channel_axis, mask)
    x = np.where(counts, x, 0)
    gamma = _extended(1.0 if gamma is None else gamma)
    beta = _extended(0.0 if beta is None else beta)
    mean = np.asarray(np.sum(x, axis=axes) / m)
    centred = np.where(counts, x - mean.reshape(shape), 0)
    rest = np.asarray(np.sum(centred, axis=axes) / m)  # what the rounding of a large mean has left
    rest = np.where(np.isfinite(mean), rest, 0.0)  # the mean of values with an infinity among them is that infinity
    mean, centred = np.asarray(mean + rest), np.where(counts, centred - rest.reshape(shape), 0)
    var = np.asarray(np.sum(centred**2, axis=axes) / m)
    rstd = np.asarray(1.0 / np.sqrt(var + eps))
    x_hat = centred * rstd.reshape(shape)
    y = np.where(counts, gamma.reshape(shape) * x_hat + beta.reshape(shape), 0)
    return BatchNorm(*map(_float64, (y, mean, var, rstd, x_hat)))


@_ieee
def batch_norm_backward(
    dy: Any, x: Any, mean: Any, var: Any, gamma: Any = None, *, eps: float = 1e-5, channel_axis: int | None = 1,
    mask: Any = None,
) -> BatchNormGradients:  # fmt: skip
    """The gradients of batch normalisation by the chain of the assignment, (2.5) to (2.10).

    ``mean`` and ``var`` are those the forward pass returned; ``dy`` is ∂ℓ/∂y, of the shape of ``x``. With ``mask``, as the
    forward pass had it, (2.20): ``dx`` and ``dx_hat`` are 0 where a value does not count, whatever ``x`` and ``dy`` are there.
    """
    dy, x, mean, var = map(_extended, (dy, x, mean, var))
    axes, shape, m, counts = _counted(x, channel_axis, mask)
    dy, x = np.where(counts, dy, 0), np.where(counts, x, mean.reshape(shape))
    gamma = _extended(1.0 if gamma is None else gamma).reshape(shape)
    centred = x - mean.reshape(shape)
    rstd = 1.0 / np.sqrt(var + eps)
    x_hat = centred * rstd.reshape(shape)

    dx_hat = dy * gamma
    dvar = np.sum(dx_hat * centred, axis=axes) * -0.5 * (var + eps) ** -1.5
    dmean = np.sum(-dx_hat * rstd.reshape(shape), axis=axes) + dvar * np.sum(-2.0 * centred, axis=axes) / m
    dvar, dmean = np.asarray(dvar), np.asarray(dmean)
    dx = dx_hat * rstd.reshape(shape) + dvar.reshape(shape) * 2.0 * centred / m + dmean.reshape(shape) / m
    dx = np.where(counts, dx, 0)
    dgamma = np.sum(dy * x_hat, axis=axes)
    dbeta = np.sum(dy, axis=axes)
    return BatchNormGradients(*map(_float64, (dx, dgamma, dbeta, dvar, dmean, dx_hat)))


@_ieee
def batch_norm_inference(
    x: Any, mean: Any, var: Any, gamma: Any = None, beta: Any = None, eps: float = 1e-5, channel_axis: int | None = 1,
    mask: Any = None,
) -> Array:  # fmt: skip
    """y = gamma (x − mean) / sqrt(var + eps) + beta with given statistics (2.14); 0 where ``mask`` is False."""
    x, mean, var = map(_extended, (x, mean, var))
    _, shape, _, counts = _counted(x, channel_axis, mask)
    gamma = _extended(1.0 if gamma is None else gamma)
    beta = _extended(0.0 if beta is None else beta)
    x_hat = (x - mean.reshape(shape)) / np.sqrt(var + eps).reshape(shape)
    y = gamma.reshape(shape) * x_hat + beta.reshape(shape)
    return _float64(np.where(counts, y, 0))


@_ieee
def batch_norm_inference_backward(
    dy: Any, x: Any, mean: Any, var: Any, gamma: Any = None, eps: float = 1e-5, channel_axis: int | None = 1, mask: Any = None
) -> BatchNormInferenceGradients:
    """The gradients where ``mean`` and ``var`` do not depend on ``x`` (2.15); ``mask`` as in the forward pass."""
    dy, x, mean, var = map(_extended, (dy, x, mean, var))
    axes, shape, _, counts = _counted(x, channel_axis, mask)
    dy, x = np.where(counts, dy, 0), np.where(counts, x, mean.reshape(shape))
    gamma = _extended(1.0 if gamma is None else gamma)
    rstd = (1.0 / np.sqrt(var + eps)).reshape(shape)
    x_hat = (x - mean.reshape(shape)) * rstd
    dx = dy * gamma.reshape(shape) * rstd
    dgamma, dbeta = np.sum(dy * x_hat, axis=axes), np.sum(dy, axis=axes)
    return BatchNormInferenceGradients(*map(_float64, (dx, dgamma, dbeta)))


def _sigmoid(p: Extended) -> Extended:
    return np.asarray(1.0 / (1.0 + np.exp(-p)))


def _standard_normal(p: Extended) -> tuple[Extended, Extended]:
    """The density φ and the distribution Φ of the standard normal law, Φ by the series (2.25)."""
    square = np.minimum(p * p, 200.0)  # beyond, exp(-p²/2) is below every other rounding
    term = np.clip(p, -np.sqrt(200.0), np.sqrt(200.0))
    total = np.zeros_like(term)
    for k in range(500):
        total = total + term
        term = term * square / (2 * k + 3)
    density = np.exp(-p * p / 2.0) / np.sqrt(2.0 * _PI)
    rest = np.exp(-square / 2.0) / np.sqrt(2.0 * _PI) * total
    return density, np.clip(0.5 + rest, 0.0, 1.0)


@_ieee
def activation(p: Any, kind: str) -> Array:
    """a(p), (2.22) to (2.24): "relu", "silu", "hardswish" or "gelu". As in PyTorch, a(−∞) is NaN but for "relu"."""
    p = _extended(p)
    if kind == "relu":
        return _float64(np.where(p <= 0.0, 0.0, p))
    if kind == "silu":
        return _float64(p * _sigmoid(p))
    if kind == "hardswish":
        return _float64(p * np.clip(p + 3.0, 0.0, 6.0) / 6.0)
    if kind == "gelu":
        return _float64(p * _standard_normal(p)[1])
    raise ValueError(f"kind: expected 'relu', 'silu', 'hardswish' or 'gelu', got {kind!r}")


@_ieee
def activation_backward(dy: Any, p: Any, kind: str) -> Array:
    """dy a′(p), (2.21), ``dy`` = ∂ℓ/∂y. Where a has no derivative a′ is as in PyTorch: 0 at 0 for "relu"; for "hardswish"
    0 at −3 and 1 at 3."""
    dy, p = _extended(dy), _extended(p)
    if kind == "relu":
        return _float64(np.where(p <= 0.0, 0.0, dy))
    if kind == "silu":
        sigma = _sigmoid(p)
        return _float64(dy * sigma * (1.0 + p * (1.0 - sigma)))
    if kind == "hardswish":
        return _float64(dy * np.where(p <= -3.0, 0.0, np.where(p >= 3.0, 1.0, p / 3.0 + 0.5)))
    if kind == "gelu":
        density, distribution = _standard_normal(p)
        return _float64(dy * (distribution + p * density))
    raise ValueError(f"kind: expected 'relu', 'silu', 'hardswish' or 'gelu', got {kind!r}")


# Softmax and cross entropy: docs/derivations.md, section 3 ---------------------------------------------------------


class SoftmaxCrossEntropy(NamedTuple):
    """``loss`` per row, of the leading shape of z; ``dz`` of the shape of z."""

    loss: Array
    dz: Array


class CrossEntropyWithOptions(NamedTuple):
    """``loss`` as reduced; ``dlogits`` of the shape of the logits."""

    loss: Array
    dlogits: Array


class CrossEntropyStatistics(NamedTuple):
    """Of every row; ``log_prob`` and ``correct`` are None for probabilities. Ignored rows have zeros, and ``predicted`` −1."""

    lse: Array
    log_prob: Array | None
    entropy: Array
    correct: NDArray[np.bool_] | None
    predicted: NDArray[np.int64]


class VocabParallelLinearCrossEntropy(NamedTuple):
    """``loss`` (N,) of every row; of their sum ``dx`` (N, D), by process ``dweights`` (V_r, D), ``dbiases`` (V_r,)."""

    loss: Array
    dx: Array
    dweights: list[Array]
    dbiases: list[Array]


class Distillation(NamedTuple):
    """``loss`` as reduced; ``dstudent`` and ``dteacher`` of the shape of the logits."""

    loss: Array
    dstudent: Array
    dteacher: Array


class TokenLogProbs(NamedTuple):
    """Of every row; ``dlogits`` of the shape of the logits. Ignored rows have zeros."""

    log_prob: Array
    entropy: Array
    lse: Array
    dlogits: Array


def _log_sum_exp(z: Extended, axis: int) -> Extended:
    shift = np.max(z, axis=axis, keepdims=True, initial=-np.inf)
    shift = np.where(np.isneginf(shift), 0.0, shift)
    return shift + np.log(np.sum(np.exp(z - shift), axis=axis, keepdims=True))


def _softmax(z: Extended, axis: int) -> Extended:
    shift = np.max(z, axis=axis, keepdims=True, initial=-np.inf)
    exponentials = np.exp(z - shift)
    return exponentials / np.sum(exponentials, axis=axis, keepdims=True)


@_ieee
def log_sum_exp(z: Any, axis: int = -1) -> Array:
    """log Σ_k exp z_k over ``axis``, kept with length 1, shifted by the maximum (3.3). All −inf gives −inf."""
    return _float64(_log_sum_exp(_extended(z), axis))


@_ieee
def softmax(z: Any, axis: int = -1) -> Array:
    """S_j = exp z_j / Σ_k exp z_k over ``axis`` (3.1), shifted by the maximum (3.2).

    A logit of −inf has probability 0; a row of −inf alone, or one that holds +inf or NaN, has no softmax and gives NaN.
    """
    return _float64(_softmax(_extended(z), axis))


@_ieee
def softmax_backward(dy: Any, y: Any, axis: int = -1) -> Array:
    """∂ℓ/∂z from ``dy`` = ∂ℓ/∂S and ``y`` = S(z): y (dy − Σ_j dy_j y_j) (3.5)."""
    dy, y = _extended(dy), _extended(y)
    return _float64(y * (dy - np.sum(dy * y, axis=axis, keepdims=True)))


@_ieee
def softmax_jacobian(z: Any) -> Array:
    """∂S_i/∂z_j = S_i (δ_ij − S_j) (3.4), of shape (…, N, N) for z of shape (…, N)."""
    s = _softmax(_extended(z), -1)
    delta = np.eye(s.shape[-1])
    return _float64(s[..., :, None] * (delta - s[..., None, :]))


@_ieee
def cross_entropy(y: Any, y_hat: Any) -> Array:
    """L(y, ŷ) = −Σ_i y_i log ŷ_i over the last axis (3.6), with 0 · log 0 = 0."""
    y, y_hat = np.broadcast_arrays(_extended(y), _extended(y_hat))
    terms = np.where((y == 0.0) & (y_hat == 0.0), 0.0, y * np.log(y_hat))
    return _float64(0.0 - np.sum(terms, axis=-1))


def _one_hot(classes: Any, n_classes: int) -> Extended:
    """The unit vectors of integer ``classes`` (…): shape (…, N)."""
    classes = np.asarray(classes)
    if not np.issubdtype(classes.dtype, np.integer):
        raise TypeError(f"classes must be integers, got dtype {classes.dtype}")
    if np.any((classes < 0) | (classes >= n_classes)):
        raise ValueError(f"classes must lie in 0…{n_classes - 1}, got {classes.min()}…{classes.max()}")
    return _extended(np.arange(n_classes) == classes[..., None])


def _weighted_loss(q: Extended, z: Extended) -> Extended:
    """Σ_c q_c (lse − z_c) over the last axis (3.11), where a class of weight 0 and logit −inf adds 0."""
    terms = np.where((q == 0.0) & np.isneginf(z), 0.0, q * (_log_sum_exp(z, -1) - z))
    return np.asarray(np.sum(terms, axis=-1))


@_ieee
def softmax_cross_entropy(z: Any, y: Any) -> SoftmaxCrossEntropy:
    """L(y, S(z)) for each row and ∂L/∂z = ŷ Σ_i y_i − y (3.8), over the last axis.

    ``y`` is an array of vectors of the shape of ``z`` (…, N), whatever their sum, or of integer classes (…).
    """
    z = _extended(z)
    y = _extended(y) if np.shape(y) == z.shape else _one_hot(y, z.shape[-1])
    y_hat = _softmax(z, -1)
    dz = y_hat * np.sum(y, axis=-1, keepdims=True) - y
    return SoftmaxCrossEntropy(_float64(_weighted_loss(y, z)), _float64(dz))


@_ieee
def cross_entropy_with_options(
    logits: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    upstream: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Any = None,
    normalizer: float | None = None,
) -> CrossEntropyWithOptions:
    """The loss of ``torch.nn.functional.cross_entropy`` and its gradient, (3.10) to (3.14), (3.17), (3.18) and (3.35).

    ``logits`` (V,) or (N, V, d1, …); ``target`` integer classes (…) without the class axis, or probabilities of the
    shape of ``logits``; ``weight`` (V,). A row's loss is Σ_c q_c (lse − z_c), q_c = w_c ((1 − ε) y_c + ε/V); rows whose
    class is ``ignore_index`` have q = 0. "mean" divides by Σ w_target over the rows kept for classes, and by the number
    of rows for probabilities; ``token_weight`` (…) multiplies each row's loss and what it counts in that sum; ``normalizer``
    takes the sum's place, whatever the reduction. ``upstream`` is ∂ℓ/∂loss, of the shape of the loss, 1 if None.
    One thing differs from PyTorch: a class with q_c = 0 and logit −inf adds 0, where PyTorch's 0 · inf may give NaN.
    """
    logits = _extended(logits)
    target = np.asarray(target)
    class_axis = 1 if logits.ndim > 1 else 0
    z = _capped(logit_scale * np.moveaxis(logits, class_axis, -1), softcap)
    n_classes = z.shape[-1]
    w = np.ones(n_classes, np.longdouble) if weight is None else _extended(weight)

    hard = np.issubdtype(target.dtype, np.integer)
    if hard:
        kept = target != ignore_index
        y = _one_hot(np.where(kept, target, 0), n_classes)
        counted = np.where(kept, np.sum(w * y, axis=-1), 0.0)
    else:
        kept = np.ones(z.shape[:-1], dtype=bool)
        y = np.moveaxis(_extended(target), class_axis, -1)
        counted = kept.astype(np.longdouble)
    v = np.ones(kept.shape, np.longdouble) if token_weight is None else _extended(token_weight)

    q = w * ((1.0 - label_smoothing) * y + label_smoothing / n_classes)
    lse = _log_sum_exp(z, -1)
    z_losses, pull = (z_loss * lse[..., 0] ** 2, 2 * z_loss * lse) if z_loss else (0.0, 0.0)
    loss = np.where(kept & (v != 0.0), v * (_weighted_loss(q, z) + z_losses), 0.0)
    dz = _softmax(z, -1) * (np.sum(q, axis=-1, keepdims=True) + pull) - q
    if softcap is not None:
        dz = (1 - (z / softcap) ** 2) * dz
    dz = logit_scale * dz

    divisor = np.sum(v * counted) if reduction == "mean" else np.longdouble(1)
    if normalizer is not None:
        divisor = np.longdouble(normalizer)
    if reduction in ("mean", "sum"):
        loss = np.sum(loss)
    elif reduction != "none":
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    loss = loss / divisor
    scale = np.broadcast_to(_extended(1.0 if upstream is None else upstream) / divisor, kept.shape) * v
    dz = np.where(kept[..., None], scale[..., None] * dz, 0.0)
    return CrossEntropyWithOptions(_float64(loss), _float64(np.moveaxis(dz, -1, class_axis)))


@_ieee
def vocab_parallel_linear_cross_entropy(
    x: Any,
    weights: Sequence[Any],
    target: Any,
    biases: Sequence[Any] | None = None,
    *,
    class_weights: Sequence[Any] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> VocabParallelLinearCrossEntropy:
    """The loss of every row, and the gradients of their sum, where the classes are divided, (3.32) to (3.34).

    ``x`` (N, D); of every process r ``weights`` W_r (V_r, D), ``biases`` b_r (V_r,), 0 if None, and ``class_weights`` (V_r,), 1
    if None; ``target`` (N,) classes of the whole vocabulary. A row whose class is ``ignore_index`` adds nothing.
    """
    x, target = _extended(x), np.asarray(target)
    kept, W = target != ignore_index, [_extended(W_r) for W_r in weights]
    sizes = [len(W_r) for W_r in W]
    b = [np.zeros(V_r, np.longdouble) for V_r in sizes] if biases is None else [_extended(b_r) for b_r in biases]
    w = [np.ones(V_r, np.longdouble) for V_r in sizes] if class_weights is None else [_extended(w_r) for w_r in class_weights]
    z = [x @ W_r.T + b_r for W_r, b_r in zip(W, b, strict=True)]
    u = [_capped(z_r, softcap) for z_r in z]
    lse = _log_sum_exp(np.concatenate([_log_sum_exp(u_r, -1) for u_r in u], axis=-1), -1)
    q = []
    for w_r, V_r, first in zip(w, sizes, np.cumsum([0, *sizes]), strict=False):
        y = target[:, None] - first == np.arange(V_r)
        q.append(kept[:, None] * w_r * ((1 - label_smoothing) * y + label_smoothing / sum(sizes)))
    terms = [np.where((q_r == 0.0) & np.isneginf(u_r), 0.0, q_r * (lse - u_r)) for q_r, u_r in zip(q, u, strict=True)]
    pull = kept[:, None] * 2 * np.longdouble(z_loss) * lse
    loss = sum(np.sum(of_r, axis=-1) for of_r in terms) + kept * z_loss * lse[:, 0] ** 2
    Q = sum(np.sum(q_r, axis=-1, keepdims=True) for q_r in q) + pull
    slope = [np.longdouble(1) if softcap is None else 1 - (u_r / softcap) ** 2 for u_r in u]
    dz = [(np.exp(u_r - lse) * Q - q_r) * slope_r for u_r, q_r, slope_r in zip(u, q, slope, strict=True)]
    dx = sum(dz_r @ W_r for dz_r, W_r in zip(dz, W, strict=True))
    return VocabParallelLinearCrossEntropy(
        _float64(loss), _float64(dx), [_float64(dz_r.T @ x) for dz_r in dz], [_float64(dz_r.sum(0)) for dz_r in dz]
    )


def _capped(z: Extended, softcap: float | None) -> Extended:
    return z if softcap is None else softcap * np.tanh(z / np.longdouble(softcap))


@_ieee
def cross_entropy_statistics(
    logits: Any, target: Any, ignore_index: int = -100, softcap: float | None = None, logit_scale: float = 1.0
) -> CrossEntropyStatistics:
    """lse, log ŷ_t, the entropy of ŷ, whether no logit exceeds the target's, and the first class that has the largest, of
    every row (3.19); arguments as above."""
    logits, target = _extended(logits), np.asarray(target)
    z = _capped(logit_scale * np.moveaxis(logits, 1 if logits.ndim > 1 else 0, -1), softcap)
    predicted = np.argmax(z, axis=-1)
    lse, p = _log_sum_exp(z, -1)[..., 0], _softmax(z, -1)
    entropy = -np.sum(np.where(p == 0.0, 0.0, p * (z - lse[..., None])), axis=-1)
    if not np.issubdtype(target.dtype, np.integer):
        return CrossEntropyStatistics(_float64(lse), None, _float64(entropy), None, predicted)
    kept = target != ignore_index
    z_t = np.take_along_axis(z, np.where(kept, target, 0)[..., None], -1)[..., 0]
    of_rows = [_float64(np.where(kept, v, 0.0)) for v in (lse, z_t - lse, entropy)]
    correct = np.asarray(kept & (z_t == np.max(z, axis=-1)))
    return CrossEntropyStatistics(of_rows[0], of_rows[1], of_rows[2], correct, np.where(kept, predicted, -1))


@_ieee
def token_log_probs(
    logits: Any,
    target: Any,
    temperature: float = 1.0,
    ignore_index: int = -100,
    axis: int = -1,
    upstream: tuple[Any, Any, Any] = (1.0, 0.0, 0.0),
) -> TokenLogProbs:
    """log p_t, −Σ p log p and lse of p = S(z/T) over ``axis``, (3.24), and Σ upstream · their gradients (3.25).

    ``target`` holds integer classes, of the shape of ``logits`` without ``axis``; ``upstream`` is ∂ℓ/∂ each of the three.
    """
    z, target = np.moveaxis(_extended(logits), axis, -1), np.asarray(target)
    c = np.max(z, axis=-1, keepdims=True, initial=-np.inf)
    d = (z - np.where(np.isneginf(c), 0.0, c)) / np.longdouble(temperature)
    log_s = _log_sum_exp(d, -1)
    p, log_p = np.exp(d - log_s), d - log_s
    kept = target != ignore_index
    one_hot = _one_hot(np.where(kept, target, 0), z.shape[-1])
    terms = np.where(p == 0.0, 0.0, p * log_p)
    entropy = -np.sum(terms, axis=-1, keepdims=True)
    log_prob = np.sum(np.where(one_hot == 1.0, log_p, 0.0), axis=-1)
    g, h, u = (np.broadcast_to(_extended(of), kept.shape)[..., None] for of in upstream)
    dz = (g * (one_hot - p) - h * (terms + p * entropy) + u * p) / np.longdouble(temperature)
    lse = (c / np.longdouble(temperature) + log_s)[..., 0]
    log_prob, entropy, lse = (_float64(np.where(kept, v, 0.0)) for v in (log_prob, entropy[..., 0], lse))
    return TokenLogProbs(log_prob, entropy, lse, _float64(np.moveaxis(np.where(kept[..., None], dz, 0.0), -1, axis)))


def _log_softmax(z: Extended, temperature: float) -> Extended:
    """log S(z/T) over the last axis; all −inf gives NaN, as 0/0 does."""
    c = np.max(z, axis=-1, keepdims=True, initial=-np.inf)
    d = (z - c) / np.longdouble(temperature)
    return d - np.log(np.sum(np.exp(d), axis=-1, keepdims=True))


def _phi(x: Extended) -> Extended:
    """e^x − 1 − x."""
    return np.asarray(np.expm1(x) - x)


def _products(p: Extended, x: Extended) -> Extended:
    """p x with 0 · ∞ = 0."""
    return np.asarray(np.where(p == 0.0, 0.0, p * x))


def _relative_entropy(p: Extended, q: Extended, log_ratio: Extended) -> Extended:
    """Σ p log(p/q) over the last axis, kept, as Σ p φ(log(q/p)) (3.26); a class without p adds q."""
    return np.asarray(np.sum(np.where(p == 0.0, q, _products(p, _phi(log_ratio))), axis=-1, keepdims=True))


@_ieee
def distillation_loss(
    student: Any,
    teacher: Any,
    temperature: float = 1.0,
    kind: str = "forward",
    beta: float = 0.5,
    mask: Any = None,
    axis: int = -1,
    reduction: str = "mean",
    upstream: Any = None,
) -> Distillation:
    """KL(p‖q), KL(q‖p) or β KL(p‖M) + (1 − β) KL(q‖M), M = β p + (1 − β) q, of every row, and the gradients of both logits,
    (3.26) to (3.29).

    q = S(student/T), p = S(teacher/T) over ``axis``; ``kind`` is "forward", "reverse" or "jensen_shannon". ``mask``: True
    for the rows that count, of the shape of the logits without ``axis``; "mean" divides by their number. ``upstream`` is
    ∂ℓ/∂loss, of the shape of the loss, 1 if None.
    """
    log_q, log_p = (_log_softmax(np.moveaxis(_extended(z), axis, -1), temperature) for z in (student, teacher))
    p, q = np.exp(log_p), np.exp(log_q)
    u = np.where((p == 0.0) & (q == 0.0), 0.0, log_q - log_p)
    if kind == "forward":
        loss = _relative_entropy(p, q, u)
        dq, dp = q - p, -_products(p, u + loss)
    elif kind == "reverse":
        loss = _relative_entropy(q, p, -u)
        dq, dp = _products(q, u - loss), p - q
    else:
        alpha, gamma = np.longdouble(beta), 1 - np.longdouble(beta)
        v, w = np.log1p(gamma * np.expm1(u)), np.log1p(alpha * np.expm1(-u))  # log(M/p) and log(M/q)
        mixture = alpha * p + gamma * q
        of_p, of_q = _relative_entropy(p, mixture, v), _relative_entropy(q, mixture, w)
        loss = alpha * of_p + gamma * of_q
        dq, dp = -gamma * _products(q, w + of_q), -alpha * _products(p, v + of_p)

    kept = np.ones(p.shape[:-1], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    loss, scale = np.where(kept, loss[..., 0], 0.0), _extended(1.0 if upstream is None else upstream)
    if reduction == "mean":
        loss, scale = np.asarray(np.sum(loss) / np.sum(kept)), scale / np.sum(kept)
    elif reduction == "sum":
        loss = np.asarray(np.sum(loss))
    elif reduction != "none":
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    scale = np.broadcast_to(scale / np.longdouble(temperature), kept.shape)[..., None]
    dq, dp = (np.moveaxis(np.where(kept[..., None], scale * d, 0.0), -1, axis) for d in (dq, dp))
    return Distillation(_float64(loss), _float64(dq), _float64(dp))


# Points with given moments: docs/derivations.md, section 4 ---------------------------------------------------------


class Moments(NamedTuple):
    """``mean`` (m,) and ``covariance`` (m, m), both with 1/n."""

    mean: Array
    covariance: Array


def helmert(n: int, r: int) -> Array:
    """H (n, r), r < n, with Hᵀ H = I and Hᵀ 1 = 0 (4.4): column j holds j ones, then −j, over sqrt(j (j + 1))."""
    h = np.zeros((n, r))
    for j in range(1, r + 1):
        h[:j, j - 1] = 1.0
        h[j, j - 1] = -float(j)
        h[:, j - 1] /= np.sqrt(j * (j + 1.0))
    return h


def points_with_moments(mean: Any, covariance: Any, n: int | None = None) -> Array:
    """Points X (n, m), one a row, whose mean is μ and whose 1/n covariance is Σ: X = 1 μᵀ + sqrt(n) H Aᵀ (4.5).

    A (m, r) holds the eigenvectors of Σ times the roots of its eigenvalues; those not above m ε max |λ| count as zero,
    with ε float64's. ``n`` is rank(Σ) + 1 if None, and cannot be less.
    """
    mean, covariance = _float64(mean), _float64(covariance)
    eigenvalues, q = np.linalg.eigh(covariance)
    positive = eigenvalues > len(mean) * np.finfo(np.float64).eps * np.max(np.abs(eigenvalues), initial=0.0)
    a = q[:, positive] * np.sqrt(eigenvalues[positive])
    r = a.shape[1]
    n = r + 1 if n is None else n
    if n < r + 1:
        raise ValueError(f"n must be at least rank(covariance) + 1 = {r + 1}, got {n}")
    return mean + np.sqrt(n) * helmert(n, r) @ a.T


def moments(points: Any) -> Moments:
    """μ = (1/n) Σ x_i and Σ = (1/n) Σ (x_i − μ)(x_i − μ)ᵀ of points (n, m) (4.1)."""
    x = _extended(points)
    n = x.shape[0]
    mean = np.sum(x, axis=0) / n
    centred = x - mean
    return Moments(_float64(mean), _float64(centred.T @ centred / n))


# The trace problem: docs/derivations.md, section 5 -----------------------------------------------------------------


class TraceMinimum(NamedTuple):
    """``phi`` (m, k), ``value`` (), and all m ``eigenvalues`` of the covariance, ascending."""

    phi: Array
    value: Array
    eigenvalues: Array


def minimize_trace(covariance: Any, k: int) -> TraceMinimum:
    """Minimise Trace(Φᵀ Σ Φ) over Φᵀ Φ = I_k (5.3): Φ holds eigenvectors of the k smallest eigenvalues.

    Σ (m, m) is symmetric, indefinite or not, and 1 ≤ k ≤ m. ``eigenvalues`` are all m of them, not the first k.
    """
    sigma = _float64(covariance)
    if not 1 <= k <= sigma.shape[-1]:
        raise ValueError(f"k must lie in 1…{sigma.shape[-1]}, got {k}")
    eigenvalues, q = np.linalg.eigh(sigma)
    phi = q[:, :k]
    value = np.trace(phi.T @ sigma @ phi)
    return TraceMinimum(phi, np.asarray(value), eigenvalues)
