"""The exponential, without a table and without a branch, so that LLVM vectorises the loop around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compile import inline, overload
from .half import every, like
from .simd import larger

# exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, ln 2 = HIGH + LOW where n * HIGH is exact. Adding MAGIC rounds to
# an integer and leaves n + bias in the last bits of the sum, from where a shift moves it to the exponent. The bias holds
# 2^64 (2^512) more than the exponent's own, which a last product removes, so that a subnormal result is rounded once.
# exp(r) = 1 + r + r^2 P(r), P the minimax polynomial (relative error 3e-9 and 4e-18) in Estrin's order, for its short chain;
# r is rounded in the powers alone.
_LOWEST32, _LOWEST64 = np.float32(-104.0), np.float64(-746.0)
_MAGIC32, _MAGIC64 = np.float32(1.5 * 2.0**23 + 127 + 64), np.float64(1.5 * 2.0**52 + 1023 + 512)
_TINY32, _TINY64 = np.float32(2.0**-64), np.float64(2.0**-512)
_INV_LN2_32, _INV_LN2_64 = np.float32(1 / math.log(2)), np.float64(1 / math.log(2))
_LN2_HIGH32, _LN2_LOW32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LN2_HIGH64, _LN2_LOW64 = np.float64(6.93147180369123816490e-01), np.float64(1.90821492927058770002e-10)
_P32 = tuple(np.float32(c) for c in (0.49999994, 0.166665196, 0.0416683927, 0.00836876128, 0.00138144533))
_P64 = (
    0.5000000000000011,
    0.16666666666666408,
    0.041666666666529864,
    0.008333333333496614,
    0.0013888888943736286,
    0.00019841269502244094,
    2.48014929630654e-05,
    2.7557589972370936e-06,
    2.763030488402456e-07,
    2.499901333004126e-08,
)


@intrinsic
def _power(typingctx: Any, shifted: Any) -> Any:
    """2^(n + bias) from a number, or `Lanes`, with n + bias in its last bits."""
    exponent = 52 if getattr(shifted, "dtype", shifted) == types.float64 else 23

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = like(args[0].type, ir.IntType(64 if exponent == 52 else 32))
        power = builder.shl(builder.bitcast(args[0], integer), every(integer, exponent))
        return builder.bitcast(power, args[0].type)

    return shifted(shifted), codegen


@inline
def _exp32(x) -> Any:
    x = larger(_LOWEST32, x)
    shifted = x * _INV_LN2_32 + _MAGIC32
    n = shifted - _MAGIC32
    high = x - n * _LN2_HIGH32
    r = high - n * _LN2_LOW32
    r2 = r * r
    p = (_P32[4] * r2 + (_P32[3] * r + _P32[2])) * r2 + (_P32[1] * r + _P32[0])
    scale = _power(shifted)
    return ((high + (p * r2 - n * _LN2_LOW32)) * scale + scale) * _TINY32


@inline
def _exp64(x) -> Any:
    x = larger(_LOWEST64, x)
    shifted = x * _INV_LN2_64 + _MAGIC64
    n = shifted - _MAGIC64
    high = x - n * _LN2_HIGH64
    r = high - n * _LN2_LOW64
    r2 = r * r
    r4 = r2 * r2
    p0 = (_P64[3] * r + _P64[2]) * r2 + (_P64[1] * r + _P64[0])
    p4 = (_P64[7] * r + _P64[6]) * r2 + (_P64[5] * r + _P64[4])
    p = ((_P64[9] * r + _P64[8]) * r4 + p4) * r4 + p0
    scale = _power(shifted)
    return ((high + (p * r2 - n * _LN2_LOW64)) * scale + scale) * _TINY64


def exp(x: Any) -> Any:
    """e^x for x <= 1, to 1 ulp, subnormal results included; NaN gives NaN and -inf gives 0. A number, or `Lanes`."""
    return np.exp(x)


@overload(exp)
def _exp(x) -> Callable[..., Any]:
    if getattr(x, "dtype", x) == types.float64:
        return lambda x: _exp64(x)
    return lambda x: _exp32(x)
