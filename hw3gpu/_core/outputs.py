"""Where results go: arrays of the caller's kind, dtype, device and layout, and an array as (outer, axis, inner)."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable

import numpy as np

from . import arrays, pool
from .arrays import Array, namespace
from .check import dtype_name
from .dispatch import _BITS, _host_view, _torch_view


def fold(x: Array, axis: int | None) -> Array:
    """`x` as (outer, x.shape[axis], inner), the axes before and after `axis` merged; (1, 1, size) for `axis=None`.

    A view wherever one stride can describe the merged axes (contiguous, channels-last, slices of the outermost axis or
    of `axis`); otherwise a contiguous copy.
    """
    if axis is None:
        return x.reshape(1, 1, math.prod(x.shape))
    shape = x.shape
    if axis == 1 and len(shape) == 3:
        return x
    try:
        sizes = _folded_sizes(shape, axis)
    except TypeError:  # symbolic sizes have no hash
        sizes = _folded_sizes.__wrapped__(shape, axis)
    return x.view(sizes) if hasattr(x, "is_cpu") and x.is_contiguous() else x.reshape(sizes)


@functools.lru_cache(1024)
def _folded_sizes(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def folded(x: Array, axis: int, which: str) -> Array:
    """`fold` of `x`, as an operand of the kernels of `which`."""
    # outside of autograd a view of a tensor has no graph to be detached from; NumPy's views are the cheaper ones
    return fold(_host_view(x), axis) if which == "cpu" else _torch_view(fold(x, axis))


def output_like(x: Array, axis: int | None) -> tuple[Array, Array]:
    """An uninitialised array of `x`'s kind, dtype, device and layout, and its `fold` about `axis`, a view of it."""
    return output(x, axis, lambda out: out)


def output(x: Array, axis: int | None, view: Callable[[Array], Array]) -> tuple[Array, Array]:
    """As `output_like`, with the fold of `view(output)` as the second result: a kernel operand (`dispatch.kernel_view`)."""
    out = empty_like(x)
    seen = view(out)
    folded = fold(seen, axis)
    if not _is_contiguous(out) and _address(folded) != _address(seen):
        out = empty(tuple(x.shape), dtype_name(x), x)
        folded = fold(view(out), axis)
    return out, folded


def _is_contiguous(x: Array) -> bool:
    """Whether `x` is contiguous; False for CuPy arrays, where the question takes long."""
    return x.is_contiguous() if hasattr(x, "is_cpu") else isinstance(x, np.ndarray) and x.flags.c_contiguous


def empty_like(x: Array) -> Array:
    """An uninitialised array of `x`'s kind, dtype, device and layout, in recycled memory where it is large."""
    if x.nbytes >= pool.SMALLEST and arrays.on_host(x):
        xp = namespace(x)
        # the strides that the array module would choose; none of these touches memory
        if xp is np:
            like = np.empty_like(x)
        else:
            like = x if x.is_contiguous() else xp.empty_like(x, device="meta")
        out = _pooled(like.shape, like.strides if xp is np else like.stride(), dtype_name(x), x)
        if out is not None:
            return out
    return sys.modules["torch"].empty_like(x) if hasattr(x, "is_cpu") else namespace(x).empty_like(x)


def _pooled(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str, like: Array) -> Array | None:
    """An uninitialised array of `like`'s kind in recycled memory, `strides` in the kind's own units (None: contiguous).

    None where memory is not recycled: on a GPU, for small arrays, with the pool off, and for subclasses of the plain array.
    """
    if type(like) is np.ndarray:
        memory = pool.empty(shape, np.dtype(dtype), strides)
        return None if memory is None else memory.view(np.ndarray)
    torch = sys.modules.get("torch")
    if torch is None or type(like) not in (torch.Tensor, torch.nn.Parameter) or not like.is_cpu:
        return None
    bits = _BITS.get(dtype) or np.dtype(dtype)
    memory = pool.empty(shape, bits, None if strides is None else [stride * bits.itemsize for stride in strides])
    if memory is None:
        return None
    out = torch.from_numpy(memory)
    of = getattr(torch, dtype)
    # `set_` and no view in another dtype, so that the result is nobody's view to autograd
    return out if out.dtype is of else torch.empty(0, dtype=of).set_(out.untyped_storage(), 0, out.shape, out.stride())


def _address(x: Array) -> int:
    return (
        x.data_ptr()
        if hasattr(x, "data_ptr")
        else x.__array_interface__["data"][0]
        if isinstance(x, np.ndarray)
        else x.data.ptr
    )


def empty(shape: tuple[int, ...], dtype: str, like: Array) -> Array:
    """An uninitialised array of `like`'s kind and device."""
    out = _pooled(shape, None, dtype, like)
    if out is not None:
        return out
    xp = namespace(like)
    if hasattr(like, "is_cpu"):
        return xp.empty(shape, dtype=getattr(xp, dtype), device=like.device)
    return xp.empty(shape, dtype)
