"""Calls of the public functions by a row of levels (dtype, layout, values, options, tool …), held to the answer sheet.

Each `Subject` has the levels of its factors, what may not stand together, and a check: of a row, it calls the function twice,
asks for the same bits and for arguments as they were (by hash), and holds every output and gradient to the bounds of
docs/errors.md. `test_pairs.py` runs the rows in which any two levels meet, `test_properties.py` drawn ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from drawn_values import DTYPES, FINITE, LAYOUTS, NUMPYS, VALUES, Row, array_of, hold, judged, numbers, rows_rng, twice
from torch.utils.checkpoint import checkpoint

import hw3gpu
import hw3gpu.functional as HF
from hw3gpu import _error_bounds, nn, reference
from hw3gpu._cli.arrays import to_numpy
from hw3gpu._core.arrays import accumulate_dtype


class Subject(NamedTuple):
    factors: dict[str, tuple[Any, ...]]
    check: Callable[[Row], None]
    allowed: Callable[[Row], bool]


# ---------------------------------------------------------------------------------------------- the array functions
def array_row(row: Row, *shape: int, salt: int = 0, values: str | None = None) -> Any:
    rng = rows_rng({**row, "salt": salt})
    layout = row["layout"]
    return array_of(row["kind"], numbers(values or row["values"], shape, row["dtype"], rng), row["dtype"], layout)


def has_dtype(row: Row) -> bool:
    """NumPy has no bfloat16, torch neither negative strides nor elements that are not aligned."""
    if row.get("kind") == "numpy" and row.get("dtype") == "bfloat16":
        return False
    return not (row.get("kind") == "torch" and row.get("layout") in ("reversed", "unaligned"))


OF_ARRAYS = {"kind": ("numpy", "torch"), "dtype": DTYPES, "layout": NUMPYS}


def check_softmax(row: Row) -> None:
    z = array_row(row, *row["shape"])
    if not z.ndim:
        return
    axis = row["axis"] % z.ndim
    (y,) = twice(lambda: (hw3gpu.softmax(z, axis),), z)
    assert (type(y), y.dtype, y.shape) == (type(z), z.dtype, z.shape)
    sheet, bound = judged("softmax", to_numpy(z), axis, dtype=accumulate_dtype(z))
    hold("y", y, sheet, bound)
    dy = array_row(row, *row["shape"], salt=1, values="normal" if row["values"] in VALUES[6:] else None)
    (dz,) = twice(lambda: (hw3gpu.softmax_backward(dy, y, axis),), dy, y)
    sheet, bound = judged("softmax_backward", to_numpy(dy), to_numpy(y), axis, dtype=accumulate_dtype(z))
    hold("dz", dz, sheet, bound)
    if z.shape[-1] < 40 and math.prod(z.shape) * z.shape[-1] <= 1 << 18:
        (jacobian,) = twice(lambda: (hw3gpu.softmax_jacobian(z),), z)
        hold("jacobian", jacobian, *judged("softmax_jacobian", to_numpy(z), dtype=accumulate_dtype(z)))


def check_softmax_cross_entropy(row: Row) -> None:
    z = array_row(row, *row["shape"])
    V, rng = z.shape[-1], rows_rng(row)
    if row["target"] == "classes":
        y = rng.integers(0, V, z.shape[:-1]).astype(row["integers"])
        y = torch.from_numpy(y) if row["kind"] == "torch" else y
    else:
        y = array_of(row["kind"], rng.dirichlet(np.ones(V), z.shape[:-1]), row["dtype"], row["layout"])
    result = twice(lambda: (lambda r: (r.loss, r.dz))(hw3gpu.softmax_cross_entropy(z, y)), z, y)
    given = to_numpy(y).astype(np.int64) if row["target"] == "classes" else to_numpy(y)
    sheet, bound = judged("softmax_cross_entropy", to_numpy(z), given, dtype=accumulate_dtype(z))
    for name, actual in zip(("loss", "dz"), result, strict=True):
        hold(name, actual, getattr(sheet, name), getattr(bound, name))
    if row["target"] == "vectors":
        p = array_of(row["kind"], rng.dirichlet(np.ones(V), z.shape[:-1]), row["dtype"], "contiguous")
        (loss,) = twice(lambda: (hw3gpu.cross_entropy(y, p),), y, p)
        hold("loss of probabilities", loss, *judged("cross_entropy", to_numpy(y), to_numpy(p), dtype=accumulate_dtype(z)))


def overflows(sheet: Any, acc: str, m: int) -> bool:
    """A variance, or the sum it comes of, that the dtype of the sums does not hold."""
    with np.errstate(all="ignore"):
        return bool(np.any(np.abs(sheet.var) * m > np.finfo(acc).max))


def check_batch_norm(row: Row) -> None:
    x = array_row(row, *row["shape"])
    axis = row["channel_axis"]
    C, acc = 1 if axis is None else x.shape[axis], accumulate_dtype(x)
    rng, kind = rows_rng(row), row["kind"]
    gamma, beta = (array_of(kind, rng.standard_normal(C), row["dtype"], "contiguous") for _ in range(2))
    if not row["affine"]:
        gamma = beta = None
    of_numpy = [None if v is None else (to_numpy(v) if axis is not None else to_numpy(v)[0]) for v in (gamma, beta)]
    options = {"eps": row["eps"], "channel_axis": axis}
    found = twice(lambda: (lambda r: (r.y, r.mean, r.var, r.rstd))(hw3gpu.batch_norm(x, gamma, beta, **options)), x)
    sheet, bound = judged("batch_norm", to_numpy(x), *of_numpy, **options, dtype=acc)
    m = x.size // C if kind == "numpy" else x.numel() // C
    if overflows(sheet, acc, m):
        return
    for name, actual in zip(("y", "mean", "var", "rstd"), found, strict=True):
        hold(name, actual, getattr(sheet, name), getattr(bound, name))
    dy = array_row(row, *row["shape"], salt=1, values="normal")
    _, mean, var, _ = found
    names = ("dx", "dgamma", "dbeta", "dvar", "dmean", "dx_hat")

    def backward() -> tuple[Any, ...]:
        r = hw3gpu.batch_norm_backward(dy, x, mean, var, gamma, **options, return_dx_hat=True)
        return tuple(getattr(r, name) for name in names)

    given = to_numpy(dy), to_numpy(x), to_numpy(mean), to_numpy(var), of_numpy[0]
    sheet, bound = judged("batch_norm_backward", *given, **options, dtype=acc)
    for name, actual in zip(names, twice(backward, dy, x, mean, var), strict=True):
        hold(name, actual, getattr(sheet, name), getattr(bound, name))


def check_moments(row: Row) -> None:
    points = array_row(row, *row["shape"])
    found = twice(lambda: tuple(hw3gpu.moments(points)), points)
    sheet, bound = reference.moments(to_numpy(points)), _error_bounds.moments(to_numpy(points))
    for name in ("mean", "covariance"):
        hold(name, getattr(hw3gpu.Moments(*found), name), getattr(sheet, name), getattr(bound, name))
    half = len(points) // 2

    def accumulated() -> tuple[Any, ...]:
        return tuple(hw3gpu.MomentAccumulator().update(points[:half]).update(points[half:]).moments())

    for name, actual in zip(("mean", "covariance"), twice(accumulated, points), strict=True):
        hold(f"{name} of two batches", actual, getattr(sheet, name), 2 * getattr(bound, name))


# ---------------------------------------------------------------------------------------------- matrices
def symmetric(row: Row, *shape: int) -> Any:
    a = rows_rng(row).standard_normal(shape)
    return array_of(row["kind"], a @ a.swapaxes(-1, -2), row["dtype"], row["layout"])


def check_minimize_trace(row: Row) -> None:
    m, largest = row["m"], row["largest"]
    sigma, k = symmetric(row, m, m + 2), min(row["k"], m)
    options = {"largest": largest, "method": row["method"]}

    def call() -> tuple[Any, ...]:
        r = hw3gpu.minimize_trace(sigma, k, certify=row["certify"], **options)
        assert r.certified == row["certify"], r.reason
        return r.value, r.phi, r.eigenvalues

    value, phi, eigenvalues = twice(call, sigma)
    of_numpy = -to_numpy(sigma) if largest else to_numpy(sigma)
    sheet = reference.minimize_trace(of_numpy, k)
    of_value, of_projector = _error_bounds.minimize_trace(of_numpy, k, dtype=row["dtype"])
    sign = -1.0 if largest else 1.0
    hold("value", value, sign * sheet.value, of_value)
    hold("eigenvalues", eigenvalues, sign * sheet.eigenvalues[:k], of_value)
    found = to_numpy(phi)
    sum_exp_minus_1 = abs(found @ found.T - sheet.phi @ sheet.phi.T) - of_projector
    assert sum_exp_minus_1.max() <= 0, f"Φ Φᵀ is {sum_exp_minus_1.max():.3g} beyond its bound"
    if row["kind"] == "torch":
        leaf = sigma.clone().requires_grad_()
        ours = HF.minimize_trace(leaf, k, **options)
        (gradient,) = torch.autograd.grad(ours.value, leaf)
        assert (abs(to_numpy(gradient) - sheet.phi @ sheet.phi.T) <= of_projector).all()


def check_points(row: Row) -> None:
    m = row["m"]
    sigma = symmetric(row, m, min(row["rank"], m))
    mean = array_row(row, m, values="far")
    n = None if row["more"] is None else min(row["rank"], m) + 1 + row["more"]
    (points,) = twice(lambda: (hw3gpu.points_with_moments(mean, sigma, n, rng=row["rng"]),), mean, sigma)
    assert len(points) == n or (n is None and len(points) <= m + 1)
    found = reference.moments(to_numpy(points))
    bound = _error_bounds.points_with_moments(to_numpy(mean), to_numpy(sigma), to_numpy(points), dtype=row["dtype"])
    assert (abs(found.mean - to_numpy(mean)) <= bound.mean).all()
    assert (abs(found.covariance - to_numpy(sigma)) <= bound.covariance).all()


# ---------------------------------------------------------------------------------------------- PyTorch's, and its tools
TOOLS = ("plain", "compile", "autocast", "checkpoint", "vmap", "deepcopy", "no_grad")


def second_of_two(function: Callable[[Any], Any], x: torch.Tensor) -> list[torch.Tensor]:
    return [v[1] for v in torch.vmap(function)(torch.stack([x, x]))]


def through(tool: str, function: Callable[[Any], Any], x: torch.Tensor, upstream: Any) -> tuple[Any, ...]:
    """Results of `function` and the gradient of x, by a tool; the gradient is None under no_grad."""
    leaf = (copy.deepcopy(x) if tool == "deepcopy" else x).detach().requires_grad_(tool != "no_grad")
    call = function
    if tool == "compile":
        torch.compiler.reset()
        call = torch.compile(function, backend="aot_eager", dynamic=False)
    elif tool == "checkpoint":
        call = partial(checkpoint, function, use_reentrant=False)
    elif tool == "vmap":
        call = partial(second_of_two, function)
    with torch.autocast("cpu", torch.bfloat16, enabled=tool == "autocast"):
        results = call(leaf)
    if tool == "no_grad":
        return *results, None
    up = [torch.as_tensor(u, dtype=v.dtype).reshape(v.shape) for u, v in zip(upstream, results, strict=True)]
    return *(v.detach() for v in results), torch.autograd.grad(results, leaf, up)[0]


def slack(row: Row) -> float:
    """Under vmap the formula in PyTorch's operations takes the place of the kernels: more roundings, sums of other lengths."""
    return 16.0 if row["tool"] == "vmap" else 1.0


