"""Batch normalisation of (N, C, S), each channel over its m = N·S values.

    forward   μ = Σ x / m,  σ² = Σ (x - μ)² / m,  rstd = 1/√(σ² + ε),  x̂ = (x - μ) rstd,  y = γ x̂ + β
    backward  dβ = Σ dy,  dγ = Σ dy x̂,  dx = γ rstd (dy - dβ/m - x̂ dγ/m)
    fused     y = relu(γ x̂ + β + residual), one bit a value kept of where it is above 0; dy is 0 where it is not
    valid     the positions that count, a bit each for all channels: m is then their number, y, dx and dresidual are 0 elsewhere
    running   r <- (1 - momentum) r + momentum · new,  the new variance being σ² m/(m - 1)
    source    docs/derivations.md, section 2
    bytes     channels that fit one tile: forward reads x, writes y; backward reads x and dy, writes dx.
              longer channels: x (and dy) are read twice, the second time from the end backwards, while the cache holds them.
              residual: read once; its gradient: written once; the mask: an eighth of a byte a value, written or read once;
              valid: an eighth of a byte a position, read as often as x.

    launches  one where a channel fits one tile. Else two: statistics (backward: sums), and what follows from them, where each
              program merges the few splits of its channels itself. Channels-last three, with a merge between: there many splits
              share the channels of a line.

μ is kept as two floats, mean[0] + mean[1]: a mean of 1e4 with a standard deviation of 1 then costs no digits of x - μ. A
program sums differences from the mean of its first tile, each lane for itself; the lanes are merged once, at the end
(`_batch_norm.statistics`), and splits by Chan's formulas. Squares are scaled by α², a power of two near 1/m, so that values
near 1e18 do not overflow. Tiles are (samples, channels, lanes), or all rows of one channel end to end (`_batch_norm.tiles`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ._batch_norm.activation import ACT
from ._batch_norm.backward import _backward_apply_kernel, _backward_kernel, _backward_merge_kernel, _backward_reduce_kernel
from ._batch_norm.forward import _forward_kernel, _merge_kernel, _normalize_kernel, _statistics_kernel
from ._rows import ACC, access_mode, operand_mode, warps
from .channel_plan import plan_batch_norm, plan_channels
from .device import device_of
from .launch import launch, numbers, scratch
from .plan import ALIGNED, SHIFTED, cdiv, float_and_bits, next_power_of_2


def _is_one_run(x) -> bool:
    """True where the samples and positions of a channel of (N, C, S) have one stride: channels-last, N = 1, S = 1."""
    N, _, S = x.shape
    return N == 1 or S == 1 or x.stride(0) == S * x.stride(2)


def _as_one_run(x) -> torch.Tensor:
    """(N, C, S) as a view (1, C, N·S); `_is_one_run` holds."""
    N, C, S = x.shape
    if N == 1:
        return x
    if S == 1:  # the stride of the one sample is a whole sample's: of 1, addresses would not be seen to lie on 16 bytes
        return x.as_strided((1, C, N), (N * x.stride(0), x.stride(1), x.stride(0)))
    return x.permute(1, 0, 2).reshape(1, C, N * S)


def _flatten(x, *others, mask=None) -> tuple[torch.Tensor | None, ...]:
    """Views (1, C, N·S) of the tensors where every one allows it, else the tensors. With a mask x alone decides: its layout is
    the mask's."""
    if _is_one_run(x) if mask is not None else all(_is_one_run(t) for t in (x, *others) if t is not None):
        return tuple(None if t is None else _as_one_run(t) for t in (x, *others))
    return (x, *others)


def _access(x) -> tuple[int, int]:
    """(MODE, bytes of an access) of x: 8 bytes where all rows begin and end on 8 but not on 16, as 14 x 14 halves do."""
    mode = access_mode(2, x)
    if mode == SHIFTED and access_mode(2, x, width=8) == ALIGNED:
        return ALIGNED, 8
    return mode, 16


def _follower(x, t) -> int:
    """MODE of an operand `t` of a kernel whose lanes follow x."""
    return operand_mode(2, x, t, _access(x)[1])


