"""Batch normalisation in torch's autograd: docs/derivations.md, section 2."""

from __future__ import annotations

import torch

from . import _arrays
from ._autograd import accumulate_dtype, as_dtype, graph_is_needed, no_second_derivative


def batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    """y, with a graph where one is needed; the arguments are checked."""
    if x.numel() == 0:
        return _empty(x, weight, bias)
    if graph_is_needed(x, weight, bias):
        return _BatchNorm.apply(x, weight, bias, running_mean, running_var, training, momentum, eps)
    return _forward(x, weight, bias, running_mean, running_var, training, momentum, eps)[0]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps):
        y, stats = _forward(x, weight, bias, running_mean, running_var, training, momentum, eps)
        ctx.save_for_backward(x, weight, stats)
        ctx.training = training
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @no_second_derivative("batch_norm")
    def backward(ctx, dy):
        x, weight, stats = ctx.saved_tensors
        which = _arrays.backend(x)
        see = _arrays.viewer(which)
        dx, dx_folded = _arrays.output(x, 1, see)
        C, acc = x.shape[1], stats.dtype
        dgamma, dbeta = (torch.empty(C, dtype=acc, device=x.device) for _ in range(2))
        stats = see(stats)
        _arrays.kernels("batch_norm", which).__dict__["backward" if ctx.training else "inference_backward"](
            _arrays.fold(see(dy), 1), _arrays.fold(see(x), 1), stats[:2], stats[2], see(_dense(weight)),
            dx_folded, see(dgamma), see(dbeta),
        )  # fmt: skip
        dweight = as_dtype(dgamma, weight.dtype) if ctx.needs_input_grad[1] else None
        dbias = as_dtype(dbeta, ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None, None, None, None


def _dense(v):
    """A number a channel with unit stride, as the kernels walk it."""
    return None if v is None else v.detach().contiguous() if not v.is_contiguous() else v


def _forward(x, weight, bias, running_mean, running_var, training, momentum, eps):
    """y, and what the backward pass needs: mean, what its rounding left, and rstd."""
    which = _arrays.backend(x)
    see, kernels = _arrays.viewer(which), _arrays.kernels("batch_norm", which)
    y, y_folded = _arrays.output(x, 1, see)
    stats = torch.empty((4, x.shape[1]), dtype=accumulate_dtype(x), device=x.device)
    x, weight, bias = _arrays.fold(see(x), 1), see(_dense(weight)), see(_dense(bias))
    if training:
        running = _dense(running_mean), _dense(running_var)
        seen = see(stats)
        kernels.forward(
            x, weight, bias, y_folded, seen[:2], seen[3], seen[2], see(running[0]), see(running[1]), eps=eps, momentum=momentum
        )
        for given, updated in zip((running_mean, running_var), running, strict=True):
            if updated is not given:
                given.copy_(updated)
    else:
        stats[0] = running_mean
        stats[1] = 0
        stats[2] = (running_var.to(stats.dtype) + eps).rsqrt()
        seen = see(stats)
        kernels.normalize(x, seen[:2], seen[2], weight, bias, y_folded)
    return y, stats


def _empty(x, weight, bias):
    """The graph stays whole: gradients of an empty batch are empty or zero."""
    y = x.clone()
    for v in (weight, bias):
        if v is not None:
            y = y + 0 * v.sum().to(x.dtype)
    return y
