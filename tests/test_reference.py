"""The answer sheet against others' float64: PyTorch's functions and autograd, SciPy, NumPy. It judges the kernels, so
its own tolerances are a few units in the last place of the numbers at hand."""

from __future__ import annotations

import ast
import sys
import warnings
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch

from hw3gpu import reference

RNG_SEED = 20
WIDE = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
F = torch.nn.functional


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(RNG_SEED)


def close(actual: Any, expected: Any, ulps: float = 64) -> None:
    """Equal NaNs and infinities, and elsewhere a difference of at most `ulps` · eps · max |expected|."""
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    finite = np.abs(expected[np.isfinite(expected)])
    atol = ulps * np.finfo(np.float64).eps * (finite.max() if finite.size else 0.0)
    assert np.asarray(actual).dtype == np.float64
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def leaf(array: Any) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


# The module --------------------------------------------------------------------------------------------------------


def test_imports_numpy_and_the_standard_library_alone() -> None:
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in froms)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    roots = {name.partition(".")[0] for name in names | {str(node.module) for node in froms}}
    assert roots - set(sys.stdlib_module_names) == {"numpy"}


_A = np.random.default_rng(19).normal(size=(4, 3, 5)).astype(np.float32)
_C, _SQUARE = _A[0, :, 0], _A[0, :, :3] @ _A[0, :, :3].T
_SQUARE = (_SQUARE + _SQUARE.T) / 2
ARGUMENTS = {
    "activation": (_A, "silu"),
    "activation_backward": (_A, _A, "gelu"),
    "batch_norm": (_A, _C, _C),
    "batch_norm_backward": (_A, _A, _C, _C**2, _C),
    "batch_norm_inference": (_A, _C, _C**2, _C, _C),
    "batch_norm_inference_backward": (_A, _A, _C, _C**2, _C),
    "softmax": (_A,),
    "softmax_backward": (_A, _A),
    "softmax_jacobian": (_A,),
    "log_sum_exp": (_A,),
    "cross_entropy": (_A**2, _A**2),
    "softmax_cross_entropy": (_A, _A),
    "cross_entropy_with_options": (_A, _A, _C),
    "cross_entropy_statistics": (_A, _A),
    "token_log_probs": (_A, [[0, 4, 2]] * 4),
    "distillation_loss": (_A, _A**2),
    "points_with_moments": (_C, _SQUARE),
    "moments": (_A[0],),
    "minimize_trace": (_SQUARE, 2),
}


def test_the_table_of_arguments_names_every_array_function() -> None:
    functions = {name for name in reference.__all__ if name.islower()}
    assert functions == set(ARGUMENTS) | {"conv2d_output_shape", "helmert", "vocab_parallel_linear_cross_entropy"}  # of lists


@pytest.mark.parametrize("name", ARGUMENTS)
def test_converts_to_float64_first_and_leaves_inputs_alone(name: str) -> None:
    def evaluate(dtype: type) -> tuple[np.ndarray, ...]:
        arguments = [a.astype(dtype) if isinstance(a, np.ndarray) else a for a in ARGUMENTS[name]]
        copies = [np.array(a) for a in arguments]
        result = getattr(reference, name)(*arguments)
        assert all(np.array_equal(a, copy) for a, copy in zip(arguments, copies, strict=True))
        parts = result if isinstance(result, tuple) else (result,)
        return tuple(part for part in parts if part is not None)  # a target of probabilities has no class to report on

    for from_single, from_double in zip(evaluate(np.float32), evaluate(np.float64), strict=True):
        assert isinstance(from_single, np.ndarray)
        assert from_single.dtype == np.float64 or from_single.dtype.kind in "bi"  # whether a class is the first, and which is
        assert np.array_equal(from_single, from_double)


def test_conv2d_output_shape_is_the_law_with_w_first() -> None:
    assert reference.conv2d_output_shape((2, 7, 11, 3), 5, (3, 4), (1, 2), (6, 0)) == (2, 17, 4, 5)
    assert reference.conv2d_output_shape((2, 7, 11, 3), 5, 3, 2, 1, 2) == (2, 3, 5, 5)


