"""Triton's interpreter, as it is in 3.6, 3.7 and 3.9, made to compute what a GPU does, and in a third of its time.

`hw3gpu verify`, the tests and the benchmarks run the Triton kernels in it where there is no GPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

_QUIET_NAN = np.uint16(0x7FC0)  # NVIDIA's and PyTorch's casts give different NaNs; any quiet one is right


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, uint16, of float32 values rounded to nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    # the carry out of the upper half moves to the next exponent, and from the largest number to infinity
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), _QUIET_NAN, rounded.astype(np.uint16))


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def mend_the_interpreter() -> None:
    """Let it compute what a GPU does, in this process, and in a third of the time; a second call changes nothing."""
    from triton.runtime import interpreter

    if hasattr(interpreter._convert_float, "__wrapped__"):
        return
    _round_as_a_gpu()
    _count_with_tensors()
    _splat_booleans()
    _reduce_by_halves()
    _patch_the_language_once()
    _make_types_once()
    _compare_types_once()
    _list_the_language_once()
    _operate_at_once()


def _in_place_of(owner: Any, name: str) -> Callable[[Any], Any]:
    """Decorates what takes the place of `owner.name`, and has that as its `__wrapped__`."""

    def replace(function: Any) -> Any:
        setattr(owner, name, functools.wraps(getattr(owner, name))(function))
        return function

    return replace


def _round_as_a_gpu() -> None:
    """Replace the casts between float32 and bfloat16, which truncate and spoil subnormals."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    @_in_place_of(interpreter, "_convert_float")
    def convert(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        # the callers view the result as the target's NumPy dtype; these arrays already have its width
        if source == tl.float32 and target == tl.bfloat16 and rounding_mode != toward_zero:
            return float32_to_bfloat16(np.ascontiguousarray(values).view(np.float32)).reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return bfloat16_to_float32(np.ascontiguousarray(values).view(np.uint16)).reshape(values.shape)
        return original(values, source, target, rounding_mode)


def _count_with_tensors() -> None:
    """Let a tensor of one element be a loop's bound where NumPy refuses to make an integer of it (Triton 3.6)."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    @_in_place_of(interpreter, "_patch_lang_tensor")
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _splat_booleans() -> None:
    """Let a comparison of numbers, spread over a block, be a mask still (Triton 3.9 refuses the integers that it becomes)."""
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_splat

    @_in_place_of(interpreter.InterpreterBuilder, "create_splat")
    def splat(self: Any, of: Any, value: Any) -> Any:
        result = original(self, of, value)
        if value.data.dtype == np.bool_:
            result.data = result.data.astype(np.bool_)
        return result


def _reduce_by_halves() -> None:
    """Reduce with a function of one's own whole halves at a time, where the interpreter goes element by element."""
    from triton.runtime.interpreter import ReduceOps

    @_in_place_of(ReduceOps, "generic_reduce")
    def reduce(self: Any, given: Any) -> Any:
        tensors, axis = self.unravel(given, self.axis)
        parts, length = list(tensors), tensors[0].handle.data.shape[axis]
        while length > 1:
            length //= 2
            halves = [
                self.to_tensor(np.take(part.handle.data, range(at, at + length), axis), part.dtype)
                for at in (0, length)
                for part in parts
            ]
            joined = self.combine_fn.fn(*halves)
            parts = list(joined) if isinstance(joined, tuple) else [joined]
        axes = axis if self.axis is not None and not self.keep_dims else None
        return [
            self.to_tensor(part.handle.data if self.keep_dims else np.squeeze(part.handle.data, axes), part.dtype)
            for part in parts
        ]


def _patch_the_language_once() -> None:
    """Triton patches all of triton.language again at each call of a device function: do it once a launch."""
    from triton.runtime import interpreter

    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[int, ...]] = set()

    @functools.cache
    def languages_of(fn: Any) -> tuple[int, ...]:
        return tuple(
            id(value)
            for value in fn.__globals__.values()
            if inspect.ismodule(value) and value in (interpreter.tl, interpreter.tl.core)
        )

    @_in_place_of(interpreter, "_patch_lang")
    def patch_new(fn: Any) -> Any:
        languages = languages_of(fn)
        if languages in patched:
            return None
        patched.add(languages)
        return patch(fn)

    @_in_place_of(interpreter.GridExecutor, "__call__")
    def call_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        with np.errstate(all="ignore"):  # a GPU computes lanes that a mask leaves out, and says nothing
            return call(self, *args, **kwargs)


def _make_types_once() -> None:
    """Triton makes types, shapes and NumPy dtypes again for every operation: keep them by name."""
    import triton.language as tl
    from triton.runtime import interpreter

    dtype_of, make_type, make_tensor = interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__
    dtypes: dict[str, np.dtype[Any]] = {}
    types: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    @_in_place_of(interpreter, "_get_np_dtype")
    def known_dtype(of: Any) -> np.dtype[Any]:
        if isinstance(of, tl.block_type):
            of = of.element_ty
        if of.name not in dtypes:
            dtypes[of.name] = dtype_of(of)
        return dtypes[of.name]

    @_in_place_of(tl.block_type, "__init__")
    def known_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key])
        self.element_ty = element_ty

    @_in_place_of(tl.tensor, "__init__")
    def known_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {key: value for key, value in self.__dict__.items() if key not in ("handle", "type")}
        self.__dict__.update(tensors[type.name])
        self.handle, self.type, self.dtype = handle, type, type.scalar


