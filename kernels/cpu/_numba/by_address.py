"""Arrays by address, for small calls: making a NumPy view of each tensor takes several times as long as the arithmetic.

The caller has checked that they are contiguous (`hw3gpu/_torch/small_calls.py`). Address 0 means a vector that is not given.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from .compile import inline, overload
from .compile import kernel as compiled
from .internals import call, cgutils, compiled_for, make_array, raise_error, unowned


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """An address as a `void *`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), codegen


@intrinsic
def _of_any_strides(typingctx: Any, array: Any) -> Any:
    """The same array, of the type of arrays with any strides."""
    return array.copy(layout="A")(array), lambda context, builder, signature, args: args[0]


@inline
def floats(address, shape) -> np.ndarray:
    return carray(pointer(address), shape, np.float32)


@inline
def planes(address, N, C, S) -> np.ndarray:
    """float32 (N, C, S), of the type of a launcher's arrays, so that both call the same compiled kernel."""
    return _of_any_strides(floats(address, (N, C, S)))


def planes_or_none(address: Any, N: Any, C: Any, S: Any) -> Any:
    """`planes`, or None where the address is None."""


@overload(planes_or_none)
def _choose_planes(address, N, C, S) -> Any:
    if address == types.none:
        return lambda address, N, C, S: None
    return lambda address, N, C, S: planes(address, N, C, S)


@inline
def vector_or(address, size, default) -> np.ndarray:
    return floats(address, size) if address else np.full(size, np.float32(default), np.float32)


@functools.cache
def at_addresses(kernel: Any) -> Any:
    """`kernel(first, last, *args)` as f(first, last, *args, *addresses): each array, in order, with its elements at an address.

    The arrays in `args` give dtype, shape and strides; their own elements are not touched.
    """

    def at(first, last, *args) -> None:
        _call_at(kernel, first, last, args)

    original = kernel.py_func
    at.__module__, at.__name__ = original.__module__, f"{original.__name__}_at"
    at.__qualname__ = f"{original.__qualname__}_at"
    return compiled(at)


@intrinsic
def _call_at(typingctx: Any, kernel: Any, first: Any, last: Any, args: Any) -> Any:
    own = len(args) - sum(isinstance(of, types.Array) for of in args)  # at the end an address for each array
    called = compiled_for(typingctx, kernel, (types.intp, types.intp, *list(args)[:own]))

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, first, last, packed = values
        unpacked = cgutils.unpack_tuple(builder, packed, len(args))
        addresses, given = iter(unpacked[own:]), []
        for of, value in zip(list(args)[:own], unpacked[:own], strict=True):
            if isinstance(of, types.Array):
                array = make_array(of)(context, builder, value)
                array.data = builder.inttoptr(next(addresses), array.data.type)
                value = unowned(array)
            given.append(value)
        with cgutils.if_unlikely(builder, call(context, builder, called, (first, last, *given))):
            raise_error(context, builder, MemoryError, "a kernel found no memory")
        return context.get_dummy_value()

    return types.void(kernel, types.intp, types.intp, args), codegen