def _plan(x, operands, extra=(), alike=None, sums=False, valid=None, act=0) -> tuple[Any, tuple[int, ...], dict[str, Any]]:
    """(plan, sizes and constants as the kernels take them) for a pass over `x`; operands: how many tensors it reads.

    extra: a residual and a mask, or None. alike: the other tensors, where a program may own whole channels; else None. valid:
    the positions that count, or None; no tile is FLAT with them, nor with an activation (ACT).
    """
    N, C, S = x.shape
    mode, width = _access(x)
    busy = act > 0 or any(t is not None for t in extra)
    far = (N - 1) * x.stride(0) + (S - 1) * x.stride(2) >= 1 << 30
    flat = not (alike is None or busy or far or valid is not None) and all(
        t.stride() == x.stride() and _follower(x, t) == mode for t in alike
    )
    plan = plan_batch_norm(N, C, S, x.element_size(), mode, channels_last=x.stride(1) == 1 and C > 1 and x.stride(2) != 1,
                           operands=operands, whole=alike is not None, may_be_flat=flat, busy=busy, sums=sums,
                           masked=valid is not None, active=act > 0, device=device_of(x))  # fmt: skip
    constants = {
        "BLOCK_C": plan.BLOCK_C, "BLOCK_N": plan.BLOCK_N, "LANES": plan.LANES, "ROWS": plan.ROWS, "FLAT": plan.flat,
        "MODE": mode, "GROUP": width // x.element_size(), "ACC": ACC[x.dtype], "num_warps": warps(plan.num_warps),
    }  # fmt: skip
    return plan, (N, C, S, plan.lane_blocks, plan.row_lanes, plan.tiles), constants


def _strides_and_mode(name, x, t) -> tuple[tuple[int, ...], dict[str, int]]:
    """(strides, {name: MODE}) of an operand t of such a kernel; t may be None."""
    return ((0, 0, 0), {name: 0}) if t is None else (t.stride(), {name: _follower(x, t)})


class _Gate(NamedTuple):
    """What tells how much of dy an activation lets through: γ, β and the residual give the p that went into it."""

    activation: str | None = None
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @property
    def act(self) -> int:
        """ACT of the kernels; 0 where there is no gate."""
        return ACT[self.activation]

    @property
    def more(self) -> bool:
        """Whether p needs another tensor than x."""
        return self.act > 0 and self.residual is not None

    def operands(self, x, residual) -> tuple[tuple[Any, ...], dict[str, int]]:
        """Strides and constants of a kernel of the backward pass; `residual` as `_flatten` has it."""
        constants = {"ACT": self.act, "RESIDUAL_MODE": 0}
        if residual is None:
            return (None, None, None), constants
        return residual.stride(), {**constants, "RESIDUAL_MODE": _follower(x, residual)}


def _mask_strides(x) -> tuple[int, int, int]:
    """Strides of the mask of x (N, C, S): each row's bytes side by side, or the channels' where x is channels-last."""
    _, C, S = x.shape
    row = cdiv(S, 8) + 2
    return (row * C, 1, C) if x.stride(1) == 1 and C > 1 else (C * row, row, 1)


def mask_size(x) -> int:
    """Bytes of the mask of x (N, C, …), a function of its shape: an eighth of a byte a value, and up to three bytes a row."""
    N, C, *positions = x.shape
    S = math.prod(positions)
    return C * (cdiv(N, 8) + 2) if S == 1 else N * C * (cdiv(S, 8) + 2)


