"""The logarithm, without a table and without a branch, as `exp.py` has the exponential: of `Lanes`, or of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compile import inline, overload
from .half import every, like
from .simd import where_below

# u = 2^k m, 1/√2 <= m < √2; log m = f - f²/2 + s (f²/2 + R(s²)), f = m - 1, s = f / (2 + f), R the minimax polynomials of
# fdlibm (relative error 3e-9 and 2e-18). Where k = 0 f is x itself, of which 1 + x may have lost the digits.
_R32 = tuple(np.float32(c) for c in (0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841))
_R64 = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_LN2_HIGH32, _LN2_LOW32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LN2_HIGH64, _LN2_LOW64 = np.float64(6.93147180369123816490e-01), np.float64(1.90821492927058770002e-10)


@intrinsic
def _parts(typingctx: Any, u: Any) -> Any:
    """(k, m) of u = 2^k m, 1/√2 <= m < √2, for a normal u."""
    double = getattr(u, "dtype", u) == types.float64
    places, root = (52, 0x3FE6A09E667F3BCD) if double else (23, 0x3F3504F3)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = like(args[0].type, ir.IntType(64 if double else 32))
        above = builder.sub(builder.bitcast(args[0], integer), every(integer, root))
        k = builder.sitofp(builder.ashr(above, every(integer, places)), args[0].type)
        m = builder.add(builder.and_(above, every(integer, (1 << places) - 1)), every(integer, root))
        return context.make_tuple(builder, signature.return_type, [k, builder.bitcast(m, args[0].type)])

    return types.UniTuple(u, 2)(u), codegen


@inline
def _log1p32(x, u) -> Any:
    k, m = _parts(u)
    f = where_below(k * k, np.float32(0.5), x, m - np.float32(1.0))
    s = f / (f + np.float32(2.0))
    z = s * s
    r = z * (_R32[0] + z * (_R32[1] + z * (_R32[2] + z * _R32[3])))
    half = f * f * np.float32(0.5)
    return k * _LN2_HIGH32 + (f - (half - (s * (half + r) + k * _LN2_LOW32)))


@inline
def _log1p64(x, u) -> Any:
    k, m = _parts(u)
    f = where_below(k * k, 0.5, x, m - 1.0)
    s = f / (f + 2.0)
    z = s * s
    r = _R64[4] + z * (_R64[5] + z * _R64[6])
    r = z * (_R64[0] + z * (_R64[1] + z * (_R64[2] + z * (_R64[3] + z * r))))
    half = f * f * 0.5
    return k * _LN2_HIGH64 + (f - (half - (s * (half + r) + k * _LN2_LOW64)))


def log1p(x: Any, u: Any) -> Any:
    """log(1 + x) of `Lanes`, to 2.5 ulp, with the digits of a small x; u is 1 + x with those of a small, normal u."""
    return np.log1p(x)


@overload(log1p)
def _log1p(x, u) -> Callable[..., Any]:
    if x.dtype == types.float64:
        return lambda x, u: _log1p64(x, u)
    return lambda x, u: _log1p32(x, u)
