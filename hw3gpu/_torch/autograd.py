"""What the autograd functions share; and backward passes without a derivative, which raise where one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)  # no subclass, whose operations may be others


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which the kernels accumulate for `x`: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x.to(dtype)`, at no cost where it has that dtype."""
    return x if x.dtype == dtype else x.to(dtype)


def empty_of(x: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """`torch.empty` where `x` lives; sooner where that has the dtype."""
    return x.new_empty(shape) if x.dtype is dtype else x.new_empty(shape, dtype=dtype)


def graph_is_needed(*tensors: torch.Tensor | None) -> bool:
    """True where autograd records, and one of the tensors asks for a gradient."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def gradients_with_a_graph(
    function: Callable[[], Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor | None],
    upstream: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """∂ℓ/∂input for the inputs that `needs` names, None for the others, with a graph: they can be differentiated again.

    function: computes its results from the inputs in PyTorch's operations. upstream: ∂ℓ/∂result, None for one that ℓ does not
    depend on.
    """
    with torch.enable_grad():
        pairs = [(v, as_dtype(g, v.dtype)) for v, g in zip(function(), upstream, strict=True) if g is not None]
        asked = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
        found = iter(torch.autograd.grad([v for v, _ in pairs], asked, [g for _, g in pairs], create_graph=True))
    return tuple(next(found) if needed else None for needed in needs)


class _NoDerivative(torch.autograd.Function):
    """Returns a tensor, with a graph to the tensors it depends on: to differentiate it raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, message: str, copied: bool, x: torch.Tensor, *depends_on: torch.Tensor) -> torch.Tensor:
        ctx.message = message
        return x.clone() if copied else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)


def no_derivative(message: str, x: torch.Tensor, *depends_on: torch.Tensor, copied: bool = False) -> torch.Tensor:
    """`x`, with a graph to the tensors it depends on: to differentiate it raises RuntimeError, instead of giving no gradient.

    `copied`: PyTorch does not allow a result that is a view to be written.
    """
    return _NoDerivative.apply(message, copied, x, *depends_on)


def no_second_derivative(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the `backward` of the autograd function behind `name`: to differentiate its results raises RuntimeError.

    `once_differentiable` is not enough: where the upstream gradient needs no gradient, it lets the result pass for a constant
    of the saved tensors, and a gradient penalty loses its second-order term in silence.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def tied(ctx: Any, *upstream: Any) -> Any:
            if not torch.is_grad_enabled():  # the common case: no second derivative
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            depends_on = [t for t in (*upstream, *ctx.saved_tensors) if t is not None and t.requires_grad]
            every = gradients if isinstance(gradients, tuple) else (gradients,)
            message = f"{name}: a second derivative was asked for, and it has none here"
            return tuple(no_derivative(message, g, *depends_on) if g is not None and depends_on else g for g in every)

        return tied

    return decorate
