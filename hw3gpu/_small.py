"""Calls on the host in float32, the way of least overhead: kernels take addresses, and no views are made.

Each function gives what the general way gives, to the bit, or None where the call is not one of these.
"""

from __future__ import annotations

import torch

from . import _arrays

# Bytes of a tensor up to which a kernel runs on the calling thread alone, counting what it reads and writes.
MOST_BYTES = 1 << 16


def _plain(x: torch.Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_contiguous() and not x.is_neg()


def _fit(x: torch.Tensor, *beside: torch.Tensor | None) -> bool:
    return 0 < x.nbytes <= MOST_BYTES and _plain(x) and all(v is None or _plain(v) for v in beside)


def _address(v: torch.Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def cross_entropy_step(logits, target, weight, upstream, options, dlogits=None):
    """The reduced loss, its gradient for an upstream number (into `dlogits` where given), and the first wrong row."""
    if weight is not None or options.z_loss or options.softcap is not None or not _fit(logits, dlogits):
        return None
    if target.dtype is not torch.int64 or not target.is_contiguous():
        return None
    shape = logits.shape
    N, V = shape[:2] if len(shape) > 1 else (1, shape[0])
    loss = logits.new_empty(())
    dlogits = torch.empty_like(logits) if dlogits is None else dlogits
    row = _arrays.kernels("cross_entropy_step", "cpu").at_addresses(
        logits.data_ptr(), target.data_ptr(), dlogits.data_ptr(), loss.data_ptr(), N, V, logits.numel() // (N * V),
        upstream=upstream, mean=options.reduction == "mean", zero_if_ignored=options.zero_if_ignored,
        ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
    )  # fmt: skip
    return loss, dlogits, row


def _sizes(x, dy=None):
    """(N, C, S) as the kernels walk x, and dy as x, S = 1 for channels-last; None for what they do not take."""
    shape, layout = x.shape, torch.contiguous_format
    if not x.numel() or x.dtype is not torch.float32 or x.is_neg():
        return None
    if x.is_contiguous():
        sizes = shape[0], shape[1], x.numel() // (shape[0] * shape[1])
    elif x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        sizes, layout = (x.numel() // shape[1], shape[1], 1), torch.channels_last
    else:
        return None
    if dy is not None and not (dy.dtype is torch.float32 and dy.is_contiguous(memory_format=layout) and not dy.is_neg()):
        return None
    return sizes


def _vectors(*vectors):
    return all(v is None or _plain(v) for v in vectors)


def batch_norm_forward(x, weight, bias, running_mean, running_var, momentum, eps):
    """y and stats (mean (2, C), rstd, var)."""
    sizes, kernels = _sizes(x), _arrays.kernels("batch_norm_small", "cpu")
    if not sizes or not kernels.does_whole(*sizes) or not _vectors(weight, bias, running_mean, running_var):
        return None
    y, stats = _arrays.empty_like(x), x.new_empty((4, sizes[1]))
    kernels.forward(
        x.data_ptr(), _address(weight), _address(bias), y.data_ptr(), stats.data_ptr(), _address(running_mean),
        _address(running_var), *sizes, eps=eps, momentum=momentum,
    )  # fmt: skip
    return y, stats


def batch_norm_evaluation(x, weight, bias, running_mean, running_var, eps):
    """y and stats (mean (2, C), rstd)."""
    sizes, kernels = _sizes(x), _arrays.kernels("batch_norm_small", "cpu")
    if not sizes or not kernels.normalizes(*sizes) or not _vectors(weight, bias, running_mean, running_var):
        return None
    y, stats = _arrays.empty_like(x), x.new_empty((3, sizes[1]))
    kernels.normalize(
        x.data_ptr(), _address(weight), _address(bias), y.data_ptr(), stats.data_ptr(), running_mean.data_ptr(),
        running_var.data_ptr(), *sizes, eps=eps,
    )  # fmt: skip
    return y, stats


def batch_norm_backward(dy, x, weight, stats, training):
    """dx, dgamma and dbeta."""
    sizes, kernels = _sizes(x, dy), _arrays.kernels("batch_norm_small", "cpu")
    if not sizes or not kernels.does_whole(*sizes) or not _vectors(weight, stats):
        return None
    dx, dgamma, dbeta = _arrays.empty_like(x), x.new_empty(sizes[1]), x.new_empty(sizes[1])
    kernels.backward(
        dy.data_ptr(), x.data_ptr(), stats.data_ptr(), _address(weight), dx.data_ptr(), dgamma.data_ptr(), dbeta.data_ptr(),
        *sizes, trained=training,
    )  # fmt: skip
    return dx, dgamma, dbeta
