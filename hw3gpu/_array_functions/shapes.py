"""The shape of a convolution's output, and what is looked for next to it. Imports the standard library alone.

Everywhere the first entry of a pair belongs to W and the second to H. Source: docs/derivations.md, section 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence, Set
from operator import index
from typing import SupportsIndex

__all__ = ["conv2d_output_shape", "conv2d_padding_for", "conv_transpose2d_output_shape"]

Pair = SupportsIndex | Sequence[SupportsIndex]


def _integer(name: str, value: object, expected: str = "an integer") -> int:
    # bool has __index__ too, as a tensor of bool has, but True as a stride is a slip.
    if not isinstance(value, bool) and not str(getattr(value, "dtype", "")).endswith("bool"):
        with contextlib.suppress(Exception):  # also what an `__index__` of someone's own raises
            return index(value)  # type: ignore[arg-type]
    raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")


def _integers(name: str, values: object, expected: str) -> tuple[int, ...]:
    refused = isinstance(values, (Set, Mapping, str, bytes)) or not getattr(values, "ndim", 1)  # a 0-d array has __iter__
    if refused or not hasattr(values, "__iter__"):
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


def _shape(input_shape: object) -> tuple[int, ...]:
    """``input_shape`` as (B, W, H, C_in)."""
    shape = _integers("input_shape", input_shape, "a sequence of four integers (B, W, H, C_in)")
    if len(shape) != 4:
        raise ValueError(f"input_shape must have four entries (B, W, H, C_in), got {len(shape)}: {input_shape!r}")
    for i, (name, minimum) in enumerate((("B", 0), ("W", 1), ("H", 1), ("C_in", 1))):
        _at_least(f"{name}, input_shape[{i}],", shape[i], minimum)
    return shape


def _span(kernel: int, dilation: int) -> int:
    """Pixels from a kernel's first tap to its last, both included."""
    return dilation * (kernel - 1) + 1


