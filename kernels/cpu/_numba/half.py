"""bfloat16 and float16 to float32 and back, for numbers and vectors; float16 by the processor's instruction or without.

bfloat16 is the upper half of a float32. x86-64 has the instruction for float16 since F16C (2012). Without it LLVM calls
functions of the compiler's library for each number, which a Python process need not have loaded: the call would jump to
address 0. There the conversions are arithmetic on bits.
"""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from .internals import processor

_PROBE = """
target triple = "{triple}"
define float @widened(half %x) {{
  %y = fpext half %x to float
  ret float %y
}}
define half @narrowed(float %x) {{
  %y = fptrunc float %x to half
  ret half %y
}}
"""
# in the bits of a float32: the difference of the exponents' biases, the smallest normal float16, and a number whose last bit is
# that of a subnormal float16
_BIAS = (127 - 15) << 23
_SMALLEST_NORMAL = (127 - 14) << 23
_UNIT_OF_SUBNORMALS = (127 - 15 + 23 - 10 + 1) << 23


@functools.cache
def has_instruction(triple: str, cpu: str, features: str) -> bool:
    """True where LLVM's code for that processor converts by instructions."""
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvm.parse_assembly(_PROBE.format(triple=triple)))
    return not any(name in assembly for name in ("extendhfsf2", "truncsfhf2", "gnu_h2f", "gnu_f2h"))


def like(of: Any, element: Any) -> Any:
    """The type `element`, or a vector of it as long as the vector `of`."""
    return ir.VectorType(element, of.count) if isinstance(of, ir.VectorType) else element


def every(of: Any, number: int) -> Any:
    """The number, or a vector of it."""
    return ir.Constant(of, [number] * of.count if isinstance(of, ir.VectorType) else number)


def from_memory(context: Any, builder: Any, value: Any, dtype: Any) -> Any:
    """Elements of an array of `dtype` as numbers to compute with: bfloat16 (uint16) and float16 (int16) as float32; exact."""
    if dtype == types.uint16:
        word = like(value.type, ir.IntType(32))
        bits = builder.shl(builder.zext(value, word), every(word, 16))
        return builder.bitcast(bits, like(word, ir.FloatType()))
    return to_float(context, builder, value) if dtype == types.int16 else value


def to_memory(context: Any, builder: Any, value: Any, dtype: Any) -> Any:
    """The inverse of `from_memory`, rounded to nearest, ties to even; NaN stays NaN. float16 comes as halves."""
    if dtype != types.uint16:
        return from_float(context, builder, value) if dtype == types.int16 else value
    word = like(value.type, ir.IntType(32))
    bits = builder.bitcast(value, word)
    # add 0x7FFF and the last kept bit, keep the upper 16 bits
    last = builder.and_(builder.lshr(bits, every(word, 16)), every(word, 1))
    rounded = builder.add(builder.add(bits, every(word, 0x7FFF)), last)
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), every(word, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, every(word, 16)), like(word, ir.IntType(16)))


def to_float(context: Any, builder: Any, value: Any) -> Any:
    """float16 values, or their bits as int16, as float32; exact."""
    floating = like(value.type, ir.FloatType())
    if has_instruction(*processor(context.codegen())):
        return builder.fpext(builder.bitcast(value, like(value.type, ir.HalfType())), floating)
    word = like(value.type, ir.IntType(32))
    bits = builder.zext(builder.bitcast(value, like(value.type, ir.IntType(16))), word)
    shifted = builder.shl(builder.and_(bits, every(word, 0x7FFF)), every(word, 13))
    normal = builder.add(shifted, every(word, _BIAS))
    # the exponent of infinity and NaN is the largest in both
    special = builder.add(shifted, every(word, 2 * _BIAS))
    # 2^-14 (1 + fraction) - 2^-14: no operand is subnormal, so that it holds where those count as 0
    smallest = builder.bitcast(every(word, _SMALLEST_NORMAL), floating)
    subnormal = builder.fsub(builder.bitcast(builder.add(shifted, every(word, _SMALLEST_NORMAL)), floating), smallest)
    is_special = builder.icmp_unsigned(">=", shifted, every(word, 0x1F << 23))
    is_subnormal = builder.icmp_unsigned("<", shifted, every(word, 1 << 23))
    result = builder.select(is_special, special, normal)
    result = builder.select(is_subnormal, builder.bitcast(subnormal, word), result)
    sign = builder.shl(builder.and_(bits, every(word, 0x8000)), every(word, 16))
    return builder.bitcast(builder.or_(result, sign), floating)


def from_float(context: Any, builder: Any, value: Any) -> Any:
    """float32 rounded to nearest, ties to even, as halves; what is beyond them is infinity, NaN stays NaN."""
    half = like(value.type, ir.HalfType())
    if has_instruction(*processor(context.codegen())):
        return builder.fptrunc(value, half)
    word = like(value.type, ir.IntType(32))
    bits = builder.bitcast(value, word)
    sign = builder.and_(bits, every(word, -1 << 31))
    size = builder.xor(bits, sign)
    # half a unit less 1, and the unit's own last bit, as bfloat16 is rounded; the carry may reach infinity
    odd = builder.and_(builder.lshr(size, every(word, 13)), every(word, 1))
    normal = builder.add(builder.sub(size, every(word, _BIAS)), builder.add(odd, every(word, 0xFFF)))
    normal = builder.lshr(normal, every(word, 13))
    # the addition rounds to a subnormal half's unit
    unit = every(word, _UNIT_OF_SUBNORMALS)
    sum_ = builder.fadd(builder.bitcast(size, value.type), builder.bitcast(unit, value.type))
    subnormal = builder.sub(builder.bitcast(sum_, word), unit)
    result = builder.select(builder.icmp_unsigned("<", size, every(word, _SMALLEST_NORMAL)), subnormal, normal)
    beyond = builder.icmp_unsigned(">=", size, every(word, (127 + 16) << 23))
    is_nan = builder.icmp_unsigned(">", size, every(word, 0xFF << 23))
    special = builder.select(is_nan, every(word, 0x7E00), every(word, 0x7C00))
    result = builder.or_(builder.select(beyond, special, result), builder.lshr(sign, every(word, 16)))
    return builder.bitcast(builder.trunc(result, like(value.type, ir.IntType(16))), half)
