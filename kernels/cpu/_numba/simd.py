"""Explicit vectors: `Lanes`, a vector of adjacent elements as one value, for loops that LLVM's vectoriser leaves too slow.

A `Lanes` value has two cache lines of accumulators, 32 float32 or 16 float64; LLVM maps it to the registers of the machine.
+, - and * work lane by lane, with numbers too. `load_lanes` and `store_lanes` convert as `load` and `store` of `elements.py`
do. Both take the number of lanes that exist (a constant costs nothing), so that the last elements of a row are one more vector
and need no loop of their own. Neither touches memory beyond these lanes, not even where a processor would allow it.

`stream_lanes` writes past the caches (non-temporal stores). An ordinary store into a line that is in no cache reads the line
first: a large result would be moved twice, and would evict what is read again. `prefetch` loads a line into the cache ahead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin

from . import half
from .compile import inline
from .internals import AbstractTemplate, cgutils, infer_global, make_array, models, register_default
from .internals import signature as typed

# Bytes of a cache line, and of the smallest result that is written past the caches.
LINE = 64
LARGE = 4 << 20

_FLOATING = (types.float32, types.float64, types.uint16, types.int16)
_BYTE, _WORD, _INT = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_CONTRACT = ("contract",)


class Lanes(types.Type):
    """`count` numbers of `dtype`."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(f"Lanes({dtype}, {count})")


@register_default(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, of: Any) -> None:
        element = ir.DoubleType() if of.dtype == types.float64 else ir.FloatType()
        super().__init__(manager, of, ir.VectorType(element, of.count))


def _lanes_of(dtype: Any) -> Lanes:
    return Lanes(types.float64, 16) if dtype == types.float64 else Lanes(types.float32, 32)


@intrinsic
def width(typingctx: Any, row: Any) -> Any:
    """How many lanes a vector of `row` has."""
    count = _lanes_of(row.dtype).count
    return types.intp(row), lambda context, builder, signature, args: context.get_constant(types.intp, count)


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_WORD, vector.count), None))


def _operand(context: Any, builder: Any, value: Any, of: Any, lanes: Any) -> Any:
    """`value` as `lanes`: a vector unchanged, a number in every lane."""
    if of == lanes:
        return value
    return _splat(builder, context.cast(builder, value, of, lanes.dtype), context.get_value_type(lanes))


def _lane_by_lane(result: Callable[..., Any], a: Any, b: Any) -> Callable[..., Any]:
    """The code of `result(builder, a, b)`, lane by lane, for operands of types a and b: `Lanes` or numbers."""
    lanes = a if isinstance(a, Lanes) else b

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, right = (_operand(context, builder, v, of, lanes) for v, of in zip(args, (a, b), strict=True))
        return result(builder, left, right)

    return codegen


def _of_lanes(result: Callable[..., Any]) -> Any:
    """The intrinsic that computes `result(builder, a, b)` lane by lane."""

    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        return (a if isinstance(a, Lanes) else b)(a, b), _lane_by_lane(result, a, b)

    return operation


def _choice(comparison: str, then: str) -> Callable[..., Any]:
    """Lane by lane: a where `a comparison b` holds, else b (then "a"); or 1 and 0 (then "1")."""

    def result(builder: Any, a: Any, b: Any) -> Any:
        unordered = comparison == "!="
        flag = (builder.fcmp_unordered if unordered else builder.fcmp_ordered)(comparison, a, b)
        if then == "a":
            return builder.select(flag, a, b)
        return builder.uitofp(flag, a.type)

    return result


def _product_or_zero(builder: Any, q: Any, d: Any) -> Any:
    zero = ir.Constant(q.type, None)
    return builder.select(builder.fcmp_ordered("==", q, zero), zero, builder.fmul(q, d))


larger = _of_lanes(_choice(">", "a"))  # a where a > b, else b; so b where either is NaN
unequal = _of_lanes(_choice("!=", "1"))  # 1 where a differs from b, else 0


