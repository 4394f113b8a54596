"""Batch normalisation on the CPU keeps its digits where the mean is large beside the spread, whatever the layout."""

from __future__ import annotations

import ast
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_operations import HALVES, channels_last

import hw3gpu
from hw3gpu import reference
from hw3gpu._cli.arrays import DTYPES
from hw3gpu.kernels.cpu import batch_norm
from hw3gpu.kernels.cpu._batch_norm import statistics

EPS = 1e-5
MEANS = (1e4, 1e6, -1e6)
SIDES = (1, 4, 7, 14, 32, 56)
LAYOUTS = {"planes": np.ascontiguousarray, "channels-last": channels_last}
PRECISION = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}


def test_what_may_be_reordered_writes_no_difference():
    """(x - high) - low may become x - (high + low) in a function whose operations the compiler may reorder."""
    found = []
    for path in sorted(Path(batch_norm.__file__).parent.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any("reduction" in ast.unparse(d) for d in function.decorator_list):
                found.append(function.name)
                for part in ast.walk(function):
                    assert not isinstance(part, (ast.Sub, ast.USub)), (path.name, function.name, part.lineno)
    assert len(found) >= 5


def stored(values, dtype):
    """`values` as the kernels take them, and what these stand for."""
    if dtype not in HALVES:
        return values.astype(dtype), values.astype(dtype)
    of, bits = HALVES[dtype]
    rounded = torch.from_numpy(values).to(of)
    return rounded.view(torch.int16).numpy().view(bits), rounded.double().numpy()


def read(values, dtype):
    if dtype not in HALVES:
        return values
    return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(HALVES[dtype][0]).double().numpy()


def given(rng, side, mean, dtype, layout):
    """x, dy, a residual, and what they stand for; 30 values a channel or more, those of x some 8 ulps apart.

    x stands less `mean`, an exact difference that normalisation does not see: long double would lose digits beside it too.
    """
    shape = (30 if side == 1 else 2, 6, side * side)
    spread = max(1.0, 8 * abs(mean) * 2.0 ** -PRECISION[dtype])
    values = mean + spread * rng.standard_normal(shape), rng.standard_normal(shape), rng.standard_normal(shape)
    pairs = [stored(v, dtype) for v in values]
    x, *others = (np.asarray(v, np.longdouble) for _, v in pairs)
    return [layout(bits) for bits, _ in pairs], [x - mean, *others]


def within(name, got, expected, terms, unit):
    """|got - expected| <= unit Σ|terms|, element by element; inputs are no part of the error, for they are taken as stored."""
    excess = np.abs(np.asarray(got, np.longdouble) - expected) - unit * terms
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, (name, worst, got[worst], expected[worst], terms[worst])


def hold(layout, dtype, side, mean, fused):
    rng = np.random.default_rng(side)
    (x, dy, residual), (x_is, dy_is, residual_is) = given(rng, side, mean, dtype, layout)
    C, m, acc = 6, x.shape[0] * x.shape[2], np.float64 if dtype == "float64" else np.float32
    gamma, beta = np.linspace(0.5, 2, C).astype(acc), np.linspace(-1, 1, C).astype(acc)
    mu, var, rstd = np.empty((2, C), acc), np.empty(C, acc), np.empty(C, acc)
    y, dx, dx_apart, dresidual = (np.empty_like(x) for _ in range(4))
    sums, sums_apart = np.empty((2, C), acc), np.empty((2, C), acc)
    forward = {"residual": residual, "activation": "relu"} if fused else {}
    told_by = {"residual": y, "activation": "relu", "beta": beta} if fused else {}
    backward = {**told_by, "dresidual": dresidual} if fused else {}
    batch_norm.forward(x, gamma, beta, y, mu, var, rstd, None, None, eps=EPS, momentum=0.1, **forward)
    batch_norm.backward(dy, x, mu, rstd, gamma, dx, *sums, **backward)
    batch_norm.backward_reduce(dy, x, mu, rstd, *sums_apart, gamma=gamma, **told_by)
    batch_norm.backward_apply(dy, x, mu, rstd, gamma, *sums_apart, m, dx_apart, **backward)

    along, over = (1, -1, 1), (0, 2)
    expected = reference.batch_norm(x_is, gamma, beta, eps=EPS)
    x_hat = np.asarray((x_is - x_is.mean(over, keepdims=True)) / np.sqrt(x_is.var(over, keepdims=True) + EPS))
    wide, low = (np.asarray(v, np.longdouble).reshape(along) for v in (gamma, beta))
    u, last = 2.0 ** -PRECISION["float64" if acc is np.float64 else "float32"], 2.0 ** -PRECISION[dtype]
    at_y, terms = wide * x_hat + low, np.abs(wide * x_hat) + np.abs(low)
    if fused:
        at_y, terms = at_y + residual_is, terms + np.abs(residual_is)
        dy_is = np.where(read(y, dtype) > 0, dy_is, 0)
        at_y = np.maximum(at_y, 0)
    # x - μ twice, rstd γ twice, the product, two sums; and the result's own rounding
    within("y", read(y, dtype), at_y, terms, 8 * u + last)
    within("var", var, expected.var, expected.var, 4 * u)
    dgamma, dbeta = (dy_is * x_hat).sum(over), dy_is.sum(over)
    slope = (dbeta.reshape(along) + x_hat * dgamma.reshape(along)) / m
    at_dx = wide / np.sqrt(x_is.var(over, keepdims=True) + EPS) * (dy_is - slope)
    weight = wide / np.sqrt(x_is.var(over, keepdims=True) + EPS)
    size = (np.abs(dy_is).sum(over).reshape(along) + np.abs(x_hat) * np.abs(dy_is * x_hat).sum(over).reshape(along)) / m
    for name, (dg, db), d in (("whole", sums, dx), ("apart", sums_apart, dx_apart)):
        # each term: x - μ twice, rstd; then the sum's rounding
        within(f"dgamma, {name}", dg, dgamma, np.abs(dy_is * x_hat).sum(over), 4 * u)
        within(f"dbeta, {name}", db, dbeta, np.abs(dy_is).sum(over), 2 * u)
        within(f"dx, {name}", read(d, dtype), at_dx, np.abs(weight) * (np.abs(dy_is) + size), 12 * u + last)


def cases(start, means=MEANS):
    """Every size, with one of the means in turn; one size of each kind of loop with all of them."""
    for i, side in enumerate(SIDES):
        for mean in means if side in (1, 7, 32) else means[(start + i) % len(means) :][:1]:
            yield side, mean


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_digits_are_lost(layout, dtype):
    for side, mean in cases(DTYPES.index(dtype), MEANS[:1] if dtype == "float16" else MEANS):
        hold(layout, dtype, side, mean, fused=False)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_digits_are_lost_with_a_residual_and_relu(layout):
    for side, mean in cases(0):
        hold(layout, "float32", side, mean, fused=True)


def test_statistics_of_exact_sums_are_rounded_once():
    """The mean in two parts, with what the division leaves; var and rstd to the last bit, whatever cancels in them."""
    shift, m = np.array([1e6, 0.0, -3.0]), 48
    sums = np.array([[100.0, 1.0, -7.0], [10000.0, 1.0, 7.0]])
    mu, var, rstd, none = np.empty((2, 3)), np.empty(3), np.empty(3), np.empty(0)
    statistics.finish_all(shift, sums, float(m), EPS, 0.1, mu, var, rstd, none, none)
    for c in range(3):
        d = Fraction(sums[0, c]) / m
        mean, variance = Fraction(shift[c]) + d, Fraction(sums[1, c]) / m - d * d
        assert abs(Fraction(mu[0, c]) + Fraction(mu[1, c]) - mean) <= abs(mean) / 2**100
        assert var[c] == float(variance)
        root, half_ulp = Fraction(rstd[c]), Fraction(np.spacing(rstd[c])) / 2
        assert (root - half_ulp) ** 2 <= 1 / (variance + Fraction(EPS)) <= (root + half_ulp) ** 2


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 2, 500), (500, 2, 1)], ids=["planes", "rows"])
def test_float64_sums_of_gradients_keep_what_an_addition_rounds_away(layout, shape):
    """dy = ±2^60 and x̂ = dy = ±1 between them: an ulp of the sums is 256 there, and their exact values are -2 and 498."""
    sign = np.where(np.arange(500) % 2, -1.0, 1.0)
    large = np.concatenate([[2.0**60], sign[1:498], [-(2.0**60)], sign[499:]])
    x, dy = (layout(np.stack([v, v]).reshape(2, shape[0], shape[2]).transpose(1, 0, 2)) for v in (sign, large))
    dgamma, dbeta = np.empty(2), np.empty(2)
    batch_norm.backward_reduce(dy, x, np.zeros((2, 2)), np.ones(2), dgamma, dbeta)
    assert (dgamma == 498).all()
    assert (dbeta == -2).all()
    dgamma[:], dbeta[:] = 0, 0
    batch_norm.backward(dy, x, np.zeros((2, 2)), np.ones(2), None, np.empty_like(x), dgamma, dbeta)
    assert (dgamma == 498).all()
    assert (dbeta == -2).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(512, 3, 1), (64, 128, 8), (1, 3, 512)], ids=["rows", "small planes", "planes"])
def test_float64_sums_keep_what_an_addition_rounds_away(layout, shape):
    """2^53, fourteen times 1/4, -2^53 in any order, and so on: beside 2^53 an addition of 1 is lost. A channel's sum is 112."""
    sixteen = np.tile([2.0**53, *[0.25] * 14, -(2.0**53)], (32, 1))
    channel = np.random.default_rng(0).permuted(sixteen, axis=1).reshape(shape[0], 1, shape[2])
    x = layout(np.ascontiguousarray(np.broadcast_to(channel, shape)))
    assert (hw3gpu.batch_norm(x).mean == 112 / 512).all()
    zeros = np.zeros(shape[1])
    gradients = hw3gpu.batch_norm_backward(x, np.ones_like(x), zeros, zeros + 1.0, eps=0.0)
    assert (gradients.dbeta == 112.0).all()
    assert (gradients.dgamma == 112.0).all()
