"""Batch normalisation: its options, and the formula in PyTorch's own operations, which have derivatives of every order and work
under every transform: docs/derivations.md, section 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.torch_internals import tracing_state
from .activation import applied, let_through
from .autograd import accumulate_dtype
from .bound_launches import Call
from .positions import Positions, unpacked

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]  # dx, dgamma, dbeta and dresidual


class Rest(NamedTuple):
    """The arguments without a gradient, as one: PyTorch inspects each argument of an autograd function in each call.

    call: its key in `bound_launches`, or None. traced: the operators run it. counted: the positions that count (N, …), or
    None where all do; positions: the same for the kernels.
    """

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    momentum: float
    eps: float
    activation: str | None
    training: bool
    call: Call | None = None
    traced: bool = False
    counted: Tensor | None = None
    positions: Positions | None = None


def exported(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest) -> Tensor:
    """PyTorch's own operation: tools that move an exported model between training and evaluation look for it alone.

    PyTorch's exporter to ONNX writes it without the mark of training. It has no mask.
    """
    if rest.counted is not None or (rest.training and tracing_state() is None and torch.onnx.is_in_onnx_export()):
        return formula(x, weight, bias, residual, rest)
    y = torch.batch_norm(
        x, weight, bias, rest.running_mean, rest.running_var, rest.training, rest.momentum, rest.eps, True
    )  # fmt: skip
    if residual is not None:
        y = y + residual
    return applied(y, rest.activation)


def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest) -> Tensor:
    """The same function in PyTorch's operations."""
    running_mean, running_var, momentum, eps, activation, training, _, _, counted, _ = rest
    acc = accumulate_dtype(x)
    on = None if counted is None else counted.unsqueeze(1)
    values = _where(on, x.to(acc))
    if training:
        deviations, var, rstd = _centred(values, eps, on)
        if running_mean is not None and running_var is not None and values.numel():
            m: Any = values.numel() / values.shape[1] if on is None else on.sum()
            unbiased = m / (m - 1) if on is None else m / (m - 1).clamp(min=1)
            mean = _mean(_where(on, values - deviations), on).flatten()
            new_mean = (1 - momentum) * running_mean.to(acc) + momentum * mean.detach()
            new_var = (1 - momentum) * running_var.to(acc) + momentum * unbiased * var.detach().flatten()
            if on is not None:
                new_mean, new_var = torch.where(m > 0, new_mean, running_mean), torch.where(m > 0, new_var, running_var)
            _write(new_mean, running_mean, new_var, running_var)
    else:
        assert running_mean is not None
        assert running_var is not None
        deviations = values - _wide(running_mean, x)
        rstd = (_wide(running_var, x) + eps).rsqrt()
    y = deviations * rstd
    if weight is not None:
        y = y * _wide(weight, x)
    if bias is not None:
        y = y + _wide(bias, x)
    if residual is not None:
        y = y + residual
    return _where(on, applied(y, activation)).to(x.dtype)


def _write(new_mean: Tensor, running_mean: Tensor, new_var: Tensor, running_var: Tensor) -> None:
    """Under a transform PyTorch refuses to write to what is no argument of the transformed function, or has fewer elements."""
    try:
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    except RuntimeError as error:
        raise RuntimeError(
            "running_mean and running_var: training writes to them, so under torch.func expected arguments of the transformed "
            "function, one of each for every mapped batch, or None (torch.func.replace_all_batch_norm_modules_, or "
            f"track_running_stats=False); PyTorch says: {error}"
        ) from error


def differentiable_backward(backward: Callable[..., Gradients], eps: float) -> Callable[..., Gradients]:
    """`run_backward` in PyTorch's operations; the mask is unpacked by the kernels of `backward`, as its gradient of ones."""

    def backward_in_formulas(
        dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, stats: Tensor,
        mask: Tensor | None, training: bool, activation: str | None, residual: bool, bits: Tensor | None = None,
        count: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        if activation == "relu":
            with torch.no_grad():
                ones = torch.ones_like(dy)
                passed = backward(ones, x, weight, bias, beside, stats, mask, False, activation, True)[3]
            assert passed is not None
            dy = dy * passed
        on = None if bits is None else unpacked(bits, x)
        dy = _where(on, dy)
        upstream, values = dy.to(stats.dtype), _where(on, x.to(stats.dtype))
        if training:
            deviations, _, rstd = _centred(values, eps, on)
        else:
            deviations = values - _wide(stats[0], x) - _wide(stats[1], x)
            rstd = _wide(stats[2], x)
        x_hat = deviations * rstd
        if activation not in (None, "relu"):
            p = x_hat if weight is None else x_hat * _wide(weight, x)
            for more in (None if bias is None else _wide(bias, x), None if beside is None else _where(on, beside)):
                p = p if more is None else p + more
            upstream = let_through(upstream, p, activation)
            dy = upstream.to(dy.dtype)
        dgamma, dbeta = (upstream * x_hat).sum(_over(x)), upstream.sum(_over(x))
        scale = rstd if weight is None else rstd * _wide(weight, x)
        dx = upstream
        if training:
            m = max(x.numel() // max(x.shape[1], 1), 1) if count is None else count.clamp(min=1)
            dx = dx - _wide(dbeta, x) / m - x_hat * (_wide(dgamma, x) / m)
        return _where(on, dx * scale).to(x.dtype), dgamma, dbeta, dy if residual else None

    return backward_in_formulas


def _over(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _wide(v: Tensor, x: Tensor) -> Tensor:
    """A vector of channels, shaped to broadcast against x, in the accumulation dtype."""
    return v.to(accumulate_dtype(x)).view(-1, *(1,) * (x.dim() - 2))


def _where(on: Tensor | None, values: Tensor) -> Tensor:
    """`values`, and 0 where `on` is given and False, whatever they are there."""
    return values if on is None else torch.where(on, values, 0.0)


def _mean(values: Tensor, on: Tensor | None) -> Tensor:
    """A channel's mean, with axes kept; of the values that count, where the others are 0."""
    if on is None:
        return values.mean(_over(values), keepdim=True)
    return values.sum(_over(values), keepdim=True) / on.sum().clamp(min=1)


def _centred(values: Tensor, eps: float, on: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x - μ, σ² and rstd. The second mean removes what the rounding of the first left."""
    deviations = _where(on, values - _mean(values, on))
    deviations = _where(on, deviations - _mean(deviations, on))
    var = _mean(deviations.square(), on)
    return deviations, var, (var + eps).rsqrt()
