"""The sums of a row that a divergence KL(base‖other) is made of, taken in one pass over both rows.

    w = exp((base - m) / T),  m = max base     y = (other - base) / T - s,  s about lse(other / T) - lse(base / T)
    Z = Σ w     B = Σ w y     A = Σ w φ(y), without the e^y of the classes where |y| > 1/2
    F = the sum of those over the whole of other's: Σ exp((other - m') / T), m' = max other, of which Z' is the sum of all;
        ∞ where other lacks a class that base has: so is the divergence

Each lane has an m and an s of its own, those of the class that is the largest of base's in it so far: nothing is known of the
row before its end, and about an s that is far from the row's A would lose its digits. (3.31) moves sums to another s.
"""

import triton
import triton.language as tl

from .. import _tile
from .._cross_entropy.tile import product_or_0
from .._rows import finite_base
from .terms import is_near, lacks, log_ratio, phi_near


@triton.jit
def empty_sums(R: tl.constexpr, L: tl.constexpr, ACC: tl.constexpr) -> tuple[tl.tensor, ...]:
    """(m, Z, s, B, A, m', Z', F) of L lanes that have seen nothing."""
    lowest: tl.constexpr = -1.7976931348623157e308 if tl.float64 == ACC else -3.4028234663852886e38
    m, zero = tl.full([R, L], lowest, ACC), tl.zeros([R, L], ACC)
    return m, zero, zero, zero, zero, m, zero, zero


@triton.jit
def _moved(Z, B, A, x, ACC: tl.constexpr) -> tl.tensor:
    """A about another s, where every y is larger by x; where x is not near, all classes are as those that are not."""
    near = phi_near(x, ACC)
    return tl.where(is_near(x), A + (x + near) * (A + B) + near * Z, -((1.0 + x) * Z + B))


@triton.jit
def _shrunk(F, e) -> tl.tensor:
    """F e; ∞ stays."""
    return tl.where(float("inf") == F, F, F * e)


@triton.jit
def accumulate_lanes(sums, base, other, scale, ACC: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums of each lane after one more class: no thread waits for another. scale = 1/T."""
    m, Z, s, B, A, m_o, Z_o, F = sums
    d, d_o = (base - m) * scale, (other - m_o) * scale
    e, e_o = tl.exp(-tl.abs(d)), tl.exp(-tl.abs(d_o))
    rises, rises_o = base > m, other > m_o
    mass = tl.where(rises_o, 1.0, e_o)
    y = log_ratio(base, other, s, scale)
    x = tl.where(rises, -y, y)
    far = is_near(x) == 0
    F, mass_before = tl.where(rises_o, _shrunk(F, e_o), F), tl.where(rises_o, Z_o * e_o, Z_o)
    # of another s all before are far. Their sums would say less: e^s of a class far below both maxima has no digits left
    F = tl.where(rises & far, tl.maximum(F, mass_before), F) + tl.where(far & (rises == 0), mass, 0.0) + lacks(base, other)
    in_A = tl.where(far, -product_or_0(e, 1.0 + x), e * phi_near(x, ACC))
    A = tl.where(rises, product_or_0(e, _moved(Z, B, A, x, ACC)), A + in_A)
    B = tl.where(rises, product_or_0(e, B + x * Z), B + product_or_0(e, x))
    s = tl.where(rises & (other > float("-inf")), (other - base) * scale, s)
    Z = tl.where(rises, Z * e + 1.0, Z + e)
    return tl.maximum(m, base), Z, s, B, A, tl.maximum(m_o, other), mass_before + mass, F


@triton.jit
def totals(m, Z, m_l, Z_l, z, z_edges, scale, LANES: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(max z, Σ exp((z - max z) / T)) of rows: of lanes (where LANES), of a tile and of its edges, either None."""
    top = m
    if LANES:
        top = tl.maximum(top, tl.max(m_l, axis=1)[:, None])
    top = _tile.max_with_rows(top, z, z_edges)
    at = finite_base(top)
    if LANES:
        Z += tl.sum(product_or_0(Z_l, tl.exp((m_l - at) * scale)), axis=1)[:, None]
    e, e_edges = None, None
    if z is not None:
        e = tl.exp((z - at) * scale)
    if z_edges is not None:
        e_edges = tl.exp((z_edges - _tile.scalar_if_one(at)) * scale)
    return top, _tile.add_row_sums(Z, e, e_edges)


@triton.jit
def terms_of_lanes(sums, top, top_o, s, scale, ACC: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What each lane adds to (A, B, F) of its row, about the row's maxima and s."""
    m, Z, own, B, A, m_o, Z_o, F = sums
    shrunk, shrunk_o = tl.exp((m - top) * scale), tl.exp((m_o - top_o) * scale)
    x = own - s
    F = tl.where(is_near(x), F, tl.maximum(F, Z_o))
    return product_or_0(shrunk, _moved(Z, B, A, x, ACC)), product_or_0(shrunk, B + x * Z), _shrunk(F, shrunk_o)


@triton.jit
def terms(base, other, top, top_o, s, scale, ACC: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What each class adds to (A, B, F) of its row."""
    w, mass = tl.exp((base - top) * scale), tl.exp((other - top_o) * scale)
    y = log_ratio(base, other, s, scale)
    near = is_near(y)
    in_A = tl.where(near, w * phi_near(y, ACC), -product_or_0(w, 1.0 + y))
    return in_A, product_or_0(w, y), tl.where(near, 0.0, mass) + lacks(base, other)