def _where(comparison: str) -> Any:
    """The intrinsic that gives x where `a comparison b` holds, else y, also where a or b is a NaN; one of the four at least is
    `Lanes`."""

    @intrinsic
    def choice(typingctx: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
        lanes = next(v for v in (a, b, x, y) if isinstance(v, Lanes))

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            left, right, then, otherwise = (
                _operand(context, builder, v, of, lanes) for v, of in zip(args, (a, b, x, y), strict=True)
            )
            return builder.select(builder.fcmp_ordered(comparison, left, right), then, otherwise)

        return lanes(a, b, x, y), codegen

    return choice


where_below = _where("<")
where_at_most = _where("<=")


@intrinsic
def lanes_where(typingctx: Any, on: Any, i: Any, exist: Any, v: Any) -> Any:
    """`v` in the lanes whose byte of on[i : i + exist] is not 0, else 0, whatever `v` is there."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bytes_of_lanes = ir.VectorType(_BYTE, v.count)
        pointer = _pointer(context, builder, on, args[0], context.cast(builder, args[1], i, types.intp), bytes_of_lanes)
        flags = _load(builder, pointer, 1, context.cast(builder, args[2], exist, types.intp), _BYTE(0))
        chosen = builder.icmp_unsigned("!=", flags, ir.Constant(bytes_of_lanes, None))
        return builder.select(chosen, args[3], ir.Constant(args[3].type, None))

    return v(on, i, exist, v), codegen


times = _of_lanes(_product_or_zero)  # q d, and 0 where q is 0 whatever d is


def _operator(operation: Callable[..., Any], instruction: str) -> None:
    """Compiles `operation` of `Lanes` (and numbers) to one instruction. An overload would take longer to compile."""

    @infer_global(operation)
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            lanes = [a for a in args if isinstance(a, Lanes)]
            return typed(lanes[0], *args) if lanes and len(args) == 2 else None

    def lowered(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _lane_by_lane(lambda builder, a, b: getattr(builder, instruction)(a, b, flags=_CONTRACT), *signature.args)
        return code(context, builder, signature, args)

    for kinds in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(operation, *kinds)(lowered)


for _operation, _instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _operator(_operation, _instruction)


# ---------------------------------------------------------------------------------------------- within a vector
@intrinsic
def wide(typingctx: Any, v: Any) -> Any:
    """The same numbers in float64."""
    result = Lanes(types.float64, v.count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if v.dtype == types.float64 else builder.fpext(args[0], context.get_value_type(result))

    return result(v), codegen


@intrinsic
def first_lanes(typingctx: Any, v: Any, exist: Any) -> Any:
    """`v` with 0 in the lanes from `exist` on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        exists = _existing(builder, v.count, context.cast(builder, args[1], exist, types.intp))
        return builder.select(exists, args[0], ir.Constant(args[0].type, None))

    return v(v, exist), codegen


@intrinsic
def with_lane(typingctx: Any, v: Any, k: Any, value: Any) -> Any:
    """`v` with `value` in lane k; unchanged where there is no lane k."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = context.cast(builder, args[1], k, types.intp)
        result = cgutils.alloca_once_value(builder, args[0])
        with cgutils.if_unlikely(builder, builder.icmp_unsigned("<", lane, ir.Constant(_INT, v.count))):
            number = context.cast(builder, args[2], value, v.dtype)
            builder.store(builder.insert_element(args[0], number, lane), result)
        return builder.load(result)

    return v(v, k, value), codegen


@intrinsic
def zeros_like(typingctx: Any, v: Any) -> Any:
    return v(v), lambda context, builder, signature, args: ir.Constant(args[0].type, None)


def _folded(builder: Any, value: Any, join: Callable[..., Any]) -> Any:
    """Joins the lanes to one number, the upper half onto the lower half each time: in one order on every machine."""
    count = value.type.count
    while count > 1:
        count //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        halves = (
            builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(_WORD, count), [*range(k, k + count)]))
            for k in (0, count)
        )
        value = join(builder, *halves)
    return builder.extract_element(value, ir.Constant(_WORD, 0))


@intrinsic
def sum_of(typingctx: Any, v: Any) -> Any:
    """The sum over the lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], lambda builder, a, b: builder.fadd(a, b))

    return v.dtype(v), codegen


@intrinsic
def largest_of(typingctx: Any, v: Any) -> Any:
    """The largest lane, by `larger`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], _choice(">", "a"))

    return v.dtype(v), codegen


# ---------------------------------------------------------------------------------------------- memory
def _is_row(row: Any) -> bool:
    return isinstance(row, types.Array) and row.ndim == 1 and row.layout == "C" and row.dtype in _FLOATING


def _memory_type(row: Any, lanes: Any) -> Any:
    """The vector of the row's elements as they are in memory, one a lane."""
    element = {types.float64: ir.DoubleType(), types.float32: ir.FloatType(), types.uint16: ir.IntType(16)}
    return ir.VectorType(element.get(row.dtype, ir.HalfType()), lanes.count)


