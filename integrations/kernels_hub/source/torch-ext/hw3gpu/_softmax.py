"""Softmax along one axis: y = exp(z - max z) / Σ exp(z - max z), and dz = y (dy - Σ dy y)."""

import torch

from . import _views
from ._ops import add_op_namespace_prefix
from .gpu import softmax as kernels


def softmax(z: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """softmax(z) along `dim`, of z's shape and dtype; of halves in float32 under autocast, as PyTorch's.

    TypeError for other dtypes than the four, ValueError for a tensor on no GPU, IndexError for no axis of z.
    """
    _views.check("z", z)
    if not -max(z.dim(), 1) <= dim < max(z.dim(), 1):
        raise IndexError(f"dim: expected an axis of z, which has {z.dim()}, got {dim}")
    if _views.widened(z):
        z = z.float()
    if z.dim() == 0:
        return _forward(z.reshape(1), 0).reshape(())
    return _forward(z, dim % z.dim())


@torch.library.custom_op(add_op_namespace_prefix("softmax"), mutates_args=())
def _forward(z: torch.Tensor, dim: int) -> torch.Tensor:
    y = _views.output(z, dim)
    with _views.on_device_of(z):
        kernels.forward(_views.fold(z, dim), _views.fold(y, dim))
    return y


@torch.library.custom_op(add_op_namespace_prefix("softmax_backward"), mutates_args=())
def _backward(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    dz = _views.output(y, dim)
    with _views.on_device_of(y):
        kernels.backward(_views.fold(dy, dim), _views.fold(y, dim), _views.fold(dz, dim))
    return dz


@_forward.register_fake
def _(z, dim):
    return _views.output(z, dim)


@_backward.register_fake
def _(dy, y, dim):
    return _views.output(y, dim)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.dim = inputs[1]


def _gradient(ctx, dy):
    return _backward(dy, *ctx.saved_tensors, ctx.dim), None


_forward.register_autograd(_gradient, setup_context=_setup)
