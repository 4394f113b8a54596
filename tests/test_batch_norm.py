"""S2 and S3: `hw3gpu.batch_norm` and `batch_norm_backward` against the answer sheet, for every kind of array."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import hw3gpu
from hw3gpu import _error_bounds, reference
from hw3gpu._core.arrays import accumulate_dtype
from hw3gpu._core.dispatch import requested_backend
from layouts import in_layout, to_torch
from measure import close, max_error

# the values that the kernels are asked to spoil are spoilt in the interpreter with a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# name: (shape, channel_axis, memory layout)
CASES = {
    "4x4 planes": ((3, 2, 4, 4), 1, "contiguous"),
    "7x7 planes": ((3, 2, 7, 7), 1, "contiguous"),
    "one sample": ((1, 3, 5), 1, "contiguous"),
    "(N, C)": ((9, 5), 1, "contiguous"),
    "spatial size 1": ((6, 3, 1, 1), 1, "contiguous"),
    "(B, W, H, C)": ((2, 5, 4, 3), -1, "contiguous"),
    "channels-last": ((2, 3, 5, 4), 1, "channels-last"),
    "channels-last, 40 channels": ((2, 40, 3, 3), 1, "channels-last"),
    "channel axis in the middle": ((2, 3, 4, 5), 2, "contiguous"),
    "channel axis first": ((3, 4, 5), 0, "contiguous"),
    "one variable": ((4, 6), None, "contiguous"),
    "one variable, strided": ((4, 6), None, "sliced"),
    "sliced": ((3, 2, 5, 3), 1, "sliced"),
    "off 16 bytes": ((3, 2, 4, 4), 1, "shifted"),
    "backwards": ((3, 2, 4, 4), 1, "reversed"),
    "a single value": ((1, 1), 1, "contiguous"),
    "long channels": ((1, 1, 20470), 1, "contiguous"),
    "long channels, channels-last": ((1, 50, 50, 16), -1, "contiguous"),
}


@pytest.fixture(params=[1, 2, 132], ids=["looped", "two splits", "split"])
def multiprocessors(request, monkeypatch):
    """Long channels under the plans of three devices. The Numba kernels have none: there the three are one."""
    if requested_backend() == "gpu":
        from hw3gpu.kernels.gpu.device import H100

        small = dataclasses.replace(H100, multiprocessors=request.param)
        monkeypatch.setattr("hw3gpu.kernels.gpu.batch_norm.device_of", lambda x: small)


def channels(shape, axis):
    return 1 if axis is None else shape[axis]


def channels_second(x, axis):
    """A torch tensor with its channels where PyTorch has them."""
    return x.reshape(-1, 1) if axis is None else x.movedim(axis, 1)


def channels_back(y, axis, shape):
    return y.reshape(shape) if axis is None else y.movedim(1, axis)


def sums_over(x, axis):
    return tuple(i for i in range(x.ndim) if axis is None or i != axis % x.ndim)


def torch_forward(x, weight, bias, eps):
    """PyTorch's y, mean, var and rstd."""
    y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return y, mean, torch.var(x.to(mean.dtype), sums_over(x, 1), correction=0), rstd


def torch_backward(dy, x, mean, var, weight, eps):
    """PyTorch's dx, dγ and dβ, and dσ² and dμ by the assignment's formulas."""
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, None, None, mean, (var + eps).rsqrt(), True, eps, [True] * 3
    )
    along = (-1, *[1] * (x.ndim - 2))
    dx_hat = dy.to(mean.dtype) * weight.view(along)
    centred = x.to(mean.dtype) - mean.view(along)
    dvar = (dx_hat * centred).sum(sums_over(x, 1)) * -0.5 * (var + eps) ** -1.5
    dmean = -(dx_hat * (var + eps).rsqrt().view(along)).sum(sums_over(x, 1))
    return dx, dgamma, dbeta, dvar, dmean


def forward_and_check(kit, dtype, x, gamma, beta, axis, eps=1e-5):
    """Our result, each part held to the answer sheet and to PyTorch's error on the same input."""
    result = hw3gpu.batch_norm(x, gamma, beta, eps=eps, channel_axis=axis)
    acc = accumulate_dtype(x)
    values = [None if v is None else kit.numpy(v) for v in (x, gamma, beta)]
    expected = reference.batch_norm(*values, eps=eps, channel_axis=axis)
    x_t = channels_second(to_torch(x), axis)
    weight, bias = (None if v is None else to_torch(v).reshape(-1).to(getattr(torch, acc)) for v in (gamma, beta))
    y, *statistics = torch_forward(x_t, weight, bias, eps)
    theirs = channels_back(y, axis, x.shape), *statistics
    bound = _error_bounds.batch_norm(*values, eps=eps, channel_axis=axis, dtype=acc)
    hold_all(kit, ("y", "mean", "var", "rstd"), result, expected, theirs, bound, dtype, acc)
    return result


