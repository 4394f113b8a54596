"""What the kernels of rows share: the rows of a program, the online maximum and sum of a row, and how tensors are accessed.

Σ exp(z - m) of a row is kept as `sum_exp_minus_1` = Σ exp(z - m) - 1. The largest term of the sum is exactly 1; where one
class has nearly all probability the other terms are far below 1, and added to 1 they would lose their digits.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from . import _tile
from .plan import row_mode

ACC = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.float32, torch.float16: tl.float32}


@triton.jit
def rows_of_tile(tile, S, tiles, BLOCK_R: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The rows of tile number `tile`: n, a scalar, and s, (BLOCK_R,). `tiles`: how many tiles the S rows of one n take."""
    tile = tl.cast(tile, tl.int64)
    return tile // tiles, (tile % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit
def finite_base(m) -> tl.tensor:
    """m, or 0 where m is -inf: a row of nothing but -inf then gives exp(z - 0) = 0, and not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _sum_and_sum_minus_1(zero, e, e_edges) -> tuple[tl.tensor, tl.tensor]:
    """(Σ e, Σ e - 1) of each row of e = exp(z - max z) and of its edges; e or e_edges may be None.

    Where Σ e is below 2 the terms other than the 1 are summed again without it, to keep their digits. A row of zeros has the
    sum_exp_minus_1 -1.
    """
    total = _tile.add_row_sums(zero, e, e_edges)
    sum_exp_minus_1 = total - 1.0
    near_one = (total >= 1.0) & (total < 2.0)
    if tl.max(tl.ravel(near_one.to(tl.int32)), axis=0) > 0:
        rest = zero
        if e is not None:
            rest = _tile.add_row_sums(rest, tl.where(e == 1.0, 0.0, e), None)
        if e_edges is not None:
            rest = _tile.add_row_sums(rest, None, tl.where(e_edges == 1.0, 0.0, e_edges))
        sum_exp_minus_1 = tl.where(near_one, rest, sum_exp_minus_1)
    return total, sum_exp_minus_1


@triton.jit
def merged_sum_exp_minus_1(m, sum_exp_minus_1, m_new, e, e_edges) -> tl.tensor:
    """Σ exp(z - m_new) - 1 of each row after one more tile of e = exp(z - m_new).

    sum_exp_minus_1: the same sum about m, before the tile.
    """
    total, more = _sum_and_sum_minus_1(tl.zeros_like(m), e, e_edges)
    return tl.where(m_new > m, more + (1.0 + sum_exp_minus_1) * tl.exp(m - finite_base(m_new)), sum_exp_minus_1 + total)


@triton.jit
def empty_lanes(R: tl.constexpr, L: tl.constexpr, ACC: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(m, sum_exp_minus_1) of lanes that have seen no value. m is the lowest finite number: -inf - (-inf) would be NaN."""
    lowest: tl.constexpr = -1.7976931348623157e308 if tl.float64 == ACC else -3.4028234663852886e38
    return tl.full([R, L], lowest, ACC), tl.full([R, L], -1.0, ACC)


@triton.jit
def update_lanes(m, sum_exp_minus_1, z) -> tuple[tl.tensor, tl.tensor]:
    """Each lane's m and Σ exp(z - m) - 1 after one more value z a lane. Lanes do not meet, so no thread waits for another."""
    d = z - m
    e = tl.exp(-tl.abs(d))
    return tl.maximum(m, z), tl.where(z > m, sum_exp_minus_1 * e, sum_exp_minus_1) + e