def _compare_types_once() -> None:
    """Triton compares equal types size by size, and casts values to their own dtype, for every operation: skip both."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    equal, cast, broadcast = tl.dtype.__eq__, TritonSemantic.cast, TritonSemantic.broadcast_impl_value

    @_in_place_of(tl.dtype, "__eq__")
    def equal_or_same(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    @_in_place_of(TritonSemantic, "cast")
    def cast_others(self: Any, input: Any, dst_ty: Any, *more: Any) -> Any:
        return input if input.type.scalar is dst_ty else cast(self, input, dst_ty, *more)

    @_in_place_of(TritonSemantic, "broadcast_impl_value")
    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        ours, theirs = lhs.type, rhs.type
        blocks = ours.is_block()
        if blocks is theirs.is_block() and (not blocks or [*ours.shape] == [*theirs.shape]):
            return lhs, rhs
        return broadcast(self, lhs, rhs)


def _list_the_language_once() -> None:
    """Triton looks up the functions to patch at each launch: keep the list."""
    import triton.language as tl
    from triton.runtime import interpreter

    members: dict[int, list[tuple[str, Any]]] = {}

    @_in_place_of(interpreter, "_patch_builtin")
    def patch(package: Any, builder: Any, scope: Any) -> None:
        if id(package) not in members:
            members[id(package)] = inspect.getmembers(package, tl.core.is_builtin)
        for name, member in members[id(package)]:
            interpreter._patch_attr(package, name, member, builder, scope)


_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_COMPARISONS |= {"eq": np.equal, "ne": np.not_equal}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or}
_NUMBERS: dict[str, Any] = {"fp32": np.float32, "fp64": np.float64, "int32": np.int32, "int64": np.int64}


def _operate_at_once() -> None:
    """Operators on two tensors of one dtype, or on a tensor and a number, are one call of NumPy, instead of thirty of Triton's.

    All other operands go through Triton.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    @_in_place_of(interpreter, "_patch_lang_tensor")
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        for operators, reflected in ((_ARITHMETIC, True), (_COMPARISONS, False), (_LOGIC, False)):
            for name, operator in operators.items():
                for method in (f"__{name}__", f"__r{name}__")[: 1 + reflected]:
                    theirs = getattr(tensor, method)
                    if not hasattr(theirs, "__wrapped__"):
                        scope.set_attr(tensor, method, _at_once(theirs, operator, method[2] == "r"))


def _at_once(theirs: Any, operator: Any, reflected: bool) -> Any:
    """Triton's method `theirs`, done by `operator` of NumPy where both operands are plain numbers of the same kind."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    compares = operator in _COMPARISONS.values()
    known = {"int1": np.bool_} if operator in _LOGIC.values() else _NUMBERS

    @functools.wraps(theirs)
    def operate(self: Any, other: Any, **more: Any) -> Any:
        value = other.value if type(other) is tl.constexpr else other
        dtype, ours, type_ = self.dtype, self.handle.data, self.type
        if dtype.name not in known or ours.dtype != known[dtype.name]:
            return theirs(self, other, **more)
        if type(value) is tl.tensor:
            operand = value.handle.data
            if operand.dtype != known.get(value.dtype.name):
                return theirs(self, other, **more)
            if value.dtype.name != dtype.name:
                if {value.dtype.name, dtype.name} != {"int32", "int64"}:
                    return theirs(self, other, **more)
                dtype, ours, operand = tl.int64, ours.astype(np.int64), operand.astype(np.int64)
            if not type_.is_block():
                type_ = value.type
        else:
            operand = _number(value, dtype.name, compares) if known is _NUMBERS else None
            if operand is None:
                return theirs(self, other, **more)
        left, right = (operand, ours) if reflected else (ours, operand)
        result = operator(left, right)
        of = tl.int1 if compares else dtype
        return tl.tensor(TensorHandle(result, of), tl.block_type(of, list(result.shape)) if type_.is_block() else of)

    return operate


def _number(value: Any, dtype: str, compares: bool) -> Any:
    """`value` in `dtype`, as Triton converts a number that is combined with a tensor; None for other cases."""
    if type(value) is float:
        # a number that a tensor is compared with is rounded to float32 first, whatever the tensor's dtype
        plain = dtype == "fp32" or (dtype == "fp64" and (not compares or value in (0.0, np.inf, -np.inf)))
        return _NUMBERS[dtype](value) if plain else None
    if type(value) is int and -(2**31) <= value < 2**31 and not (compares and dtype.startswith("fp")):
        return _NUMBERS[dtype](value)
    return None