def hold_all(kit, names, result, expected, theirs, bound, dtype, acc):
    """Each result of these names held to the answer sheet, the first in `dtype` and the others in `acc`."""
    for name, of, by_torch in zip(names, (dtype, *[acc] * (len(names) - 1)), theirs, strict=True):
        sheet = getattr(expected, name)
        torch_error = max_error(by_torch.double().cpu().numpy().reshape(sheet.shape), sheet, of)
        close(kit.numpy(getattr(result, name)), sheet, torch_error, of, getattr(bound, name), name)


def backward_and_check(kit, dtype, dy, x, mean, var, gamma, axis, eps=1e-5):
    """As `forward_and_check`, for the gradients."""
    result = hw3gpu.batch_norm_backward(dy, x, mean, var, gamma, eps=eps, channel_axis=axis)
    acc = accumulate_dtype(x)
    dy_np, x_np, mean_np, var_np = map(kit.numpy, (dy, x, mean, var))
    gamma_np = None if gamma is None else kit.numpy(gamma)
    expected = reference.batch_norm_backward(dy_np, x_np, mean_np, var_np, gamma_np, eps=eps, channel_axis=axis)
    # dμ is asked for at the true mean, where Σ (x - μ) = 0
    true_mean = np.asarray(x_np.astype(np.longdouble).mean(sums_over(x_np, axis)))
    at_mean = reference.batch_norm_backward(dy_np, x_np, true_mean, var_np, gamma_np, eps=eps, channel_axis=axis)
    expected = expected._replace(dmean=at_mean.dmean)

    dy_t, x_t = (channels_second(to_torch(v), axis) for v in (dy, x))
    mean_t, var_t = (to_torch(v).reshape(-1).to(getattr(torch, acc)) for v in (mean, var))
    weight = torch.ones_like(mean_t) if gamma is None else to_torch(gamma).reshape(-1).to(mean_t.dtype)
    dx, *sums = torch_backward(dy_t, x_t, mean_t, var_t, weight, eps)
    theirs = channels_back(dx, axis, x.shape), *sums
    given = dy_np, x_np, mean_np, var_np, gamma_np
    bound = _error_bounds.batch_norm_backward(*given, eps=eps, channel_axis=axis, dtype=acc)
    hold_all(kit, ("dx", "dgamma", "dbeta", "dvar", "dmean"), result, expected, theirs, bound, dtype, acc)
    return result


def operands(kit, rng, dtype, shape, axis, layout="contiguous", values=None):
    """x, dy, γ and β; γ and β in the dtype in which statistics are kept."""
    x = in_layout(kit, 3 * rng.standard_normal(shape) + 1.5 if values is None else values, dtype, layout)
    dy = in_layout(kit, rng.standard_normal(shape), dtype, layout)
    C = channels(shape, axis)
    acc = accumulate_dtype(x)
    gamma, beta = (kit.array(rng.standard_normal(C) + offset, acc) for offset in (1.0, 0.0))
    return x, dy, gamma, beta


def both_ways(kit, rng, dtype, shape, axis, layout="contiguous", values=None, eps=1e-5):
    x, dy, gamma, beta = operands(kit, rng, dtype, shape, axis, layout, values)
    result = forward_and_check(kit, dtype, x, gamma, beta, axis, eps)
    gradients = backward_and_check(kit, dtype, dy, x, result.mean, result.var, gamma, axis, eps)
    return x, beta, result, gradients


# ---------------------------------------------------------------------------------------------- ordinary values
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_shape_and_layout(tensors, rng, case, dtype):
    both_ways(tensors, rng, dtype, *CASES[case])


@pytest.mark.parametrize("case", ["7x7 planes", "(B, W, H, C)"])
def test_every_kind_and_dtype(kit, rng, case, dtype):
    both_ways(kit, rng, dtype, *CASES[case])