# Batch normalisation -----------------------------------------------------------------------------------------------

LAYOUTS = pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [((6, 3), 1), ((4, 3, 5), 1), ((2, 3, 4, 5), 1), ((2, 4, 5, 3), -1), ((3, 7), 0), ((2, 2, 3, 2, 2), 2)],
    ids=str,
)


@LAYOUTS
def test_batch_norm_and_its_gradients_are_pytorchs(shape: Any, channel_axis: int, rng: np.random.Generator) -> None:
    x, dy = rng.normal(size=shape) + 3, rng.normal(size=shape)
    gamma, beta = rng.normal(size=3), rng.normal(size=3)
    tx, tg, tb = leaf(x), leaf(gamma), leaf(beta)
    ty = F.batch_norm(tx.movedim(channel_axis, 1), None, None, tg, tb, training=True, eps=1e-3).movedim(1, channel_axis)
    ty.backward(torch.tensor(dy))

    forward = reference.batch_norm(x, gamma, beta, eps=1e-3, channel_axis=channel_axis)
    close(forward.y, ty)
    channels_last = np.moveaxis(x, channel_axis, -1).reshape(-1, 3)
    close(forward.mean, channels_last.mean(axis=0))
    close(forward.var, channels_last.var(axis=0))
    close(forward.rstd, (forward.var + 1e-3) ** -0.5)
    plain = reference.batch_norm(x, eps=1e-3, channel_axis=channel_axis)
    close(plain.y, forward.x_hat, ulps=0)

    backward = reference.batch_norm_backward(dy, x, forward.mean, forward.var, gamma, eps=1e-3, channel_axis=channel_axis)
    close(backward.dx, tx.grad)
    close(backward.dgamma, tg.grad)
    close(backward.dbeta, tb.grad)


@pytest.mark.parametrize("shift", [0.0, 0.5], ids=["the mean", "another centre"])
def test_dvar_dmean_and_dx_hat_are_autograds_with_the_mean_as_a_leaf(shift: float, rng: np.random.Generator) -> None:
    """About another centre than the mean, the way from it through the variance, which (2.7) drops, counts."""
    x, dy, gamma, eps = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 3, 5)), rng.normal(size=3), 1e-2
    tx, mean = torch.tensor(x), leaf(reference.batch_norm(x).mean + shift)
    var = ((tx - mean[:, None]) ** 2).mean(dim=(0, 2))
    var.retain_grad()
    backward = reference.batch_norm_backward(dy, x, mean.detach(), var.detach(), gamma, eps=eps)
    x_hat = (tx - mean[:, None]) * (var[:, None] + eps) ** -0.5
    x_hat.retain_grad()
    (torch.tensor(gamma)[:, None] * x_hat).backward(torch.tensor(dy))
    close(backward.dvar, var.grad)
    close(backward.dmean, mean.grad)
    close(backward.dx_hat, x_hat.grad)


def test_channel_axis_none_is_one_variable(rng: np.random.Generator) -> None:
    x, dy = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    one = reference.batch_norm(x, 1.5, -0.5, channel_axis=None)
    column = reference.batch_norm(x.reshape(20, 1), [1.5], [-0.5])
    close(one.y, column.y.reshape(4, 5))
    assert one.mean.shape == one.var.shape == one.rstd.shape == ()
    back = reference.batch_norm_backward(dy, x, one.mean, one.var, 1.5, channel_axis=None)
    back_column = reference.batch_norm_backward(dy.reshape(20, 1), x.reshape(20, 1), column.mean, column.var, [1.5])
    close(back.dx, back_column.dx.reshape(4, 5))
    for field in ("dgamma", "dbeta", "dvar", "dmean"):
        close(getattr(back, field), getattr(back_column, field)[0])


