"""Laws that hold of every function whatever it is given, and the answer sheet's values, over drawn shapes, strides and values.

Drawn by hypothesis: in `make test` the same few examples in every run; HW3GPU_EXAMPLES=N draws N of each anew, as `make fuzz`
does for 20 minutes.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from drawn_cases import SUBJECTS
from drawn_values import DTYPES, SIZES, array_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import hw3gpu
import hw3gpu.functional as HF
from hw3gpu import _error_bounds, reference
from hw3gpu._cli.arrays import to_numpy

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*non-contiguous.*:UserWarning")

EXAMPLES = int(os.environ.get("HW3GPU_EXAMPLES", "0"))
drawn = settings(
    max_examples=EXAMPLES or 12, derandomize=not EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip
SEEDS = st.integers(0, 2**32 - 1)
LARGEST = 1 << 13


@st.composite
def shapes(draw: Any, least: int = 1, most: int = 4) -> tuple[int, ...]:
    shape: list[int] = []
    for _ in range(draw(st.integers(least, most))):
        room = LARGEST // max(math.prod(shape), 1)
        shape.append(draw(st.sampled_from([n for n in SIZES if n <= max(room, 1)])))
    return tuple(draw(st.permutations(shape)))


@st.composite
def large_shapes(draw: Any, least: int, most: int) -> tuple[int, ...]:
    """Of 2¹⁸ to 2²¹ elements: outputs in recycled memory, several threads, results past the caches."""
    shape = list(draw(shapes(least, most)))
    grown = draw(st.integers(0, len(shape) - 1))
    shape[grown] *= -(-draw(st.sampled_from([1 << 18, 1 << 20])) // math.prod(shape))
    return tuple(shape)


RANKS = {"batch_norm": (2, 4), "functional.batch_norm": (2, 4), "moments": (2, 2)}
WITH_SHAPES = [name for name, subject in SUBJECTS.items() if "shape" in subject.factors and name != "moments"]


def values_are_the_answer_sheets(name: str, shapes: Any, examples: int, without: tuple[str, ...] = ("compile",)) -> None:
    """Every output and gradient within its bound, arguments as they were, the same bits on a second run."""
    subject = SUBJECTS[name]

    @settings(drawn, max_examples=examples)
    @given(st.data())
    def draws(data: Any) -> None:
        row = {
            factor: data.draw(st.sampled_from([v for v in levels if v not in without]), factor)
            for factor, levels in subject.factors.items()
        }
        if "shape" in row:
            row["shape"] = data.draw(shapes(*RANKS.get(name, (1, 3))), "shape")
        if "channel_axis" in row and row["channel_axis"] is not None:
            row["channel_axis"] %= len(row["shape"])
        if row.get("training") and row["shape"][0] * math.prod(row["shape"][2:]) == 1:
            row["shape"] = (2, *row["shape"][1:])  # a single value a channel is refused
        if name == "moments" and math.prod(row["shape"]) * row["shape"][1] > 1 << 17:
            row["shape"] = row["shape"][::-1]
        assume(name != "moments" or row["shape"][1] <= 128)
        row["seed"] = data.draw(SEEDS, "seed")
        assume(subject.allowed(row))
        subject.check(row)

    draws()


@pytest.mark.parametrize("name", SUBJECTS)
def test_values_are_the_answer_sheets(name: str) -> None:
    values_are_the_answer_sheets(name, shapes, EXAMPLES or 12)


@pytest.mark.parametrize("name", WITH_SHAPES)
def test_values_of_large_arrays_are_the_answer_sheets(name: str) -> None:
    """Not under vmap, where PyTorch's sums take the place of the kernels'."""
    values_are_the_answer_sheets(name, large_shapes, EXAMPLES // 8 or 4, ("compile", "vmap"))


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def bound_of(name: str, *args: Any, dtype: str, **options: Any) -> Any:
    return getattr(_error_bounds, name)(*args, **options, dtype=dtype)


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What rounding numbers like x to a dtype may cost."""
    info = torch.finfo(dtype)
    return info.eps * (abs(x) + info.smallest_normal)


# ---------------------------------------------------------------------------------------------- softmax and its loss
@drawn
@given(shapes(1, 2), st.sampled_from(DTYPES), SEEDS)
def test_probabilities_sum_to_one_and_derivatives_to_zero(shape, dtype, seed):
    rng = rng_of(seed)
    z = array_of("torch", 4 * rng.standard_normal(shape), dtype, "contiguous")
    acc = "float64" if dtype == "float64" else "float32"
    y, zs = to_numpy(hw3gpu.softmax(z)), to_numpy(z)
    of_y = bound_of("softmax", zs, dtype=acc) + rounded(y, z.dtype)
    assert (abs(y.sum(-1) - 1) <= of_y.sum(-1)).all()
    classes = torch.from_numpy(np.asarray(rng.integers(0, shape[-1], shape[:-1])))
    dz = to_numpy(hw3gpu.softmax_cross_entropy(z, classes).dz)
    of_dz = bound_of("softmax_cross_entropy", zs, classes.numpy(), dtype=acc).dz + rounded(dz, z.dtype)
    assert (abs(dz.sum(-1)) <= of_dz.sum(-1)).all()
    if shape[-1] <= 65:
        jacobian = to_numpy(hw3gpu.softmax_jacobian(z))
        of_jacobian = bound_of("softmax_jacobian", zs, dtype=acc) + rounded(jacobian, z.dtype)
        for axis in (-1, -2):
            assert (abs(jacobian.sum(axis)) <= of_jacobian.sum(axis)).all()


