"""Softmax cross entropy along the middle axis of (N, V, S): loss, gradient, or both at once.

    q_c   = w_c ((1 - ε) y_c + ε/V),   W = Σ_c q_c            y one-hot for hard targets; w class weights, ε smoothing
    lse   = m + log Σ_c exp(z_c - m),                         m = max_c z_c
    loss  = W (lse - m) - Σ_c q_c (z_c - m) + ζ lse²,         ζ the z-loss's factor, 0·∞ = 0
    dz_c  = g ((W + 2 ζ lse) p_c - q_c),   p_c = exp(z_c - m) / Σ exp(z - m),   g = upstream / denominator
    softcap τ: z stands for τ tanh(z/τ) everywhere, and dz_c gains the factor 1 - (z_c/τ)²
    logit_scale κ: z stands for κ z everywhere, before the cap, and dz_c gains the factor κ
    source: docs/derivations.md, section 3
    bytes   forward: read z.  backward: read z, write dz.  forward_backward: read z, write dz; of a row that does not fit one
            program, the part beyond KEEP lanes is read twice, the second time from the far end back.  Soft targets: y is
            read wherever z is.

`forward` saves three numbers a row: m, Σ exp(z - m) - 1 and W. An lse rounded near 1e4 would lose the digits of p, and a sum
near 1 those of 1 - p. The 1 of a one-hot y is subtracted in float32, and the result is rounded once. A row whose target is
`ignore_index` reads no logits and gives zeros; one whose target is out of range reads none, gives NaN and writes its number to
`invalid`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from . import _tile
from ._cross_entropy.backward import _backward_kernel
from ._cross_entropy.forward import _forward_kernel
from ._cross_entropy.reduction import _reduce_kernel
from ._rows import ACC, access_mode, operand_mode, plan_constants, rows_along_s, warps
from .device import device_of
from .launch import counter, launch, scratch
from .plan import cdiv, float_and_bits
from .row_plan import plan_columns, plan_reduce, plan_rows


class _Options(NamedTuple):
    """What decides the loss of a row, apart from its target."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float


def _call(z, target, dz, options) -> tuple[tuple[int, ...], Any, dict[str, Any]]:
    """(strides, ignore_index and options, constants) as the kernels take them."""
    soft, (ignore_index, smoothing, z_loss, cap, scale) = target.ndim == z.ndim, options
    constants = {
        "SOFT": soft, "DENSE": soft or smoothing != 0.0, "CAPPED": cap is not None, "SCALED": scale != 1.0,
        "Z_LOSS": z_loss != 0.0, "MODE": access_mode(1, z),
        "TARGET_MODE": operand_mode(1, z, target) if soft else _tile.STRIDED.value, "DZ_MODE": operand_mode(1, z, dz),
        "GROUP": 16 // z.element_size(), "ACC": ACC[z.dtype],
    }  # fmt: skip
    numbers = smoothing, z_loss, 1.0 if cap is None else cap, scale
    fixed = ignore_index, *(half for number in numbers for half in float_and_bits(number))
    stride_t = target.stride() if soft else (target.stride(0), 0, target.stride(1))
    return (*z.stride(), *stride_t, *dz.stride()), fixed, constants


def _launch_forward(
    z, target, weight, loss, stats, dz, invalid, denominator, reduced, options, row_weights=None, upstream=None
) -> None:
    """Launches the forward kernel, with the gradient where dz is given.

    reduced: (total, denominator to write or None, whether the mean is asked for, what replaces a denominator of 0), or None
    where losses are not added up.
    """
    if not z.numel():
        _reduce_apart(loss, target, weight, reduced, options)
        return
    rows_apart = reduced is not None and plan_reduce(loss.numel()).programs > 1
    total, sum_of_weights, mean, if_none = reduced or (None, None, False, 0.0)
    if rows_apart:
        total = sum_of_weights = None
    z, given, dz = rows_along_s(z), rows_along_s(target), None if dz is None else rows_along_s(dz)
    N, V, S = z.shape
    strides, fixed, constants = _call(z, given, z if dz is None else dz, options)
    unit_s = z.stride(2) == 1 and z.stride(1) != 1
    more = stats is not None and len(stats) > 3
    # with a long row that stays in registers, the search for its arg max takes more of them
    with_stats = more and (constants["DENSE"] or (dz is not None and V > 16384))
    extra_per_lane = constants["DENSE"] + (constants["CAPPED"] or with_stats)
    rare = more or constants["SOFT"] or weight is not None or constants["Z_LOSS"]
    plan = plan_rows(
        V, S, z.element_size(), constants["MODE"], unit_s, extra_per_lane, constants["DENSE"], tensors=1 + constants["SOFT"],
        row_reused=dz is not None, rows_ahead=0 if rare else 1, device=device_of(z),
    )  # fmt: skip
    tiles = cdiv(S, plan.BLOCK_R)
    weighed = sum_of_weights is not None and not constants["SOFT"]
    if weighed and row_weights is None:
        row_weights = scratch(loss.dtype, z.device, N * S)
    launch(
        _forward_kernel, plan.grid(N * tiles),
        z, given, weight, loss, stats, upstream, denominator, dz, invalid,
        total, sum_of_weights, row_weights if weighed else None,
        None if total is None else counter(z.device),
        V, S, N * S, tiles, *fixed, if_none, *strides,
        plan=plan, reads=("z", "target"), writes=("loss", "stats", "dz"), again=0.0 if dz is None else plan.again(V),
        MORE=more, MEAN=mean and (total is not None or dz is not None), **constants, **plan_constants(plan),
    )  # fmt: skip
    if rows_apart:
        _reduce_apart(loss, target, weight, reduced, options)