def _pointer(context: Any, builder: Any, row: Any, value: Any, index: Any, to: Any) -> Any:
    array = make_array(row)(context, builder, value)
    pointer = cgutils.get_item_pointer(context, builder, row, array, [index], wraparound=False)
    return builder.bitcast(pointer, to.as_pointer())


def _existing(builder: Any, count: int, exist: Any) -> Any:
    """True for the first `exist` of `count` lanes, 0 <= exist <= count."""
    numbers = ir.Constant(ir.VectorType(_WORD, count), [*range(count)])
    return builder.icmp_signed("<", numbers, _splat(builder, builder.trunc(exist, _WORD), numbers.type))


def _load_first(builder: Any, pointer: Any, align: int, exist: Any, rest: Any) -> Any:
    """The 0 <= `exist` < count elements at `pointer`, then `rest`: pieces of 16, 8, 4, 2 and 1, one a bit of `exist`.

    LLVM's masked load is not used. LLVM divides one that is wider than a register, and where another select has the same mask
    LLVM 22's code for AVX-512 reads lanes that do not exist.
    """
    vector = pointer.type.pointee
    first = builder.bitcast(pointer, vector.element.as_pointer())
    size, value = 1, _splat(builder, rest, ir.VectorType(vector.element, 1))
    while size < vector.count:  # value: exist % size elements, then `rest`; size lanes
        piece = ir.VectorType(vector.element, size)
        both = ir.Constant(ir.VectorType(_WORD, 2 * size), [*range(2 * size)])
        without, before = builder.shuffle_vector(value, _splat(builder, rest, piece), both), builder.block
        with builder.if_then(cgutils.is_not_null(builder, builder.and_(exist, exist.type(size)))):
            start = builder.gep(first, [builder.and_(exist, exist.type(-2 * size))])
            loaded = builder.load(builder.bitcast(start, piece.as_pointer()), align=align)
            joined, loading = builder.shuffle_vector(loaded, value, both), builder.block
        value = builder.phi(without.type)
        value.add_incoming(without, before)
        value.add_incoming(joined, loading)
        size *= 2
    return value


def _load(builder: Any, pointer: Any, align: int, exist: Any, rest: Any) -> Any:
    """The `exist` elements at `pointer`, then `rest`: a plain load where all exist (no branch where LLVM can prove it)."""
    count = pointer.type.pointee.count
    with builder.if_else(builder.icmp_signed("==", exist, exist.type(count))) as (then, otherwise):
        with then:
            loaded, of_all = builder.load(pointer, align=align), builder.block
        with otherwise:
            joined = _load_first(builder, pointer, align, exist, rest)
            of_some = builder.block
    value = builder.phi(loaded.type)
    value.add_incoming(loaded, of_all)
    value.add_incoming(joined, of_some)
    return value


@intrinsic
def load_lanes_like(typingctx: Any, row: Any, i: Any, exist: Any, rest: Any, like: Any) -> Any:
    """As `load_lanes`, in a vector of `like`'s width and precision."""
    if not _is_row(row):
        return None
    lanes = _lanes_of(like.dtype)
    computed = types.float64 if row.dtype == types.float64 else types.float32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _memory_type(row, lanes)
        pointer = _pointer(context, builder, row, args[0], context.cast(builder, args[1], i, types.intp), vector)
        others = half.to_memory(context, builder, context.cast(builder, args[3], rest, computed), row.dtype)
        value = _load(
            builder, pointer, row.dtype.bitwidth // 8, context.cast(builder, args[2], exist, types.intp),
            builder.bitcast(others, vector.element),
        )  # fmt: skip
        value, wanted = half.from_memory(context, builder, value, row.dtype), context.get_value_type(lanes)
        if value.type.element != wanted.element:
            narrow = wanted.element == ir.FloatType() and row.dtype == types.float64
            value = (builder.fptrunc if narrow else builder.fpext)(value, wanted)
        return value

    return lanes(row, i, exist, rest, like), codegen


