"""S4 to S6: softmax, its Jacobian and cross entropy against the answer sheet, for every kind of array."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from answers import CASES, HARD, LONG, backward_and_check, forward_and_check, judges, ones, probabilities, values

import hw3gpu
from hw3gpu._core.arrays import accumulate_dtype
from layouts import in_layout, to_torch
from measure import close, largest, max_error, ulp

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# ---------------------------------------------------------------------------------------------- softmax
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_of_every_shape_and_layout(tensors, rng, case, dtype):
    shape, axis, layout = CASES[case]
    z = in_layout(tensors, rng.standard_normal(shape), dtype, layout)
    dy = in_layout(tensors, rng.standard_normal(shape), dtype, layout)
    y = forward_and_check(tensors, z, dtype, axis)
    backward_and_check(tensors, dy, y, dtype, axis)


@pytest.mark.parametrize("case", ["V = 1001", "axis in the middle"])
def test_softmax_of_every_kind_and_dtype(kit, rng, case, dtype):
    shape, axis, layout = CASES[case]
    z, dy = (in_layout(kit, rng.standard_normal(shape), dtype, layout) for _ in range(2))
    y = forward_and_check(kit, z, dtype, axis)
    backward_and_check(kit, dy, y, dtype, axis)


def test_softmax_axis_by_default_is_the_last(kit, rng):
    z = kit.array(rng.standard_normal((3, 5)))
    np.testing.assert_array_equal(kit.numpy(hw3gpu.softmax(z)), kit.numpy(hw3gpu.softmax(z, 1)))
    y = hw3gpu.softmax(z)
    np.testing.assert_array_equal(kit.numpy(hw3gpu.softmax_backward(z, y)), kit.numpy(hw3gpu.softmax_backward(z, y, 1)))


@pytest.mark.parametrize("layout", ["sliced", "channels-last", "reversed"])
def test_backward_of_operands_laid_out_apart(tensors, rng, layout):
    """dy and y need not share their strides."""
    y = tensors.array(probabilities(rng, (3, 4, 6)))
    dy = in_layout(tensors, rng.standard_normal((3, 4, 6)), "float32", layout)
    backward_and_check(tensors, dy, y, "float32", 2)
    backward_and_check(tensors, y, dy, "float32", 1)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 3)], ids=str)
def test_softmax_of_nothing(kit, shape):
    z = kit.array(np.zeros(shape))
    assert tuple(hw3gpu.softmax(z).shape) == shape
    assert tuple(hw3gpu.softmax_backward(z, z).shape) == shape


@pytest.mark.parametrize("case", HARD, ids=list(HARD))
@pytest.mark.parametrize(("V", "dtype"), [(1001, "float64"), (1001, "float16"), (1001, "bfloat16"), (LONG, "float32")])
def test_softmax_of_hard_rows(tensors, rng, case, V, dtype):
    z = tensors.array(np.stack([HARD[case](V), rng.standard_normal(V)]), dtype)
    dy = tensors.array(rng.standard_normal((2, V)), dtype)
    y = forward_and_check(tensors, z, dtype)
    total = tensors.numpy(y).sum(-1)
    np.testing.assert_allclose(total, 1.0, atol=V * ulp(1.0 / 300, dtype) + ulp(1.0, dtype))
    backward_and_check(tensors, dy, y, dtype)


@pytest.mark.parametrize("V", [10, LONG])
@pytest.mark.parametrize(
    "spoil", [lambda z: np.full_like(z, -np.inf), lambda z: np.where(np.arange(z.size) == 5, np.inf, z),
              lambda z: np.where(np.arange(z.size) == z.size - 1, np.nan, z)], ids=["all -inf", "+inf", "NaN"],
)  # fmt: skip
def test_a_row_without_a_softmax_is_nan_and_alone(tensors, rng, spoil, V):
    """As PyTorch's; the rows beside it are untouched."""
    values = rng.standard_normal((3, V)).astype(np.float32)
    clean = tensors.numpy(hw3gpu.softmax(tensors.array(values)))
    values[1] = spoil(values[1])
    got = tensors.numpy(hw3gpu.softmax(tensors.array(values)))
    assert np.isnan(got[1]).all()
    assert F.softmax(torch.from_numpy(values), -1)[1].isnan().all()
    np.testing.assert_array_equal(got[[0, 2]], clean[[0, 2]])


