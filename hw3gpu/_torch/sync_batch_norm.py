"""Batch normalisation over the batches of several processes, in torch's autograd.

    forward   every process sends m, μ and M2 = Σ (x - μ)² of its batch, and merges what all have sent, in order of rank:
              m = Σ m_r,  μ = Σ m_r μ_r / m,  M2 = Σ M2_r + m_r (μ_r - μ)²                    (docs/derivations.md, section 2)
    backward  dβ and dγ stay each process's own; their sums over all processes, divided by m, are what dx needs

One collective each way, of 2 C + 1 and 2 C numbers in float64. The counts stay on the device, so that batches may differ in
size, or be empty, and nothing waits for the host. A process without samples takes part in both collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import dispatch, outputs
from .._core.arrays import Array
from .._core.protocols import BatchNormKernels
from . import operators
from .activation import kept, masked
from .autograd import accumulate_dtype, as_dtype, graph_is_needed, no_second_derivative
from .batch_norm import engine_of, fused_operands, gate_operands, mask_size
from .collectives import gathered, summed
from .positions import Positions


class Rest(NamedTuple):
    """The arguments without a gradient. group: the name of the processes' group. traced: the call goes through the operators.
    positions: those that count, or None where all do."""

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    momentum: float
    eps: float
    activation: str | None
    group: str
    traced: bool = False
    positions: Positions | None = None


def sync_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest) -> Tensor:
    """y = x̂ γ + β, or a(… + residual), x̂ by the batches of all processes in the group."""
    if operators.traced(x):
        return FORWARD(x, weight, bias, residual, *_arguments(rest))[0]
    if operators.transformed():
        raise RuntimeError("sync_batch_norm: torch.func transforms and forward mode do not reach the other processes")
    if graph_is_needed(x, weight, bias, residual):
        return _SyncBatchNorm.apply(x, weight, bias, residual, rest)
    return _run(x, weight, bias, residual, rest)[0]


# ---------------------------------------------------------------------------------------------- forward and backward
def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, and what the backward pass needs: stats (mean, what its rounding left, rstd), the number of values, the mask."""
    running_mean, running_var, momentum, eps, activation, group, traced, positions = rest
    new = torch.zeros if traced else torch.empty  # of a mask some bytes are left unwritten
    which = dispatch.backend(x)
    view, kernels = dispatch.kernel_view(which), dispatch.batch_norm(which)
    y, y_folded = outputs.output(x, 1, view)
    folded = outputs.fold(view(x), 1)
    stats, total, mean, var = _statistics(x, folded, view, kernels, eps, group, positions)
    if running_mean is not None and running_var is not None:
        _update(running_mean, mean, momentum, total)
        _update(running_var, var * (total / (total - 1).clamp(min=1)), momentum, total)
    mask, fused = fused_operands(folded, residual, activation, x.device, which, new)
    if positions is not None:
        fused["valid"] = view(positions.bits)
    if x.numel():
        stats_view = view(stats)
        scale, shift = dispatch.vector_view(weight, which), dispatch.vector_view(bias, which)
        kernels.normalize(folded, stats_view[:2], stats_view[2], scale, shift, y_folded, **fused)
    return y, stats, total, mask


