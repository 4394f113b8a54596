"""Every array function once, for tests of what goes in and what comes out; its arithmetic has tests of its own."""

from __future__ import annotations

import dataclasses

import numpy as np

CALLS = {
    "batch_norm": lambda f, a: f.batch_norm(a["x"], a["gamma"], beta=a["gamma"]),
    "batch_norm_backward": lambda f, a: f.batch_norm_backward(a["dy"], a["x"], a["gamma"], a["var"]),
    "softmax": lambda f, a: f.softmax(a["x"]),
    "softmax_backward": lambda f, a: f.softmax_backward(a["dy"], a["x"]),
    "softmax_jacobian": lambda f, a: f.softmax_jacobian(a["gamma"]),
    "cross_entropy": lambda f, a: f.cross_entropy(a["p"], a["p"]),
    "softmax_cross_entropy": lambda f, a: f.softmax_cross_entropy(a["x"], a["p"]),
    "classes": lambda f, a: f.softmax_cross_entropy(a["x"], a["classes"]),
    "points_with_moments": lambda f, a: f.points_with_moments(mean=a["gamma"], covariance=a["sigma"]),
    "moments": lambda f, a: f.moments(a["x"]),
    "minimize_trace": lambda f, a: f.minimize_trace(a["sigma"], 2),
    "minor_components": lambda f, a: f.minor_components(a["x"], 2),
    "MomentAccumulator": lambda f, a: accumulated(f, a["x"]),
}


def accumulated(f, x):
    """Mean and covariance of points in two parts, merged."""
    return f.MomentAccumulator(3).update(x[:2]).merge(f.MomentAccumulator().update(x[2:])).moments(ddof=1)


def operands(rng):
    """The NumPy arrays, by name, that `CALLS` takes."""
    x, a, p = rng.standard_normal((5, 3)), rng.standard_normal((3, 3)), rng.random((5, 3)) + 0.01
    return {
        "x": x,
        "dy": rng.standard_normal((5, 3)),
        "gamma": rng.standard_normal(3),
        "var": rng.random(3) + 0.5,
        "p": p / p.sum(1, keepdims=True),
        "classes": np.array([0, 2, 1, 1, 0]),
        "sigma": a @ a.T,
    }


def leaves(result):
    """The arrays and numbers of a result, in order."""
    if dataclasses.is_dataclass(result):
        return [v for f in dataclasses.fields(result) for v in leaves(getattr(result, f.name))]
    return [v for part in result for v in leaves(part)] if isinstance(result, tuple) else [result]
