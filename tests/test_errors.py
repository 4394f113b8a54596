"""The measure of docs/errors.md is tight: deliberate faults in right algorithms fail both of its criteria.

Each fault is what a careless kernel would do, in NumPy and the dtype of the sums, on inputs like those of `hw3gpu verify` and
the tests; the same computation without the fault passes. PyTorch's error is measured on the same input, in the precision
of the sums. Faults that PyTorch's own kernels have are a table of their own: there the bound alone tells right from wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hw3gpu import _error_bounds, reference
from hw3gpu._cli import losses, operations
from hw3gpu._cli.arrays import DTYPES, Place
from hw3gpu._cli.measure import max_error, share_of_bound, tolerance, ulp
from hw3gpu._error_bounds import rounding
from measure import close

EPS = 1e-5
f32, f16 = np.float32, np.float16


class Case(NamedTuple):
    """A result with a fault and without it, the answer sheet's, PyTorch's, the bound, and the result's dtype."""

    wrong: Any
    right: Any
    sheet: np.ndarray
    theirs: torch.Tensor | None  # None where PyTorch has the same fault
    bound: np.ndarray
    dtype: str


def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)


def bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(x, dtype=f32)).bfloat16().double().numpy()


# ---------------------------------------------------------------------------------------------- batch normalisation
def far_channels(dtype: Any, offset: float = 1e4) -> np.ndarray:
    """(N, C, S) with a mean of 1e4 and a spread of 1."""
    return (rng().standard_normal((4, 4, 40)) + offset).astype(dtype)


def normalized(x: np.ndarray, mean: Any, rest: Any, var: Any) -> np.ndarray:
    of = x.dtype.type
    rstd = (1 / np.sqrt(np.asarray(var, dtype=of) + of(EPS))).astype(of)
    along = (1, -1, 1)
    centred = (x - np.asarray(mean, dtype=of).reshape(along)) - np.asarray(rest, dtype=of).reshape(along)
    return centred * rstd.reshape(along)


def batch_norm(x: np.ndarray, name: str, wrong: Any, right: Any) -> Case:
    x_t = torch.from_numpy(x)
    y, mean, rstd = torch.native_batch_norm(x_t, None, None, None, None, True, 0.0, EPS)
    theirs = {"y": y, "mean": mean, "var": torch.var(x_t, (0, 2), correction=0), "rstd": rstd}
    dtype = str(x.dtype)
    sheet, bound = reference.batch_norm(x), _error_bounds.batch_norm(x, dtype=dtype)
    return Case(wrong, right, getattr(sheet, name), theirs[name], getattr(bound, name), dtype)


def sum_without_compensation() -> Case:
    """The mean of float32 values by one float32 sum after the other, where the kernels carry along what is rounded off."""
    x = far_channels(f32)
    sums = np.cumsum(x.transpose(1, 0, 2).reshape(4, -1), axis=1, dtype=f32)[:, -1]
    return batch_norm(x, "mean", sums / f32(160), x.mean((0, 2), dtype=np.float64).astype(f32))


def mean_without_its_rest(dtype: Any) -> Case:
    """The mean in one number of the dtype, where the kernels keep a second one with what its rounding left."""
    x = far_channels(dtype)
    exact = x.astype(np.longdouble)
    mean, var = exact.mean((0, 2)).astype(dtype), exact.var((0, 2))
    rest = (exact - mean.reshape(1, -1, 1)).mean((0, 2)).astype(dtype)
    wrong, right = (normalized(x, mean, low, var) for low in (0 * rest, rest))
    return batch_norm(x, "y", wrong, right)._replace(theirs=None)


def one_pass_variance(dtype: Any) -> Case:
    """E[x²] - E[x]², which cancels the digits of a variance far smaller than the mean's square."""
    x = far_channels(dtype)
    mean = x.mean((0, 2), dtype=dtype)
    wrong = (x * x).mean((0, 2), dtype=dtype) - mean * mean
    centred = x - mean.reshape(1, -1, 1)
    rest = centred.mean((0, 2), dtype=dtype)
    return batch_norm(x, "var", wrong, (centred * centred).mean((0, 2), dtype=dtype) - rest * rest)


