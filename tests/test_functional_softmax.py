"""`hw3gpu.functional.softmax` against the answer sheet and PyTorch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import ACC, SINGLE, drawn, gradcheck, gradgradcheck, hold, layout_of, ones, same, tensor, values_of, zeros

import hw3gpu.functional as HF
from hw3gpu import _error_bounds, reference
from hw3gpu._core.torch_internals import softmax_backward as torch_softmax_backward

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("float64", "contiguous"), ("float16", "contiguous"), ("bfloat16", "channels-last"), ("float32", "sliced"),
     ("float32", "channels-last"), ("float32", "contiguous")],
)  # fmt: skip
def test_softmax(device, rng, dim, layout, dtype):
    x = layout_of(tensor(rng.standard_normal((3, 4, 11)), dtype, device), layout).requires_grad_()
    dy = layout_of(tensor(rng.standard_normal((3, 4, 11)), dtype, device), layout)
    y = HF.softmax(x, dim)
    (dx,) = torch.autograd.grad(y, x, dy)
    # PyTorch's own: in the precision of the sums, rounded once
    acc = ACC[dtype]
    theirs = F.softmax(x.to(acc), dim).to(x.dtype)
    theirs_dx = torch_softmax_backward(dy.to(acc), y.detach().to(acc), dim, acc).to(x.dtype)
    bounds = {"dtype": SINGLE[acc]}
    hold("y", y, reference.softmax(values_of(x), dim), dtype, theirs, _error_bounds.softmax(values_of(x), dim, **bounds))
    given = values_of(dy), values_of(y), dim
    hold("dx", dx, reference.softmax_backward(*given), dtype, theirs_dx, _error_bounds.softmax_backward(*given, **bounds))


@drawn
@given(data=st.data())
def test_softmax_is_torchs(device, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4), "shape")
    rank = max(len(shape), 1)
    dim = data.draw(st.integers(-rank, rank - 1), "dim")
    start = data.draw(st.sampled_from(["float64", "float32", "int64"]), "dtype")
    dtype = data.draw(st.sampled_from([torch.float64, None]), "dtype=") if start != "int64" else torch.float64
    x = tensor(3 * rng.standard_normal(shape), start, device)
    results = []
    for function in (HF.softmax, F.softmax):
        leaf = x.clone().requires_grad_(start != "int64")
        y = function(leaf, dim, dtype=dtype)
        results.append([y] if start == "int64" else [y, torch.autograd.grad((y**2).sum(), leaf)[0]])
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs, 1e-6 if torch.float32 in (ours.dtype, x.dtype) else 1e-12)


def test_softmax_chooses_a_dim_as_torch_does(device, rng):
    for shape in ((4,), (3, 4), (2, 3, 4), (2, 3, 4, 5)):
        x = tensor(rng.standard_normal(shape), "float64", device)
        with pytest.warns(UserWarning, match="implicit choice"):
            ours = HF.softmax(x)
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            same(ours, F.softmax(x))


def test_softmax_gradcheck(device, rng):
    x = tensor(rng.standard_normal((3, 5, 2)), "float64", device, grad=True)
    gradcheck(lambda x: HF.softmax(x, 1), (x,))
    gradgradcheck(lambda x: HF.softmax(x, 1), (x,))


def test_a_fake_result_has_the_strides_of_a_real_one(device):
    """Also of axes in an order in which those before or behind `dim` are not one."""
    for order in itertools.permutations(range(4)):
        x = torch.zeros(2, 3, 4, 5, device=device).permute(order)
        for dim in range(4):
            with FakeTensorMode() as mode:
                fake = HF.softmax(mode.from_tensor(x), dim)
            assert fake.stride() == HF.softmax(x, dim).stride(), (order, dim)


@pytest.mark.parametrize("V", [10, 33333])
def test_softmax_of_rows_of_minus_infinity(device, rng, V):
    x = tensor(rng.standard_normal((3, V)), "float32", device)
    x[0, : V - 3] = -math.inf
    x[1] = -math.inf
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    dy = tensor(rng.standard_normal((3, V)), "float32", device)
    y, theirs = HF.softmax(leaf, 1), F.softmax(other, 1)
    torch.testing.assert_close(y, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)
    dx, theirs_dx = torch.autograd.grad(y, leaf, dy)[0], torch.autograd.grad(theirs, other, dy)[0]
    torch.testing.assert_close(dx, theirs_dx, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"input: expected a torch.Tensor, got builtins.list", ([1.0], 0), {}),
        (TypeError, r"input: expected dtype .* got int64", (zeros(3), 0), {}),
        (TypeError, r"input: expected dtype .* got int32", (ones(3), 0), {"dtype": torch.int32}),
        (IndexError, r"dim: expected an axis of input with shape \(2, 3\), got 2", (ones(2, 3), 2), {}),
        (IndexError, r"dim: expected an axis of input with shape \(2, 3\), got -3", (ones(2, 3), -3), {}),
        (IndexError, r"dim: expected an axis of input with shape .* got 1", (ones(), 1), {}),
    ],
)
def test_softmax_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        HF.softmax(*arguments, **options)
