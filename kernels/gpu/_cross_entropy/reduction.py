"""Σ loss and Σ weight over the rows, and the mean: the same bits in every run, whichever program computes them.

Every program of a launch counts itself when it ends. The last one adds up what all programs have written, in the order of the
rows.
"""

import triton
import triton.language as tl

from .._rows import quotient
from ..row_plan import SUMMED
from .tile import hard_target

LANES = tl.constexpr(SUMMED)


@triton.jit
def is_last(arrived_ptr) -> tl.tensor:
    """True in the program that calls this last. It then sees the stores of the others, by loads that bypass the L1 cache (.cg).

    arrived_ptr: an int32, 0 before the launch; the last program sets it to 0 again (`leave`).
    """
    tl.debug_barrier()
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1


@triton.jit
def leave(arrived_ptr, last) -> None:
    """The last program sets the counter to 0 for the next launch."""
    tl.store(arrived_ptr, 0, mask=last)


@triton.jit
def in_pairs(x) -> tl.tensor:
    """The sum of a vector of 2^k numbers, neighbours first: the same bits for any number of threads."""
    for _ in tl.static_range(30):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def finish(total, weight, total_ptr, weight_ptr, if_none, MEAN: tl.constexpr, ACC: tl.constexpr) -> None:
    """Writes Σ loss or (MEAN) the mean, and, where weight_ptr is given, the denominator: Σ weight, `if_none` if that is 0."""
    weight = tl.where(weight == 0.0, if_none, weight).to(ACC)
    if weight_ptr is not None:
        tl.store(weight_ptr, weight)
    if MEAN:
        total = quotient(total, weight, ACC)
    if total_ptr is not None:
        tl.store(total_ptr, total)


@triton.jit(noinline=True)  # one program of many calls it: the others need not have its registers
def reduce_rows(
    loss_ptr, row_weight_ptr, denominator_ptr, total_ptr, weight_ptr, rows, if_none, MEAN: tl.constexpr, ACC: tl.constexpr
) -> None:  # fmt: skip
    """Adds up the losses of all rows, in the last program of the launch that wrote them.

    The denominator of the mean is Σ row_weight where row_weight_ptr is given, else what denominator_ptr holds, else the number
    of rows.
    """
    total, weights = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
    for first in range(0, rows, LANES):
        row = first + tl.arange(0, LANES)
        total += tl.load(loss_ptr + row, mask=row < rows, other=0.0, cache_modifier=".cg")
        if row_weight_ptr is not None:
            weights += tl.load(row_weight_ptr + row, mask=row < rows, other=0.0, cache_modifier=".cg")
    if row_weight_ptr is not None:
        weight = in_pairs(weights)
    elif denominator_ptr is not None:
        weight = tl.load(denominator_ptr).to(ACC)
    else:
        weight = tl.cast(rows, ACC)
    finish(tl.sum(total, axis=0), weight, total_ptr, weight_ptr, if_none, MEAN, ACC)


@triton.jit(do_not_specialize=["S", "rows", "per_program", "ignore_index"])
def _reduce_kernel(
    loss_ptr, target_ptr, weight_ptr, partial_ptr, arrived_ptr, total_ptr, denominator_ptr,
    V, S, rows, per_program, ignore_index, if_none, stride_tn, stride_ts,
    PROGRAMS: tl.constexpr, SOFT: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """Σ loss, or the mean, and Σ w_target. Grid: up to PROGRAMS programs, `per_program` rows each; the last one to end adds up
    what all have found. Reads a loss and a target a row; writes two numbers."""
    pid = tl.program_id(0).to(tl.int64)
    total, weights = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
    for i in range(0, per_program, LANES):
        row = pid * per_program + i + tl.arange(0, LANES)
        live = row < rows
        if loss_ptr is not None:
            total += tl.load(loss_ptr + row, mask=live, other=0.0)
        if SOFT:
            weights += tl.where(live, 1.0, 0.0)
        else:
            at = (row // S) * stride_tn + (row % S) * stride_ts
            _, _, _, w_t = hard_target(target_ptr, at, weight_ptr, live, V, ignore_index, ACC)
            weights += w_t
    sum_of_loss, sum_of_weights = tl.sum(total, axis=0), in_pairs(weights)
    if PROGRAMS == 1:
        finish(sum_of_loss, sum_of_weights, total_ptr, denominator_ptr, if_none, MEAN, ACC)
    else:
        programs = tl.num_programs(0)
        tl.store(partial_ptr + pid, sum_of_loss)
        tl.store(partial_ptr + (programs + pid), sum_of_weights)
        last = is_last(arrived_ptr)
        if last:
            of = tl.arange(0, PROGRAMS)
            totals = tl.load(partial_ptr + of, mask=of < programs, other=0.0, cache_modifier=".cg")
            of_programs = tl.load(partial_ptr + (programs + of), mask=of < programs, other=0.0, cache_modifier=".cg")
            finish(tl.sum(totals, axis=0), tl.sum(of_programs, axis=0), total_ptr, denominator_ptr, if_none, MEAN, ACC)
        leave(arrived_ptr, last)
