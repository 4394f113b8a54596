"""Arrays by address, for small calls: a NumPy view of every tensor costs several times their arithmetic.

They are contiguous, which the caller has seen to (`hw3gpu/_torch/small_calls.py`); address 0 stands for a vector that is not
given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from .compile import inline


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """An address as a `void *`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), codegen


@intrinsic
def _of_any_strides(typingctx: Any, array: Any) -> Any:
    """The same array, of the type that kernels for all strides take."""
    return array.copy(layout="A")(array), lambda context, builder, signature, args: args[0]


@inline
def floats(address, shape):
    return carray(pointer(address), shape, np.float32)


@inline
def planes(address, N, C, S):
    """Floats (N, C, S), of the type that a launcher's arrays have: a kernel for these serves both."""
    return _of_any_strides(floats(address, (N, C, S)))


@inline
def vector_or(address, size, default):
    return floats(address, size) if address else np.full(size, np.float32(default), np.float32)