def tensor_of(row: Row, *shape: int, salt: int = 0, values: str | None = None) -> torch.Tensor:
    return array_row({"kind": "torch", **row}, *shape, salt=salt, values=values)


def check_functional_cross_entropy(row: Row) -> None:
    x = tensor_of(row, *row["shape"])
    rng, acc = rows_rng(row), accumulate_dtype(x)
    C = x.shape[min(x.dim() - 1, 1)]
    rows = () if x.dim() == 1 else (x.shape[0], *x.shape[2:])
    options: Row = {name: row[name] for name in ("label_smoothing", "z_loss", "softcap")}
    if row["target"] == "vectors":
        target = torch.from_numpy(np.moveaxis(rng.dirichlet(np.ones(C), rows), -1, min(len(x.shape) - 1, 1))).to(x.dtype)
    else:
        options["ignore_index"] = row["ignore_index"]
        t = np.where(rng.random(rows) < 0.3, row["ignore_index"], rng.integers(0, C, rows))
        target = torch.from_numpy(np.asarray(t)).to(torch.int64)
    weight = torch.from_numpy(np.where(rng.random(C) < 0.2, 0, rng.random(C) + 0.1)).to(x.dtype) if row["weight"] else None
    if row["reduction"] == "mean" and weight is not None and row["target"] == "classes":
        kept = target[target != row["ignore_index"]]
        if kept.numel() and not weight[kept].any():
            return  # a mean over a weight of 0: what a smoothed gradient divided by 0 is, infinite or NaN, is not promised
    upstream = rng.standard_normal(rows if row["reduction"] == "none" else ())
    extra = {"gradient": row["gradient"], "reduction": row["reduction"], **options}

    def function(leaf: Any) -> tuple[Any, ...]:
        if row["tool"] == "deepcopy":
            return (copy.deepcopy(nn.CrossEntropyLoss(weight, **extra))(leaf, target),)
        return (HF.cross_entropy(leaf, target, weight, **extra),)

    loss, dx = twice(lambda: through(row["tool"], function, x, (upstream,)), x, target, weight)
    up = to_numpy(torch.as_tensor(upstream).to(loss.dtype))
    given = to_numpy(x), to_numpy(target).astype(np.int64) if row["target"] == "classes" else to_numpy(target)
    sheet, bound = judged(
        "cross_entropy_with_options", *given, None if weight is None else to_numpy(weight),
        reduction=row["reduction"], upstream=up, **options, dtype=acc,
    )  # fmt: skip
    if row["softcap"] is None:  # nothing but -inf has no softmax: NaN in the kernels, whatever the sheet's 0 or inf times it
        undefined = (given[0] == -np.inf).all(min(x.dim() - 1, 1))
        if row["target"] == "classes":
            undefined &= given[1] != row["ignore_index"]
        undefined = undefined if row["reduction"] == "none" else undefined.any()
        sheet = sheet._replace(loss=np.where(undefined, np.nan, sheet.loss))
    hold("loss", loss, sheet.loss, bound.loss, slack(row))
    if dx is not None:
        hold("dlogits", dx, sheet.dlogits, bound.dlogits, slack(row))


