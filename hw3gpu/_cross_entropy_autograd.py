"""Softmax cross entropy in torch's autograd: docs/derivations.md, sections 3.3 and 3.4."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _arrays
from ._autograd import accumulate_dtype, as_dtype, no_second_derivative


def cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing):
    """The loss, with a graph where one is needed; the arguments are checked, weight is in the kernels' dtype."""
    gradient = torch.is_grad_enabled() and logits.requires_grad and not target.requires_grad
    at_once = gradient and reduction != "none" and _arrays.backend(logits) == "cpu"
    function = _CrossEntropyStep if at_once else _CrossEntropy
    return function.apply(logits, target, weight, ignore_index, reduction, label_smoothing)


def loss_shape(logits: Tensor) -> tuple[int, ...]:
    """The shape of the loss of every row: that of `logits` without the class axis."""
    return (*logits.shape[:1], *logits.shape[2:]) if logits.dim() > 1 else ()


class _CrossEntropy(torch.autograd.Function):
    """Forward reads the logits once and keeps three numbers a row; backward reads them once and writes the gradient."""

    @staticmethod
    def forward(ctx, logits, target, weight, ignore_index, reduction, label_smoothing):
        ctx.reduction, ctx.options = reduction, {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        result, denominator, stats = _loss(logits, target, weight, reduction, ctx.options)
        ctx.save_for_backward(logits, target, weight, stats, denominator)
        return as_dtype(result, logits.dtype)

    @staticmethod
    @no_second_derivative("cross_entropy")
    def backward(ctx, upstream):
        logits, target, weight, stats, denominator = ctx.saved_tensors
        rows = stats.shape[1:]
        upstream = upstream.reshape(rows) if ctx.reduction == "none" else upstream.expand(rows)
        dlogits = dtarget = None
        if ctx.needs_input_grad[0]:
            which = _arrays.backend(logits)
            see = _arrays.viewer(which)
            z, t = _rows(see(logits), see(target))
            dlogits, dz = _arrays.output(logits, _class_axis(logits), see)
            kernels = _arrays.kernels("cross_entropy", which)
            kernels.backward(z, t, see(weight), see(stats), see(upstream), see(denominator), dz, **ctx.options)
        if ctx.needs_input_grad[1]:
            dtarget = _target_gradient(logits, target, weight, stats, upstream, denominator, ctx.options)
        return dlogits, dtarget, None, None, None, None


class _CrossEntropyStep(torch.autograd.Function):
    """A reduced loss on the CPU: forward writes the gradient at once, for upstream 1, while it has the logits in cache.

    Backward hands that out, and computes it anew for another upstream gradient, and for a second call: the caller may have
    written into what it got.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, ignore_index, reduction, label_smoothing):
        ctx.options = {"mean": reduction == "mean", "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        result, dlogits = _loss_and_gradient(logits, target, weight, 1.0, ctx.options)
        ctx.save_for_backward(logits, target, weight, dlogits)
        ctx.handed_out = False
        return as_dtype(result, logits.dtype)

    @staticmethod
    @no_second_derivative("cross_entropy")
    def backward(ctx, upstream):
        logits, target, weight, dlogits = ctx.saved_tensors
        upstream = upstream.item()
        # with a version count of its own, so that a write into it does not count as one into the saved tensor
        dlogits = None if ctx.handed_out else dlogits.data
        ctx.handed_out = True
        if dlogits is None or upstream != 1:
            _, dlogits = _loss_and_gradient(logits, target, weight, upstream, ctx.options, dlogits)
        return dlogits, None, None, None, None, None


def _class_axis(logits):
    return min(logits.ndim - 1, 1)


def _rows(logits, target):
    """Logits as (N, V, S) and targets as (N, S) or (N, V, S), of tensors or of what the kernels see."""
    z = _arrays.fold(logits, _class_axis(logits))
    soft = target.ndim == logits.ndim
    return z, _arrays.fold(target, _class_axis(logits)) if soft else target.reshape(z.shape[0], z.shape[2])


def _refuse_class(row, t, V, ignore_index):
    raise IndexError(
        f"target: expected classes in 0…{V - 1} or ignore_index {ignore_index}, got {int(t.reshape(-1)[row])} in row {row}"
    )


def _loss(logits, target, weight, reduction, options):
    """The reduced loss, what its gradient is divided by (None for 1), and three numbers a row."""
    which = _arrays.backend(logits)
    see, kernels, device = _arrays.viewer(which), _arrays.kernels("cross_entropy", which), logits.device
    z, t = _rows(see(logits), see(target))
    N, V, S = z.shape
    acc, seen_weight = accumulate_dtype(logits), see(weight)
    loss = torch.empty((N, S), dtype=acc, device=device)
    stats = torch.empty((3, N, S), dtype=acc, device=device)
    invalid = torch.full((1,), N * S, dtype=torch.int64, device=device)
    seen_invalid = see(invalid)
    kernels.forward(z, t, seen_weight, see(loss), see(stats), seen_invalid, **options)
    if t.ndim == 2 and _arrays.on_host(logits) and seen_invalid[0] < N * S:
        _refuse_class(int(seen_invalid[0]), t, V, options["ignore_index"])
    if reduction == "none":
        return loss.reshape(loss_shape(logits)), None, stats
    total, denominator = (torch.empty(1, dtype=acc, device=device) for _ in range(2))
    kernels.reduce(see(loss), t, seen_weight, see(total), see(denominator), ignore_index=options["ignore_index"])
    if reduction == "sum":
        return total[0], None, stats
    return (total / denominator)[0], denominator, stats


def _loss_and_gradient(logits, target, weight, upstream, options, dlogits=None):
    """On the CPU: the reduced loss, and its gradient for an upstream number, in `dlogits` where that is given."""
    see = _arrays.viewer("cpu")
    z, t = _rows(see(logits), see(target))
    N, V, S = z.shape
    if dlogits is None:
        dlogits, dz = _arrays.output(logits, _class_axis(logits), see)
    else:
        dz = _arrays.fold(see(dlogits), _class_axis(logits))
    result, invalid = torch.empty((), dtype=accumulate_dtype(logits)), np.array((N * S,))
    _arrays.kernels("cross_entropy_step", "cpu").forward_backward(
        z, t, see(weight), see(result).reshape(1), dz, invalid, upstream=upstream, **options
    )
    if invalid[0] < N * S:
        _refuse_class(int(invalid[0]), t, V, options["ignore_index"])
    return result, dlogits


def _target_gradient(logits, target, weight, stats, upstream, denominator, options):
    """∂loss/∂y_c = -w_c (1 - ε) log p_c for soft targets."""
    z = _arrays.fold(logits, _class_axis(logits))
    log_p = (z.to(stats.dtype) - stats[0][:, None]) - stats[1].log1p()[:, None]
    scale = upstream.to(stats.dtype)[:, None] * (options["label_smoothing"] - 1)
    if denominator is not None:
        scale = scale / denominator
    if weight is not None:
        scale = scale * weight.to(stats.dtype)[None, :, None]
    return (scale * log_p).reshape(target.shape).to(target.dtype)