@triton.jit
def merge_lanes(m, sum_exp_minus_1) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(m, Σ exp(z - m) - 1) of each row from those of its lanes, and the factor exp(m_lane - m) of each lane.

    The 1 of the largest value is never added and subtracted again, so the other terms keep their digits.
    """
    top = tl.max(m, axis=1)[:, None]
    shrunk = tl.exp(m - top)
    rest = tl.sum(sum_exp_minus_1 * shrunk + tl.where(shrunk == 1.0, 0.0, shrunk), axis=1)[:, None]
    rest += tl.sum(tl.where(shrunk == 1.0, 1.0, 0.0), axis=1)[:, None] - 1.0
    return tl.where(rest == -1.0, float("-inf"), top), rest, shrunk


@triton.jit
def log1p(x, ACC: tl.constexpr) -> tl.tensor:
    """log(1 + x), accurate for small x too; -inf at x = -1."""
    u = 1.0 + x
    if tl.float64 == ACC:
        y = tl.where(u == 1.0, x, tl.log(u) * tl.where(x == 0.0, 1.0, x / (u - 1.0)))
    else:
        s = x / (2.0 + x)  # log(1 + x) = 2 artanh(s), whose series to s⁹ leaves 1e-8 for x < 1/2
        s2 = s * s
        series = 2.0 * s * (1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9)))))
        y = tl.where((x >= 0.0) & (x < 0.5), series, tl.log(u))
    return y


@triton.jit
def quotient(a, b, ACC: tl.constexpr) -> tl.tensor:
    """a / b, rounded to nearest in float32 too."""
    if tl.float64 == ACC:
        q = a / b
    else:
        q = tl.div_rn(a, tl.zeros_like(a) + b)
    return q


@triton.jit
def as_acc(single, bits, ACC: tl.constexpr) -> tl.tensor:
    """A scalar argument in the dtype ACC. Triton passes floats as float32: float64 kernels take the bits (`float_and_bits`)."""
    if tl.float64 == ACC:
        value = tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True)
    else:
        value = tl.cast(single, ACC)
    return value


def rows_along_s(x: torch.Tensor) -> torch.Tensor:
    """A view with the rows along the last axis: (N, V, 1) as (1, V, N), and (N, 1) as (1, N)."""
    return x.transpose(0, -1) if x.shape[-1] == 1 else x


def access_mode(axis: int, *tensors: torch.Tensor, width: int = 16) -> int:
    """`plan.row_mode` of tensors with three axes that are read together along `axis`, `width` bytes of the first an access."""
    x = tensors[0]
    if any(t.stride(axis) != x.stride(axis) or t.element_size() < x.element_size() for t in tensors):
        return _tile.STRIDED.value
    others = [i for i in range(3) if i != axis]
    steps = [tuple(t.stride(i) for i in others if t.shape[i] > 1) for t in tensors]
    return row_mode([t.data_ptr() for t in tensors], x.element_size(), x.shape[axis], x.stride(axis), steps, width)


def operand_mode(axis: int, lead: torch.Tensor, x: torch.Tensor, width: int = 16) -> int:
    """MODE of an operand `x` in a kernel whose lanes follow the bodies of the rows of `lead`, `width` bytes of it an access."""
    if access_mode(axis, lead, width=width) == _tile.SHIFTED.value:
        return access_mode(axis, lead, x, width=width)
    whole_groups = x.shape[axis] % (width // lead.element_size()) == 0  # x is masked by the lanes of the lead
    aligned = whole_groups and access_mode(axis, x, width=width) == _tile.ALIGNED.value
    return _tile.ALIGNED.value if aligned else _tile.STRIDED.value


@functools.cache
def _warp_size(driver: Any) -> int:
    return driver.get_current_target().warp_size


def warps(planned: int) -> int:
    """Warps of this device (64 threads on AMD) for a plan's warps of 32 threads."""
    if triton.knobs.runtime.interpret:
        return planned
    return max(planned * 32 // _warp_size(triton.runtime.driver.active), 1)


def _takes_maxnreg() -> bool:
    return not triton.knobs.runtime.interpret and _warp_size(triton.runtime.driver.active) == 32


def plan_constants(plan: Any) -> dict[str, Any]:
    """The constants of a kernel of rows from its `row_plan.RowPlan`."""
    registers = {"maxnreg": plan.registers} if plan.registers and _takes_maxnreg() else {}
    return {
        "BLOCK_R": plan.BLOCK_R, "KEEP": plan.KEEP, "BLOCK_V": plan.BLOCK_V, "FITS": plan.FITS, "STAGES": plan.STAGES,
        "LOOP": plan.programs > 0, "num_warps": warps(plan.num_warps), **registers,
    }  # fmt: skip