@inline
def load_lanes(row, i, exist, rest) -> Lanes:
    """row[i : i + exist], then `rest` in the other lanes; rest is 0 or an infinity, 0 <= exist <= width(row)."""
    return load_lanes_like(row, i, exist, rest, row)


@intrinsic
def store_lanes(typingctx: Any, row: Any, i: Any, exist: Any, v: Any) -> Any:
    """row[i : i + exist] = the first lanes, rounded once."""
    if not (_is_row(row) and v == _lanes_of(row.dtype)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _memory_type(row, v)
        pointer = _pointer(context, builder, row, args[0], context.cast(builder, args[1], i, types.intp), vector)
        value, align = half.to_memory(context, builder, args[3], row.dtype), row.dtype.bitwidth // 8
        exists = context.cast(builder, args[2], exist, types.intp)
        whole = builder.icmp_signed("==", exists, ir.Constant(_INT, vector.count))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                builder.store(value, pointer, align=align)
            with otherwise:  # one by one: a masked store takes some 40 ns on AMD's processors
                there = cgutils.alloca_once(builder, vector)
                builder.store(value, there)
                source, target = (builder.bitcast(p, vector.element.as_pointer()) for p in (there, pointer))
                with cgutils.for_range(builder, exists) as loop:
                    element = builder.load(builder.gep(source, [loop.index]))
                    builder.store(element, builder.gep(target, [loop.index]), align=align)
        return context.get_dummy_value()

    return types.void(row, i, exist, v), codegen


@intrinsic
def stream_lanes(typingctx: Any, row: Any, i: Any, v: Any) -> Any:
    """row[i : i + width(row)] = v past the caches; the address is a multiple of the vector's bytes."""
    if not (_is_row(row) and v == _lanes_of(row.dtype)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = _memory_type(row, v)
        pointer = _pointer(context, builder, row, args[0], context.cast(builder, args[1], i, types.intp), vector)
        align = min(LINE, v.count * row.dtype.bitwidth // 8)
        store = builder.store(half.to_memory(context, builder, args[2], row.dtype), pointer, align=align)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_WORD, 1)]))
        return context.get_dummy_value()

    return types.void(row, i, v), codegen


@intrinsic
def prefetch(typingctx: Any, row: Any, i: Any) -> Any:
    """Prefetches the lines of row[i : i + width(row)]; an invalid address does nothing."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, row, args[0], context.cast(builder, args[1], i, types.intp), _BYTE)
        of = ir.FunctionType(ir.VoidType(), [pointer.type, _WORD, _WORD, _WORD])
        function = cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0i8")
        for line in range(0, _lanes_of(row.dtype).count * row.dtype.bitwidth // 8, LINE):
            there = builder.gep(pointer, [ir.Constant(_INT, line)])
            builder.call(function, [there, *(ir.Constant(_WORD, k) for k in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(row, i), codegen


@inline
def fetch(row) -> None:
    """Prefetches a whole row."""
    for i in range(0, row.size, LINE // row.itemsize):
        prefetch(row, i)


@intrinsic
def _address(typingctx: Any, row: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(make_array(row)(context, builder, args[0]).data, _INT)

    return types.intp(row), codegen


@intrinsic
def streamed(typingctx: Any) -> Any:
    """A fence: stores of `stream_lanes` are visible before any later store that tells another thread of them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@inline
def before_line(row) -> int:
    """How many elements of `row` come before its first whole cache line; -1 where elements are not aligned to their size."""
    head = -_address(row) % LINE
    return head // row.itemsize if head % row.itemsize == 0 else -1


# ---------------------------------------------------------------------------------------------- a row of results
@inline
def write(row, around, lanes, args) -> None:
    """row[i : i + exist] = lanes(i, exist, args), vector by vector; `lanes` is a compiled function.

    around: whole cache lines are written past the caches.
    """
    size, count = row.size, width(row)
    head = before_line(row) if around else -1
    i, stop = 0, min(max(head, 0), size)
    while True:  # the elements before the first line, the whole vectors, the last elements: `lanes` is compiled in twice
        while i < stop:
            exist = min(count, stop - i)
            store_lanes(row, i, exist, lanes(i, exist, args))
            i += exist
        if stop == size:
            break
        while i + count <= size:
            v = lanes(i, width(row), args)
            if head >= 0:
                stream_lanes(row, i, v)
            else:
                store_lanes(row, i, width(row), v)
            i += count
        stop = size
