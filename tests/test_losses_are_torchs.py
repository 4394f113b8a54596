"""cross_entropy, linear_cross_entropy and softmax beside PyTorch's, over 1,400 drawn combinations of arguments,
of which `make test` runs half.

Values and gradients, and the exception where PyTorch raises one. What PyTorch refuses and this library takes is drawn in no
case: int32 and other integer classes, class weights in float32 beside half precision.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from twins import ACC, layout_of, tensor

import hw3gpu.functional as HF

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning"),
]


PARTS = 4


def drawn(n):
    """Runs a test of drawn `data` n times, the same draws in every run, in parts that pytest-xdist can divide."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    profile = settings(max_examples=n // PARTS, deadline=None, database=None, suppress_health_check=quiet)

    def decorated(test):
        @pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.slow) for part in range(2, PARTS))])
        def parts(part):
            seed(part)(profile(given(data=st.data())(test)))()

        return parts

    return decorated


DTYPES = st.sampled_from(["float64", "float32", "bfloat16", "float16"])
LAYOUTS = st.sampled_from(["contiguous", "channels-last", "sliced"])
REDUCTIONS = st.sampled_from(["none", "mean", "sum"])


def outcome(function, leaves, *args, upstream=None, **options):
    """(results, None) or (None, the exception)."""
    leaves = [v.detach().clone().requires_grad_() for v in leaves]
    try:
        y = function(*leaves, *args, **options)
        up = torch.ones_like(y) if upstream is None else upstream(y)
        return [y, *torch.autograd.grad(y, leaves, up, allow_unused=True)], None
    except Exception as error:
        return None, error


def compare(ours, theirs, *dtypes):
    """Errors of the two differ by rounding to the coarsest of the dtypes: PyTorch rounds between the steps."""
    (found, our_error), (expected, their_error) = ours, theirs
    if their_error is not None:
        assert our_error is not None, f"PyTorch raises {their_error!r}"
        assert isinstance(our_error, type(their_error)), f"{our_error!r} where PyTorch raises {their_error!r}"
        return
    if our_error is not None:
        raise our_error
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        eps = max(torch.finfo(getattr(torch, of)).eps for of in dtypes)
        finite = b.detach()[b.detach().isfinite()].double()
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=64 * eps, atol=32 * eps * (1 + scale), equal_nan=True, check_stride=False)


def drawn_upstream(seed):
    def upstream(y):
        values = np.random.default_rng(seed).standard_normal(tuple(y.shape))
        return torch.tensor(values).to(y.dtype)

    return upstream


def classes(rng, shape, C, ignored, ignore_index):
    t = rng.integers(0, C, shape)
    return torch.tensor(np.where(rng.random(shape) < ignored, ignore_index, t))


@drawn(800)
def test_cross_entropy(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 999), "seed"))
    dtype, C = draw(DTYPES, "dtype"), draw(st.integers(1, 9), "C")
    spatial = draw(st.sampled_from([None, (), (1,), (3,), (2, 3), (0,)]), "spatial")
    shape = (C,) if spatial is None else (draw(st.integers(0, 5), "N"), C, *spatial)
    rows = () if spatial is None else (shape[0], *spatial)
    layout = draw(LAYOUTS, "layout") if len(shape) > 1 else "contiguous"
    x = layout_of(tensor(3 * rng.standard_normal(shape), dtype, "cpu"), layout)
    hard = draw(st.booleans(), "hard")
    options = {
        "reduction": draw(REDUCTIONS, "reduction"),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "label_smoothing"),
    }
    weight = draw(st.sampled_from(["none", "random", "some zero"]), "weight")
    if weight != "none":
        w = rng.random(C) + 0.1
        w[rng.random(C) < (0.3 if weight == "some zero" else 0.0)] = 0.0
        options["weight"] = tensor(w, dtype, "cpu")
    if hard:
        options["ignore_index"] = draw(st.sampled_from([-100, 0, -1, 7, 255]), "ignore_index")
        target = classes(rng, rows, C, draw(st.sampled_from([0.0, 0.4, 1.0]), "ignored"), options["ignore_index"])
        wrong = draw(st.sampled_from(["nothing"] * 6 + ["class", "N", "dtype", "smoothing", "weight"]), "wrong")
        if wrong == "class" and target.numel():
            target = torch.full_like(target, C + 300)
        elif wrong == "N" and len(shape) > 1:
            target = torch.zeros((shape[0] + 1, *spatial), dtype=torch.int64)
        elif wrong == "dtype":
            target = target.bool()
        elif wrong == "smoothing":
            options["label_smoothing"] = 1.5
        elif wrong == "weight":
            options["weight"] = torch.ones(C + 1, dtype=x.dtype)
        leaves, args = [x], (target,)
    else:
        y = rng.random(shape) + 0.01
        leaves, args = [x, layout_of(tensor(y, draw(st.sampled_from([dtype, "float32"]), "target's dtype"), "cpu"), layout)], ()
        if draw(st.booleans(), "target without gradient"):
            leaves, args = leaves[:1], (leaves[1],)
        if draw(st.integers(0, 9), "wrong") == 0:
            options["ignore_index"] = 1
    upstream = drawn_upstream(1)
    ours = outcome(HF.cross_entropy, leaves, *args, upstream=upstream, **options)
    theirs = outcome(in_the_precision_of_the_sums(F.cross_entropy), leaves, *args, upstream=upstream, **options)
    compare(ours, theirs, dtype, *(str(v.dtype).removeprefix("torch.") for v in (*leaves, *args) if v.is_floating_point()))