def last_value_left_out_of_a_channel() -> Case:
    """m - 1 of a channel's m values in its mean, as behind a mask that is one short."""
    x = rng().standard_normal((4, 4, 40)).astype(f32)
    wrong = x.transpose(1, 0, 2).reshape(4, -1)[:, :-1].astype(np.float64).mean(1).astype(f32)
    return batch_norm(x, "mean", wrong, x.astype(np.float64).mean((0, 2)).astype(f32))


def half_precision_statistics() -> Case:
    """The sums of a half-precision batch in half precision instead of float32."""
    x = bfloat16(rng().standard_normal((4, 4, 40)) + 2.0).astype(f32)
    total = np.zeros(4)
    for value in x.transpose(0, 2, 1).reshape(-1, 4):
        total = bfloat16(total + value)
    return batch_norm(x, "mean", bfloat16(total / 160), x.astype(np.float64).mean((0, 2)).astype(f32))


def gradient_about_a_rounded_mean() -> Case:
    """dγ with (x - hi) - lo made x - (hi + lo), as a compiler that may reassociate does."""
    x, dy = far_channels(f32), rng().standard_normal((4, 4, 40)).astype(f32)
    sheet, along = reference.batch_norm(x), (1, -1, 1)
    hi = sheet.mean.astype(f32)
    lo = (sheet.mean - hi).astype(f32)
    rstd = sheet.rstd.astype(f32)
    found = [
        (np.sum(dy * centred, (0, 2), dtype=np.float64) * rstd).astype(f32)
        for centred in (x - (hi + lo).reshape(along), (x - hi.reshape(along)) - lo.reshape(along))
    ]
    given = dy, x, sheet.mean, sheet.var
    bound = _error_bounds.batch_norm_backward(*given, dtype="float32", own_statistics=True)
    return Case(*found, reference.batch_norm_backward(*given).dgamma, None, bound.dgamma, "float32")


# ---------------------------------------------------------------------------------------------- softmax and its loss
def softmax_of(z: np.ndarray, keep: int | None = None) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e[..., :keep].sum(-1, keepdims=True, dtype=z.dtype)


def softmax(z: np.ndarray, wrong: Any) -> Case:
    dtype = str(z.dtype)
    theirs = torch.softmax(torch.from_numpy(z), -1)
    return Case(wrong, softmax_of(z), reference.softmax(z), theirs, _error_bounds.softmax(z, dtype=dtype), dtype)


def last_class_left_out(dtype: Any) -> Case:
    z = (3 * rng().standard_normal((4, 1030))).astype(dtype)
    z[:, -1] = 0.0  # an ordinary class: about 1e-5 of the sum
    return softmax(z, softmax_of(z, -1))


def half_precision_sum() -> Case:
    """Σ exp(z - m) of a thousand classes in float16: what follows is float32 again."""
    z = rng().standard_normal((4, 1030)).astype(f16).astype(f32)
    e = np.exp(z - z.max(-1, keepdims=True))
    total = np.zeros((4, 1), f16)
    for column in e.T:
        total = (total + column[:, None].astype(f16)).astype(f16)
    return softmax(z, e / total.astype(f32))


def without_the_maximum(dtype: Any) -> Case:
    """exp(z) where z lies near -80 (-700): what is left of the sum is subnormal, or has lost its digits."""
    z = (rng().standard_normal((4, 33)) - (100 if dtype == f32 else 740)).astype(dtype)
    e = np.exp(z)
    return softmax(z, e / e.sum(-1, keepdims=True))


def backward_with_one_class_less() -> Case:
    y = softmax_of(rng().standard_normal((4, 257)).astype(f32))
    dy = np.sin(np.arange(y.size)).reshape(y.shape).astype(f32)
    wrong, right = (y * (dy - (dy * y)[:, :keep].sum(-1, keepdims=True)) for keep in (-1, None))
    theirs = torch.ops.aten._softmax_backward_data(torch.from_numpy(dy), torch.from_numpy(y), -1, torch.float32)
    bound = _error_bounds.softmax_backward(dy, y, dtype="float32")
    return Case(wrong, right, reference.softmax_backward(dy, y), theirs, bound, "float32")