@drawn
@given(shapes(1, 3), st.sampled_from(["float64", "float32"]), SEEDS, st.sampled_from([-1024.0, 64.0, 4096.0]))
def test_a_shift_of_the_logits_changes_no_bit_of_softmax_and_loss(shape, dtype, seed, shift):
    """Multiples of 2⁻⁶ and their sums with the shift are numbers of the dtype: z - max z is the same."""
    rng = rng_of(seed)
    z = torch.from_numpy(rng.integers(-512, 512, shape) / 64.0).to(getattr(torch, dtype))
    classes = torch.from_numpy(np.asarray(rng.integers(0, shape[-1], shape[:-1])))
    assert torch.equal(hw3gpu.softmax(z), hw3gpu.softmax(z + shift))
    ours, moved = (hw3gpu.softmax_cross_entropy(v, classes) for v in (z, z + shift))
    assert torch.equal(ours.loss, moved.loss)
    assert torch.equal(ours.dz, moved.dz)
    assert (ours.loss >= 0).all()


@drawn
@given(st.sampled_from([(3, 5), (17, 33), (64, 129)]), st.sampled_from(DTYPES), SEEDS)
def test_rows_and_classes_in_another_order_come_out_in_that_order(shape, dtype, seed):
    """Rows to the bit. Classes are summed in their order: within twice the bound."""
    rng = rng_of(seed)
    z = array_of("torch", 3 * rng.standard_normal(shape), dtype, "contiguous")
    rows, classes = torch.from_numpy(rng.permutation(shape[0])), torch.from_numpy(rng.permutation(shape[1]))
    target = torch.from_numpy(rng.integers(0, shape[1], shape[0]))
    y, loss = hw3gpu.softmax(z), HF.cross_entropy(z, target, reduction="none")
    assert torch.equal(hw3gpu.softmax(z[rows]), y[rows])
    assert torch.equal(HF.cross_entropy(z[rows], target[rows], reduction="none"), loss[rows])
    of_y = bound_of("softmax", to_numpy(z), dtype="float64" if dtype == "float64" else "float32")
    of_y = (of_y + rounded(to_numpy(y), z.dtype))[:, classes.numpy()]
    assert (abs(to_numpy(hw3gpu.softmax(z[:, classes])) - to_numpy(y)[:, classes.numpy()]) <= 2 * of_y).all()


@drawn
@given(st.sampled_from([(3, 5), (17, 33)]), SEEDS, st.sampled_from([2.0**-10, 8.0, 2.0**20]))
def test_a_scale_of_the_class_weights_leaves_a_mean_as_it_is(shape, seed, scale):
    """A power of two: to the bit, loss and gradient."""
    rng = rng_of(seed)
    z = torch.from_numpy(rng.standard_normal(shape)).requires_grad_()
    target, weight = torch.from_numpy(rng.integers(0, shape[1], shape[0])), torch.from_numpy(rng.random(shape[1]) + 0.1)
    losses = [HF.cross_entropy(z, target, w) for w in (weight, scale * weight)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, z)[0] for loss in losses))


# ---------------------------------------------------------------------------------------------- batch normalisation
@drawn
@given(shapes(2, 4), st.sampled_from(["float64", "float32"]), SEEDS)
def test_the_gradient_of_a_channel_sums_to_zero_alone_and_along_x_hat(shape, dtype, seed):
    rng = rng_of(seed)
    assume(math.prod(shape) > shape[1])
    x, dy = (array_of("numpy", rng.standard_normal(shape), dtype, "contiguous") for _ in range(2))
    gamma, axes = np.ones(shape[1], dtype), (0, *range(2, len(shape)))
    found = hw3gpu.batch_norm(x, gamma)
    dx = np.asarray(hw3gpu.batch_norm_backward(dy, x, found.mean, found.var, gamma).dx, dtype=np.float64)
    sheet = reference.batch_norm(x, gamma)
    given_ = dy, x, sheet.mean, sheet.var, gamma
    of_dx = bound_of("batch_norm_backward", *given_, dtype=dtype, own_statistics=True).dx + np.finfo(dtype).eps * abs(dx)
    # what the rounded mean, given to the backward pass, has left: the sums of x_hat are not quite 0 and m
    eps_var = 1e-5 / (sheet.var + 1e-5)
    mean_part = abs(sheet.mean) * np.finfo(dtype).eps * sheet.rstd
    slope = np.sum(abs(dy), axis=axes) * sheet.rstd * (mean_part + np.finfo(dtype).eps)
    assert (abs(dx.sum(axes)) <= of_dx.sum(axes) + 4 * slope).all()
    # Σ dx x̂ = γ rstd (Σ dy x̂) ε / (σ² + ε): zero but for ε
    along = np.sum(dy * sheet.x_hat, axis=axes) * sheet.rstd * eps_var
    of_sum = np.sum(of_dx * abs(sheet.x_hat), axis=axes) + 4 * slope * np.max(abs(sheet.x_hat), axis=axes)
    assert (abs(np.sum(dx * sheet.x_hat, axis=axes) - along) <= of_sum).all()