@pytest.mark.parametrize(("offset", "spread"), [(1e4, 1.0), (1.23e6, 0.0), (0.0, 1e18)], ids=str)
def test_batch_norm_is_right_to_the_last_digit(offset: float, spread: float, rng: np.random.Generator) -> None:
    x = offset + spread * rng.normal(size=(300, 2))
    forward = reference.batch_norm(x)
    ulps = 1 if WIDE else 1e6
    with localcontext() as context:
        context.prec = 60
        for channel in range(2):
            column = [Decimal(value) for value in x[:, channel].tolist()]
            mean = sum(column) / len(column)
            var = sum((value - mean) ** 2 for value in column) / len(column)
            rstd = 1 / (var + Decimal.from_float(1e-5)).sqrt()
            exact = [float((value - mean) * rstd) for value in column]
            close(forward.mean[channel], float(mean), ulps)
            close(forward.var[channel], float(var), ulps)
            close(forward.y[:, channel], exact, ulps)


def test_an_empty_batch_has_no_statistics_and_zero_parameter_gradients() -> None:
    empty = np.zeros((0, 3, 4))
    forward = reference.batch_norm(empty)
    assert forward.y.shape == (0, 3, 4)
    assert np.isnan([forward.mean, forward.var, forward.rstd]).all()
    backward = reference.batch_norm_backward(empty, empty, forward.mean, forward.var)
    assert backward.dx.shape == (0, 3, 4)
    assert np.array_equal([backward.dgamma, backward.dbeta], np.zeros((2, 3)))


@LAYOUTS
def test_inference_and_its_gradients_are_pytorchs(shape: Any, channel_axis: int, rng: np.random.Generator) -> None:
    x, dy = rng.normal(size=shape), rng.normal(size=shape)
    (mean, gamma, beta), var = rng.normal(size=(3, 3)), rng.uniform(0.1, 2.0, 3)
    tx, tg, tb = leaf(x), leaf(gamma), leaf(beta)
    ty = F.batch_norm(tx.movedim(channel_axis, 1), torch.tensor(mean), torch.tensor(var), tg, tb, eps=1e-3)
    ty.movedim(1, channel_axis).backward(torch.tensor(dy))
    close(reference.batch_norm_inference(x, mean, var, gamma, beta, 1e-3, channel_axis), ty.movedim(1, channel_axis))
    gradients = reference.batch_norm_inference_backward(dy, x, mean, var, gamma, 1e-3, channel_axis)
    for mine, theirs in zip(gradients, (tx.grad, tg.grad, tb.grad), strict=True):
        close(mine, theirs)


# Softmax and cross entropy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e4], ids=str)
def test_softmax_and_log_sum_exp_are_scipys(axis: int, scale: float, rng: np.random.Generator) -> None:
    z = scale * rng.normal(size=(4, 5, 6))
    close(reference.softmax(z, axis), scipy.special.softmax(z, axis=axis))
    close(reference.log_sum_exp(z, axis), scipy.special.logsumexp(z, axis=axis, keepdims=True))


def test_softmax_of_infinities_and_nan_is_pytorchs() -> None:
    inf = np.inf
    z = np.array([[-inf, 0, 1], [-inf, -inf, 5], [-inf, -inf, -inf], [inf, 0, 1], [np.nan, 0, 1], [-200, -201, -1e308]])
    close(reference.softmax(z), torch.softmax(torch.tensor(z), dim=-1), ulps=2)
    close(reference.log_sum_exp(z[[0, 1, 2, 4, 5]])[:, 0], torch.logsumexp(torch.tensor(z[[0, 1, 2, 4, 5]]), dim=-1))
    assert reference.softmax(np.zeros((3, 0))).shape == (3, 0)


@pytest.mark.parametrize("axis", [-1, 1])
def test_softmax_backward_is_autograds_and_the_jacobians(axis: int, rng: np.random.Generator) -> None:
    z, dy = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4, 5))
    tz = leaf(z)
    torch.softmax(tz, dim=axis).backward(torch.tensor(dy))
    dz = reference.softmax_backward(dy, reference.softmax(z, axis), axis)
    close(dz, tz.grad)
    if axis == -1:
        jacobian = reference.softmax_jacobian(z)
        assert jacobian.shape == (3, 4, 5, 5)
        close(np.einsum("...i,...ij->...j", dy, jacobian), dz)