def _output_size(axis: str, size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    span = _span(kernel, dilation)
    output = (size + 2 * padding - span) // stride + 1
    if output < 1:
        raise ValueError(
            f"the output would have size {output} along {axis}: the kernel spans dilation * (kernel_size - 1) + 1 = "
            f"{dilation} * ({kernel} - 1) + 1 = {span} pixels, more than the padded input's {axis} + 2 * padding = "
            f"{size} + 2 * {padding} = {size + 2 * padding} (stride {stride})"
        )
    return output


def _paddings(axis: str, size: int, output: int, kernel: int, stride: int, dilation: int) -> range:
    """Every p >= 0 with floor((size + 2 p - span) / stride) + 1 = output."""
    span = _span(kernel, dilation)
    # both sides together: at least `least` for the last step to fit, fewer than `least + stride` for there to be no other
    least = (output - 1) * stride + span - size
    most = least + stride - 1
    found = range(max(-(-least // 2), 0), most // 2 + 1)
    if not found:
        unpadded = (size - span) // stride + 1
        why = (
            f"without padding it is {unpadded} already"
            if most < 0
            else f"the two sides would need {least} pixels together, which is odd, and each gets padding"
        )
        raise ValueError(
            f"no padding gives the output size {output} along {axis}: {why} ({axis} = {size}, kernel_size {kernel}, stride "
            f"{stride}, dilation {dilation})"
        )
    return found


def conv2d_output_shape(
    input_shape: Sequence[SupportsIndex],
    output_channels: SupportsIndex,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
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
        padding: (p1, p2) pixels added on *each* of the two sides, each at least 0; "valid" for none; "same" for as many
            as make W' = ceil(W / s1) and H' = ceil(H / s2), those of an odd number on the far side. (PyTorch has "same"
            for stride 1 alone; for others this is that of TensorFlow, Keras and JAX.)
        dilation: (d1, d2), the distance in pixels between neighbouring kernel taps, each at least 1.

    Raises:
        TypeError: an argument is no integer, or no sequence of integers; a bool counts as none.
        ValueError: an argument has the wrong number of entries or one out of range, ``padding`` is another string, or W' or
            H' would be below 1.
    """
    batch, width, height, _ = _shape(input_shape)
    channels_out = _at_least("output_channels", _integer("output_channels", output_channels), 1)
    k1, k2 = _pair("kernel_size", kernel_size, 1)
    s1, s2 = _pair("stride", stride, 1)
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ValueError(f"padding must be an integer, a pair of integers, 'same' or 'valid', got {padding!r}")
    p1, p2 = (0, 0) if isinstance(padding, str) else _pair("padding", padding, 0)
    d1, d2 = _pair("dilation", dilation, 1)
    if isinstance(padding, str) and padding == "same":
        return batch, -(-width // s1), -(-height // s2), channels_out
    return (batch, _output_size("W", width, k1, s1, p1, d1), _output_size("H", height, k2, s2, p2, d2), channels_out)


def conv2d_padding_for(
    input_size: Pair, output_size: Pair, kernel_size: Pair, stride: Pair = 1, dilation: Pair = 1
) -> tuple[range, range]:
    """All paddings with which Conv2D takes (W, H) to (W', H'): those along W and those along H, in ascending order.

    Every pair of one from each does, and no other does. At stride 1 there is at most one along an axis; at stride s about
    s / 2, since up to s - 1 pixels at the far end are not looked at. For padding of one number, look into both ranges.
    Source: docs/derivations.md, section 1.3.

    Args:
        input_size: (W, H) pixels, each at least 1; here and below one integer stands for both entries.
        output_size: (W', H') pixels, each at least 1.
        kernel_size: as in ``conv2d_output_shape``, as are the next two.
        stride: (s1, s2) pixels.
        dilation: (d1, d2) pixels.

    Returns:
        Two ranges, neither empty.

    Raises:
        TypeError: an argument is no integer or pair of integers.
        ValueError: an entry is out of range, or no padding gives that size; the message says along which axis and why.
    """
    sizes, outputs = _pair("input_size", input_size, 1), _pair("output_size", output_size, 1)
    kernels, strides = _pair("kernel_size", kernel_size, 1), _pair("stride", stride, 1)
    dilations = _pair("dilation", dilation, 1)
    along_w, along_h = (_paddings(*axis) for axis in zip("WH", sizes, outputs, kernels, strides, dilations, strict=True))
    return along_w, along_h


def conv_transpose2d_output_shape(
    input_shape: Sequence[SupportsIndex],
    output_channels: SupportsIndex,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    dilation: Pair = 1,
) -> tuple[int, int, int, int]:
    """The shape (B, W', H', C_out) that (B, W, H, C_in) has after a transposed convolution.

        W' = (W - 1) s1 - 2 p1 + d1 (k1 - 1) + o1 + 1
        H' = (H - 1) s2 - 2 p2 + d2 (k2 - 1) + o2 + 1

    It is a shape that a convolution of this kernel, stride, padding and dilation takes to (B, W, H, C_in): o of the s shapes
    that do says which, 0 for the smallest. Source: docs/derivations.md, section 1.4.

    Args:
        input_shape: (B, W, H, C_in), as in ``conv2d_output_shape``, as are ``kernel_size``, ``stride`` and ``dilation``.
        output_channels: C_out, at least 1.
        kernel_size: (k1, k2) pixels.
        stride: (s1, s2) pixels.
        padding: (p1, p2) pixels by which *each* of the two sides is cut, each at least 0.
        output_padding: (o1, o2) pixels added at the far end, each at least 0 and less than stride or dilation.
        dilation: (d1, d2) pixels.

    Raises:
        TypeError: an argument is no integer, or no sequence of integers; a bool counts as none.
        ValueError: an argument has the wrong number of entries or one out of range, or W' or H' would be below 1.
    """
    batch, width, height, _ = _shape(input_shape)
    channels_out = _at_least("output_channels", _integer("output_channels", output_channels), 1)
    kernels, strides = _pair("kernel_size", kernel_size, 1), _pair("stride", stride, 1)
    dilations = _pair("dilation", dilation, 1)
    paddings, extras = _pair("padding", padding, 0), _pair("output_padding", output_padding, 0)
    for axis, o, s, d in zip("WH", extras, strides, dilations, strict=True):
        if o >= max(s, d):
            raise ValueError(
                f"output_padding must be less than stride or dilation, got {o} along {axis} (stride {s}, dilation {d})"
            )
    sizes = []
    for axis, size, k, s, p, o, d in zip("WH", (width, height), kernels, strides, paddings, extras, dilations, strict=True):
        output = (size - 1) * s - 2 * p + _span(k, d) + o
        if output < 1:
            raise ValueError(
                f"the output would have size {output} along {axis}: ({axis} - 1) * stride - 2 * padding + dilation * "
                f"(kernel_size - 1) + output_padding + 1 = ({size} - 1) * {s} - 2 * {p} + {d} * ({k} - 1) + {o} + 1"
            )
        sizes.append(output)
    return batch, sizes[0], sizes[1], channels_out
