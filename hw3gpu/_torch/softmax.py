"""Softmax in torch's autograd: docs/derivations.md, sections 3.1 and 3.2.

A call takes one of three ways. Eager: `_Softmax`, or `run` alone where no graph is needed. Traced: the operators below, around
the same functions. Inside `torch.func` transforms, in forward mode, and where a gradient is to be differentiated again: (3.1)
and (3.5) in PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._core import arrays, dispatch, outputs
from .._core.torch_internals import apply_of
from . import bound_launches, operators
from .autograd import accumulate_dtype, graph_is_needed
from .bound_launches import Call


def softmax(z: Tensor, dim: int, call: Call | None = None) -> Tensor:
    """softmax(z) along `dim`; the arguments are checked. `call`: what `bound_launches` knows of it."""
    if call is None:
        if operators.traced(z):
            return FORWARD(z, dim)
        if operators.transformed():
            return torch.softmax(z, dim, dtype=accumulate_dtype(z)).to(z.dtype)
    if not graph_is_needed(z):
        return run(z, dim, call)
    again = call is not None and call.launches is not None
    return (_apply_again if again else _Softmax.apply)(z, (dim, run, _eager_backward, call))


def run(z: Tensor, dim: int, call: Call | None = None) -> Tensor:
    """softmax(z) along `dim`."""
    if call is not None and call.launches is not None:
        y = torch.empty_like(z)
        call.launches(z, y)
        return y
    which = dispatch.backend(z)
    y, y_folded = outputs.output(z, dim, dispatch.kernel_view(which))
    with bound_launches.noted(call, (z, y), y):
        dispatch.softmax(which).forward(outputs.folded(z, dim, which), y_folded)
    return y


def _eager_backward(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    of = bound_launches.of_host if arrays.on_host(y) else bound_launches.of
    return run_backward(dy, y, dim, of(("softmax, backward", dim), y, dy))


def run_backward(dy: Tensor, y: Tensor, dim: int, call: Call | None = None) -> Tensor:
    """∂ℓ/∂z from ∂ℓ/∂y and y."""
    if call is not None and call.launches is not None:
        dz = torch.empty_like(y)
        call.launches(y, dy, dz)
        return dz
    which = dispatch.backend(y)
    dz, dz_folded = outputs.output(y, dim, dispatch.kernel_view(which))
    with bound_launches.noted(call, (y, dy, dz), dz):
        dispatch.softmax(which).backward(outputs.folded(dy, dim, which), outputs.folded(y, dim, which), dz_folded)
    return dz


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, rest: tuple[int, Callable[..., Tensor], Callable[..., Tensor], Call | None]) -> Tensor:
        dim, forward, backward, call = rest  # in one argument: PyTorch looks at each of them, each time
        y = forward(z, dim, call)
        ctx.save_for_backward(y)
        ctx.dim, ctx.backward = dim, backward
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated again
            g, p = (v.to(accumulate_dtype(y)) for v in (dy, y))
            dz = (p * (g - (g * p).sum(ctx.dim, keepdim=True))).to(y.dtype)
        else:
            dz = ctx.backward(dy, y, ctx.dim)
        return dz, None


_apply_again = apply_of(_Softmax)


def _below_autograd(z: Tensor, dim: int, call: Call | None) -> Tensor:
    return operators.below_autograd(FORWARD, z, dim)


FORWARD = operators.define(
    "softmax(Tensor z, int dim) -> Tensor",
    run,
    operators.fake_output,
    lambda z, dim: _Softmax.apply(z, (dim, _below_autograd, torch.ops.hw3gpu.softmax_backward, None)),
)
BACKWARD = operators.define(
    "softmax_backward(Tensor dy, Tensor y, int dim) -> Tensor",
    run_backward,
    lambda dy, y, dim: operators.fake_output(y, dim),
)