@drawn
@given(shapes(2, 4), st.sampled_from(["float64", "float32"]), SEEDS, st.sampled_from([2.0**-6, 4.0, 2.0**10]))
def test_a_scale_of_x_changes_no_bit_of_y(shape, dtype, seed, scale):
    """By a power of two, ε by its square."""
    x = rng_of(seed).standard_normal(shape).astype(dtype)
    plain, scaled = hw3gpu.batch_norm(x, eps=2.0**-16), hw3gpu.batch_norm(scale * x, eps=2.0**-16 * scale**2)
    np.testing.assert_array_equal(plain.y, scaled.y)
    np.testing.assert_array_equal(scale * plain.mean, scaled.mean)
    np.testing.assert_array_equal(scale**2 * plain.var, scaled.var)


@drawn
@given(st.sampled_from([(7, 3), (5, 4, 9), (2, 17, 3, 3)]), st.sampled_from(DTYPES), SEEDS)
def test_channels_in_another_order_come_out_in_that_order(shape, dtype, seed):
    rng = rng_of(seed)
    x = array_of("torch", rng.standard_normal(shape), dtype, "contiguous")
    order = torch.from_numpy(rng.permutation(shape[1]))
    given_, expected = hw3gpu.batch_norm(x[:, order].contiguous()), hw3gpu.batch_norm(x)
    bound = bound_of("batch_norm", to_numpy(x), dtype="float64" if dtype == "float64" else "float32")
    of_y = bound.y + rounded(to_numpy(expected.y), x.dtype)
    assert (abs(to_numpy(given_.y) - to_numpy(expected.y)[:, order.numpy()]) <= 2 * of_y[:, order.numpy()]).all()


# ---------------------------------------------------------------------------------------------- points and the trace
@drawn
@given(st.integers(1, 33), st.integers(0, 33), st.sampled_from(["float64", "float32"]), SEEDS)
def test_moments_of_points_with_moments_are_the_moments(m, rank, dtype, seed):
    rng = rng_of(seed)
    a = rng.standard_normal((m, min(rank, m)))
    mean, sigma = (10 * rng.standard_normal(m)).astype(dtype), (a @ a.T).astype(dtype)
    points = hw3gpu.points_with_moments(mean, sigma, rng=seed % 7 or None)
    found = hw3gpu.moments(points)
    bound = _error_bounds.points_with_moments(mean, sigma, points, dtype=dtype)
    own = _error_bounds.moments(points)
    ulp = np.finfo(dtype).eps
    assert (abs(found.mean - mean.astype("f8")) <= bound.mean + own.mean + ulp * abs(mean)).all()
    assert (abs(found.covariance - sigma.astype("f8")) <= bound.covariance + own.covariance + ulp * abs(sigma)).all()


@drawn
@given(st.integers(2, 40), st.sampled_from(["float64", "float32"]), SEEDS)
def test_the_trace_grows_with_k_is_the_least_and_is_certified(m, dtype, seed):
    rng = rng_of(seed)
    a = rng.standard_normal((m, m))
    sigma = (a @ a.T).astype(dtype)
    found = [hw3gpu.minimize_trace(sigma, k) for k in range(1, m + 1)]
    sums = [float(f.eigenvalue_sum) for f in found]
    assert all(after - before >= -float(f.margin) for before, after, f in zip(sums, sums[1:], found[1:], strict=False))
    assert abs(sums[-1] - np.trace(sigma.astype("f8"))) <= m * 2.0**-50 * np.linalg.norm(sigma.astype("f8"))
    k = seed % m + 1
    best = found[k - 1]
    assert best.value_certified, best.reason
    assert best.certified or best.gap < 1e-10 * np.linalg.norm(sigma)
    q = np.linalg.qr(rng.standard_normal((m, k)))[0]
    assert np.trace(q.T @ sigma @ q) >= best.dual_value - best.margin
    largest = hw3gpu.minimize_trace(-sigma, k, largest=True)
    assert float(largest.value) == -float(best.value)