# ---------------------------------------------------------------------------------------------- the Jacobian
@pytest.mark.parametrize("shape", [(4,), (1,), (2, 3, 5), (0, 3), (2, 0)], ids=str)
def test_jacobian(kit, rng, shape, dtype):
    z = kit.array(2 * rng.standard_normal(shape), dtype)
    jacobian = hw3gpu.softmax_jacobian(z)
    assert type(jacobian) is type(z)
    assert jacobian.dtype == z.dtype
    assert tuple(jacobian.shape) == (*shape, shape[-1])
    expected, bound = (of.softmax_jacobian(kit.numpy(z), **more) for of, more in judges(z))
    s = F.softmax(to_torch(z).to(getattr(torch, accumulate_dtype(z))), -1)
    theirs = (torch.diag_embed(s) - s[..., :, None] * s[..., None, :]).to(to_torch(z).dtype)
    close(kit.numpy(jacobian), expected, max_error(values(theirs), expected, dtype), dtype, bound)


def test_jacobian_of_a_certain_class(kit, dtype):
    """S (1 - S) where S rounds to 1, and 0 where a class is impossible."""
    z = kit.array([[30.0, 0.0, -np.inf]], dtype)
    jacobian = kit.numpy(hw3gpu.softmax_jacobian(z))
    np.testing.assert_array_equal(jacobian[0, 2], 0.0)
    np.testing.assert_array_equal(jacobian[0, :, 2], 0.0)
    expected, bound = (of.softmax_jacobian(kit.numpy(z), **more) for of, more in judges(z))
    close(jacobian, expected, None, dtype, bound)


def test_backward_is_the_jacobian_applied(kit, rng):
    z, dy = (kit.array(rng.standard_normal((3, 6)), "float64") for _ in range(2))
    product = np.einsum("nij,ni->nj", kit.numpy(hw3gpu.softmax_jacobian(z)), kit.numpy(dy))
    got = kit.numpy(hw3gpu.softmax_backward(dy, hw3gpu.softmax(z)))
    np.testing.assert_allclose(got, product, rtol=0, atol=1e-15)


# ---------------------------------------------------------------------------------------------- cross entropy
@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 7), (0, 3)], ids=str)
def test_cross_entropy(kit, rng, shape, dtype):
    y, y_hat = (kit.array(probabilities(rng, shape), dtype) for _ in range(2))
    loss = hw3gpu.cross_entropy(y, y_hat)
    acc = accumulate_dtype(y_hat)
    y_t, y_hat_t = (to_torch(v).to(getattr(torch, acc)) for v in (y, y_hat))
    assert tuple(loss.shape) == shape[:-1]
    assert type(loss) is type(hw3gpu.softmax(y)) or np.ndim(loss) == 0
    assert str(loss.dtype).removeprefix("torch.") == acc
    sheet, bound = (of.cross_entropy(kit.numpy(y), kit.numpy(y_hat), **more) for of, more in judges(y_hat))
    theirs = -(y_t * y_hat_t.log()).sum(-1)
    close(kit.numpy(loss), sheet, max_error(values(theirs), sheet, acc), acc, bound)


def test_cross_entropy_counts_zero_times_log_zero_as_zero(kit, dtype):
    y = kit.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype)
    y_hat = kit.array([[0.0, 1.0, 0.0], [0.25, 0.75, 0.0], [0.0, 0.5, 0.5]], dtype)
    loss = kit.numpy(hw3gpu.cross_entropy(y, y_hat))
    assert loss[0] == 0.0
    assert not math.copysign(1.0, loss[0]) < 0
    assert loss[1] == pytest.approx(-0.5 * math.log(0.25) - 0.5 * math.log(0.75), rel=1e-6)
    assert loss[2] == math.inf


