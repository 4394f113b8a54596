"""S1 to S9 as `hw3gpu verify` runs them: inputs, our result, the answer sheet's, what rounding may do to it, PyTorch's.

Each operation is a generator. It takes a place (the kind of array and the device) and a dtype, and yields an `Output`
for each array it computed, on ordinary inputs first and then on those that break careless kernels. The answer sheet is
given the inputs as rounded to the dtype. Where PyTorch has no function for an operation, the formula is written with
PyTorch's own operators (S3's ∂ℓ/∂σ² and ∂ℓ/∂μ from its ∂ℓ/∂γ and ∂ℓ/∂β, S8 by its `eigh`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _error_bounds, reference
from .._core import arrays
from .arrays import DTYPES, KINDS, Array, Place, to_numpy, to_torch


@dataclass(frozen=True)
class Output:
    """One computed array: `actual` as the library returned it, `expected` in float64, and PyTorch's.

    `bound`, of the shape of `expected`, is that of `_error_bounds`. `dtype` is the one whose last place counts, if it is not
    that of `actual`.
    """

    name: str
    actual: Array
    expected: np.ndarray
    torch: Any
    bound: Any
    dtype: str = ""


@dataclass(frozen=True)
class Operation:
    """One function of the library, the row of the assignment that it answers, and what it takes."""

    row: str
    name: str
    run: Callable[[Place, str], Iterator[Output]]
    dtypes: tuple[str, ...] = DTYPES
    kinds: tuple[str, ...] = KINDS


def random() -> np.random.Generator:
    return np.random.default_rng(20240229)


def _stacked(
    name: str, actual: list[Any], expected: list[Any], theirs: list[Any], bounds: list[Any], dtype: str = ""
) -> Output:
    """Results of one kind, measured together: the largest of many errors says more than the error of one small array."""
    ours, sheet, torchs, bound = (np.stack([to_numpy(x) for x in results]) for results in (actual, expected, theirs, bounds))
    return Output(name, ours, sheet, torchs, bound, dtype or arrays.dtype_name(actual[0]))


def _each(results: list[Any], name: str) -> list[Any]:
    return [getattr(result, name) for result in results]


# ---------------------------------------------------------------------------------------------- S1
# (W, H), kernel size, stride, padding: each pair with W first, and no two numbers of a case in the same role alike
CONVOLUTIONS = (
    ((9, 14), (3, 4), (2, 1), (1, 0)),
    ((12, 7), (5, 2), (3, 2), (0, 1)),
    ((31, 8), (4, 3), (1, 5), (2, 3)),
)


def output_shape(place: Place, dtype: str) -> Iterator[Output]:
    """S1: the shape after a convolution, against PyTorch's on its shape-only device."""
    import torch

    from .. import conv2d_output_shape

    ours, sheet, torchs = [], [], []
    for size, kernel, stride, padding in CONVOLUTIONS:
        x = place.array(np.zeros((2, *size, 3)), dtype)
        ours.append(conv2d_output_shape(x.shape, 5, kernel, stride, padding))
        sheet.append(reference.conv2d_output_shape(x.shape, 5, kernel, stride, padding))
        images, weight = torch.empty((2, 3, *size), device="meta"), torch.empty((5, 3, *kernel), device="meta")
        b, c, w, h = torch.nn.functional.conv2d(images, weight, None, stride, padding).shape
        torchs.append((b, w, h, c))
    yield Output("B, W', H', C_out", np.array(ours), np.array(sheet), np.array(torchs), 0.0, "float64")


def convolution(place: Place, dtype: str) -> Iterator[Output]:
    """S1: the output of `nn.Conv2D`, of the shape of the answer sheet."""
    import torch

    from .. import nn

    rng = random()
    for size, kernel, stride, padding in CONVOLUTIONS:
        x = place.array(rng.standard_normal((2, *size, 3)), dtype)
        layer = nn.Conv2D(3, 5, kernel, stride, padding).to(device=x.device, dtype=x.dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape))))
        shape = reference.conv2d_output_shape(x.shape, 5, kernel, stride, padding)

        # a sum over the taps along W and H, each a product over the channels
        padded = np.pad(to_numpy(x), ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)))
        weight = to_numpy(layer.weight)
        expected = np.broadcast_to(to_numpy(layer.bias), shape).copy()
        magnitude = np.abs(expected)
        for i, j in np.ndindex(*kernel):
            taps = padded[:, i :: stride[0], j :: stride[1]][:, : shape[1], : shape[2]]
            expected += taps @ weight[:, :, i, j].T
            magnitude += np.abs(taps) @ np.abs(weight[:, :, i, j].T)
        theirs = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, stride, padding)
        bound = _error_bounds.sum_of_products(magnitude, weight[0].size, dtype=arrays.accumulate_dtype(x))
        yield Output(f"y, kernel {kernel}", layer(x), expected, theirs.permute(0, 2, 3, 1), bound)


