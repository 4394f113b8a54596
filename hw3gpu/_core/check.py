"""Every argument check and its message: the argument, what was expected, what was given.

The checks look at `.shape`, `.ndim` and the name of `.dtype` alone, which NumPy, CuPy and torch arrays share, and run before
anything is allocated. `TypeError` for kinds and dtypes, `ValueError` for shapes and values.
"""

from __future__ import annotations

import functools
import numbers
from operator import index
from typing import Any

import numpy as np

Array = Any

FLOATING = ("float16", "bfloat16", "float32", "float64")
INTEGER = ("uint8", "int8", "int16", "int32", "int64")


# Each is also of the type that PyTorch raises for the same argument, so that code which catches PyTorch's catches ours.
class ShapeError(ValueError, RuntimeError):
    """A wrong shape, or a wrong value."""


class RankError(ValueError, IndexError, RuntimeError):
    """Too few axes."""


class DtypeError(TypeError, NotImplementedError):
    """A wrong dtype."""


class ChoiceError(TypeError, ValueError):
    """An argument that should name one of several choices, and is no string."""


def dtype_name(x: Array) -> str:
    """'float32', 'bfloat16', 'int64', … for an array of any kind; '>f4' in the other byte order than this machine's."""
    return _numpy_name(x.dtype) if isinstance(x.dtype, np.dtype) else str(x.dtype).removeprefix("torch.")


@functools.lru_cache(64)
def _numpy_name(dtype: np.dtype) -> str:  # NumPy takes microseconds to say it
    return str(dtype)


def got_dtype(x: Array, name: str) -> str:
    """The dtype of `x` as it ends a message; how to convert it, where its bytes are in the other order than this machine's."""
    other_order = isinstance(x.dtype, np.dtype) and not x.dtype.isnative
    how = f", in the other byte order: {name}.astype({x.dtype.newbyteorder('=').name!r}) converts it" if other_order else ""
    return f"got {dtype_name(x)}{how}"


def shape_of(x: Array) -> str:
    """A shape for a message: '(32, 3, 28, 28)'."""
    return str(tuple(x.shape))


def floating(x: Array, name: str, allowed: tuple[str, ...] = FLOATING) -> None:
    """TypeError unless `x` holds one of the floating dtypes `allowed`."""
    if dtype_name(x) not in allowed:
        raise DtypeError(f"{name}: expected dtype {', '.join(allowed)}, {got_dtype(x, name)}")


def integer(x: Array, name: str) -> None:
    """TypeError unless `x` holds integer classes."""
    if dtype_name(x) not in INTEGER:
        raise DtypeError(f"{name}: expected integer classes ({', '.join(INTEGER)}), {got_dtype(x, name)}")


def same_dtype(x: Array, name: str, other: Array, other_name: str) -> None:
    """TypeError unless both arrays have one dtype."""
    if dtype_name(x) != dtype_name(other):
        raise DtypeError(f"{name}: expected the dtype of {other_name}, {dtype_name(other)}, {got_dtype(x, name)}")


def same_shape(x: Array, name: str, other: Array, other_name: str) -> None:
    """ValueError unless both arrays have one shape."""
    if tuple(x.shape) != tuple(other.shape):
        raise ShapeError(f"{name}: expected the shape of {other_name}, {shape_of(other)}, got {shape_of(x)}")


def shape(x: Array, name: str, expected: tuple[int, ...], meaning: str) -> None:
    """ValueError unless `x` has exactly the shape `expected`; `meaning` says what its sizes stand for."""
    if tuple(x.shape) != tuple(expected):
        raise ShapeError(f"{name}: expected shape {tuple(expected)} ({meaning}), got {shape_of(x)}")


def rank_at_least(x: Array, name: str, least: int, meaning: str) -> None:
    """ValueError unless `x` has `least` axes or more."""
    if x.ndim < least:
        raise RankError(f"{name}: expected at least {least} axes ({meaning}), got shape {shape_of(x)}")


def rank_at_most(x: Array, name: str, most: int) -> None:
    """ValueError if `x` has more than `most` axes."""
    if x.ndim > most:
        raise RankError(f"{name}: expected at most {most} axes, got {x.ndim}")


def integer_value(value: Any, name: str) -> int:
    """`value` as an int of 64 bits; TypeError for floats, booleans and everything else that is not an integer."""
    if isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    try:
        found = index(value)
    except Exception:  # also what an `__index__` of someone's own, or of a tensor without elements, raises
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__})") from None
    if not -(2**63) <= found < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, got one of {found.bit_length()}")
    return found


def real_value(value: Any, name: str) -> None:
    """TypeError unless `value` is a real number, ValueError where no float is as large."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float holds, got one beyond 1.8e308") from None


def boolean(value: Any, name: str) -> None:
    """TypeError unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {value!r} ({type(value).__name__})")


def one_of(value: Any, name: str, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of the strings `choices`; also a TypeError where it is no string."""
    if not isinstance(value, str):
        raise ChoiceError(f"{name}: expected one of {', '.join(choices)}, got {value!r} ({type(value).__name__})")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def at_least_zero(value: Any, name: str) -> None:
    """TypeError unless `value` is a real number, ValueError unless it is at least 0."""
    real_value(value, name)
    if not value >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value}")


def axis(value: Any, name: str, x: Array, x_name: str) -> int:
    """The axis of `x` that `value` names, counted from the front."""
    i = integer_value(value, name)
    if not -x.ndim <= i < x.ndim:
        raise ValueError(f"{name}: expected an axis of {x_name} with shape {shape_of(x)}, got {i}")
    return i % x.ndim


def positive(value: float, name: str) -> None:
    """ValueError unless `value` is a finite number above zero."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