def test_softmax_jacobian_is_autograds(rng: np.random.Generator) -> None:
    z = rng.normal(size=6)
    jacobian = torch.autograd.functional.jacobian(lambda t: torch.softmax(t, dim=-1), torch.tensor(z))
    close(reference.softmax_jacobian(z), jacobian)


def test_cross_entropy_takes_zero_log_zero_as_zero() -> None:
    y = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.0, 0.0], [np.nan, 0.0]])
    y_hat = np.array([[0.0, 1.0], [0.25, 0.75], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    expected = [0.0, -0.5 * np.log(0.25) - 0.5 * np.log(0.75), np.inf, 0.0, np.nan]
    close(reference.cross_entropy(y, y_hat), expected, ulps=2)
    assert not np.signbit(reference.cross_entropy([0.0, 1.0], [0.0, 1.0]))


@pytest.mark.parametrize("total", [1.0, 0.25, 3.0], ids=lambda t: f"sum {t}")
def test_softmax_cross_entropy_for_vectors_of_any_sum(total: float, rng: np.random.Generator) -> None:
    z, y = rng.normal(size=(3, 4, 5)), rng.uniform(size=(3, 4, 5))
    y *= total / y.sum(axis=-1, keepdims=True)
    tz = leaf(z)
    rows = -(torch.tensor(y) * torch.log_softmax(tz, dim=-1)).sum(dim=-1)
    rows.sum().backward()
    loss, dz = reference.softmax_cross_entropy(z, y)
    close(loss, rows)
    close(dz, tz.grad)
    close(loss, reference.cross_entropy(y, reference.softmax(z)))


def test_softmax_cross_entropy_for_classes_is_that_for_unit_vectors(rng: np.random.Generator) -> None:
    z, classes = rng.normal(size=(3, 4, 5)), rng.integers(0, 5, (3, 4))
    for mine, other in zip(
        reference.softmax_cross_entropy(z, classes), reference.softmax_cross_entropy(z, np.eye(5)[classes]), strict=True
    ):
        close(mine, other, ulps=0)
    tz = leaf(z)
    rows = F.cross_entropy(tz.movedim(-1, 1), torch.tensor(classes), reduction="none")
    close(reference.softmax_cross_entropy(z, classes).loss, rows)


def test_softmax_cross_entropy_where_logits_are_minus_infinity() -> None:
    inf = np.inf
    z = np.array([[-inf, 0.0, 0.0], [-inf, 0.0, 0.0], [-inf, -inf, 3.0], [-inf, -inf, -inf]])
    y = np.array([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    loss, dz = reference.softmax_cross_entropy(z, y)
    close(loss, [np.log(2.0), inf, 0.0, np.nan], ulps=2)
    close(dz, [[0, 0, 0], [-0.5, 0, 0.5], [0, 0, 0], [np.nan] * 3], ulps=2)


def test_classes_out_of_range_or_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"classes must lie in 0…4, got 0…5"):
        reference.softmax_cross_entropy(np.zeros((2, 5)), [0, 5])
    with pytest.raises(ValueError, match=r"got -1…0"):
        reference.softmax_cross_entropy(np.zeros((2, 5)), [0, -1])
    with pytest.raises(TypeError, match="classes must be integers, got dtype float64"):
        reference.softmax_cross_entropy(np.zeros((2, 5)), [0.0, 1.0])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0], ids=lambda e: f"smoothing {e}")
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("target_kind", ["classes", "distributions", "any sums"])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 5, 2, 4)], ids=str)
def test_cross_entropy_with_options_is_pytorchs(
    shape: tuple[int, ...], target_kind: str, weighted: bool, smoothing: float, reduction: str
) -> None:
    rng = np.random.default_rng(RNG_SEED)
    class_axis, n_classes = min(1, len(shape) - 1), 5
    z = 3 * rng.normal(size=shape)
    target: Any
    if target_kind == "classes":
        rows = shape[:class_axis] + shape[class_axis + 1 :]
        target = np.asarray(rng.integers(0, n_classes, rows))
        if rows:
            target.flat[[0, 2]] = -7
    else:
        target = rng.uniform(size=shape)
        if target_kind == "distributions":
            target /= target.sum(axis=class_axis, keepdims=True)
    weight = rng.uniform(0.2, 2.0, n_classes) if weighted else None

    tz = leaf(z)
    theirs = F.cross_entropy(
        tz,
        torch.tensor(target),
        None if weight is None else torch.tensor(weight),
        ignore_index=-7,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    upstream = rng.normal(size=tuple(theirs.shape))
    theirs.backward(torch.tensor(upstream))
    mine = reference.cross_entropy_with_options(z, target, weight, -7, smoothing, reduction, upstream)
    close(mine.loss, theirs)
    close(mine.dlogits, tz.grad)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=str)