# ---------------------------------------------------------------------------------------------- S2 and S3
@dataclass(frozen=True)
class _Batch:
    """Arguments of one call of batch norm, of the place and dtype."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array
    axis: int | None

    @classmethod
    def of(cls, values: np.ndarray, axis: int | None, place: Place, dtype: str) -> _Batch:
        rng, channels = np.random.default_rng(7), () if axis is None else (values.shape[axis],)
        dy, gamma, beta = (
            place.array(part, dtype)
            for part in (rng.standard_normal(values.shape), rng.uniform(0.5, 2.0, channels), rng.standard_normal(channels))
        )
        return cls(place.array(values, dtype), dy, gamma, beta, axis)

    @property
    def reduced(self) -> list[int]:
        """The axes over which a channel's statistics go."""
        return [i for i in range(self.x.ndim) if self.axis is None or i != self.axis % self.x.ndim]

    @property
    def channels(self) -> list[int]:
        """The shape that lays a number for each channel along x."""
        return [1 if i in self.reduced else -1 for i in range(self.x.ndim)]


def _batches(place: Place, dtype: str) -> Iterator[tuple[str, list[_Batch]]]:
    """(what is special, batches to be measured together).

    Half precision gets the mean and the constant that its range and step allow.
    """
    half = dtype in ("float16", "bfloat16")
    x = random().standard_normal((4, 4, 5, 8)) + np.arange(4).reshape(4, 1, 1) / 2
    constant = np.where(np.arange(4).reshape(4, 1, 1) == 2, 1000.0 if half else 1.23e6, x)
    offset = 50 if half else 10_000
    yield "", [_Batch.of(x, 1, place, dtype)]
    yield "channels last", [_Batch.of(np.moveaxis(x, 1, -1), -1, place, dtype)]
    yield "one variable", [_Batch.of(x[:, c], None, place, dtype) for c in (0, 3)]
    yield f"mean {offset}", [_Batch.of(x + offset, 1, place, dtype)]
    yield "constant channel", [_Batch.of(constant, 1, place, dtype)]


def _torch_batch_norm(x: Any, gamma: Any, beta: Any, axis: int | None) -> Any:
    """PyTorch's own batch norm of a tensor with its channels anywhere."""
    from torch.nn.functional import batch_norm

    moved = x.reshape(1, 1, -1) if axis is None else x.movedim(axis, 1)
    y = batch_norm(moved, None, None, gamma.reshape(-1), beta.reshape(-1), training=True)
    return y.reshape(x.shape) if axis is None else y.movedim(1, axis)


def batch_norm(place: Place, dtype: str) -> Iterator[Output]:
    """S2: y, mean, 1/m variance and 1/sqrt(variance + eps)."""
    import torch

    from .. import batch_norm

    for what, batches in _batches(place, dtype):
        found, sheets, theirs, bounds = [], [], [], []
        for b in batches:
            found.append(batch_norm(b.x, b.gamma, b.beta, channel_axis=b.axis))
            x, gamma, beta = map(to_numpy, (b.x, b.gamma, b.beta))
            acc = arrays.accumulate_dtype(b.x)
            sheets.append(reference.batch_norm(x, gamma, beta, channel_axis=b.axis))
            bounds.append(_error_bounds.batch_norm(x, gamma, beta, channel_axis=b.axis, dtype=acc))
            wide = to_torch(b.x).to(getattr(torch, acc))
            var, mean = torch.var_mean(wide, b.reduced, correction=0)
            y = _torch_batch_norm(to_torch(b.x), to_torch(b.gamma), to_torch(b.beta), b.axis)
            theirs.append({"y": y, "mean": mean, "var": var, "rstd": torch.rsqrt(var + 1e-5)})
        for name in theirs[0]:
            results = _each(found, name), _each(sheets, name), [t[name] for t in theirs], _each(bounds, name)
            yield _stacked(f"{name} {what}", *results)