def _reduce_apart(loss, target, weight, reduced, options) -> None:
    """The sum of the losses in a launch of its own: of many rows, or of none."""
    if reduced is not None:
        total, sum_of_weights, mean, if_none = reduced
        _reduce(loss, target, weight, total, sum_of_weights, options.ignore_index, mean, if_none)


def forward(
    z, target, weight, loss, stats, invalid, *,
    total=None, denominator=None, row_weights=None, mean: bool = False, zero_if_ignored: bool = False,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:  # fmt: skip
    """Loss per row (N, S), and stats (3, N, S) or (6, N, S), contiguous: m, Σ exp(z - m) - 1, W; z_target - m, entropy, argmax.

    Where `total` is given, also Σ loss, or the mean and its `denominator`. row_weights: memory for one number a row.
    """
    options = _Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    reduced = None if total is None else (total, denominator, mean, _if_none(zero_if_ignored))
    _launch_forward(z, target, weight, loss, stats, None, invalid, None, reduced, options, row_weights)


def forward_backward(
    z, target, weight, loss, dz, invalid, *, stats=None, upstream=None, denominator=None,
    total=None, mean: bool = False, zero_if_ignored: bool = False,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:  # fmt: skip
    """Loss per row, stats where given, and dz for an upstream gradient of 1, or (N, S), contiguous, divided by `denominator`.

    Where `total` is given, also Σ loss or the mean. Hard targets: divided by `denominator`, which `count` has computed before.
    Soft targets: divided by the number of rows, which is written to `denominator`.
    """
    options = _Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    found = total is not None and mean and target.ndim == z.ndim
    reduced = None if total is None else (total, denominator if found else None, mean, _if_none(zero_if_ignored))
    over = None if found else denominator
    _launch_forward(z, target, weight, loss, stats, dz, invalid, over, reduced, options, upstream=upstream)


def _if_none(zero_if_ignored) -> float:
    """What replaces a denominator of 0, so that the mean over no rows is 0/0 = NaN, or 0."""
    return math.inf if zero_if_ignored else 0.0


def backward(
    z, target, weight, stats, upstream, denominator, dz, *, unless_one: bool = False,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:  # fmt: skip
    """dz from what `forward` saved, for an upstream gradient a row, divided by `denominator` where given.

    unless_one: rows with an upstream of 1 are not computed, since dz already holds their gradient.
    """
    if not z.numel():
        return
    options = _Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    z, target, upstream, dz = (rows_along_s(x) for x in (z, target, upstream, dz))
    N, V, S = z.shape
    strides, fixed, constants = _call(z, target, dz, options)
    plan = plan_columns(
        V, S, z.element_size(), constants["MODE"], unit_s=z.stride(2) == 1 and z.stride(1) != 1,
        light=not (constants["DENSE"] or constants["CAPPED"] or unless_one), device=device_of(z),
    )  # fmt: skip
    tiles, columns = cdiv(S, plan.BLOCK_R), plan.columns
    programs, per_program = N * tiles * columns, 0
    if unless_one:
        per_program = cdiv(N * tiles, device_of(z).multiprocessors * 4)
        programs = cdiv(N * tiles, per_program)
    launch(
        _backward_kernel, programs,
        z, target, weight, stats, upstream, denominator, dz,
        V, S, N * S, tiles, columns, per_program, *fixed, *strides, *upstream.stride(),
        plan=plan, reads=("z", "target", "stats", "upstream"), writes=("dz",),
        BLOCK_R=plan.BLOCK_R, BLOCK_V=plan.BLOCK_V, UNLESS_ONE=unless_one, **constants, num_warps=warps(plan.num_warps),
    )  # fmt: skip


def count(target, weight, denominator, *, ignore_index: int, zero_if_ignored: bool = False) -> None:
    """denominator = Σ w_target over the rows that count (hard targets), the number of rows (soft)."""
    _reduce(None, target, weight, None, denominator, ignore_index, False, _if_none(zero_if_ignored))


def reduce(loss, target, weight, total, denominator, *, ignore_index: int) -> None:
    """total = Σ loss; denominator as of `count`."""
    _reduce(loss, target, weight, total, denominator, ignore_index, False, 0.0)


def _reduce(loss, target, weight, total, denominator, ignore_index, mean, if_none) -> None:
    N, S = target.shape[0], target.shape[-1]
    plan = plan_reduce(N * S)
    like = denominator if total is None else total
    apart = plan.programs > 1
    launch(
        _reduce_kernel, plan.programs,
        loss, target, weight, scratch(like.dtype, like.device, 2, plan.programs) if apart else None,
        counter(like.device) if apart else None, total, denominator,
        1 << 62, max(S, 1), N * S, plan.per_program, ignore_index, if_none, target.stride(0), target.stride(-1),
        plan=plan, reads=("loss",) if target.ndim == 3 else ("loss", "target"),
        PROGRAMS=plan.MERGE, SOFT=target.ndim == 3, MEAN=mean, ACC=ACC[like.dtype],
        num_warps=max(4, like.element_size()),  # with 4 for float64 it spills on sm_90
    )  # fmt: skip