def check_linear_cross_entropy(row: Row) -> None:
    (N, C, D), acc, rng = row["sizes"], row["dtype"], rows_rng(row)
    x, W = tensor_of(row, N, D), tensor_of(row, C, D, salt=1)
    b = tensor_of(row, C, salt=2) if row["bias"] else None
    options: Row = {name: row[name] for name in ("label_smoothing", "z_loss", "reduction")}
    target = torch.from_numpy(rng.integers(0, C, N))
    target[rng.random(N) < 0.2] = -100
    extra = {**options, "gradient": row["gradient"], "chunk_rows": row["chunk_rows"]}
    upstream = rng.standard_normal(N if row["reduction"] == "none" else ())

    def function(leaf: Any) -> tuple[Any, ...]:
        return (HF.linear_cross_entropy(leaf, W, target, linear_bias=b, **extra),)

    loss, dx = twice(lambda: through(row["tool"], function, x, (upstream,)), x, W, b, target)
    xs, Ws, bias = to_numpy(x), to_numpy(W), 0.0 if b is None else to_numpy(b)
    z = np.asarray(xs.astype(np.longdouble) @ Ws.T.astype(np.longdouble) + bias, np.float64)
    u = _error_bounds.unit_roundoff(acc)
    of_z = ((D + 2) * u * (abs(xs) @ abs(Ws).T + abs(np.asarray(bias)))).max(initial=0.0)
    up = to_numpy(torch.as_tensor(upstream).to(loss.dtype))
    given = z, target.numpy()
    sheet, bound = judged("cross_entropy_with_options", *given, upstream=up, **options, dtype=acc)
    kept = max(int((target != -100).sum()), 1)
    lse = 1 + 2 * row["z_loss"] * abs(reference.log_sum_exp(z)).max(initial=0.0)
    rows = kept if row["reduction"] == "sum" else 1
    hold("loss", loss, sheet.loss, bound.loss + 2 * of_z * lse * rows, slack(row))
    if dx is not None:
        scale = np.abs(up).max(initial=0.0) / (kept if row["reduction"] == "mean" else 1)
        of_dz = bound.dlogits + 4 * of_z * scale * lse
        of_dx = of_dz @ abs(Ws) + (C + 2) * u * (abs(sheet.dlogits) @ abs(Ws))
        hold("dx", dx, sheet.dlogits @ Ws, of_dx, slack(row))