def test_when_all_rows_are_ignored_the_mean_is_nan_as_pytorchs(reduction: str, smoothing: float) -> None:
    z, target = np.ones((3, 4)), np.full(3, -100)
    tz = leaf(z)
    theirs = F.cross_entropy(tz, torch.tensor(target), reduction=reduction, label_smoothing=smoothing)
    theirs.sum().backward()
    mine = reference.cross_entropy_with_options(z, target, label_smoothing=smoothing, reduction=reduction)
    close(mine.loss, theirs)
    assert np.array_equal(mine.dlogits, np.zeros((3, 4)))
    assert np.array_equal(tz.grad.numpy(), np.zeros((3, 4)))


@pytest.mark.parametrize("target", [np.zeros(0, np.int64), np.zeros((0, 4))], ids=["classes", "distributions"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_rows_at_all_is_as_pytorchs(target: np.ndarray, reduction: str) -> None:
    theirs = F.cross_entropy(torch.zeros(0, 4, dtype=torch.float64), torch.tensor(target), reduction=reduction)
    mine = reference.cross_entropy_with_options(np.zeros((0, 4)), target, reduction=reduction)
    close(mine.loss, theirs)
    assert mine.dlogits.shape == (0, 4)


def test_a_weightless_class_at_minus_infinity_adds_nothing_and_a_smoothed_one_everything() -> None:
    z = np.array([[0.0, -np.inf, 0.0]])
    soft = reference.cross_entropy_with_options(z, [[0.5, 0.0, 0.5]])
    close(soft.loss, np.log(2.0), ulps=2)
    close(soft.dlogits, [[0.0, 0.0, 0.0]])
    masked = reference.cross_entropy_with_options(z, [0], weight=[1.0, 0.0, 1.0], label_smoothing=0.3)
    close(masked.loss, np.log(2.0) * 0.9, ulps=4)
    smoothed = reference.cross_entropy_with_options(z, [0], label_smoothing=0.3)
    assert smoothed.loss == np.inf
    close(smoothed.dlogits, [[0.5 - 0.8, -0.1, 0.5 - 0.1]], ulps=4)
    theirs = leaf(z)
    F.cross_entropy(theirs, torch.tensor([0]), label_smoothing=0.3).backward()
    close(smoothed.dlogits, theirs.grad, ulps=4)


def test_an_ignored_row_stays_silent_whatever_its_logits() -> None:
    z = np.array([[np.nan, 1.0], [np.inf, 1.0], [0.0, 0.0]])
    mine = reference.cross_entropy_with_options(z, [-100, -100, 1])
    close(mine.loss, np.log(2.0), ulps=2)
    close(mine.dlogits, [[0, 0], [0, 0], [0.5, -0.5]])


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'average'"):
        reference.cross_entropy_with_options(np.zeros((2, 3)), [0, 1], reduction="average")


# Points with given moments -----------------------------------------------------------------------------------------


def test_moments_are_numpys_with_one_over_n(rng: np.random.Generator) -> None:
    points = rng.normal(size=(9, 4)) + 5
    mean, covariance = reference.moments(points)
    close(mean, points.mean(axis=0))
    close(covariance, np.cov(points, rowvar=False, bias=True))


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
@pytest.mark.parametrize("extra", [None, 1, 10], ids=lambda e: f"{e} more")
def test_points_have_exactly_the_moments_asked_for(rank: int, extra: int | None, rng: np.random.Generator) -> None:
    factor, mean = rng.normal(size=(4, rank)), rng.normal(size=4) * 100
    covariance = factor @ factor.T
    n = None if extra is None else rank + 1 + extra
    points = reference.points_with_moments(mean, covariance, n)
    assert points.shape == (rank + 1 + (extra or 0), 4)
    answer = reference.moments(points)
    close(answer.mean, mean)
    # A deviation x_i − μ of size s carries the roundings of x_i and μ, u = eps |μ|; its square 2 s u + u².
    eps, scale = np.finfo(np.float64).eps, np.abs(covariance).max(initial=0.0)
    rounding = 4 * eps * np.abs(mean).max()
    atol = 16 * (eps * scale + rounding * np.sqrt(scale) + rounding**2)
    np.testing.assert_allclose(answer.covariance, covariance, rtol=0, atol=atol)


def test_one_point_too_few_is_refused_with_the_minimum() -> None:
    with pytest.raises(ValueError, match=r"n must be at least rank\(covariance\) \+ 1 = 3, got 2"):
        reference.points_with_moments([1.0, 2.0, 3.0], np.diag([0.0, 1.0, 4.0]), n=2)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150], ids=str)
