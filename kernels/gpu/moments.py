"""Mean and scatter of points (B, n, m), one pass over them, added to those of points seen before.

    μ = 1/n Σ x_i,    scatter = Σ (x_i - μ)(x_i - μ)ᵀ                            docs/derivations.md, sections 2.5 and 4.5
    update   m ≤ BLOCK_M: read x once, read and write the state. Wider points: each tile of the scatter reads its variables of
             x, from the cache where a run of points stays there. Several runs: their scatters too, together no more than x
    merge    the states of two sets of points
    finish   mean, covariance = scatter / divisor

The state of `count` points, in float64: shift (B, m), a mean of some of them; total (2, B, m), Σ (x - shift); scatter (2, B,
m, m), its lower triangle. Index 1 holds what the additions to index 0 have rounded off, so that neither their number nor the
size of μ costs digits. All of a variable is multiplied by unit (B, m), a power of two with which no square leaves float64: of
float64 points STEP until a value reaches 1 / LARGE, 1 until one reaches LARGE, and 1 / STEP from there on. A program owns a
run of points and a tile of the scatter. It takes BLOCK_N points at a time, finds their mean twice (the second time what the
rounding of the first left), and multiplies GROUP deviations at a time. (`tl.dot` of float64 does not compile for sm_100.)
Blocks are merged in order (Chan, Golub and LeVeque).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import device_of
from .launch import launch
from .plan import cdiv, plan_moments

MERGE_WARPS = 8  # of 4 the merge of 16 variables needs more registers than there are
# Squares of numbers between TINY = 1 / LARGE and LARGE can be summed; STEP takes smaller ones there, 1 / STEP larger ones.
TINY, LARGE, STEP = tl.constexpr(2.0**-480), tl.constexpr(2.0**480), tl.constexpr(2.0**544)


@triton.jit
def _two_sum(a, b) -> tuple[tl.tensor, tl.tensor]:
    """a + b in two parts: the rounded sum, and what the rounding left (Knuth)."""
    high = a + b
    part = high - a
    return high, (a - (high - part)) + (b - part)


@triton.jit
def _finite(x) -> tl.tensor:
    return tl.abs(x) < float("inf")


@triton.jit
def _with_low(total, low) -> tl.tensor:
    """total + low: a sum and what its roundings have left. An infinite sum has left NaN, and stays as it is."""
    return tl.where(_finite(low), total + low, total)


@triton.jit
def _block_mean(x_columns, p, stop, stride_xn, inside, count, unit) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The mean of a block of `count` points p < stop (BLOCK_N, BLOCK_M) as (shift, rest, unit): shift + rest, in units of
    1/unit.

    It is found twice: rest is the mean of what the first mean leaves.
    """
    live = (p < stop)[:, None]
    x = tl.load(x_columns + p[:, None] * stride_xn, mask=live & inside, other=0.0)
    if x.dtype == tl.float64:  # only its squares can leave the range of float64
        largest = tl.max(tl.abs(x), axis=0)
        unit = tl.where(largest >= LARGE, 1 / STEP, tl.where(largest >= TINY, tl.minimum(unit, 1.0), unit))
        x *= unit[None, :]
    x = x.to(tl.float64)
    shift = tl.sum(x, axis=0) / count
    rest = tl.sum(tl.where(live, x - shift[None, :], 0.0), axis=0) / count
    return shift, tl.where(_finite(shift), rest, 0.0), unit  # of an infinite mean the deviations are NaN


@triton.jit
def _deviations(x_columns, p, stop, stride_xn, inside, shift, rest, unit) -> tl.tensor:
    """x - mean of the points p < stop (GROUP, BLOCK_M), in units of 1/unit; 0 for the other lanes."""
    live = (p < stop)[:, None]
    x = tl.load(x_columns + p[:, None] * stride_xn, mask=live & inside, other=0.0)
    if x.dtype == tl.float64:
        x *= unit[None, :]
    x = x.to(tl.float64)
    return tl.where(live, (x - shift[None, :]) - rest[None, :], 0.0)


@triton.jit
def _moved(seen, shift, total, low, more, more_shift, more_rest) -> tuple[tl.tensor, ...]:
    """(shift, total, low, delta) after `more` points; delta: their mean minus the mean of the `seen` points."""
    shift = tl.where(seen > 0, shift, tl.where(_finite(more_shift), more_shift, 0.0))
    away = (more_shift - shift) + more_rest
    delta = tl.where(seen > 0, away - (total + low) / tl.maximum(seen, 1.0), 0.0)
    total, lost = _two_sum(total, more * away)
    return shift, total, low + lost, delta