def check_token_log_probs(row: Row) -> None:
    x = tensor_of(row, *row["shape"])
    dim, rng = row["dim"] % x.dim(), rows_rng(row)
    rows = tuple(np.delete(x.shape, dim))
    t = np.where(rng.random(rows) < 0.2, -100, rng.integers(0, x.shape[dim], rows))
    target, upstream = torch.from_numpy(np.asarray(t)), tuple(rng.standard_normal((3, *rows)))

    def function(leaf: Any) -> tuple[Any, ...]:
        return tuple(HF.token_log_probs(leaf, target, temperature=row["temperature"], dim=dim))

    *found, dx = twice(lambda: through(row["tool"], function, x, upstream), x, target)
    up = tuple(to_numpy(torch.as_tensor(u).to(v.dtype)) for u, v in zip(upstream, found, strict=True))
    options = {"temperature": row["temperature"], "axis": dim, "upstream": up}
    sheet, bound = judged("token_log_probs", to_numpy(x), t, **options, dtype=accumulate_dtype(x))
    # a row of nothing but -inf has no softmax: the kernels give NaN, where log Σ exp would be -inf
    sheet = sheet._replace(lse=np.where(np.isnan(sheet.entropy), np.nan, sheet.lse))
    for name, actual in zip(("log_prob", "entropy", "lse"), found, strict=True):
        hold(name, actual, getattr(sheet, name), getattr(bound, name), slack(row))
    if dx is not None:
        hold("dlogits", dx, sheet.dlogits, bound.dlogits, slack(row))