# two channels where there are samples: those of one lie end to end, and the kernels take them as one
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1, 1, 20470), 1), ((30, 2, 601), 1), ((9, 2, 2101), 1), ((1, 60, 60, 5), -1)],
    ids=["one sample", "several samples a tile", "several, and tiles along them", "channels-last"],
)
def test_long_channels(tensors, multiprocessors, rng, shape, axis):
    """Right, and a second time the same to the last bit."""
    x, dy, gamma, beta = operands(tensors, rng, "float32", shape, axis)
    first = forward_and_check(tensors, "float32", x, gamma, beta, axis)
    back = backward_and_check(tensors, "float32", dy, x, first.mean, first.var, gamma, axis)
    again = hw3gpu.batch_norm(x, gamma, beta, channel_axis=axis)
    back_again = hw3gpu.batch_norm_backward(dy, x, first.mean, first.var, gamma, channel_axis=axis)
    for a, b in ((first, again), (back, back_again)):
        assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name != "dx_hat")


@pytest.mark.parametrize("multiprocessors", [1], indirect=True, ids=["many channels"])
@pytest.mark.parametrize("shape", [(2, 20, 3), (2, 37, 4), (2, 20, 33)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_channels_a_program(tensors, multiprocessors, rng, shape, dtype):
    """A device with one multiprocessor makes the plan of many small channels choose itself for few."""
    both_ways(tensors, rng, dtype, shape, 1)


def test_without_gamma_and_beta(kit, rng, dtype):
    x, dy, _, _ = operands(kit, rng, dtype, (3, 2, 7), 1)
    result = forward_and_check(kit, dtype, x, None, None, 1)
    backward_and_check(kit, dtype, dy, x, result.mean, result.var, None, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parameters", ["float64", "float16", "bfloat16"])
def test_gamma_and_beta_of_another_dtype(kit, rng, dtype, parameters):
    if parameters not in kit.dtypes:
        parameters = "float16"  # arrays of this kind have no bfloat16
    x, dy, gamma, beta = operands(kit, rng, dtype, (3, 2, 7), 1)
    gamma, beta = (kit.array(kit.numpy(v), parameters) for v in (gamma, beta))
    result = hw3gpu.batch_norm(x, gamma, beta)
    gamma_acc, beta_acc = (kit.array(kit.numpy(v), accumulate_dtype(x)) for v in (gamma, beta))
    expected = forward_and_check(kit, dtype, x, gamma_acc, beta_acc, 1)
    np.testing.assert_array_equal(kit.numpy(result.y), kit.numpy(expected.y))
    got = hw3gpu.batch_norm_backward(dy, x, result.mean, result.var, gamma, return_dx_hat=True)
    wanted = hw3gpu.batch_norm_backward(dy, x, result.mean, result.var, gamma_acc, return_dx_hat=True)
    for field in dataclasses.fields(got):
        np.testing.assert_array_equal(kit.numpy(getattr(got, field.name)), kit.numpy(getattr(wanted, field.name)))


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1, 10.0])
def test_eps(tensors, rng, eps):
    both_ways(tensors, rng, "float32", (3, 2, 7), 1, eps=eps)


@pytest.mark.parametrize("eps", [1e-5, 0.1, 0.7])
def test_eps_keeps_all_digits_in_float64(tensors, rng, eps):
    both_ways(tensors, rng, "float64", (3, 2, 7), 1, values=1e-3 * rng.standard_normal((3, 2, 7)), eps=eps)


@pytest.mark.parametrize("axis", [1, -1, None])
def test_dx_hat_on_request(kit, rng, dtype, axis):
    x, dy, gamma, _ = operands(kit, rng, dtype, (3, 2, 3), axis)
    mean, var = (kit.array(np.ones(channels(x.shape, axis))) for _ in range(2))
    assert hw3gpu.batch_norm_backward(dy, x, mean, var, gamma, channel_axis=axis).dx_hat is None
    for g in (gamma, None):
        got = hw3gpu.batch_norm_backward(dy, x, mean, var, g, channel_axis=axis, return_dx_hat=True).dx_hat
        along = [1, 1, 1]
        if axis is not None:
            along[axis] = -1
        expected = kit.numpy(dy) * (1.0 if g is None else kit.numpy(g).reshape(along))
        close(kit.numpy(got), expected, None, dtype)
        assert got.dtype == x.dtype
        assert got is not dy


def test_one_variable_takes_scalars(kit, rng, dtype):
    x = kit.array(rng.standard_normal((2, 3, 4)), dtype)
    scalar, vector = kit.array(np.float64(1.25), dtype), kit.array([1.25], dtype)
    a = hw3gpu.batch_norm(x, scalar, scalar, channel_axis=None)
    b = hw3gpu.batch_norm(x, vector, vector, channel_axis=None)
    assert tuple(a.mean.shape) == tuple(a.var.shape) == tuple(a.rstd.shape) == ()
    np.testing.assert_array_equal(kit.numpy(a.y), kit.numpy(b.y))
    g = hw3gpu.batch_norm_backward(x, x, a.mean, a.var, scalar, channel_axis=None)
    assert tuple(g.dgamma.shape) == tuple(g.dbeta.shape) == tuple(g.dvar.shape) == tuple(g.dmean.shape) == ()
    given = {"x": kit.numpy(x), "gamma": 1.25, "beta": 1.25, "channel_axis": None}
    bound = _error_bounds.batch_norm(**given, dtype=accumulate_dtype(x)).y
    close(kit.numpy(a.y), reference.batch_norm(**given).y, None, dtype, bound)


def test_channel_axis_is_a_matter_of_names(tensors, rng):
    """The same numbers wherever the channels stand, but for the order of the sums."""
    values = rng.standard_normal((3, 2, 4, 5))
    expected = tensors.numpy(hw3gpu.batch_norm(tensors.array(values, "float64")).y)
    for axis in (0, 2, 3, -1, -2):
        moved = tensors.array(np.moveaxis(values, 1, axis), "float64")
        got = tensors.numpy(hw3gpu.batch_norm(moved, channel_axis=axis).y)
        np.testing.assert_allclose(np.moveaxis(got, axis, 1), expected, rtol=0, atol=2e-15)


# ---------------------------------------------------------------------------------------------- hard values
def outlier_first(rng, shape):
    x = rng.standard_normal(shape)
    x[0, :, 0] = 1000.0
    return x


def constant_channel(rng, shape):
    x = rng.standard_normal(shape)
    x[:, 0] = 1.23e6
    return x


HARD = {
    "mean 1e4": lambda rng, shape: 1e4 + rng.standard_normal(shape),
    "mean -1e4, spread 0.1": lambda rng, shape: -1e4 + 0.1 * rng.standard_normal(shape),
    "outlier first": outlier_first,
    "constant channel": constant_channel,
    "values near 1e18": lambda rng, shape: 1e18 * (1.0 + 0.1 * rng.standard_normal(shape)),
    "a spread of 1e18": lambda rng, shape: 1e18 * rng.standard_normal(shape),
    "values near 1e-15": lambda rng, shape: 1e-15 * rng.standard_normal(shape),
    "alternating 1e4": lambda rng, shape: 1e4 * (-1.0) ** np.arange(math.prod(shape)).reshape(shape),
    "two values, one apart": lambda rng, shape: 4096.0 + rng.integers(0, 2, shape),
}


@pytest.mark.parametrize("case", HARD, ids=list(HARD))
def test_hard_values(tensors, rng, case, dtype):
    shape = (4, 2, 25)
    values = HARD[case](rng, shape)
    if dtype == "float16":
        values = np.clip(values, -6e4, 6e4)
    both_ways(tensors, rng, dtype, shape, 1, values=values)


@pytest.mark.parametrize("case", ["mean 1e4", "values near 1e18", "outlier first", "two values, one apart"])
def test_hard_values_in_long_channels(tensors, multiprocessors, rng, case):
    shape = (1, 1, 20470)
    both_ways(tensors, rng, "float32", shape, 1, values=HARD[case](rng, shape))


@pytest.mark.parametrize("shape", [(3, 2, 7, 7), (1, 2, 20470), (2, 5, 4, 2), (9, 2)], ids=str)
@pytest.mark.parametrize("value", [1.23e6, -0.1, 3.0e18])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_constant_channel_comes_out_as_beta(tensors, shape, value, dtype):
    axis = -1 if shape[-1] == 2 else 1
    x, beta = tensors.array(np.full(shape, value), dtype), tensors.array([0.3, -7.0], dtype)
    result = hw3gpu.batch_norm(x, tensors.array([5.0, 1e3], dtype), beta, channel_axis=axis)
    along = [1] * len(shape)
    along[axis] = 2
    np.testing.assert_array_equal(tensors.numpy(result.y), np.broadcast_to(tensors.numpy(beta).reshape(along), shape))
    np.testing.assert_array_equal(tensors.numpy(result.var), 0.0)
    np.testing.assert_array_equal(tensors.numpy(result.mean), tensors.numpy(x).flat[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_upstream_gradients_with_a_large_mean(tensors, rng, dtype):
    """dy - mean(dy) keeps its digits only where 1/m does."""
    x, _, gamma, _ = operands(tensors, rng, dtype, (5, 6, 13), 1)
    dy = tensors.array(1e4 + rng.standard_normal((5, 6, 13)), dtype)
    result = hw3gpu.batch_norm(x)
    backward_and_check(tensors, dtype, dy, x, result.mean, result.var, gamma, 1)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15], ids="{:g}".format)
def test_upstream_gradients_of_any_size(tensors, rng, scale):
    x, _, gamma, _ = operands(tensors, rng, "float32", (5, 2, 13), 1)
    dy = tensors.array(scale * rng.standard_normal((5, 2, 13)), "float32")
    result = hw3gpu.batch_norm(x)
    backward_and_check(tensors, "float32", dy, x, result.mean, result.var, gamma, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", ["float32"])
def test_a_spoilt_channel_stays_alone(tensors, rng, value, dtype):
    values = rng.standard_normal((3, 3, 7))
    values[1, 1, 2] = value
    x, dy, gamma, beta = operands(tensors, rng, dtype, (3, 3, 7), 1, values=values)
    result = hw3gpu.batch_norm(x, gamma, beta)
    gradients = hw3gpu.batch_norm_backward(dy, x, result.mean, result.var, gamma)
    for whole in (tensors.numpy(result.y), tensors.numpy(gradients.dx)):
        assert np.isnan(whole[:, 1]).all()
    keep = [0, 2]
    alone = hw3gpu.batch_norm(tensors.array(values[:, keep], dtype), tensors.array(tensors.numpy(gamma)[keep], dtype),
                              tensors.array(tensors.numpy(beta)[keep], dtype))  # fmt: skip
    np.testing.assert_allclose(tensors.numpy(result.y)[:, keep], tensors.numpy(alone.y), rtol=1e-6, atol=1e-6)
    assert np.isfinite(tensors.numpy(gradients.dx)[:, keep]).all()


# ---------------------------------------------------------------------------------------------- what comes back
def test_results_have_the_dtypes_promised(kit, rng, dtype):
    x, dy, gamma, beta = operands(kit, rng, dtype, (3, 2, 7), 1)
    result = hw3gpu.batch_norm(x, gamma, beta)
    gradients = hw3gpu.batch_norm_backward(dy, x, result.mean, result.var, gamma)
    acc = "float64" if dtype == "float64" else "float32"
    for v in (result.y, gradients.dx):
        assert type(v) is type(x)
        assert v.dtype == x.dtype
        assert tuple(v.shape) == (3, 2, 7)
    for v in (result.mean, result.var, result.rstd, gradients.dgamma, gradients.dbeta, gradients.dvar, gradients.dmean):
        assert type(v) is type(x)
        assert str(v.dtype).removeprefix("torch.") == acc
        assert tuple(v.shape) == (2,)


def test_results_are_frozen(kit, rng):
    result = hw3gpu.batch_norm(kit.array(rng.standard_normal((3, 2))))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.y = None
    gradients = hw3gpu.batch_norm_backward(result.y, result.y, result.mean, result.var)
    with pytest.raises(dataclasses.FrozenInstanceError):
        gradients.dx = None


@pytest.mark.parametrize("case", ["7x7 planes", "(B, W, H, C)"])
def test_bitwise_repeatable(kit, rng, case, dtype):
    shape, axis, layout = CASES[case]
    x, dy, gamma, beta = operands(kit, rng, dtype, shape, axis, layout)

    def run():
        a = hw3gpu.batch_norm(x, gamma, beta, channel_axis=axis)
        b = hw3gpu.batch_norm_backward(dy, x, a.mean, a.var, gamma, channel_axis=axis)
        return [kit.numpy(v) for v in (a.y, a.mean, a.var, a.rstd, b.dx, b.dgamma, b.dbeta, b.dvar, b.dmean)]

    for first, again in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(first, again)


# ---------------------------------------------------------------------------------------------- bad input
F32 = np.float32


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"x: expected a NumPy, CuPy or torch array, got builtins.list", lambda a: ([[1.0, 2.0]],)),
        (TypeError, r"x: expected dtype float16, bfloat16, float32, float64, got int64", lambda a: (a((2, 3), "int64"),)),
        (TypeError, r"x: expected dtype .* got bool", lambda a: (a((2, 3), "bool"),)),
        (TypeError, r"gamma: expected a NumPy, CuPy or torch array, got builtins.float", lambda a: (a((2, 3)), 1.0)),
        (TypeError, r"beta: expected dtype .* got int32", lambda a: (a((2, 3)), None, a((3,), "int32"))),
        (ValueError, r"x: expected at least 2 axes .*channel_axis=None.* got shape \(3,\)", lambda a: (a((3,)),)),
        (ValueError, r"x: expected at least 2 axes .* got shape \(\)", lambda a: (a(()),)),
        (ValueError, r"gamma: expected shape \(3,\) \(one number per channel of x\), got \(2,\)",
         lambda a: (a((2, 3)), a((2,)))),
        (ValueError, r"beta: expected shape \(3,\) .* got \(3, 1\)", lambda a: (a((2, 3)), None, a((3, 1)))),
        (ValueError, r"gamma: expected shape \(3,\) .* got \(\)", lambda a: (a((2, 3)), a(()))),
        (ValueError, r"x: expected at least one value per channel, got shape \(0, 3\)", lambda a: (a((0, 3)),)),
        (ValueError, r"x: expected at least one value per channel, got shape \(2, 3, 0\)", lambda a: (a((2, 3, 0)),)),
    ],
)  # fmt: skip
def test_bad_operands(kit, error, message, arguments):
    def array(shape, dtype="float32"):
        return kit.array(np.ones(shape), dtype)

    with pytest.raises(error, match=message):
        hw3gpu.batch_norm(*arguments(array))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"eps: expected a number of at least 0, got -1e-05", {"eps": -1e-5}),
        (ValueError, r"eps: expected a number of at least 0, got nan", {"eps": math.nan}),
        (ValueError, r"channel_axis: expected an axis of x with shape \(2, 3\), got 2", {"channel_axis": 2}),
        (ValueError, r"channel_axis: expected an axis of x with shape \(2, 3\), got -3", {"channel_axis": -3}),
        (TypeError, r"channel_axis: expected an integer, got 1.0 \(float\)", {"channel_axis": 1.0}),
        (TypeError, r"channel_axis: expected an integer, got True", {"channel_axis": True}),
    ],
)
def test_bad_options(kit, error, message, options):
    x = kit.array(np.ones((2, 3)))
    with pytest.raises(error, match=message):
        hw3gpu.batch_norm(x, **options)
    with pytest.raises(error, match=message):
        hw3gpu.batch_norm_backward(x, x, kit.array(np.ones(3)), kit.array(np.ones(3)), **options)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, r"dy: expected a NumPy, CuPy or torch array, got builtins.NoneType", {"dy": lambda a: None}),
        (TypeError, r"dy: expected the dtype of x, float32, got float64", {"dy": lambda a: a((2, 3), "float64")}),
        (ValueError, r"dy: expected the shape of x, \(2, 3\), got \(3, 2\)", {"dy": lambda a: a((3, 2))}),
        (ValueError, r"mean: expected shape \(3,\) \(one number per channel of x\), got \(2,\)", {"mean": lambda a: a((2,))}),
        (ValueError, r"var: expected shape \(3,\) .* got \(\)", {"var": lambda a: a(())}),
        (TypeError, r"var: expected dtype .* got int32", {"var": lambda a: a((3,), "int32")}),
        (TypeError, r"mean: expected a NumPy, CuPy or torch array, got builtins.float", {"mean": lambda a: 0.0}),
        (ValueError, r"gamma: expected shape \(3,\) .* got \(4,\)", {"gamma": lambda a: a((4,))}),
        (ValueError, r"x: expected at least one value per channel, got shape \(0, 3\)", {"x": lambda a: a((0, 3))}),
    ],
)
def test_bad_operands_backward(kit, error, message, change):
    def array(shape, dtype="float32"):
        return kit.array(np.ones(shape), dtype)

    arguments = {"dy": array((2, 3)), "x": array((2, 3)), "mean": array((3,)), "var": array((3,)), "gamma": array((3,))}
    arguments |= {name: make(array) for name, make in change.items()}
    with pytest.raises(error, match=message):
        hw3gpu.batch_norm_backward(**arguments)