@triton.jit
def _grown(scatter, low, product, seen, more, delta_i, delta_j) -> tuple[tl.tensor, tl.tensor]:
    """scatter + low of `seen` points after `more` points with the scatter `product`: Chan's formula."""
    between = tl.where(seen > 0, ((seen * (more / (seen + more))) * delta_i)[:, None] * delta_j[None, :], 0.0)
    scatter, lost = _two_sum(scatter, product + between)
    return scatter, low + lost


@triton.jit
def _factor(now, unit) -> tl.tensor:
    """now / unit for units that are STEP, 1 or 1 / STEP; 0 where that is not representable. A division would take registers."""
    return tl.where(now == unit, 1.0, tl.where(now * STEP == unit, 1 / STEP, 0.0))


@triton.jit
def _rescaled(scatter, factor_i, factor_j) -> tl.tensor:
    """A tile of the scatter in new units. One factor after the other: their product may leave the range of float64."""
    return scatter * factor_i[:, None] * factor_j[None, :]


@triton.jit
def _place(program, tiles, m, BLOCK_M: tl.constexpr) -> tuple[tl.tensor, ...]:
    """(set or run, rows, columns, whether the tile is in the lower triangle) of a program."""
    pair = program % (tiles * tiles)
    i, j = pair // tiles, pair % tiles
    lane = tl.arange(0, BLOCK_M).to(tl.int64)
    return program // (tiles * tiles), i * BLOCK_M + lane, j * BLOCK_M + lane, j <= i


@triton.jit
def _run_of(r, per_run, longer) -> tuple[tl.tensor, tl.tensor]:
    """(start, stop) of the points of run r: `per_run` points, one more in each of the first `longer` runs."""
    start = tl.cast(r, tl.int64) * per_run + tl.minimum(r, longer)
    return start, start + per_run + (r < longer).to(tl.int64)


@triton.jit
def _lower(t, rows, columns, m) -> tuple[tl.tensor, tl.tensor]:
    """(offsets, mask) of the elements of a tile in the lower triangle of matrix t."""
    row, column = rows[:, None], columns[None, :]
    return (t * m + row) * m + column, (row < m) & (column <= row)


@triton.jit
def _vector(ptr, t, index, m, live) -> tl.tensor:
    """One number a variable of set t; 0 where the state holds nothing yet."""
    return tl.load(ptr + t * m + index, mask=(index < m) & live, other=0.0)


@triton.jit
def _units(ptr, t, index, m, live, otherwise) -> tl.tensor:
    """The units of the variables of set t; `otherwise` where the state holds nothing yet."""
    return tl.load(ptr + t * m + index, mask=(index < m) & live, other=otherwise)


@triton.jit
def _two_parts(ptr, plane, offsets, mask) -> tl.tensor:
    """A sum of the state, with what its roundings have left, as one number."""
    return _with_low(tl.load(ptr + offsets, mask=mask, other=0.0), tl.load(ptr + plane + offsets, mask=mask, other=0.0))


@triton.jit
def _store(
    shift_ptr, total_ptr, scatter_ptr, unit_ptr, B, t, m, rows, columns, shift, total, total_low, scatter, low, unit
) -> None:
    """Stores a tile of the scatter; tiles on the diagonal store shift, total and unit too."""
    offsets, mask = _lower(t, rows, columns, m)
    tl.store(scatter_ptr + offsets, scatter, mask=mask)
    tl.store(scatter_ptr + B * m * m + offsets, low, mask=mask)
    diagonal = (rows < m) & (rows == columns)
    tl.store(shift_ptr + t * m + rows, shift, mask=diagonal)
    tl.store(total_ptr + t * m + rows, total, mask=diagonal)
    tl.store(total_ptr + (B + t) * m + rows, total_low, mask=diagonal)
    tl.store(unit_ptr + t * m + rows, unit, mask=diagonal)