def _moment_scalars(x, count, eps, momentum) -> tuple[float, tuple[Any, ...]]:
    """(α, m, ε, momentum) as the kernels take them; α² is a power of four near 1/m. Only the momentum changes call by call.

    count: m as a tensor (1,) where some values do not count, else None.
    """
    m = x.shape[0] * x.shape[2]
    alpha = 2.0 ** -(max(m - 1, 1).bit_length() // 2)
    return alpha, (m if count is None else count, *float_and_bits(eps), *numbers(momentum))


def _partial_statistics(x, mean, alpha, valid) -> tuple[torch.Tensor, int]:
    """Launches the statistics of each split: (partial (4, splits, C), number of splits)."""
    (x,) = _flatten(x)
    plan, sizes, constants = _plan(x, 1, sums=True, valid=valid)
    partial = scratch(mean.dtype, x.device, 4, plan.splits, x.shape[1])
    launch(
        _statistics_kernel, plan.channel_blocks * plan.splits,
        x, valid, partial, *sizes, *plan.split, alpha, *x.stride(),
        plan=plan, reads=("x", "valid"), HALVINGS=plan.halvings, STAGES=plan.stages, **constants,
    )  # fmt: skip
    return partial, plan.splits


def statistics(x, mean, var, rstd, running_mean, running_var, *, eps: float, momentum: float, valid=None, count=None) -> None:
    """mean (2, C), var and rstd (C,) of x (N, C, S); running_mean and running_var, where given, are updated.

    valid: the bits of the positions that count, and count: their number (1,); where it is 0 the running statistics stay.
    """
    C = x.shape[1]
    alpha, scalars = _moment_scalars(x, count, eps, momentum)
    partial, splits = _partial_statistics(x, mean, alpha, valid)
    block, programs = plan_channels(C, splits)
    launch(
        _merge_kernel, programs,
        partial, mean, var, rstd, running_mean, running_var, C, splits, alpha, *scalars,
        SPLITS=next_power_of_2(splits), BLOCK_C=block, ACC=ACC[x.dtype],
    )  # fmt: skip


def normalize(x, mean, rstd, gamma, beta, y, *, residual=None, mask=None, valid=None, activation=None) -> None:
    """y = (x - mean) (rstd γ) + β + residual. Where a mask is given: y = relu(…), and the mask says where it is above 0. Any
    other activation: y = a(…). Where valid is given: 0 at positions that do not count."""
    if x.numel():
        one_split = None, 1, None, None, None, 1.0, (0, 0.0, 0, 0.0, 0)
        _normalize(x, mean, rstd, gamma, beta, y, residual, mask, valid, activation, *one_split)


def _normalize(
    x, mean, rstd, gamma, beta, y, residual, mask, valid, activation, partial, summed, var, running_mean, running_var, alpha,
    scalars,
) -> None:  # fmt: skip
    """`normalize`. Where `partial` is given, its `summed` splits are merged first, and mean, var and rstd are written too."""
    x, y, residual = _flatten(x, y, residual, mask=mask)
    plan, sizes, constants = _plan(x, 1, (residual, mask), valid=valid, act=ACT[activation])
    stride_r, mode_r = _strides_and_mode("RESIDUAL_MODE", x, residual)
    launch(
        _normalize_kernel, plan.channel_blocks * plan.splits,
        x, mean, rstd, gamma, beta, residual, y, mask, valid, partial, var, running_mean, running_var,
        *sizes, *plan.split, summed, alpha, *scalars,
        *x.stride(), *stride_r, *y.stride(), *_mask_strides(x),
        plan=plan, reads=("x", "residual", "valid"), writes=("y", "mask"),
        SPLITS=next_power_of_2(summed), STAGES=plan.stages, Y_MODE=_follower(x, y), ACT=ACT[activation], **mode_r,
        **constants,
    )  # fmt: skip


def forward(
    x, gamma, beta, y, mean, var, rstd, running_mean, running_var, *, eps: float, momentum: float, residual=None, mask=None,
    valid=None, count=None, activation=None,
) -> None:  # fmt: skip
    """`statistics`, then `normalize`: in one launch where a channel is one tile, in two where it has few splits."""
    given = x, y, residual
    alpha, scalars = _moment_scalars(x, count, eps, momentum)
    x, y, residual = _flatten(x, y, residual, mask=mask)
    plan, sizes, constants = _plan(x, 1, (residual, mask), alike=(y,), valid=valid, act=ACT[activation])
    if plan.tiles == 1:
        stride_r, mode_r = _strides_and_mode("RESIDUAL_MODE", x, residual)
        launch(
            _forward_kernel, plan.channel_blocks,
            x, gamma, beta, residual, y, mask, valid, mean, var, rstd, running_mean, running_var, *sizes, alpha, *scalars,
            *x.stride(), *stride_r, *y.stride(), *_mask_strides(x),
            plan=plan, reads=("x", "residual", "valid"), writes=("y", "mask"),
            HALVINGS=plan.halvings, Y_MODE=_follower(x, y), ACT=ACT[activation], **mode_r, **constants,
        )  # fmt: skip
        return
    x, y, residual = given
    if plan.BLOCK_C > 1:
        statistics(x, mean, var, rstd, running_mean, running_var, eps=eps, momentum=momentum, valid=valid, count=count)
        normalize(x, mean, rstd, gamma, beta, y, residual=residual, mask=mask, valid=valid, activation=activation)
        return
    partial, splits = _partial_statistics(x, mean, alpha, valid)
    _normalize(
        x, mean, rstd, gamma, beta, y, residual, mask, valid, activation, partial, splits, var, running_mean, running_var,
        alpha, scalars,
    )  # fmt: skip


def _partial_sums(dy, x, mean, rstd, mask, valid, gate) -> tuple[torch.Tensor, int]:
    """Launches the two sums of each split: (partial (4, splits, C), number of splits)."""
    x, dy, residual = _flatten(x, dy, gate.residual, mask=mask)
    plan, sizes, constants = _plan(x, 2 + gate.more, (mask,), sums=True, valid=valid, act=gate.act)
    strides, of_gate = gate.operands(x, residual)
    needed = (rstd, gate.gamma, gate.beta) if gate.act else (None, None, None)
    partial = scratch(mean.dtype, x.device, 4, plan.splits, x.shape[1])
    launch(
        _backward_reduce_kernel, plan.channel_blocks * plan.splits,
        dy, x, mask, valid, mean, *needed, residual, partial, *sizes, *plan.split,
        *dy.stride(), *x.stride(), *_mask_strides(x), *strides, plan=plan, reads=("dy", "x", "mask", "valid", "residual"),
        HALVINGS=plan.halvings, STAGES=plan.stages,
        DY_MODE=_follower(x, dy), **of_gate, **constants,
    )  # fmt: skip
    return partial, plan.splits


def backward_reduce(
    dy, x, mean, rstd, dgamma, dbeta, *, mask=None, valid=None, activation=None, gamma=None, beta=None, residual=None
) -> None:
    """dγ = Σ dy x̂ and dβ = Σ dy, (C,) each; dy counts as 0 where a mask is given and not set, and so with valid; with an
    activation as dy a'(p), p = γ x̂ + β + residual."""
    if not x.numel():
        dgamma.zero_()
        dbeta.zero_()
        return
    C = x.shape[1]
    partial, splits = _partial_sums(dy, x, mean, rstd, mask, valid, _Gate(activation, gamma, beta, residual))
    block, programs = plan_channels(C, splits)
    launch(
        _backward_merge_kernel, programs,
        partial, rstd, dgamma, dbeta, C, splits, BLOCK_C=block, SPLITS=next_power_of_2(splits)
    )  # fmt: skip


def backward_apply(
    dy, x, mean, rstd, gamma, dgamma, dbeta, count: int, dx, *, mask=None, dresidual=None, valid=None, activation=None,
    beta=None, residual=None,
) -> None:  # fmt: skip
    """dx = γ rstd (dy - dβ/count - x̂ dγ/count); dresidual, where given, is dy as `backward_reduce` counts it. Where valid is
    given, both are 0 at positions that do not count."""
    gate = _Gate(activation, gamma, beta, residual)
    _apply(dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, mask, dresidual, valid, gate, trained=True)


def _apply(
    dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, mask, dresidual, valid, gate, trained, partial=None, summed=1
) -> None:  # fmt: skip
    """dx. Where `partial` is given, its `summed` splits are merged first, and dγ and dβ are written too."""
    if not x.numel():
        return
    x, dy, dx, dresidual, residual = _flatten(x, dy, dx, dresidual, gate.residual, mask=mask)
    x_counts = trained or gate.act > 0
    plan, sizes, constants = _plan(x, 1 + x_counts + gate.more, (mask, dresidual), valid=valid, act=gate.act)
    stride_r, mode_r = _strides_and_mode("DRESIDUAL_MODE", x, dresidual)
    strides, of_gate = gate.operands(x, residual)
    launch(
        _backward_apply_kernel, plan.channel_blocks * plan.splits,
        dy, x, mask, valid, mean, rstd, gamma, gate.beta, residual, dgamma, dbeta, dx, dresidual, partial,
        *sizes, *plan.split, summed, count,
        *dy.stride(), *x.stride(), *_mask_strides(x), *dx.stride(), *stride_r, *strides,
        plan=plan, reads=("dy", "x", "mask", "valid", "residual") if x_counts else ("dy", "mask", "valid"),
        writes=("dx", "dresidual"),
        SPLITS=next_power_of_2(summed), STAGES=plan.stages, TRAINED=trained,
        DY_MODE=_follower(x, dy), DX_MODE=_follower(x, dx), **mode_r, **of_gate, **constants,
    )  # fmt: skip


def backward(
    dy, x, mean, rstd, gamma, dx, dgamma, dbeta, *, mask=None, dresidual=None, valid=None, count=None, activation=None,
    beta=None, residual=None,
) -> None:  # fmt: skip
    """`backward_reduce`, then `backward_apply`: in one launch where a channel is one tile, in two where it has few splits."""
    given = dy, x, dx, dresidual, residual
    m, gate = x.shape[0] * x.shape[2] if count is None else count, _Gate(activation, gamma, beta, residual)
    x, dy, dx, dresidual, residual = _flatten(x, dy, dx, dresidual, residual, mask=mask)
    plan, sizes, constants = _plan(x, 2 + gate.more, (mask, dresidual), alike=(dy, dx), valid=valid, act=gate.act)
    if plan.tiles == 1 and x.numel():
        stride_r, mode_r = _strides_and_mode("DRESIDUAL_MODE", x, dresidual)
        strides, of_gate = gate.operands(x, residual)
        launch(
            _backward_kernel, plan.channel_blocks,
            dy, x, mask, valid, mean, rstd, gamma, beta, residual, dx, dresidual, dgamma, dbeta, *sizes, m,
            *dy.stride(), *x.stride(), *_mask_strides(x), *dx.stride(), *stride_r, *strides,
            plan=plan, reads=("dy", "x", "mask", "valid", "residual"), writes=("dx", "dresidual"), HALVINGS=plan.halvings,
            DY_MODE=_follower(x, dy), DX_MODE=_follower(x, dx), **mode_r, **of_gate, **constants,
        )  # fmt: skip
        return
    dy, x, dx, dresidual, residual = given
    if plan.BLOCK_C > 1 or not x.numel():
        by = {"mask": mask, "valid": valid, "activation": activation, "beta": beta, "residual": residual}
        backward_reduce(dy, x, mean, rstd, dgamma, dbeta, gamma=gamma, **by)
        backward_apply(dy, x, mean, rstd, gamma, dgamma, dbeta, m, dx, dresidual=dresidual, **by)
        return
    partial, splits = _partial_sums(dy, x, mean, rstd, mask, valid, gate)
    _apply(dy, x, mean, rstd, gamma, dgamma, dbeta, m, dx, mask, dresidual, valid, gate, True, partial, splits)


def inference_backward(
    dy, x, mean, rstd, gamma, dx, dgamma, dbeta, *, mask=None, dresidual=None, valid=None, activation=None, beta=None,
    residual=None,
) -> None:  # fmt: skip
    """Backward where mean and rstd are constants: dx = γ rstd dy, and the sums of `backward_reduce`."""
    gate = _Gate(activation, gamma, beta, residual)
    by = {"mask": mask, "valid": valid, "activation": activation, "beta": beta, "residual": residual}
    backward_reduce(dy, x, mean, rstd, dgamma, dbeta, gamma=gamma, **by)
    _apply(dy, x, mean, rstd, gamma, None, None, 1, dx, mask, dresidual, valid, gate, trained=False)