def check_functional_softmax(row: Row) -> None:
    x = tensor_of(row, *row["shape"])
    dim, acc = row["dim"] % x.dim(), accumulate_dtype(x)
    dy = tensor_of(row, *row["shape"], salt=1, values="normal")
    y, dx = twice(lambda: through(row["tool"], lambda leaf: (HF.softmax(leaf, dim),), x, (dy,)), x, dy)
    exact, bound = judged("softmax", to_numpy(x), dim, dtype=acc)
    hold("y", y, exact, bound, slack(row))
    if dx is not None:  # kernels start from y as it was rounded, the formula does not
        of = exact if row["tool"] == "vmap" else to_numpy(y)
        hold("dx", dx, *judged("softmax_backward", to_numpy(dy), of, dim, dtype=acc), slack(row))


def check_functional_batch_norm(row: Row) -> None:
    x = tensor_of(row, *row["shape"])
    C, acc, rng, training = x.shape[1], accumulate_dtype(x), rows_rng(row), row["training"]
    of = x.dtype if row["parameters"] == "input's" else getattr(torch, acc)
    gamma, beta = (torch.from_numpy(rng.standard_normal(C)).to(of) if row["affine"] else None for _ in range(2))
    mean, var = (torch.from_numpy(v).to(of) for v in (rng.standard_normal(C), rng.random(C) + 0.5))
    tracked = row["tracked"] or not training
    residual = tensor_of(row, *row["shape"], salt=2, values="normal") if row["residual"] else None
    fused: Row = {"residual": residual, "activation": "relu" if row["relu"] else None}
    dy = tensor_of(row, *row["shape"], salt=1, values="normal")
    statistics: list[Any] = []

    def function(leaf: Any) -> tuple[Any, ...]:
        running = [mean.clone(), var.clone()] if tracked else [None, None]
        if row["tool"] == "deepcopy" and row["affine"]:
            module = {2: nn.BatchNormAct1d, 3: nn.BatchNormAct1d, 4: nn.BatchNormAct2d}[leaf.dim()](
                C, eps=row["eps"], momentum=0.3, track_running_stats=tracked, dtype=of, activation=fused["activation"]
            ).train(training)
            names = ("running_mean", "running_var", "weight", "bias") if tracked else ("weight", "bias")
            given = [*running, gamma, beta] if tracked else [gamma, beta]
            module.load_state_dict(dict(zip(names, given, strict=True)), strict=False)
            module = copy.deepcopy(module)
            y = module(leaf, residual)
            statistics[:] = [module.running_mean, module.running_var] if tracked else [None, None]
            return (y,)
        y = HF.batch_norm(leaf, *running, gamma, beta, training, 0.3, row["eps"], **fused)
        statistics[:] = running
        return (y,)

    y, dx = twice(lambda: through(row["tool"], function, x, (dy,)), x, dy, gamma, beta, mean, var, residual)
    xs, up = to_numpy(x), to_numpy(dy)
    g, b = (None if v is None else to_numpy(v) for v in (gamma, beta))
    if row["relu"]:
        up = np.where(to_numpy(y) > 0, up, 0.0)
    if training:
        sheet, bound = judged("batch_norm", xs, g, b, eps=row["eps"], dtype=acc)
        m = x.numel() // C
        if overflows(sheet, acc, m):
            return
        expected, of_y = sheet.y, bound.y
        given = up, xs, sheet.mean, sheet.var, g
        back = reference.batch_norm_backward(*given, eps=row["eps"])
        of_dx = _error_bounds.batch_norm_backward(*given, eps=row["eps"], dtype=acc, own_statistics=True).dx
        if tracked and row["tool"] not in ("checkpoint", "compile"):  # which computes the forward pass twice
            new = sheet.mean, sheet.var * m / (m - 1)
            bounds = bound.mean, bound.var * m / (m - 1)
            for name, i in (("running_mean", 0), ("running_var", 1)):
                before = to_numpy((mean, var)[i])
                rounding = 4 * _error_bounds.unit_roundoff(acc) * (abs(before) + abs(new[i]))
                hold(name, statistics[i], 0.7 * before + 0.3 * new[i], 0.3 * bounds[i] + rounding)
    else:
        given = to_numpy(mean), to_numpy(var), g
        expected, of_y = judged("batch_norm_inference", xs, *given, b, row["eps"], dtype=acc)
        back, of_back = judged("batch_norm_inference_backward", up, xs, *given, row["eps"], dtype=acc)
        of_dx = of_back.dx
    if residual is not None:
        of_y = of_y + _error_bounds.unit_roundoff(acc) * 2 * (abs(to_numpy(residual)) + abs(expected))
        expected = expected + to_numpy(residual)
    # of a positive number that y rounds to 0 it is not promised whether dy passes
    lost = row["relu"] and ((expected > 0) & (to_numpy(y) == 0)).any()
    if row["relu"]:
        expected = np.where(np.isnan(expected), np.nan, np.maximum(expected, 0.0))
    hold("y", y, expected, of_y, slack(row))
    if dx is not None and not lost:
        hold("dx", dx, back.dx, of_dx, slack(row))