def certain_rows(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    z = rng().standard_normal((6, 40))
    z[np.arange(6), np.arange(6)] += 12.0
    return z.astype(dtype), np.arange(6)


def p_rounded_first(
    dtype: Any, rounded: Callable[[np.ndarray], np.ndarray], result: Callable[[np.ndarray], np.ndarray], name: str
) -> Case:
    """p_t - 1 with p rounded first, where p_t → 1: of the result, `name` its dtype, the digits beyond those of p are gone."""
    z, t = certain_rows(dtype)
    at = np.arange(6), t
    e = np.exp(z - z.max(-1, keepdims=True))
    e[at] = 0.0
    sum_exp_minus_1 = e.sum(-1)
    wrong, right = rounded(1 / (1 + sum_exp_minus_1)) - 1, -sum_exp_minus_1 / (1 + sum_exp_minus_1)
    sheet = reference.softmax_cross_entropy(z, t).dz[at]
    bound = _error_bounds.softmax_cross_entropy(z, t, dtype=str(z.dtype)).dz[at]
    theirs = torch.from_numpy(result(torch.softmax(torch.from_numpy(z), -1).numpy()[at] - 1))
    return Case(result(wrong), result(right), sheet, theirs, bound, name)


def p_rounded_as_pytorch_does(dtype: Any) -> Case:
    case = p_rounded_first(dtype, np.array, np.array, np.dtype(dtype).name)
    return case._replace(theirs=None)


def loss_from_a_rounded_p() -> Case:
    """-log p_t where p_t rounds to 1."""
    z, t = certain_rows(f32)
    p = softmax_of(z)[np.arange(6), t]
    e = np.exp(z - z.max(-1, keepdims=True))
    e[np.arange(6), t] = 0.0
    sheet, bound = reference.softmax_cross_entropy(z, t).loss, _error_bounds.softmax_cross_entropy(z, t, dtype="float32").loss
    return Case(-np.log(p), np.log1p(e.sum(-1)), sheet, None, bound, "float32")


def loss_by_a_rounded_lse() -> Case:
    """(m + log Σ exp(z - m)) - z_t near 1e4, where the sum rounds away the logarithm's digits."""
    z = (1e4 + 3 * rng().standard_normal((6, 40))).astype(f32)
    t, rows = np.arange(6), np.arange(6)
    m = z.max(-1)
    log = np.log(np.exp(z - m[:, None]).sum(-1))
    sheet, bound = reference.softmax_cross_entropy(z, t).loss, _error_bounds.softmax_cross_entropy(z, t, dtype="float32").loss
    theirs = F.cross_entropy(torch.from_numpy(z), torch.from_numpy(t), reduction="none")
    return Case((m + log) - z[rows, t], log - (z[rows, t] - m), sheet, theirs, bound, "float32")


def cross_entropy_without_the_last_class() -> Case:
    y, y_hat = (rng().dirichlet(np.ones(257), 4).astype(f32) for _ in range(2))
    terms = y * np.log(y_hat)
    theirs = -torch.special.xlogy(torch.from_numpy(y), torch.from_numpy(y_hat)).sum(-1)
    bound = _error_bounds.cross_entropy(y, y_hat, dtype="float32")
    return Case(-terms[:, :-1].sum(-1), -terms.sum(-1), reference.cross_entropy(y, y_hat), theirs, bound, "float32")


def jacobian_in_half_precision() -> Case:
    z = rng().standard_normal((4, 21)).astype(f32)
    s = softmax_of(z)

    def jacobian(s: np.ndarray) -> np.ndarray:
        return np.eye(21, dtype=f32) * s[..., None, :] - s[..., :, None] * s[..., None, :]

    theirs = torch.softmax(torch.from_numpy(z), -1)
    theirs = torch.diag_embed(theirs) - theirs[..., :, None] * theirs[..., None, :]
    bound = _error_bounds.softmax_jacobian(z, dtype="float32")
    return Case(jacobian(s.astype(f16).astype(f32)), jacobian(s), reference.softmax_jacobian(z), theirs, bound, "float32")


# ---------------------------------------------------------------------------------------------- points and the trace
def moments(points: np.ndarray, wrong: Any, right: Any) -> Case:
    theirs = torch.cov(torch.from_numpy(points.T), correction=0)
    return Case(wrong, right, reference.moments(points).covariance, theirs, _error_bounds.moments(points).covariance, "float64")


def one_pass_covariance() -> Case:
    """E[x xᵀ] - μ μᵀ."""
    x = rng().standard_normal((20, 3)) + 1e4
    centred = x - x.mean(0)
    return moments(x, x.T @ x / 20 - np.outer(x.mean(0), x.mean(0)), centred.T @ centred / 20)


def float32_covariance() -> Case:
    """Float64 points summed in float32."""
    x = rng().standard_normal((20, 3))
    centred = x - x.mean(0)
    return moments(x, centred.astype(f32).T @ centred.astype(f32) / 20, centred.T @ centred / 20)


def points_of_the_unbiased_covariance() -> Case:
    """sqrt(n) taken for sqrt(n - 1): the points' covariance is off by 1/n."""
    a = rng().standard_normal((3, 3))
    sigma = a @ a.T
    values, q = np.linalg.eigh(sigma)
    x = np.sqrt(20) * reference.helmert(20, 3) @ (q * np.sqrt(values)).T
    bound = _error_bounds.points_with_moments(np.zeros(3), sigma, x, dtype="float64").covariance
    wrong, right = (reference.moments(points).covariance for points in (x * np.sqrt(19 / 20), x))
    return Case(wrong, right, sigma, torch.from_numpy(right), bound, "float64")


def eigenvalue_of_float32() -> Case:
    a = rng().standard_normal((12, 12))
    sigma = a + a.T
    wrong = np.linalg.eigvalsh(sigma.astype(f32))[:4].sum(dtype=f32)
    sheet = reference.minimize_trace(sigma, 4).value
    bound = np.asarray(_error_bounds.minimize_trace(sigma, 4, dtype="float64")[0])
    theirs = torch.linalg.eigvalsh(torch.from_numpy(sigma))[:4].sum()
    return Case(np.float64(wrong), theirs.numpy(), sheet, theirs, bound, "float64")


def as_float16(x: np.ndarray) -> np.ndarray:
    return x.astype(f16).astype(f32)


FAULTS: dict[str, Callable[[], Case]] = {
    "a dropped compensation": sum_without_compensation,
    "a one-pass variance, float32": lambda: one_pass_variance(f32),
    "a one-pass variance, float64": lambda: one_pass_variance(np.float64),
    "a one-pass covariance": one_pass_covariance,
    "half-precision accumulation, statistics": half_precision_statistics,
    "half-precision accumulation, exponentials": half_precision_sum,
    "half-precision probabilities in a Jacobian": jacobian_in_half_precision,
    "p rounded to float16 before 1 is subtracted": lambda: p_rounded_first(f32, as_float16, np.array, "float32"),
    "p rounded to bfloat16 before 1 is subtracted": lambda: p_rounded_first(f32, bfloat16, bfloat16, "bfloat16"),
    "the last element left out, a channel": last_value_left_out_of_a_channel,
    "the last element left out, softmax in float32": lambda: last_class_left_out(f32),
    "the last element left out, softmax in float64": lambda: last_class_left_out(np.float64),
    "the last element left out, softmax's backward": backward_with_one_class_less,
    "the last element left out, cross entropy": cross_entropy_without_the_last_class,
    "exp without the maximum, float32": lambda: without_the_maximum(f32),
    "exp without the maximum, float64": lambda: without_the_maximum(np.float64),
    "a rounded log-sum-exp": loss_by_a_rounded_lse,
    "a float32 covariance of float64 points": float32_covariance,
    "points of the unbiased covariance": points_of_the_unbiased_covariance,
    "an eigenvalue of float32": eigenvalue_of_float32,
}

# PyTorch's batch normalisation keeps a mean in one number, its softmax a probability beside 1
PYTORCHS_OWN: dict[str, Callable[[], Case]] = {
    "a mean without its rest, float32": lambda: mean_without_its_rest(f32),
    "a mean without its rest, float64": lambda: mean_without_its_rest(np.float64),
    "x - (hi + lo) in the sums of a gradient": gradient_about_a_rounded_mean,
    "p rounded to float32 before 1 is subtracted": lambda: p_rounded_as_pytorch_does(f32),
    "p rounded to float64 before 1 is subtracted": lambda: p_rounded_as_pytorch_does(np.float64),
    "-log of a rounded p": loss_from_a_rounded_p,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_both_criteria(fault: str) -> None:
    case = FAULTS[fault]()
    assert case.theirs is not None
    torch_error = max_error(case.theirs.double().numpy(), case.sheet, case.dtype)
    assert max_error(case.wrong, case.sheet, case.dtype) > tolerance(case.sheet, case.dtype, torch_error)
    assert share_of_bound(case.wrong, case.sheet, case.dtype, case.bound) > 1.0
    with pytest.raises(AssertionError, match=r"is above .* of the bound"):
        close(case.wrong, case.sheet, torch_error, case.dtype, case.bound)
    close(case.right, case.sheet, torch_error, case.dtype, case.bound)
    assert share_of_bound(case.right, case.sheet, case.dtype, case.bound) <= 1.0


@pytest.mark.parametrize("fault", PYTORCHS_OWN)
def test_the_bound_alone_refuses_what_pytorch_does_too(fault: str) -> None:
    case = PYTORCHS_OWN[fault]()
    assert share_of_bound(case.wrong, case.sheet, case.dtype, case.bound) > 1.0
    assert share_of_bound(case.right, case.sheet, case.dtype, case.bound) <= 1.0


# ---------------------------------------------------------------------------------------------- what the bounds are made of
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_unit_in_the_last_place_is_the_distance_of_neighbours(dtype: str) -> None:
    """Of ordinary numbers, at both ends of the normal ones, below them, and of 0."""
    of = getattr(torch, dtype)
    limits = torch.finfo(of)
    for value in (1.0, 1.75, 1000.0, limits.max / 1.5, limits.tiny, 1.5 * limits.tiny, limits.tiny / 2, 0.0):
        x = torch.tensor(value, dtype=of)
        assert ulp(float(x), dtype) == float(torch.nextafter(x, torch.tensor(np.inf, dtype=of)).double() - x.double())
        assert ulp(-float(x), dtype) == ulp(float(x), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_a_rounding_costs(dtype: str) -> None:
    """Half a unit of 1, and of a number below the normal ones no more than the smallest of these."""
    limits = np.finfo(dtype)
    assert rounding.unit_roundoff(dtype) == limits.eps / 2
    assert rounding.result(0.0, dtype) == limits.tiny
    assert rounding.result(3.0, dtype) == 1.5 * limits.eps + limits.tiny
    assert rounding.times(np.array([0.0, 1.0, 2.0]), np.array([np.inf, 3.0, 4.0])).tolist() == [0.0, 3.0, 8.0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["relu", "silu", "hardswish", "gelu"])
def test_the_bounds_of_activations_are_a_few_units(kind: str, dtype: str) -> None:
    """6 u of what goes in; of what comes out 10 u and another a unit of |p|, of which an exponential is; 14 u of a slope."""
    p, u = np.linspace(-20, 20, 401), rounding.unit_roundoff(dtype)
    y = abs(reference.activation(p, kind))
    forward = _error_bounds.activation(p, kind, dtype=dtype) / u
    assert np.all(forward <= 6.1 * abs(p) + (10.1 + abs(p)) * y + 1e-6)
    assert kind == "relu" or np.all(forward >= y)
    assert np.all(_error_bounds.activation_backward(1.0, p, kind, dtype=dtype) <= 14 * u)


# ---------------------------------------------------------------------------------------------- what `verify` measures by
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_batches_of_every_dtype_have_statistics(dtype: str) -> None:
    for output in operations.batch_norm(Place("torch", "cpu"), dtype):
        assert np.isfinite(output.expected).all(), output.name


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_pytorchs_divergence_is_the_answer_sheets(kind: str) -> None:
    student, teacher = rng().standard_normal((2, 5, 40))
    sheet = reference.distillation_loss(student, teacher, kind=kind, temperature=losses.TEMPERATURE, reduction="none")
    theirs = losses._torch_divergence(*map(torch.from_numpy, (student, teacher)), kind)
    np.testing.assert_allclose(theirs.numpy(), sheet.loss, rtol=1e-12)


def test_an_error_of_pytorch_that_is_not_finite_is_no_measure() -> None:
    for error in (np.inf, np.nan):
        with pytest.raises(ValueError, match="torch_error: expected a finite error, got"):
            tolerance(np.ones(2), "float32", error)
