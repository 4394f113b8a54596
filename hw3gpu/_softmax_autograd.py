"""Softmax in torch's autograd: docs/derivations.md, sections 3.1 and 3.2."""

from __future__ import annotations

import torch

from . import _arrays
from ._autograd import graph_is_needed, no_second_derivative


def softmax(z, dim):
    """softmax(z) along `dim`, with a graph where one is needed; the arguments are checked."""
    return _Softmax.apply(z, dim) if graph_is_needed(z) else _forward(z, dim)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, dim):
        y = _forward(z, dim)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    @staticmethod
    @no_second_derivative("softmax")
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        which = _arrays.backend(y)
        see = _arrays.viewer(which)
        dz, dz_folded = _arrays.output(y, ctx.dim, see)
        _arrays.kernels("softmax", which).backward(_arrays.fold(see(dy), ctx.dim), _arrays.fold(see(y), ctx.dim), dz_folded)
        return dz, None


def _forward(z, dim):
    which = _arrays.backend(z)
    see = _arrays.viewer(which)
    y, y_folded = _arrays.output(z, dim, see)
    _arrays.kernels("softmax", which).forward(_arrays.fold(see(z), dim), y_folded)
    return y