def _statistics(
    x: Tensor, folded: Array, view: Callable[[Array], Array], kernels: BatchNormKernels, eps: float, group: str,
    positions: Positions | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the values of all processes: mean, what its rounding left, rstd; their number a channel; mean and var in float64."""
    C, acc = x.shape[1], accumulate_dtype(x)
    own = torch.zeros((4, C), dtype=acc, device=x.device)
    if x.numel():
        stats_view = view(own)
        of = {} if positions is None else {"valid": view(positions.bits), "count": view(positions.n)}
        kernels.statistics(folded, stats_view[:2], stats_view[3], stats_view[2], None, None, eps=eps, momentum=0.0, **of)
    count = x.numel() // max(C, 1) if positions is None else positions.n[0].double()
    sent = own.new_empty(2 * C + 1, dtype=torch.float64)
    sent[0] = count
    torch.add(own[0].double(), own[1], out=sent[1 : C + 1])
    torch.mul(own[3].double(), count, out=sent[C + 1 :])
    received = gathered(sent, group)
    counts, means, squares = received[:, :1], received[:, 1 : C + 1], received[:, C + 1 :]
    total = counts.sum(0)
    divisor = total.clamp(min=1)
    mean = (counts * means).sum(0) / divisor
    var = (squares + counts * (means - mean).square()).sum(0) / divisor
    stats = own[:3]
    stats[0] = mean
    stats[1] = mean - stats[0]
    stats[2] = (var + eps).rsqrt()
    return stats, total, mean, var


def _update(running: Tensor, value: Tensor, momentum: float, total: Tensor) -> None:
    """r <- (1 - momentum) r + momentum · value, unless all batches are empty."""
    new = (1 - momentum) * running.double() + momentum * value
    running.copy_(torch.where(total > 0, new, running))


def _run_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, stats: Tensor, total: Tensor,
    mask: Tensor | None, activation: str | None, residual: bool, dx_needed: bool, group: str, bits: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dx where it is needed, this process's dgamma and dbeta, and dresidual where `residual` asks for it; None without an
    activation where every position counts (bits None): it is dy."""
    which = dispatch.backend(x)
    view, kernels = dispatch.kernel_view(which), dispatch.batch_norm(which)
    stats_view, scale = view(stats), dispatch.vector_view(weight, which)
    dgamma, dbeta = (torch.zeros(x.shape[1], dtype=stats.dtype, device=x.device) for _ in range(2))
    folded, upstream = outputs.fold(view(x), 1), outputs.fold(view(dy), 1)
    fused = gate_operands(bias, beside, mask, activation, which)
    if bits is not None:
        fused["valid"] = view(bits)
    if x.numel():
        by = {**fused, "gamma": scale} if "activation" in fused else fused
        kernels.backward_reduce(upstream, folded, stats_view[:2], stats_view[2], view(dgamma), view(dbeta), **by)
    dresidual = None
    if residual and fused:
        dresidual, fused["dresidual"] = outputs.output(x, 1, view)
    elif not dx_needed:
        return None, dgamma, dbeta, dresidual
    means = torch.stack([dgamma, dbeta]).double()
    if dx_needed:
        means = summed(means, group) / total.clamp(min=1)
    means = view(means.to(stats.dtype))
    dx, dx_folded = outputs.output(x, 1, view)
    if x.numel():
        kernels.backward_apply(
            upstream, folded, stats_view[:2], stats_view[2], scale, means[0], means[1], 1, dx_folded, **fused
        )
    return dx if dx_needed else None, dgamma, dbeta, dresidual


# ---------------------------------------------------------------------------------------------- autograd
class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest
    ) -> Tensor | tuple[Tensor | None, ...]:
        y, stats, total, mask = (_below_autograd if rest.traced else _run)(x, weight, bias, residual, rest)
        told_by = kept(engine_of(x, rest.activation), rest.activation, bias, residual, y)
        bits = None if rest.positions is None else rest.positions.bits
        ctx.save_for_backward(x, weight, *told_by, stats, total, mask, bits)
        ctx.options, ctx.bias_dtype = (rest.activation, rest.group, rest.traced), None if bias is None else bias.dtype
        if not rest.traced:
            return y
        ctx.mark_non_differentiable(stats, total, mask)
        ctx.set_materialize_grads(False)
        return y, stats, total, mask

    @staticmethod
    @no_second_derivative("sync_batch_norm")
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        x, weight, bias, beside, stats, total, mask, bits = ctx.saved_tensors
        activation, group, traced = ctx.options
        x_needs, weight_needs, bias_needs, residual_needs, _ = ctx.needs_input_grad
        backward = BACKWARD if traced else _run_backward
        dx, dgamma, dbeta, dresidual = backward(
            dy, x, weight, bias, beside, stats, total, mask, activation, residual_needs, x_needs, group, bits
        )
        return (
            dx if x_needs else None,
            as_dtype(dgamma, weight.dtype) if weight_needs else None,
            as_dtype(dbeta, ctx.bias_dtype) if bias_needs else None,
            (dy if activation is None and bits is None else dresidual) if residual_needs else None,
            None,
        )


# ---------------------------------------------------------------------------------------------- operators
def _arguments(rest: Rest) -> tuple[Any, ...]:
    """What the operator takes of a call's `Rest`."""
    return *rest[:6], *(rest.positions or (None, None))


def _below_autograd(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest) -> Any:
    return operators.below_autograd(FORWARD, x, weight, bias, residual, *_arguments(rest))


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, rest: Rest
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    stats = x.new_empty((3, x.shape[1]), dtype=accumulate_dtype(x))
    mask = x.new_empty(mask_size(x), dtype=torch.uint8) if masked(engine_of(x, rest.activation), rest.activation) else None
    return operators.fake_output(x, 1), stats, x.new_empty(1, dtype=torch.float64), mask


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, beside: Tensor | None, stats: Tensor, total: Tensor,
    mask: Tensor | None, activation: str | None, residual: bool, dx_needed: bool, group: str, bits: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    dx, C = operators.fake_output(x, 1), x.shape[1]
    dresidual = torch.empty_like(dx) if residual and (activation is not None or bits is not None) else None
    return dx if dx_needed else None, stats.new_empty(C), stats.new_empty(C), dresidual


def _rest(
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, activation: str | None,
    group: str, bits: Tensor | None = None, count: Tensor | None = None,
) -> Rest:  # fmt: skip
    """The `Rest` of the operator's arguments."""
    positions = None if bits is None or count is None else Positions(bits, count)
    return Rest(running_mean, running_var, momentum, eps, activation, group, True, positions)


FORWARD = operators.define(
    "sync_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, str? activation, str group, Tensor? bits=None, Tensor? count=None) "
    "-> (Tensor y, Tensor stats, Tensor total, Tensor mask)",
    *(lambda *args, f=f: f(*args[:4], _rest(*args[4:])) for f in (_run, _fake, _SyncBatchNorm.apply)),
)
BACKWARD = operators.define(
    "sync_batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? beside, Tensor stats, Tensor total, "
    "Tensor mask, str? activation, bool residual, bool dx_needed, str group, Tensor? bits=None) "
    "-> (Tensor dx, Tensor dgamma, Tensor dbeta, Tensor dresidual)",
    _run_backward,
    _fake_backward,
)
