"""SiLU, Hardswish and GELU of a tile, and what they let through of an upstream gradient: docs/derivations.md, section 2.7."""

import triton
import triton.language as tl

SILU: tl.constexpr = tl.constexpr(1)
HARDSWISH: tl.constexpr = tl.constexpr(2)
GELU: tl.constexpr = tl.constexpr(3)

# ACT of the kernels, by name; 0 stands for none, and for "relu", whose mask says what passed
ACT = {None: 0, "relu": 0, "silu": 1, "hardswish": 2, "gelu": 3}


@triton.jit
def _sigmoids(p) -> tuple[tl.tensor, tl.tensor]:
    """σ(p) and σ(-p), neither by a difference."""
    e = tl.exp(-tl.abs(p))
    q = 1.0 / (1.0 + e)
    return tl.where(p < 0.0, e * q, q), tl.where(p < 0.0, q, e * q)


@triton.jit
def _distribution(p) -> tl.tensor:
    """Φ(p)."""
    return 0.5 * (1.0 + tl.erf(p * 0.7071067811865476))


@triton.jit
def activated(p, ACT: tl.constexpr) -> tl.tensor:
    """a(p); NaN stays NaN, and -∞ gives NaN, as in PyTorch."""
    if ACT == SILU:
        sigma, _ = _sigmoids(p)
        y = p * sigma
    elif ACT == HARDSWISH:
        t = p + 3.0
        t = tl.where(t < 0.0, 0.0, t)
        y = p * (tl.where(t > 6.0, 6.0, t) * 0.16666666666666666)
    else:
        y = p * _distribution(p)
    return y


@triton.jit
def let_through(dy, p, ACT: tl.constexpr) -> tl.tensor:
    """dy a'(p)."""
    if ACT == SILU:
        sigma, rest = _sigmoids(p)
        passed = dy * (sigma * (1.0 + p * rest))
    elif ACT == HARDSWISH:
        inner = dy * (p * 0.3333333333333333 + 0.5)
        passed = tl.where(p <= -3.0, 0.0, tl.where(p >= 3.0, dy, inner))
    else:
        density = tl.exp(-0.5 * p * p) * 0.3989422804014327
        passed = dy * (_distribution(p) + p * density)
    return passed
