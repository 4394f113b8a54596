"""Plain float32 calls on the host, losses of small ones: kernels take addresses, so that no NumPy views of tensors are made.

Each function returns the same bits as the general path, or None for a call that it does not take.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._core import dispatch, pool, record
from .autograd import PLAIN
from .cross_entropy_formula import Options

# Bytes of a tensor up to which a kernel runs on the calling thread alone, counting what it reads and writes.
MOST_BYTES = 1 << 16

_FLOAT, _FLOAT32 = np.dtype(np.float32), torch.float32
_PATH = "kernels by address, without views: a plain float32 call on the host"


def _is_plain(v: Tensor) -> bool:
    """True for a float32 tensor on the host whose memory holds its values; every tensor has what is asked for first."""
    return (
        type(v) in PLAIN
        and v.dtype is torch.float32
        and v.layout is torch.strided
        and v.is_cpu
        and not v.is_nested
        and not v.is_neg()
    )


def _is_adjacent(v: Tensor | None) -> bool:
    """True for a plain contiguous tensor, and for None."""
    return v is None or (_is_plain(v) and v.is_contiguous())


def _fit(x: Tensor, *beside: Tensor | None) -> bool:
    return 0 < x.nbytes <= MOST_BYTES and _is_adjacent(x) and all(map(_is_adjacent, beside))


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def cross_entropy_step(
    logits: Tensor, target: Tensor, weight: Tensor | None, upstream: float, options: Options, dlogits: Tensor | None = None
) -> tuple[Tensor, Tensor, int] | None:
    """The reduced loss, its gradient for an upstream number (into `dlogits` where given), and the first wrong row."""
    if options.z_loss or options.softcap is not None or options.logit_scale != 1.0 or not _fit(logits, dlogits, weight):
        return None
    if weight is not None and options.label_smoothing:  # the sum of the weights is the general path's
        return None
    if target.dtype is not torch.int64 or not target.is_contiguous():
        return None
    shape = logits.shape
    N, V = shape[:2] if len(shape) > 1 else (1, shape[0])
    record.note(_PATH, "cpu")
    loss = logits.new_empty(())
    dlogits = torch.empty_like(logits) if dlogits is None else dlogits
    row = dispatch.cross_entropy_small.forward_backward(
        logits.data_ptr(), target.data_ptr(), _address(weight), dlogits.data_ptr(), loss.data_ptr(),
        N, V, logits.numel() // (N * V),
        upstream=upstream, mean=options.reduction == "mean", zero_if_ignored=options.zero_if_ignored,
        ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
    )  # fmt: skip
    return loss, dlogits, row


# ---------------------------------------------------------------------------------------------- batch normalisation
class Way(NamedTuple):
    """The layout of an input: N, C, S (S = 1 for channels-last), how an output is allocated, and whether training is taken."""

    sizes: tuple[int, int, int]
    nbytes: int
    shape: torch.Size
    strides: tuple[int, ...]
    byte_strides: tuple[int, ...]
    trains: bool


@functools.lru_cache(1024)
def _way(shape: torch.Size, strides: tuple[int, ...]) -> Way | None:
    """The `Way` of a layout, found once; None where no kernel takes it."""
    x = torch.empty_strided(shape, strides, dtype=torch.float32, device="meta")
    if x.dim() < 2 or not x.numel():
        return None
    N, C, count = shape[0], shape[1], x.numel()
    if x.is_contiguous():
        sizes = N, C, count // (N * C)
    elif x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        sizes = count // C, C, 1
    else:
        return None
    trains = count > C and dispatch.batch_norm_small.trains(*sizes)
    return Way(sizes, 4 * count, shape, strides, tuple(4 * s for s in strides), trains)


def batch_norm_way(
    x: Any, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, training: bool,
    residual: Any = None,
) -> Way | None:  # fmt: skip
    """For `batch_norm_forward`, of a call that needs no further check of its tensors; None for other calls."""
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return None
    try:
        # `_is_plain`, spelt out for five tensors: the calls cost more than what they ask
        if type(x) not in PLAIN or x.dtype is not _FLOAT32 or not x.is_cpu or x.is_neg():
            return None
        way = _way(x.shape, x.stride())
        if way is None or (training and not way.trains):
            return None
        if residual is not None and not (_is_plain(residual) and _way(residual.shape, residual.stride()) == way):
            return None
        C = way.sizes[1]
        for v in (weight, bias, running_mean, running_var):
            if v is not None and not (
                type(v) in PLAIN
                and v.dtype is _FLOAT32
                and v.is_cpu
                and v.numel() == C
                and v.layout is torch.strided
                and v.stride() == (1,)
                and not v.is_neg()
            ):
                return None
    except RuntimeError:  # of what has no strides: other layouts, nested tensors
        return None
    return way


# One operation allocates all: the first call of another one, after a convolution has filled the caches, takes some 25 us more.
def _output(x: Tensor, way: Way) -> Tensor:
    memory = pool.empty(way.shape, _FLOAT, way.byte_strides) if way.nbytes >= pool.SMALLEST else None
    return x.new_empty_strided(way.shape, way.strides) if memory is None else torch.from_numpy(memory)


def batch_norm_forward(
    way: Way, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float, residual: Tensor | None, activation: str | None, backward: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y and stats: mean (2, C), rstd, and in training var. Without a `backward` pass evaluation needs none."""
    record.note(_PATH, "cpu")
    y, kernels, C = _output(x, way), dispatch.batch_norm_small, way.sizes[1]
    stats = x.new_empty_strided((4 if training else 3, C), (C, 1)) if training or backward else None
    addresses = (
        x.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        0 if stats is None else stats.data_ptr(),
        0 if running_mean is None else running_mean.data_ptr(),
        0 if running_var is None else running_var.data_ptr(),
    )
    beside = None if residual is None else residual.data_ptr()
    if training:
        kernels.forward(*addresses, *way.sizes, eps=eps, momentum=momentum, activation=activation, residual=beside)
    else:
        kernels.normalize(*addresses, *way.sizes, eps=eps, activation=activation, residual=beside)
    return y, stats


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, stats: Tensor, training: bool,
    activation: str | None, residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """dx, dgamma, dbeta and, where `residual` asks for it, its gradient; None for what the kernels do not take.

    Without an activation the residual's gradient is dy, and none is given. bias, beside: what `activation.kept` keeps.
    """
    if not (_is_plain(x) and _is_plain(dy)) or (activation is not None and not training):
        return None
    way = _way(x.shape, x.stride())
    if way is None or (training and not way.trains) or _way(dy.shape, dy.stride()) != way:
        return None
    if not (_is_adjacent(stats) and _is_adjacent(weight) and _is_adjacent(bias)):
        return None
    if beside is not None and not (_is_plain(beside) and _way(beside.shape, beside.stride()) == way):
        return None
    record.note(_PATH, "cpu")
    C = way.sizes[1]
    dx, dgamma, dbeta = _output(x, way), stats.new_empty_strided((C,), (1,)), stats.new_empty_strided((C,), (1,))
    dresidual = _output(x, way) if residual and activation is not None else None
    addresses = (
        dy.data_ptr(), x.data_ptr(), stats.data_ptr(), _address(weight), dx.data_ptr(), dgamma.data_ptr(), dbeta.data_ptr()
    )  # fmt: skip
    if training:
        dispatch.batch_norm_small.backward(
            *addresses, *way.sizes, activation=activation, beta=_address(bias),
            beside=None if beside is None else beside.data_ptr(), dresidual=None if dresidual is None else dresidual.data_ptr(),
        )  # fmt: skip
    else:
        dispatch.batch_norm_small.inference_backward(*addresses, *way.sizes)
    return dx, dgamma, dbeta, dresidual
