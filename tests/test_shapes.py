"""`hw3gpu.shapes`: the law of docs/derivations.md, section 1, against PyTorch, and its errors."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hw3gpu import reference, shapes
from hw3gpu.shapes import conv2d_output_shape

SHAPE = (2, 17, 29, 3)


def torch_shape(
    input_shape: tuple[int, ...],
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, ...]:
    """The shape PyTorch computes, with no data: its axes and pairs have H before W."""
    b, w, h, c = input_shape
    (k1, k2), (s1, s2), (p1, p2), (d1, d2) = kernel, stride, padding, dilation
    x = torch.empty(b, c, h, w, device="meta")
    weight = torch.empty(channels, c, k2, k1, device="meta")
    y = torch.nn.functional.conv2d(x, weight, stride=(s2, s1), padding=(p2, p1), dilation=(d2, d1))
    return (y.shape[0], y.shape[3], y.shape[2], y.shape[1])


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    """W ≠ H, and six different numbers for kernel, stride and padding: swapping any two is seen."""
    k1, k2, s1, s2, p1, p2 = draw(st.lists(st.integers(0, 9), min_size=6, max_size=6, unique=True))
    assume(min(k1, k2, s1, s2) >= 1)
    d1, d2 = draw(st.lists(st.integers(1, 4), min_size=2, max_size=2, unique=True))
    w, h = draw(st.lists(st.integers(1, 60), min_size=2, max_size=2, unique=True))
    batch, channels_in, channels_out = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return {
        "input_shape": (batch, w, h, channels_in),
        "output_channels": channels_out,
        "kernel_size": (k1, k2),
        "stride": (s1, s2),
        "padding": (p1, p2),
        "dilation": (d1, d2),
    }


@settings(max_examples=300, deadline=None, derandomize=True)
@given(geometries())
def test_agrees_with_pytorch_and_the_answer_sheet_or_raises_where_pytorch_does(geometry: dict[str, Any]) -> None:
    try:
        expected = torch_shape(*geometry.values())
    except RuntimeError:
        with pytest.raises(ValueError, match="the output would have size"):
            conv2d_output_shape(**geometry)
    else:
        assert conv2d_output_shape(**geometry) == expected
        assert reference.conv2d_output_shape(**geometry) == expected


def test_first_entry_belongs_to_w_and_second_to_h() -> None:
    assert conv2d_output_shape((2, 7, 11, 3), 5, (3, 4), (1, 2), (6, 0)) == (2, 17, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kernel_size": 3}, (2, 15, 27, 5)),
        ({"kernel_size": 3, "padding": 1}, (2, 17, 29, 5)),
        ({"kernel_size": 2, "stride": 2}, (2, 8, 14, 5)),
        ({"kernel_size": 3, "dilation": 8}, (2, 1, 13, 5)),
        ({"kernel_size": (17, 29)}, (2, 1, 1, 5)),
        ({"kernel_size": 1, "stride": 100}, (2, 1, 1, 5)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_one_integer_stands_for_both_entries(arguments: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert conv2d_output_shape(SHAPE, 5, **arguments) == expected


@pytest.mark.parametrize(
    "three",
    [3, np.int32(3), np.array(3), torch.tensor(3), (3, 3), [3, np.int64(3)], np.array([3, 3]), torch.Size([3, 3])],
    ids=lambda value: f"{type(value).__module__}.{type(value).__name__}-{value}".replace(" ", ""),
)
def test_anything_with_index_counts_as_an_integer(three: Any) -> None:
    shape = conv2d_output_shape(torch.Size(SHAPE), np.uint8(5), three)
    assert shape == (2, 15, 27, 5)
    assert all(type(size) is int for size in shape)


def test_an_empty_batch_keeps_its_size() -> None:
    assert conv2d_output_shape((0, 4, 5, 1), 2, 2) == (0, 3, 4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": 4}, r"input_shape must be a sequence of four integers \(B, W, H, C_in\), got 4 of type int"),
        ({"input_shape": "2abc"}, "input_shape must be a sequence .* got '2abc' of type str"),
        ({"input_shape": (2, 17.0, 29, 3)}, r"input_shape\[1\] must be an integer, got 17.0 of type float"),
        ({"input_shape": (2, 17, True, 3)}, r"input_shape\[2\] must be an integer, got True of type bool"),
        ({"output_channels": 5.0}, "output_channels must be an integer, got 5.0 of type float"),
        ({"output_channels": None}, "output_channels must be an integer, got None of type NoneType"),
        ({"kernel_size": "same"}, "kernel_size must be an integer or a pair .* got 'same' of type str"),
        ({"kernel_size": True}, "kernel_size must be an integer or a pair .* got True of type bool"),
        ({"kernel_size": 3.0}, "kernel_size must be an integer or a pair .* got 3.0 of type float"),
        ({"kernel_size": np.float64(3)}, "kernel_size must be an integer or a pair"),
        ({"stride": (1, 2.5)}, r"stride\[1\] must be an integer, got 2.5 of type float"),
        ({"padding": (False, 1)}, r"padding\[0\] must be an integer, got False of type bool"),
        ({"padding": np.array([0.0, 1.0])}, r"padding\[0\] must be an integer"),
        ({"dilation": None}, "dilation must be an integer or a pair .* got None of type NoneType"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_no_integer_is_a_type_error(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"input_shape": SHAPE, "output_channels": 5, "kernel_size": 3} | change
    with pytest.raises(TypeError, match=message):
        conv2d_output_shape(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": (17, 29, 3)}, r"four entries \(B, W, H, C_in\), got 3: \(17, 29, 3\)"),
        ({"input_shape": (1, 2, 17, 29, 3)}, "four entries .* got 5"),
        ({"input_shape": (-1, 17, 29, 3)}, r"B, input_shape\[0\], must be at least 0, got -1"),
        ({"input_shape": (2, 0, 29, 3)}, r"W, input_shape\[1\], must be at least 1, got 0"),
        ({"input_shape": (2, 17, -29, 3)}, r"H, input_shape\[2\], must be at least 1, got -29"),
        ({"input_shape": (2, 17, 29, 0)}, r"C_in, input_shape\[3\], must be at least 1, got 0"),
        ({"output_channels": 0}, "output_channels must be at least 1, got 0"),
        ({"kernel_size": (3,)}, r"kernel_size must be an integer or a pair .* got 1 entries: \(3,\)"),
        ({"kernel_size": (1, 2, 3)}, "kernel_size must be an integer or a pair .* got 3 entries"),
        ({"kernel_size": (0, 3)}, r"kernel_size must be at least 1, got 0 along W in \(0, 3\)"),
        ({"stride": 0}, "stride must be at least 1, got 0 along W in 0"),
        ({"stride": (1, -2)}, r"stride must be at least 1, got -2 along H in \(1, -2\)"),
        ({"padding": (0, -1)}, r"padding must be at least 0, got -1 along H in \(0, -1\)"),
        ({"dilation": (0, 1)}, r"dilation must be at least 1, got 0 along W in \(0, 1\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_out_of_range_is_a_value_error(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"input_shape": SHAPE, "output_channels": 5, "kernel_size": 3} | change
    with pytest.raises(ValueError, match=message):
        conv2d_output_shape(**arguments)


def test_an_output_below_one_names_the_axis_and_every_value_that_led_there() -> None:
    with pytest.raises(ValueError, match="size -3 along H") as raised:
        conv2d_output_shape((2, 17, 29, 3), 5, (3, 13), (1, 7), (0, 8), (1, 6))
    message = str(raised.value)
    for part in ("6 * (13 - 1) + 1 = 73", "29 + 2 * 8 = 45", "stride 7"):
        assert part in message
    with pytest.raises(ValueError, match="size 0 along W"):
        conv2d_output_shape((2, 17, 29, 3), 5, (18, 13))


def test_imports_the_standard_library_alone() -> None:
    tree = ast.parse(Path(shapes.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in froms)
    roots = {name.partition(".")[0] for name in names | {str(node.module) for node in froms}}
    assert roots <= set(sys.stdlib_module_names)
