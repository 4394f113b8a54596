"""The shape of a convolution's output. Imports the standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import SupportsIndex

__all__ = ["conv2d_output_shape"]

Pair = SupportsIndex | Sequence[SupportsIndex]


def _integer(name: str, value: object, expected: str = "an integer") -> int:
    # bool has __index__ too, but True as a stride is a slip.
    if not isinstance(value, bool):
        try:
            return index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")


def _integers(name: str, values: object, expected: str) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be {expected}, got {values!r} of type {type(values).__name__}")
    return tuple(_integer(f"{name}[{i}]", value) for i, value in enumerate(values))


def _at_least(name: str, value: int, minimum: int) -> int:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def _pair(name: str, value: object, minimum: int) -> tuple[int, int]:
    """``value`` as its entries for W and for H, each at least ``minimum``; one integer stands for both."""
    expected = "an integer or a pair of integers (along W, along H)"
    if getattr(value, "ndim", 1) and hasattr(value, "__iter__"):  # a 0-d array has __iter__, but is one integer
        entries = _integers(name, value, expected)
        if len(entries) != 2:
            raise ValueError(f"{name} must be {expected}, got {len(entries)} entries: {value!r}")
    else:
        entries = (_integer(name, value, expected),) * 2
    for axis, entry in zip("WH", entries, strict=True):
        if entry < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {entry} along {axis} in {value!r}")
    return entries[0], entries[1]


def _output_size(axis: str, size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    span = dilation * (kernel - 1) + 1
    output = (size + 2 * padding - span) // stride + 1
    if output < 1:
        raise ValueError(
            f"the output would have size {output} along {axis}: the kernel spans dilation * (kernel_size - 1) + 1 = "
            f"{dilation} * ({kernel} - 1) + 1 = {span} pixels, more than the padded input's {axis} + 2 * padding = "
            f"{size} + 2 * {padding} = {size + 2 * padding} (stride {stride})"
        )
    return output


def conv2d_output_shape(
    input_shape: Sequence[SupportsIndex],
    output_channels: SupportsIndex,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
) -> tuple[int, int, int, int]:
    """The shape (B, W', H', C_out) that (B, W, H, C_in) has after Conv2D(C_in, C_out, kernel_size, stride, padding).

        W' = floor((W + 2 p1 - d1 (k1 - 1) - 1) / s1) + 1
        H' = floor((H + 2 p2 - d2 (k2 - 1) - 1) / s2) + 1

    The first entry of each pair belongs to W and the second to H, the order of the axes in ``input_shape``: p1 pixels
    are padded left and right, p2 top and bottom. (PyTorch's ``Conv2d`` has H first, in its shapes and in its pairs.)
    Source: docs/derivations.md, section 1.

    Args:
        input_shape: (B, W, H, C_in), in images, pixels, pixels, channels; B may be 0.
        output_channels: C_out, at least 1.
        kernel_size: (k1, k2) pixels, each at least 1; here and below one integer stands for both entries.
        stride: (s1, s2) pixels, each at least 1.
        padding: (p1, p2) pixels added on *each* of the two sides, each at least 0.
        dilation: (d1, d2), the distance in pixels between neighbouring kernel taps, each at least 1.

    Raises:
        TypeError: an argument is no integer, or no sequence of integers; a bool counts as none.
        ValueError: an argument has the wrong number of entries or one out of range, or W' or H' would be below 1.
    """
    shape = _integers("input_shape", input_shape, "a sequence of four integers (B, W, H, C_in)")
    if len(shape) != 4:
        raise ValueError(f"input_shape must have four entries (B, W, H, C_in), got {len(shape)}: {input_shape!r}")
    batch, width, height, channels = shape
    _at_least("B, input_shape[0],", batch, 0)
    _at_least("W, input_shape[1],", width, 1)
    _at_least("H, input_shape[2],", height, 1)
    _at_least("C_in, input_shape[3],", channels, 1)
    channels_out = _at_least("output_channels", _integer("output_channels", output_channels), 1)
    k1, k2 = _pair("kernel_size", kernel_size, 1)
    s1, s2 = _pair("stride", stride, 1)
    p1, p2 = _pair("padding", padding, 0)
    d1, d2 = _pair("dilation", dilation, 1)
    return (
        batch,
        _output_size("W", width, k1, s1, p1, d1),
        _output_size("H", height, k2, s2, p2, d2),
        channels_out,
    )