# ---------------------------------------------------------------------------------------------- what meets what
def fits_batch_norm(row: Row) -> bool:
    if row.get("tool") == "vmap" and (row.get("tracked") or row.get("training") is False):
        return False  # refused: an update in place
    if row.get("dtype") == "float64" and row.get("parameters") == "the sums'":
        return False  # the same
    return not (row.get("values") in ("-inf", "inf", "nan") and row.get("relu"))  # whether NaN > 0


def fits_cross_entropy(row: Row) -> bool:
    if row.get("tool") == "compile" and row.get("gradient") == "forward":
        return False  # a compiled graph takes "backward"
    return not (row.get("tool") == "vmap" and row.get("values") not in (None, "normal", "far", "zeros"))


def fits_linear(row: Row) -> bool:
    if row.get("gradient") == "forward" and (row.get("reduction") == "none" or row.get("tool") == "compile"):
        return False  # refused; a compiled graph takes "backward"
    return row.get("tool") != "autocast"  # whose products are in its dtype


def fits_rows(row: Row) -> bool:
    return has_dtype(row) and not (row.get("tool") == "vmap" and row.get("values") not in (None, "normal", "far", "zeros"))


ROWS = ((5,), (3, 1), (2, 7), (4, 33), (3, 8, 2), (2, 129), (1, 1025), (2, 3, 4, 5), (17, 2))
IMAGES = ((2, 3), (5, 4), (2, 3, 5), (4, 2, 3, 3), (3, 17, 2), (2, 2, 33), (9, 1, 8))
EXACT = (*LAYOUTS[:4], "reversed", "unaligned")  # every element has a place of its own
OF_TENSORS = {"dtype": DTYPES, "layout": LAYOUTS, "values": VALUES, "tool": TOOLS}
OPTIONS = {
    "target": ("classes", "vectors"), "weight": (False, True), "reduction": ("mean", "sum", "none"), "ignore_index": (-100, 0),
    "label_smoothing": (0.0, 0.2), "z_loss": (0.0, 1e-2), "softcap": (None, 30.0), "gradient": ("auto", "backward", "forward"),
}  # fmt: skip
SUBJECTS = {
    "softmax": Subject(
        {**OF_ARRAYS, "values": VALUES, "shape": (*ROWS, (0, 3), (3, 0)), "axis": (-1, 0, 1)}, check_softmax, has_dtype
    ),
    "softmax_cross_entropy": Subject(
        {**OF_ARRAYS, "values": VALUES, "shape": ROWS, "target": ("classes", "vectors"),
         "integers": ("int64", "int32", "uint8")},
        check_softmax_cross_entropy,
        lambda row: has_dtype(row) and not (row.get("integers") == "uint8" and (row.get("shape") or (1,))[-1] > 255),
    ),
    "batch_norm": Subject(
        {**OF_ARRAYS, "values": VALUES, "shape": IMAGES, "channel_axis": (1, -1, 0, None), "affine": (True, False),
         "eps": (1e-5, 0.5)},
        check_batch_norm, has_dtype,
    ),
    "moments": Subject(
        {"kind": ("numpy", "torch"), "dtype": DTYPES[:2], "layout": NUMPYS, "values": FINITE[:4],
         "shape": ((3, 1), (2, 5), (17, 3), (130, 4), (257, 7))},
        check_moments, has_dtype,
    ),
    "minimize_trace": Subject(
        {"kind": ("numpy", "torch"), "dtype": DTYPES[:2], "layout": EXACT, "m": (1, 2, 3, 17, 33),
         "k": (1, 2, 16), "largest": (False, True), "method": ("auto", "syevr", "syevd"), "certify": (True, False)},
        check_minimize_trace, has_dtype,
    ),
    "points_with_moments": Subject(
        {"kind": ("numpy", "torch"), "dtype": DTYPES[:2], "layout": EXACT, "m": (1, 2, 3, 17),
         "rank": (0, 1, 2, 17), "more": (None, 0, 3), "rng": (None, 3)},
        check_points, has_dtype,
    ),
    "functional.linear_cross_entropy": Subject(
        {"dtype": DTYPES[:2], "layout": LAYOUTS, "values": ("normal", "zeros", "1e-30"), "tool": TOOLS,
         "sizes": ((1, 1, 1), (5, 7, 3), (17, 33, 8), (3, 129, 16)), "bias": (False, True), "chunk_rows": (None, 1, 2),
         **{name: OPTIONS[name] for name in ("reduction", "label_smoothing", "z_loss", "gradient")}},
        check_linear_cross_entropy, fits_linear,
    ),
    "functional.softmax": Subject({**OF_TENSORS, "shape": ROWS, "dim": (-1, 0, 1)}, check_functional_softmax, fits_rows),
    "functional.cross_entropy": Subject(
        {**OF_TENSORS, "shape": ROWS, **OPTIONS}, check_functional_cross_entropy, fits_cross_entropy
    ),
    "functional.token_log_probs": Subject(
        {**OF_TENSORS, "shape": ROWS, "dim": (-1, 0, 1), "temperature": (1.0, 0.7, 4.0)}, check_token_log_probs, fits_rows
    ),
    "functional.batch_norm": Subject(
        {**OF_TENSORS, "shape": IMAGES, "training": (True, False), "tracked": (True, False), "affine": (True, False),
         "parameters": ("input's", "the sums'"), "residual": (False, True), "relu": (False, True), "eps": (1e-5, 0.5)},
        check_functional_batch_norm, fits_batch_norm,
    ),
}  # fmt: skip