def batch_norm_backward(place: Place, dtype: str) -> Iterator[Output]:
    """S3: the gradients with respect to x, γ, β, σ², μ and x̂."""
    from .. import batch_norm_backward

    for what, batches in _batches(place, dtype):
        found, sheets, theirs, bounds = [], [], [], []
        for b in batches:
            dy, x, gamma = map(to_numpy, (b.dy, b.x, b.gamma))
            exact = reference.batch_norm(x, channel_axis=b.axis)
            acc = arrays.accumulate_dtype(b.x)
            mean, var = place.array(exact.mean, acc), place.array(exact.var, acc)
            found.append(batch_norm_backward(b.dy, b.x, mean, var, b.gamma, channel_axis=b.axis, return_dx_hat=True))
            given = dy, x, to_numpy(mean), to_numpy(var), gamma
            sheet = reference.batch_norm_backward(*given, channel_axis=b.axis)
            # ∂ℓ/∂μ is asked for where Σ (x - μ) = 0, which a rounded μ would leave out; about 0 it is rounded least
            about_0 = x - exact.mean.reshape(b.channels)
            mean_0 = reference.batch_norm(about_0, channel_axis=b.axis).mean
            at_mean = reference.batch_norm_backward(dy, about_0, mean_0, given[3], gamma, channel_axis=b.axis)
            sheets.append(sheet._replace(dmean=at_mean.dmean))
            bounds.append(_error_bounds.batch_norm_backward(*given, channel_axis=b.axis, dtype=acc))
            theirs.append(_torch_gradients(b))
        for name in theirs[0]:
            results = _each(found, name), _each(sheets, name), [t[name] for t in theirs], _each(bounds, name)
            yield _stacked(f"{name} {what}", *results)


def _torch_gradients(b: _Batch) -> dict[str, Any]:
    """PyTorch's gradients: dx, dgamma and dbeta of its batch norm, and from these, in the wider dtype, the others."""
    import torch

    def gradients(x: Any, dy: Any, gamma: Any, beta: Any) -> tuple[Any, ...]:
        for leaf in (x, gamma, beta):
            leaf.requires_grad_()
        return torch.autograd.grad(_torch_batch_norm(x, gamma, beta, b.axis), (x, gamma, beta), dy)

    acc = getattr(torch, arrays.accumulate_dtype(b.x))
    dx, dgamma, dbeta = gradients(*map(to_torch, (b.x, b.dy, b.gamma, b.beta)))
    x, dy, gamma, beta = (to_torch(part).to(acc) for part in (b.x, b.dy, b.gamma, b.beta))
    scale = gamma * torch.rsqrt(x.var(b.reduced, correction=0) + 1e-5)
    dx_hat = (gamma.reshape(b.channels) * dy).to(dx.dtype)
    _, wide_dgamma, wide_dbeta = gradients(x.clone(), dy, gamma.clone(), beta)
    others = {"dvar": -0.5 * scale * scale / gamma * wide_dgamma, "dmean": -scale * wide_dbeta, "dx_hat": dx_hat}
    return {"dx": dx, "dgamma": dgamma, "dbeta": dbeta} | others