def in_the_precision_of_the_sums(function):
    """PyTorch's function of float32 for half precision, rounded once: where it does not raise, which it is asked first."""

    def call(x, target, **options):
        y = function(x, target, **options)
        acc = ACC[str(x.dtype).removeprefix("torch.")]
        if y.dtype == acc:
            return y
        options = {k: v.to(acc) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return function(x.to(acc), target.to(acc) if target.is_floating_point() else target, **options).to(y.dtype)

    return call


@drawn(350)
def test_linear_cross_entropy(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 999), "seed"))
    dtype = draw(st.sampled_from(["float64", "float32"]), "dtype")
    N, C, D = draw(st.integers(1, 7), "N"), draw(st.integers(1, 6), "C"), draw(st.integers(1, 5), "D")
    K, batched = draw(st.sampled_from([(), (), (2,), (2, 3)]), "K"), True
    if not K:
        batched = draw(st.booleans(), "batched")
    x = tensor(rng.standard_normal((N, D) if batched else (D,)), dtype, "cpu")
    W = tensor(rng.standard_normal((C, *K, D)), dtype, "cpu")
    leaves = [x, W]
    rows = (N, *K) if batched else ()
    options = {
        "reduction": draw(REDUCTIONS, "reduction"),
        "label_smoothing": draw(st.sampled_from([0.0, 0.2]), "label_smoothing"),
    }
    if draw(st.booleans(), "weight"):
        options["weight"] = tensor(rng.random(C) + 0.1, dtype, "cpu")
    if draw(st.booleans(), "hard"):
        ignore = draw(st.sampled_from([None, -100, 0]), "ignore_index")
        target = classes(rng, rows, C, draw(st.sampled_from([0.0, 0.4]), "ignored"), -100 if ignore is None else ignore)
        options["ignore_index"] = ignore
    else:
        target = tensor(rng.random((N, C, *K) if batched else (C,)), dtype, "cpu")
    wrong = draw(st.sampled_from(["nothing"] * 7 + ["features", "bias", "dtype", "class", "reduction"]), "wrong")
    bias = tensor(rng.standard_normal((C, *K)), dtype, "cpu") if draw(st.booleans(), "bias") else None
    if wrong == "features":
        leaves[1] = torch.ones(C, *K, D + 1, dtype=x.dtype)
    elif wrong == "bias":
        bias = torch.ones(C + 1, dtype=x.dtype)
    elif wrong == "dtype":
        leaves[1] = W.to(torch.float16)
    elif wrong == "class" and not target.is_floating_point():
        target = torch.full_like(target, C + 5)
    elif wrong == "reduction":
        options["reduction"] = "average"
    if bias is not None:
        leaves.append(bias)
    ours_only = {
        "chunk_rows": draw(st.sampled_from([None, 1, 2, 3]), "chunk_rows"),
        "gradient": draw(st.sampled_from(["auto", "backward"]), "gradient"),
    }

    def call(function, **more):
        def of(x, W, b=None):
            return function(x, W, target, linear_bias=b, **options, **more)

        return outcome(of, leaves, upstream=drawn_upstream(2))

    compare(call(HF.linear_cross_entropy, **ours_only), call(F.linear_cross_entropy), dtype)


@drawn(250)
def test_softmax(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 999), "seed"))
    dtype = draw(DTYPES, "dtype")
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4), "shape"))
    layout = draw(LAYOUTS, "layout") if len(shape) > 1 else "contiguous"
    x = layout_of(tensor(5 * rng.standard_normal(shape), dtype, "cpu"), layout)
    spoilt = draw(st.sampled_from(["no", "no", "-inf", "nan"]), "spoilt")
    if spoilt != "no":
        x = torch.where(torch.tensor(rng.random(shape)) < 0.3, math.nan if spoilt == "nan" else -math.inf, x)
    dim = draw(st.integers(-len(shape) - 1, len(shape)), "dim")
    to = draw(st.sampled_from([None, None, torch.float64, torch.float32, torch.int64]), "dtype=")
    # in half precision PyTorch's backward starts from the rounded y, as this library's does
    ours, theirs = (outcome(f, [x], dim, upstream=drawn_upstream(3), dtype=to) for f in (HF.softmax, F.softmax))
    compare(ours, theirs, dtype, "float32" if to is torch.float32 else dtype)