def test_the_rank_is_judged_against_the_largest_eigenvalue(scale: float, rng: np.random.Generator) -> None:
    factor = rng.normal(size=(5, 2))
    assert reference.points_with_moments(np.zeros(5), scale * (factor @ factor.T)).shape == (3, 5)
    assert reference.points_with_moments(np.zeros(3), scale * np.diag([1.0, 1e-12, 1e-30])).shape == (3, 3)


# The trace problem -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("kind", ["indefinite", "rank 2", "identity", "zero", "cluster"])
def test_minimize_trace_is_lapacks_range_solver_and_beats_every_other_frame(
    kind: str, k: int, rng: np.random.Generator
) -> None:
    a = rng.normal(size=(6, 6))
    q = np.linalg.qr(a)[0]
    sigma = {
        "indefinite": a + a.T,
        "rank 2": a[:, :2] @ a[:, :2].T,
        "identity": np.eye(6),
        "zero": np.zeros((6, 6)),
        "cluster": (q * [1.0, 2.0, 2.0, 2.0, 3.0, 4.0]) @ q.T,
    }[kind]
    sigma = (sigma + sigma.T) / 2
    answer = reference.minimize_trace(sigma, k)
    atol = 64 * np.finfo(np.float64).eps * np.abs(sigma).max()
    smallest = scipy.linalg.eigh(sigma, eigvals_only=True, subset_by_index=(0, k - 1), driver="evr")
    assert answer.phi.shape == (6, k)
    assert answer.eigenvalues.shape == (6,)
    assert answer.value.shape == ()
    np.testing.assert_allclose(answer.eigenvalues[:k], smallest, rtol=0, atol=atol)
    np.testing.assert_allclose(answer.value, smallest.sum(), rtol=0, atol=atol)
    np.testing.assert_allclose(answer.phi.T @ answer.phi, np.eye(k), rtol=0, atol=1e-14)
    np.testing.assert_allclose(sigma @ answer.phi, answer.phi * answer.eigenvalues[:k], rtol=0, atol=atol)
    for _ in range(20):
        other = np.linalg.qr(rng.normal(size=(6, k)))[0]
        assert np.trace(other.T @ sigma @ other) >= answer.value - atol


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in 1…3, got {k}"):
        reference.minimize_trace(np.eye(3), k)


def test_the_mean_of_a_channel_with_an_infinity_is_that_infinity() -> None:
    x = np.array([[1.0, 1.0, 1.0], [np.inf, -np.inf, 2.0], [0.0, np.inf, 3.0]])
    sheet = reference.batch_norm(x)
    np.testing.assert_array_equal(sheet.mean, [np.inf, np.nan, 2.0])
    np.testing.assert_array_equal(np.isnan(sheet.var), [True, True, False])