# ---------------------------------------------------------------------------------------------- S4 to S7
def inputs_of_rows(dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """(what is special, logits (rows, classes)), with row lengths on both sides of the kernels' blocks."""
    rng = random()
    for rows, classes in ((16, 5), (4, 257), (4, 1030)):
        yield f"N = {classes}", 3.0 * rng.standard_normal((rows, classes))
    masked = rng.standard_normal((6, 300))
    masked[:, :290] = -np.inf
    yield "290 of 300 at -inf", masked
    certain = rng.standard_normal((6, 40))
    certain[np.arange(6), np.arange(6)] += 30.0
    yield "p -> 1", certain
    yield "all near -200", rng.standard_normal((6, 33)) - 200.0


def softmax(place: Place, dtype: str) -> Iterator[Output]:
    """S4: y along the last axis and along the first, and the backward."""
    import torch

    from .. import softmax, softmax_backward
    from .._core.torch_internals import softmax_backward as torch_softmax_backward

    for what, values in inputs_of_rows(dtype):
        z = place.array(values, dtype)
        acc = arrays.accumulate_dtype(z)
        for axis, name in ((-1, "y"), (0, "y along axis 0")):
            if axis == 0 and (np.isinf(values).any() or values.shape[1] > 300):
                continue
            y, theirs = softmax(z, axis), torch.softmax(to_torch(z), axis)
            sheet, bound = reference.softmax(to_numpy(z), axis), _error_bounds.softmax(to_numpy(z), axis, dtype=acc)
            yield Output(f"{name} {what}", y, sheet, theirs, bound)
        y, dy = softmax(z), place.array(np.sin(np.arange(values.size)).reshape(values.shape), dtype)
        theirs = torch_softmax_backward(to_torch(dy), to_torch(y), -1, to_torch(y).dtype)
        given = to_numpy(dy), to_numpy(y)
        sheet, bound = reference.softmax_backward(*given), _error_bounds.softmax_backward(*given, dtype=acc)
        yield Output(f"dz {what}", softmax_backward(dy, y), sheet, theirs, bound)


def softmax_jacobian(place: Place, dtype: str) -> Iterator[Output]:
    """S5: S_i (δ_ij - S_j)."""
    import torch

    from .. import softmax_jacobian

    for what, values in inputs_of_rows(dtype):
        if values.shape[-1] > 300:
            continue
        z = place.array(values, dtype)
        s = torch.softmax(to_torch(z), -1)
        theirs = torch.diag_embed(s) - s[..., :, None] * s[..., None, :]
        sheet = reference.softmax_jacobian(to_numpy(z))
        bound = _error_bounds.softmax_jacobian(to_numpy(z), dtype=arrays.accumulate_dtype(z))
        yield Output(f"dS/dz {what}", softmax_jacobian(z), sheet, theirs, bound)


def cross_entropy(place: Place, dtype: str) -> Iterator[Output]:
    """S6: the loss of a ground truth vector, with 0 log 0 = 0."""
    import torch

    from .. import cross_entropy

    rng = random()
    for what, values in inputs_of_rows(dtype):
        y_hat = place.array(reference.softmax(values), dtype)
        truth = rng.dirichlet(np.ones(values.shape[-1]), len(values)) * (to_numpy(y_hat) > 0)
        y = place.array(truth, dtype)
        theirs = -torch.special.xlogy(to_torch(y), to_torch(y_hat)).sum(-1)
        given = to_numpy(y), to_numpy(y_hat)
        bound = _error_bounds.cross_entropy(*given, dtype=arrays.accumulate_dtype(y))
        yield Output(f"loss {what}", cross_entropy(y, y_hat), reference.cross_entropy(*given), theirs, bound)


def softmax_cross_entropy(place: Place, dtype: str) -> Iterator[Output]:
    """S7: loss and gradient, for classes and for vectors whose sum is 1 or is not."""
    from torch.autograd import grad
    from torch.nn.functional import cross_entropy, log_softmax

    from .. import softmax_cross_entropy

    rng = random()
    for what, values in inputs_of_rows(dtype):
        rows, classes = values.shape
        soft = rng.dirichlet(np.ones(classes), rows) * np.isfinite(values)
        # the last of the classes, which no input masks; where one is certain, that one
        hard = np.arange(rows) if what == "p -> 1" else classes - 1 - np.arange(rows) % 5
        targets = {
            "classes": place.array(hard, "int64"),
            "vectors": place.array(soft, dtype),
            "any sum": place.array(soft * rng.uniform(0.5, 2.0, (rows, 1)), dtype),
        }
        for kind, y in targets.items():
            z = place.array(values, dtype)
            found = softmax_cross_entropy(z, y)
            given = to_numpy(z), hard if kind == "classes" else to_numpy(y)
            sheet = reference.softmax_cross_entropy(*given)
            bound = _error_bounds.softmax_cross_entropy(*given, dtype=arrays.accumulate_dtype(z))
            leaf = to_torch(z).requires_grad_()
            loss = cross_entropy(leaf, to_torch(y), reduction="none")
            if loss.isnan().any():  # 0 * inf at a masked class of weight 0
                loss = -(to_torch(y) * log_softmax(leaf, -1).masked_fill(leaf.isneginf(), 0.0)).sum(-1)
            (dz,) = grad(loss.sum(), leaf)
            yield Output(f"loss {kind}, {what}", found.loss, sheet.loss, loss, bound.loss)
            yield Output(f"dz {kind}, {what}", found.dz, sheet.dz, dz, bound.dz)


# ---------------------------------------------------------------------------------------------- S8 and S9
def _covariances() -> Iterator[tuple[str, list[np.ndarray]]]:
    """(what is special, matrices to be measured together)."""
    rng = random()
    yield "full rank", [a @ a.T for a in rng.standard_normal((3, 6, 6))]
    yield "rank 2", [a @ a.T for a in rng.standard_normal((3, 6, 2))]
    yield "Σ = 0", [np.zeros((6, 6))]


def points(place: Place, dtype: str) -> Iterator[Output]:
    """S8: the mean and the 1/n covariance of the points constructed, and `moments` of these points."""
    import torch

    from .. import moments, points_with_moments

    mu = place.array(np.arange(6.0) - 2.0, dtype)
    for what, matrices in _covariances():
        sigmas = [place.array(values, dtype) for values in matrices]
        for n in (None, 20):
            points = [points_with_moments(mu, sigma, n) for sigma in sigmas]
            theirs = [_torch_points(to_torch(mu), to_torch(sigma), len(x)) for sigma, x in zip(sigmas, points, strict=True)]
            sheet, torchs = ([reference.moments(to_numpy(x)) for x in sets] for sets in (points, theirs))
            found, tensors = [moments(x) for x in points], [to_torch(x) for x in points]
            name = f"{what}, n = {len(points[0])}"
            given = {"mean": [to_numpy(mu)] * len(sigmas), "covariance": [to_numpy(sigma) for sigma in sigmas]}
            torch_found = {"mean": [x.mean(0) for x in tensors], "covariance": [torch.cov(x.T, correction=0) for x in tensors]}
            of_points = [
                _error_bounds.points_with_moments(to_numpy(mu), to_numpy(sigma), to_numpy(x), dtype=dtype)
                for sigma, x in zip(sigmas, points, strict=True)
            ]
            of_moments = [_error_bounds.moments(to_numpy(x)) for x in points]
            for field, symbol in (("mean", "μ"), ("covariance", "Σ")):
                ours, bounds = _each(sheet, field), _each(of_points, field)
                yield _stacked(f"points' {symbol}, {name}", ours, given[field], _each(torchs, field), bounds, dtype)
                bounds = _each(of_moments, field)
                yield _stacked(f"{symbol}, {name}", _each(found, field), ours, torch_found[field], bounds, dtype)


def _torch_points(mean: Any, covariance: Any, n: int) -> Any:
    """The construction of S8 with PyTorch's operators in the dtype given."""
    import torch

    eigenvalues, q = torch.linalg.eigh(covariance)
    r = min(n - 1, len(mean))
    a = q[:, len(mean) - r :] * eigenvalues[len(mean) - r :].clamp(min=0).sqrt()
    h = torch.from_numpy(reference.helmert(n, r)).to(mean)
    return mean + n**0.5 * h @ a.T


def minimize_trace(place: Place, dtype: str) -> Iterator[Output]:
    """S9: the minimum, the projector on the minimising subspace, and the certificate."""
    import torch

    from .. import minimize_trace

    rng = random()
    a = rng.standard_normal((12, 12))
    for what, values in (("PSD", a @ a.T), ("indefinite", a + a.T)):
        sigma = place.array(values, dtype)
        eigenvalues, vectors = torch.linalg.eigh(to_torch(sigma))
        minima, expected, bounds = [], [], []
        for k in (1, 4, 12):
            found, sheet = minimize_trace(sigma, k), reference.minimize_trace(to_numpy(sigma), k)
            if not found.certified:
                raise AssertionError(f"the minimum for k = {k} is not certified ({what})")
            minima.append(float(found.value))
            expected.append(float(sheet.value))
            of_value, of_projector = _error_bounds.minimize_trace(to_numpy(sigma), k, dtype=dtype)
            bounds.append(of_value)
            projectors = found.phi @ found.phi.T, sheet.phi @ sheet.phi.T, vectors[:, :k] @ vectors[:, :k].T
            yield Output(f"ΦΦᵀ, k = {k}, {what}", *projectors, of_projector)
        # measured together: the rounding of an eigenvalue is relative to ‖Σ‖, not to the eigenvalue
        torchs = eigenvalues.cumsum(0)[[0, 3, 11]]
        yield Output(f"values, {what}", np.array(minima), np.array(expected), torchs, np.array(bounds), dtype)


REAL = ("float64", "float32")

OPERATIONS = (
    Operation("S1", "conv2d_output_shape", output_shape, dtypes=("float32",)),
    Operation("S1", "nn.Conv2D", convolution, kinds=("torch",)),
    Operation("S2", "batch_norm", batch_norm),
    Operation("S3", "batch_norm_backward", batch_norm_backward),
    Operation("S4", "softmax, softmax_backward", softmax),
    Operation("S5", "softmax_jacobian", softmax_jacobian),
    Operation("S6", "cross_entropy", cross_entropy),
    Operation("S7", "softmax_cross_entropy", softmax_cross_entropy),
    Operation("S8", "points_with_moments, moments", points, dtypes=REAL),
    Operation("S9", "minimize_trace", minimize_trace, dtypes=REAL),
)
