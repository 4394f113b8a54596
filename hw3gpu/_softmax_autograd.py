"""Softmax in torch's autograd: docs/derivations.md, sections 3.1 and 3.2.

A call takes one of three ways. Eager: `_Softmax`, or `run` alone where no graph is needed. Traced: the operators below, around
the same functions. Inside `torch.func` transforms, in forward mode, and where a gradient is to be differentiated again: (3.1)
and (3.5) in PyTorch's own operations.
"""

from __future__ import annotations

import torch

from . import _arrays, _bound, _ops
from ._autograd import accumulate_dtype, graph_is_needed
from ._torch_internals import apply_of


def softmax(z, dim, call=None):
    """softmax(z) along `dim`; the arguments are checked. `call`: what `_bound` knows of it."""
    if call is None:
        if _ops.traced(z):
            return FORWARD(z, dim)
        if _ops.transformed():
            return torch.softmax(z, dim, dtype=accumulate_dtype(z)).to(z.dtype)
    if not graph_is_needed(z):
        return run(z, dim, call)
    again = call is not None and call.launches is not None
    return (_apply_again if again else _Softmax.apply)(z, (dim, run, _eager_backward, call))


def run(z, dim, call=None):
    """softmax(z) along `dim`."""
    if call is not None and call.launches is not None:
        y = torch.empty_like(z)
        call.launches(z, y)
        return y
    which = _arrays.backend(z)
    y, y_folded = _arrays.output(z, dim, _arrays.viewer(which))
    with _bound.noted(call, (z, y), y):
        _arrays.kernels("softmax", which).forward(_arrays.folded(z, dim, which), y_folded)
    return y


def _eager_backward(dy, y, dim):
    return run_backward(dy, y, dim, _bound.of(("softmax, backward", dim), y, dy))


def run_backward(dy, y, dim, call=None):
    """∂ℓ/∂z from ∂ℓ/∂y and y."""
    if call is not None and call.launches is not None:
        dz = torch.empty_like(y)
        call.launches(y, dy, dz)
        return dz
    which = _arrays.backend(y)
    dz, dz_folded = _arrays.output(y, dim, _arrays.viewer(which))
    with _bound.noted(call, (y, dy, dz), dz):
        _arrays.kernels("softmax", which).backward(_arrays.folded(dy, dim, which), _arrays.folded(y, dim, which), dz_folded)
    return dz


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, rest):
        dim, forward, backward, call = rest  # in one argument: PyTorch looks at each of them, each time
        y = forward(z, dim, call)
        ctx.save_for_backward(y)
        ctx.dim, ctx.backward = dim, backward
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate again
            g, p = (v.to(accumulate_dtype(y)) for v in (dy, y))
            dz = (p * (g - (g * p).sum(ctx.dim, keepdim=True))).to(y.dtype)
        else:
            dz = ctx.backward(dy, y, ctx.dim)
        return dz, None


_apply_again = apply_of(_Softmax)


def _below_autograd(z, dim, call):
    return _ops.below_autograd(FORWARD, z, dim)


FORWARD = _ops.define(
    "softmax(Tensor z, int dim) -> Tensor",
    run,
    _ops.fake_output,
    lambda z, dim: _Softmax.apply(z, (dim, _below_autograd, torch.ops.hw3gpu.softmax_backward, None)),
)
BACKWARD = _ops.define(
    "softmax_backward(Tensor dy, Tensor y, int dim) -> Tensor",
    run_backward,
    lambda dy, y, dim: _ops.fake_output(y, dim),
)
