"""`hw3gpu._array_functions.shapes`: the law of docs/derivations.md, section 1, against PyTorch, and its errors."""

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

from hw3gpu import conv2d_output_shape, conv2d_padding_for, conv_transpose2d_output_shape, reference
from hw3gpu._array_functions import shapes

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


def torch_same_shape(geometry: dict[str, Any]) -> tuple[int, ...]:
    """PyTorch's shape with padding made by hand: for ceil(W / s) outputs, those of an odd number on the far side."""
    b, w, h, c = geometry["input_shape"]
    sides = []
    for size, k, s, d in zip((w, h), geometry["kernel_size"], geometry["stride"], geometry["dilation"], strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        sides += [total // 2, total - total // 2]
    x = torch.nn.functional.pad(torch.empty(b, c, h, w, device="meta"), sides)  # the last axis, W, comes first
    padded = (b, x.shape[3], x.shape[2], c)
    return torch_shape(
        padded, *[geometry[name] for name in ("output_channels", "kernel_size", "stride")], (0, 0), geometry["dilation"]
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(geometries())
def test_same_and_valid_agree_with_pytorch(geometry: dict[str, Any]) -> None:
    assert conv2d_output_shape(**geometry | {"padding": "same"}) == torch_same_shape(geometry)
    one = geometry | {"stride": 1}
    b, w, h, c = geometry["input_shape"]
    (k1, k2), (d1, d2) = geometry["kernel_size"], geometry["dilation"]
    x, weight = torch.empty(b, c, h, w, device="meta"), torch.empty(5, c, k2, k1, device="meta")
    theirs = torch.nn.functional.conv2d(x, weight, padding="same", dilation=(d2, d1))
    ours = conv2d_output_shape(**one | {"padding": "same", "output_channels": 5})
    assert ours == (b, theirs.shape[3], theirs.shape[2], 5)
    fits = all(d * (k - 1) < size for size, k, d in zip((w, h), (k1, k2), (d1, d2), strict=True))
    if fits:
        assert conv2d_output_shape(**geometry | {"padding": "valid"}) == torch_shape(*(geometry | {"padding": (0, 0)}).values())
    else:
        with pytest.raises(ValueError, match="the output would have size"):
            conv2d_output_shape(**geometry | {"padding": "valid"})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(geometries(), st.integers(1, 70), st.integers(1, 70))
def test_padding_for_finds_all_paddings_or_says_why_there_is_none(geometry: dict[str, Any], width: int, height: int) -> None:
    _, w, h, _ = geometry["input_shape"]
    law = {name: geometry[name] for name in ("kernel_size", "stride", "dilation")}

    def reached(size: int, axis: int, p: int) -> int:
        """Where a kernel may start, counted."""
        k, s, d = (law[name][axis] for name in ("kernel_size", "stride", "dilation"))
        return len(range(0, size + 2 * p - d * (k - 1), s))

    wanted = [
        [p for p in range(400) if reached(size, axis, p) == target]
        for axis, (size, target) in enumerate(((w, width), (h, height)))
    ]
    if all(wanted):
        found = conv2d_padding_for((w, h), (width, height), **law)
        assert [list(ps) for ps in found] == wanted
        ks, ss, ds = law.values()
        for end in (0, -1):
            assert torch_shape((1, w, h, 1), 1, ks, ss, (found[0][end], found[1][end]), ds) == (1, width, height, 1)
    else:
        axis = "W" if not wanted[0] else "H"
        with pytest.raises(ValueError, match=rf"no padding gives the output size \d+ along {axis}: (without|the two sides)"):
            conv2d_padding_for((w, h), (width, height), **law)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (((17, 29), (17, 29), (3, 5)), ([1], [2])),
        ((28, 14, 4, 2), ([1], [1])),
        ((28, 14, 3, 2), ([1], [1])),
        ((29, 8, 4, 4), ([2, 3], [2, 3])),
        (((7, 9), (1, 1), (3, 5), 9), ([0, 1, 2], [0, 1, 2])),
    ],
)
def test_paddings_of_common_layers(arguments: tuple[Any, ...], expected: tuple[list[int], list[int]]) -> None:
    assert tuple(list(paddings) for paddings in conv2d_padding_for(*arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 2), r"size 8 along W: the two sides would need 1 pixels together, which is odd.*kernel_size 2, stride 1"),
        (((8, 9), (8, 4), (3, 3)), r"size 4 along H: without padding it is 7 already \(H = 9"),
        ((8, 0, 3), r"output_size must be at least 1, got 0 along W in 0"),
        ((8, 8, 3, (1, 0)), "stride must be at least 1, got 0 along H"),
    ],
)
def test_no_padding_and_why(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv2d_padding_for(*arguments)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(geometries(), st.integers(0, 9), st.integers(0, 9))
def test_transposed_shape_agrees_with_pytorch(geometry: dict[str, Any], o1: int, o2: int) -> None:
    b, w, h, c = geometry["input_shape"]
    (k1, k2), (s1, s2), (p1, p2), (d1, d2) = (geometry[n] for n in ("kernel_size", "stride", "padding", "dilation"))
    x, weight = (
        torch.empty(max(b, 1), c, h, w, device="meta"),
        torch.empty(c, geometry["output_channels"], k2, k1, device="meta"),
    )
    options = {"stride": (s2, s1), "padding": (p2, p1), "output_padding": (o2, o1), "dilation": (d2, d1)}
    if o1 >= max(s1, d1) or o2 >= max(s2, d2):  # the meta device does not look
        with pytest.raises(RuntimeError, match="output padding must be smaller than either stride or dilation"):
            torch.nn.functional.conv_transpose2d(
                torch.zeros_like(x, device="cpu"), torch.zeros_like(weight, device="cpu"), **options
            )
        with pytest.raises(ValueError, match="output_padding must be less than stride or dilation"):
            conv_transpose2d_output_shape(**geometry, output_padding=(o1, o2))
        return
    try:
        theirs = torch.nn.functional.conv_transpose2d(x, weight, **options).shape
    except RuntimeError:
        theirs = torch.Size((0, 0, 0, 0))
    if min(theirs[2:]) < 1:  # the meta device lets a single size of 0 through
        with pytest.raises(ValueError, match="the output would have size"):
            conv_transpose2d_output_shape(**geometry, output_padding=(o1, o2))
        return
    shape = conv_transpose2d_output_shape(**geometry, output_padding=(o1, o2))
    assert shape == (b, theirs[3], theirs[2], theirs[1])
    if o1 < s1 and o2 < s2:
        back = conv2d_output_shape(shape, c, (k1, k2), (s1, s2), (p1, p2), (d1, d2))
        assert back == geometry["input_shape"]


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


PAIRS: dict[str, Any] = {
    "list": list,
    "torch.Size": torch.Size,
    "array": np.array,
    "array of uint8": lambda pair: np.array(pair, np.uint8),
    "array of objects": lambda pair: np.array(pair, object),
    "tensor": torch.tensor,
}


@pytest.mark.parametrize("of", PAIRS.values(), ids=PAIRS)
def test_every_argument_is_a_pair_of_any_kind(of: Any) -> None:
    pairs = {"kernel_size": (3, 4), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)}
    given = {name: of(pair) for name, pair in pairs.items()}
    assert conv2d_output_shape(of(SHAPE), 5, **given) == conv2d_output_shape(SHAPE, 5, **pairs) == (2, 9, 24, 5)
    for name in pairs:
        one = {"kernel_size": (3, 4)} | {name: pairs[name]}
        assert conv2d_output_shape(SHAPE, 5, **(one | {name: given[name]})) == conv2d_output_shape(SHAPE, 5, **one), name
    sizes = (9, 24)
    more = {name: pairs[name] for name in ("kernel_size", "stride", "dilation")}
    assert conv2d_padding_for(of(SHAPE[1:3]), of(sizes), **{name: given[name] for name in more}) == conv2d_padding_for(
        SHAPE[1:3], sizes, **more
    )
    assert conv_transpose2d_output_shape(
        of(SHAPE), 5, given["kernel_size"], given["stride"], given["padding"], of((1, 0)), given["dilation"]
    ) == conv_transpose2d_output_shape(SHAPE, 5, (3, 4), (2, 1), (1, 2), (1, 0), (1, 3))


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
        ({"padding": ("same", "same")}, r"padding\[0\] must be an integer, got 'same' of type str"),
        ({"padding": np.array([0.0, 1.0])}, r"padding\[0\] must be an integer"),
        ({"dilation": None}, "dilation must be an integer or a pair .* got None of type NoneType"),
        ({"stride": {1, 2}}, r"stride must be an integer or a pair .* got \{1, 2\} of type set"),
        ({"stride": {1: 2, 2: 3}}, "stride must be an integer or a pair .* of type dict"),
        ({"padding": np.array("same")}, "padding must be an integer or a pair .* of type ndarray"),
        ({"padding": np.array([True, False])}, r"padding\[0\] must be an integer"),
        ({"padding": torch.tensor([True, False])}, r"padding\[0\] must be an integer, got tensor\(True\)"),
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
        ({"padding": "full"}, "padding must be an integer, a pair of integers, 'same' or 'valid', got 'full'"),
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