# ---------------------------------------------------------------------------------------------- what comes back
def test_results_have_the_dtypes_promised(kit, rng, dtype):
    z = kit.array(rng.standard_normal((3, 7)), dtype)
    result = hw3gpu.softmax_cross_entropy(z, kit.array([1, 2, 3], "int64"))
    for v in (hw3gpu.softmax(z), hw3gpu.softmax_backward(z, z), result.dz):
        assert type(v) is type(z)
        assert v.dtype == z.dtype
        assert tuple(v.shape) == (3, 7)
    assert type(result.loss) is type(z)
    assert str(result.loss.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.loss = None


def test_half_precision_saturates_only_where_the_result_does(kit):
    """The loss of float16 logits is a float32: beyond float16's range it stays finite."""
    top = largest("float16")
    result = hw3gpu.softmax_cross_entropy(kit.array([[top, -top]], "float16"), kit.array([1], "int64"))
    assert kit.numpy(result.loss)[0] == 2 * top


@pytest.mark.parametrize(("V", "dtype"), [(10, "float16"), (1001, "float32"), (LONG, "float32")])
def test_bitwise_repeatable(tensors, rng, V, dtype):
    z, dy = (tensors.array(rng.standard_normal((2, V)), dtype) for _ in range(2))
    y, t = tensors.array(probabilities(rng, (2, V)), dtype), tensors.array(rng.integers(0, V, 2), "int64")

    def run():
        hard, soft = hw3gpu.softmax_cross_entropy(z, t), hw3gpu.softmax_cross_entropy(z, y)
        out = (hw3gpu.softmax(z), hw3gpu.softmax_backward(dy, y), hard.loss, hard.dz, soft.loss, soft.dz)
        return [tensors.numpy(v) for v in out]

    for first, again in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(first, again)


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("function", [hw3gpu.softmax, hw3gpu.softmax_jacobian], ids=lambda f: f.__name__)
def test_bad_logits(kit, function):
    with pytest.raises(TypeError, match=r"z: expected a NumPy, CuPy or torch array, got builtins.list"):
        function([1.0, 2.0])
    with pytest.raises(TypeError, match=r"z: expected dtype float16, bfloat16, float32, float64, got int32"):
        function(ones(kit, (2, 3), "int32"))
    with pytest.raises(TypeError, match=r"z: expected dtype .* got complex64"):
        function(ones(kit, (2, 3), "complex64"))
    with pytest.raises(ValueError, match=r"got (shape \(\)|-1)"):
        function(ones(kit, ()))


@pytest.mark.parametrize(
    ("error", "message", "axis"),
    [
        (ValueError, r"axis: expected an axis of z with shape \(2, 3\), got 2", 2),
        (ValueError, r"axis: expected an axis of z with shape \(2, 3\), got -3", -3),
        (TypeError, r"axis: expected an integer, got 0.5 \(float\)", 0.5),
        (TypeError, r"axis: expected an integer, got False", False),
        (TypeError, r"axis: expected an integer, got None", None),
    ],
)
def test_bad_axis(kit, error, message, axis):
    z = ones(kit, (2, 3))
    with pytest.raises(error, match=message):
        hw3gpu.softmax(z, axis)
    with pytest.raises(error, match=message.replace(" of z ", " of y ")):
        hw3gpu.softmax_backward(z, z, axis)


@pytest.mark.parametrize("function", [hw3gpu.softmax_backward, hw3gpu.cross_entropy], ids=["backward", "cross_entropy"])
def test_two_operands_that_do_not_match(kit, function):
    a, b = ("dy", "y") if function is hw3gpu.softmax_backward else ("y", "y_hat")
    good = ones(kit, (2, 3))
    with pytest.raises(TypeError, match=rf"{a}: expected a NumPy, CuPy or torch array, got builtins.NoneType"):
        function(None, good)
    with pytest.raises(TypeError, match=rf"{b}: expected a NumPy, CuPy or torch array, got builtins.float"):
        function(good, 1.0)
    with pytest.raises(TypeError, match=rf"{a}: expected the dtype of {b}, float32, got float64"):
        function(ones(kit, (2, 3), "float64"), good)
    with pytest.raises(TypeError, match=rf"{b}: expected dtype .* got int64"):
        function(good, ones(kit, (2, 3), "int64"))
    with pytest.raises(ValueError, match=rf"{a}: expected the shape of {b}, \(2, 3\), got \(3, 2\)"):
        function(ones(kit, (3, 2)), good)
    with pytest.raises(ValueError, match=rf"{a}: expected the shape of {b}, \(2, 3\), got \(1, 3\)"):
        function(ones(kit, (1, 3)), good)