@triton.jit(do_not_specialize=["per_run", "longer", "m", "runs", "tiles", "count", "B"])
def _add_runs_kernel(
    x_ptr, old_shift_ptr, old_total_ptr, old_unit_ptr, shift_ptr, total_ptr, scatter_ptr, unit_ptr,
    per_run, longer, m, runs, tiles, count, B, stride_xb, stride_xn, stride_xm,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """Adds points to states: with one run a set to the state of `count` points, with several a new state b · runs + r each.

    Grid: one program a run and tile of the scatter (those above the diagonal end at once). Reads x (B, n, m) once for each row
    and column of tiles, and the old state; writes the state.
    """
    m, B = tl.cast(m, tl.int64), tl.cast(B, tl.int64)
    run, rows, columns, is_lower = _place(tl.program_id(0), tiles, m, BLOCK_M)
    if is_lower:
        start, stop = _run_of(run % runs, per_run, longer)
        b, t = (run // runs).to(tl.int64), run.to(tl.int64)
        x_i, x_j = x_ptr + b * stride_xb + rows[None, :] * stride_xm, x_ptr + b * stride_xb + columns[None, :] * stride_xm
        inside_i, inside_j, live = (rows < m)[None, :], (columns < m)[None, :], count > 0
        shift_i, shift_j = _vector(old_shift_ptr, b, rows, m, live), _vector(old_shift_ptr, b, columns, m, live)
        total_i, total_j = _vector(old_total_ptr, b, rows, m, live), _vector(old_total_ptr, b, columns, m, live)
        low_i, low_j = _vector(old_total_ptr, B + b, rows, m, live), _vector(old_total_ptr, B + b, columns, m, live)
        unit_i = tl.full([BLOCK_M], 1.0, tl.float64)  # as it stays for float32, whose squares are float64's
        unit_j = unit_i
        if x_ptr.dtype.element_ty == tl.float64:
            unit_i, unit_j = _units(old_unit_ptr, b, rows, m, live, STEP), _units(old_unit_ptr, b, columns, m, live, STEP)
        offsets, mask = _lower(b, rows, columns, m)
        scatter = tl.load(scatter_ptr + offsets, mask=mask & live, other=0.0)
        low = tl.load(scatter_ptr + B * m * m + offsets, mask=mask & live, other=0.0)
        for begin in range(start, stop, BLOCK_N):
            p = begin + tl.arange(0, BLOCK_N).to(tl.int64)
            more = tl.minimum(stop - begin, BLOCK_N).to(tl.float64)
            seen = (begin - start + count).to(tl.float64)
            mean_i, rest_i, now_i = _block_mean(x_i, p, stop, stride_xn, inside_i, more, unit_i)
            mean_j, rest_j, now_j = _block_mean(x_j, p, stop, stride_xn, inside_j, more, unit_j)
            if x_ptr.dtype.element_ty == tl.float64:
                f_i, f_j, unit_i, unit_j = _factor(now_i, unit_i), _factor(now_j, unit_j), now_i, now_j
                shift_i, total_i, low_i = shift_i * f_i, total_i * f_i, low_i * f_i
                shift_j, total_j, low_j = shift_j * f_j, total_j * f_j, low_j * f_j
                scatter, low = _rescaled(scatter, f_i, f_j), _rescaled(low, f_i, f_j)
            shift_i, total_i, low_i, delta_i = _moved(seen, shift_i, total_i, low_i, more, mean_i, rest_i)
            shift_j, total_j, low_j, delta_j = _moved(seen, shift_j, total_j, low_j, more, mean_j, rest_j)
            product = tl.zeros([BLOCK_M, BLOCK_M], tl.float64)
            for group in range(0, BLOCK_N, GROUP):
                q = begin + group + tl.arange(0, GROUP).to(tl.int64)
                d_i = _deviations(x_i, q, stop, stride_xn, inside_i, mean_i, rest_i, unit_i)
                d_j = _deviations(x_j, q, stop, stride_xn, inside_j, mean_j, rest_j, unit_j)
                product += tl.sum(d_i[:, :, None] * d_j[:, None, :], axis=0)
            scatter, low = _grown(scatter, low, product, seen, more, delta_i, delta_j)
        _store(
            shift_ptr, total_ptr, scatter_ptr, unit_ptr, B * runs, t, m, rows, columns, shift_i, total_i, low_i, scatter, low,
            unit_i,
        )  # fmt: skip


@triton.jit(do_not_specialize=["per_run", "longer", "m", "runs", "tiles", "count", "B"])
def _merge_kernel(
    more_shift_ptr, more_total_ptr, more_scatter_ptr, more_unit_ptr, old_shift_ptr, old_total_ptr, old_unit_ptr,
    shift_ptr, total_ptr, scatter_ptr, unit_ptr,
    per_run, longer, m, runs, tiles, count, B, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """Adds the states of `runs` runs, in order, to the state of `count` points.

    Grid: one program a set and tile of the scatter. Reads the states of the runs, reads and writes the state of the set.
    """
    m, B = tl.cast(m, tl.int64), tl.cast(B, tl.int64)
    index, rows, columns, is_lower = _place(tl.program_id(0), tiles, m, BLOCK_M)
    if is_lower:
        b, live = index.to(tl.int64), count > 0
        shift_i, shift_j = _vector(old_shift_ptr, b, rows, m, live), _vector(old_shift_ptr, b, columns, m, live)
        total_i, total_j = _vector(old_total_ptr, b, rows, m, live), _vector(old_total_ptr, b, columns, m, live)
        low_i, low_j = _vector(old_total_ptr, B + b, rows, m, live), _vector(old_total_ptr, B + b, columns, m, live)
        offsets, mask = _lower(b, rows, columns, m)
        scatter = tl.load(scatter_ptr + offsets, mask=mask & live, other=0.0)
        low = tl.load(scatter_ptr + B * m * m + offsets, mask=mask & live, other=0.0)
        unit_i, unit_j = _units(old_unit_ptr, b, rows, m, live, STEP), _units(old_unit_ptr, b, columns, m, live, STEP)
        for r in range(runs):
            t = b * runs + r
            begin, end = _run_of(r, per_run, longer)
            more, seen = (end - begin).to(tl.float64), (begin + count).to(tl.float64)
            more_i, more_j = _units(more_unit_ptr, t, rows, m, True, 1.0), _units(more_unit_ptr, t, columns, m, True, 1.0)
            now_i, now_j = tl.minimum(unit_i, more_i), tl.minimum(unit_j, more_j)
            f_i, f_j = _factor(now_i, unit_i), _factor(now_j, unit_j)
            g_i, g_j = _factor(now_i, more_i), _factor(now_j, more_j)
            unit_i, unit_j = now_i, now_j
            shift_i, total_i, low_i = shift_i * f_i, total_i * f_i, low_i * f_i
            shift_j, total_j, low_j = shift_j * f_j, total_j * f_j, low_j * f_j
            scatter, low = _rescaled(scatter, f_i, f_j), _rescaled(low, f_i, f_j)
            rest_i = _two_parts(more_total_ptr, B * runs * m, t * m + rows, rows < m) / more * g_i
            rest_j = _two_parts(more_total_ptr, B * runs * m, t * m + columns, columns < m) / more * g_j
            mean_i = _vector(more_shift_ptr, t, rows, m, True) * g_i
            mean_j = _vector(more_shift_ptr, t, columns, m, True) * g_j
            shift_i, total_i, low_i, delta_i = _moved(seen, shift_i, total_i, low_i, more, mean_i, rest_i)
            shift_j, total_j, low_j, delta_j = _moved(seen, shift_j, total_j, low_j, more, mean_j, rest_j)
            offsets, mask = _lower(t, rows, columns, m)
            product = _rescaled(_two_parts(more_scatter_ptr, B * runs * m * m, offsets, mask), g_i, g_j)
            scatter, low = _grown(scatter, low, product, seen, more, delta_i, delta_j)
        _store(
            shift_ptr, total_ptr, scatter_ptr, unit_ptr, B, b, m, rows, columns, shift_i, total_i, low_i, scatter, low, unit_i
        )  # fmt: skip


@triton.jit(do_not_specialize=["m", "tiles", "count", "divisor", "B"])
def _finish_kernel(
    shift_ptr, total_ptr, scatter_ptr, unit_ptr, mean_ptr, covariance_ptr, m, tiles, count, divisor, B, BLOCK_M: tl.constexpr
) -> None:  # fmt: skip
    """mean = shift + total / count and covariance = scatter / divisor, in the units of the points.

    Grid: one program a set and tile of the scatter. Reads the state; writes the mean and both triangles of the covariance.
    """
    m, B = tl.cast(m, tl.int64), tl.cast(B, tl.int64)
    index, rows, columns, is_lower = _place(tl.program_id(0), tiles, m, BLOCK_M)
    if is_lower:
        b = index.to(tl.int64)
        offsets, mask = _lower(b, rows, columns, m)
        covariance = _two_parts(scatter_ptr, B * m * m, offsets, mask) / tl.cast(divisor, tl.float64)
        unit, unit_j = _units(unit_ptr, b, rows, m, True, 1.0), _units(unit_ptr, b, columns, m, True, 1.0)
        alike = unit[:, None] == unit_j[None, :]  # equal units: their product may leave the range of float64
        first = tl.where(alike, unit[:, None], unit[:, None] * unit_j[None, :])
        covariance = (covariance / first / tl.where(alike, unit_j[None, :], 1.0)).to(covariance_ptr.dtype.element_ty)
        tl.store(covariance_ptr + offsets, covariance, mask=mask)
        tl.store(covariance_ptr + (b * m + columns[None, :]) * m + rows[:, None], covariance, mask=mask)
        rest = _two_parts(total_ptr, B * m, b * m + rows, rows < m) / tl.cast(count, tl.float64)
        mean = (_vector(shift_ptr, b, rows, m, True) + rest) / unit
        tl.store(mean_ptr + b * m + rows, mean.to(mean_ptr.dtype.element_ty), mask=(rows < m) & (rows == columns))


# ---------------------------------------------------------------------------------------------- launchers
def update(
    x: torch.Tensor, shift: torch.Tensor, total: torch.Tensor, scatter: torch.Tensor, unit: torch.Tensor, *, count: int
) -> None:  # fmt: skip
    """Adds the points x (B, n, m), n ≥ 1, to the state of `count` points; where that is 0 the state is not read."""
    B, n, m = x.shape
    given = shift, total, scatter, unit
    assert (n >= 1, *(a.shape for a in given)) == (True, (B, m), (2, B, m), (2, B, m, m), (B, m)), x.shape
    if not B * m:
        return
    plan = plan_moments(B, n, m, device_of(x))
    tiles = cdiv(m, plan.BLOCK_M)
    before = count
    state: tuple[torch.Tensor, ...] = given
    if plan.runs > 1:
        before, sizes = 0, ((B * plan.runs, m), (2, B * plan.runs, m), (2, B * plan.runs, m, m), (B * plan.runs, m))
        state = tuple(torch.empty(size, dtype=shift.dtype, device=shift.device) for size in sizes)
    # every tile of a set reads the state of the mean while one of them writes it: they read a copy
    old = (shift.clone(), total.clone(), unit.clone())
    launch(
        _add_runs_kernel, B * plan.runs * tiles * tiles,
        x, *old, *state, *divmod(n, plan.runs), m, plan.runs, tiles, before, B, *x.stride(),
        plan=plan, reads=("x",), again=2.0 * tiles + 1.0, writes=("shift", "total", "scatter", "unit"),
        BLOCK_N=plan.BLOCK_N, GROUP=plan.GROUP, BLOCK_M=plan.BLOCK_M, num_warps=plan.num_warps,
    )  # fmt: skip
    if plan.runs > 1:
        launch(
            _merge_kernel, B * tiles * tiles,
            *state, *old, *given, *divmod(n, plan.runs), m, plan.runs, tiles, count, B,
            plan=plan, reads=("more_scatter",), writes=("shift", "total", "scatter", "unit"),
            BLOCK_M=plan.BLOCK_M, num_warps=MERGE_WARPS,
        )  # fmt: skip


def merge(
    more_shift: torch.Tensor, more_total: torch.Tensor, more_scatter: torch.Tensor, more_unit: torch.Tensor,
    shift: torch.Tensor, total: torch.Tensor, scatter: torch.Tensor, unit: torch.Tensor, *, more: int, count: int,
) -> None:  # fmt: skip
    """Adds the state of `more` ≥ 1 points to the state of `count` points."""
    B, m = shift.shape
    plan = plan_moments(B, 1, m, device_of(shift))
    tiles = cdiv(m, plan.BLOCK_M)
    launch(
        _merge_kernel, B * tiles * tiles,
        more_shift, more_total, more_scatter, more_unit, shift.clone(), total.clone(), unit.clone(),
        shift, total, scatter, unit,
        more, 0, m, 1, tiles, count, B,
        plan=plan, reads=("more_scatter",), writes=("shift", "total", "scatter", "unit"),
        BLOCK_M=plan.BLOCK_M, num_warps=MERGE_WARPS,
    )  # fmt: skip


def finish(
    shift: torch.Tensor, total: torch.Tensor, scatter: torch.Tensor, unit: torch.Tensor,
    mean: torch.Tensor, covariance: torch.Tensor, *, count: int, divisor: int,
) -> None:  # fmt: skip
    """mean (B, m) and covariance (B, m, m), exactly symmetric, of the state of `count` points."""
    B, m = shift.shape
    if not B * m:
        return
    plan = plan_moments(B, 1, m, device_of(shift))
    tiles = cdiv(m, plan.BLOCK_M)
    launch(
        _finish_kernel, B * tiles * tiles,
        shift, total, scatter, unit, mean, covariance, m, tiles, count, divisor, B,
        plan=plan, reads=("shift", "total", "scatter", "unit"), writes=("mean", "covariance"),
        BLOCK_M=plan.BLOCK_M, num_warps=plan.num_warps,
    )  # fmt: skip
