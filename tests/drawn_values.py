"""Values, layouts and what is held of a call, for `drawn_cases.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hw3gpu import _error_bounds, reference
from hw3gpu._cli.arrays import to_numpy
from hw3gpu._core.arrays import dtype_name
from measure import share_of_bound

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------- values and layouts
VALUES = ("normal", "far", "subnormal", "zeros", "1e30", "1e-30", "-inf", "inf", "nan")
FINITE = VALUES[:6]
DTYPES = ("float64", "float32", "float16", "bfloat16")
SMALLEST = {"float64": 5e-324, "float32": 1.4e-45, "float16": 6e-8, "bfloat16": 9.2e-41}
LAYOUTS = ("contiguous", "last axis outermost", "sliced", "shifted", "broadcast", "overlapping")
NUMPYS = (*LAYOUTS, "reversed", "unaligned")
# primes, powers of two and their neighbours
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 255, 256, 257, 513, 1021, 1025)


def numbers(kind: str, shape: Any, dtype: str, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(shape)
    if kind == "far":
        return 100.0 + x
    if kind == "subnormal":
        return SMALLEST[dtype] * np.trunc(10 * x)
    if kind == "zeros":
        return np.copysign(0.0, x)
    if kind in ("1e30", "1e-30"):
        return x * ((2e4 if kind == "1e30" else 1e-6) if dtype == "float16" else float(kind))
    if kind in ("-inf", "inf", "nan"):
        return np.where(rng.random(shape) < 0.15, float(kind), x)
    return x


def array_of(kind: str, values: np.ndarray, dtype: str, layout: str) -> Any:
    """An array of NumPy or torch in a layout; "broadcast" and "overlapping" have fewer values than elements."""
    values = np.ascontiguousarray(values)
    if layout == "unaligned":
        flat = np.zeros(values.size * np.dtype(dtype).itemsize + 1, np.uint8)[1:].view(dtype)
        flat[...] = values.reshape(-1).astype(dtype)
        return flat.reshape(values.shape)

    def plain(x: np.ndarray) -> Any:
        x = np.ascontiguousarray(x)
        return x.astype(dtype) if kind == "numpy" else torch.from_numpy(x.copy()).to(getattr(torch, dtype))

    with np.errstate(all="ignore"):
        if layout == "last axis outermost" and values.ndim > 1:
            x = plain(np.moveaxis(values, -1, 0))
            return np.moveaxis(x, 0, -1) if kind == "numpy" else x.movedim(0, -1)
        if layout == "sliced":
            return plain(np.stack([values, np.full_like(values, np.nan)], -1))[..., 0]
        if layout == "shifted":
            return plain(np.concatenate([[np.nan], values.reshape(-1)]))[1:].reshape(values.shape)
        if layout == "reversed":
            return plain(values[..., ::-1])[..., ::-1]
        if layout == "broadcast" and values.ndim and values.shape[0]:
            x = plain(values[:1])
            return np.broadcast_to(x, values.shape) if kind == "numpy" else x.expand(values.shape)
        if layout == "overlapping" and values.ndim and values.size:
            flat = plain(values.reshape(-1)[: sum(values.shape)])
            if len(flat) >= sum(values.shape) - values.ndim + 1:
                strides = (1,) * values.ndim
                if kind == "torch":
                    return flat.as_strided(values.shape, strides)
                step = flat.itemsize
                return np.lib.stride_tricks.as_strided(flat, values.shape, [step] * values.ndim, writeable=False)
        return plain(values)


def rows_rng(row: Row) -> np.random.Generator:
    """The same numbers for the same row, in every process."""
    return np.random.default_rng(list(hashlib.blake2b(repr(sorted(row.items())).encode(), digest_size=8).digest()))


# ---------------------------------------------------------------------------------------------- what is held
def bits(x: Any) -> bytes:
    if x is None:
        return b""
    if isinstance(x, torch.Tensor):
        x = torch.empty(x.shape, dtype=x.dtype).copy_(x.detach()).reshape(-1).view(torch.uint8).numpy()
    return np.asarray(x).tobytes()


def twice(function: Callable[[], tuple[Any, ...]], *inputs: Any) -> tuple[Any, ...]:
    """The results of a call that changes none of `inputs`, and gives the same bits again."""
    before = [hashlib.sha256(bits(x)).digest() for x in inputs]
    first, second = function(), function()
    assert [hashlib.sha256(bits(x)).digest() for x in inputs] == before, "an argument was changed"
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert bits(a) == bits(b), f"output {i} has other bits on a second run"
    return first


def hold(name: str, actual: Any, expected: Any, bound: Any, more: float = 1.0) -> None:
    """`actual` within its bound, `more` times that where PyTorch's operations take the place of kernels."""
    expected = np.asarray(expected, dtype=np.float64)
    with np.errstate(all="ignore"):
        bound = np.broadcast_to(np.where(np.isfinite(bound), bound, 1e307), expected.shape) * more
        share = share_of_bound(to_numpy(actual), expected, dtype_name(actual), bound)
    assert share <= 1, f"{name}: {share:.3g} of the bound; got {to_numpy(actual)!r:.600}, expected {expected!r:.600}"


def judged(name: str, *args: Any, dtype: str, **options: Any) -> tuple[Any, Any]:
    """What the answer sheet has, and how far rounding may go."""
    with np.errstate(all="ignore"):
        return getattr(reference, name)(*args, **options), getattr(_error_bounds, name)(*args, **options, dtype=dtype)
