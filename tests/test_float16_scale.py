"""float16 `linear_cross_entropy` makes its gradients in the forward pass: whatever the size of what they are made of, they have
the digits of `gradient="backward"`, which knows the upstream gradient before anything is rounded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from proofs import proves
from twins import hold, values_of

import hw3gpu.functional as HF
from hw3gpu import reference
from hw3gpu._core.dispatch import requested_backend
from hw3gpu._torch import float16_scale
from hw3gpu._torch.cross_entropy import Rest, run
from hw3gpu._torch.cross_entropy_formula import Options
from hw3gpu._torch.linear_chunks import Problem

# fewer in Triton's interpreter, where each row of a tile takes milliseconds
ROWS, FEATURES, CLASSES = (16, 8, 5025) if requested_backend() == "cpu" else (4, 8, 700)
WEIGHTS = {
    "none": lambda rng: None,
    "1e5": lambda rng: torch.full((CLASSES,), 1e5),
    "1e-5": lambda rng: torch.full((CLASSES,), 1e-5),
    "of sum 1": lambda rng: torch.full((CLASSES,), 1 / CLASSES),
    "1e-4 to 1e4": lambda rng: torch.tensor(10 ** rng.uniform(-4, 4, CLASSES), dtype=torch.float32),
}
KINDS = {
    "classes": {},
    "certain": {},
    "smoothed": {"label_smoothing": 0.1},
    "probabilities": {},
    "z-loss": {"z_loss": 0.01},
    "softcap": {"softcap": 2.0},
}


def problem(rng, device, kind):
    """Leaves (ROWS, FEATURES) and (CLASSES, FEATURES) of float16, and a target."""
    spread = 6.0 if kind == "certain" else 1.0
    x, W = (torch.tensor(rng.standard_normal((n, FEATURES)) * by).half() for n, by in ((ROWS, 1), (CLASSES, spread)))
    target = torch.tensor(rng.integers(0, CLASSES, ROWS))
    if kind == "certain":
        target = (x.double() @ W.double().t()).argmax(1)
    elif kind == "probabilities":
        target = torch.tensor(rng.dirichlet([0.1] * CLASSES, ROWS)).half()
    if not target.is_floating_point():
        target[1] = -100
    return x.to(device).requires_grad_(), W.to(device).requires_grad_(), target.to(device)


def gradients(x, W, target, upstream, **options):
    """Under autocast the loss of float16 is float32, so that it takes a loss scale that float16 does not hold."""
    with torch.autocast(x.device.type, torch.float16, enabled=x.dtype == torch.float16):
        loss = HF.linear_cross_entropy(x, W, target, chunk_rows=ROWS // 2, **options)
    return torch.autograd.grad(loss * upstream, (x, W))


def exact_gradients(x, W, target, weight, **options):
    """Those of float64, for an upstream gradient of 1."""
    x, W = (v.detach().double().requires_grad_() for v in (x, W))
    target = target.double() if target.is_floating_point() else target
    weight = None if weight is None else weight.double()
    return [values_of(g) for g in gradients(x, W, target, 1.0, weight=weight, gradient="backward", **options)]


CASES = [
    *((weights, kind, "mean") for weights in WEIGHTS for kind in KINDS if weights not in ("none", "1e-5") or kind == "classes"),
    *((weights, "classes", "sum") for weights in WEIGHTS),
]


@pytest.mark.parametrize(("weights", "kind", "reduction"), CASES, ids=str)
def test_it_is_as_exact_as_the_backward_pass(device, rng, weights, kind, reduction):
    x, W, target = problem(rng, device, kind)
    weight, options = WEIGHTS[weights](rng), {"reduction": reduction, **KINDS[kind]}
    weight = None if weight is None else weight.to(device)
    exact = exact_gradients(x, W, target, weight, **options)
    largest = max(float(abs(g).max()) for g in exact)
    upstreams = [u for u in (65536.0, 1.0, 2.0**-16) if 2.0**-14 < largest * u < 2.0**15]  # the range of float16
    assert upstreams
    for upstream in upstreams[:1]:
        ours, late = (
            gradients(x, W, target, upstream, weight=weight, gradient=when, **options) for when in ("auto", "backward")
        )
        for name, a, b, e in zip(("input", "linear_weight"), ours, late, exact, strict=True):
            hold(f"{name}, upstream {upstream}", a, e * upstream, "float16", b, None)


@pytest.mark.parametrize("kind", ["classes", "certain"])
@pytest.mark.parametrize("weights", ["none", "of sum 1", "1e-5"])
def test_no_class_loses_its_gradient(device, rng, weights, kind):
    """Each class's row of the gradient of linear_weight, those of classes that no row has too, to float16's roundings."""
    x, W, target = problem(rng, device, kind)
    weight = WEIGHTS[weights](rng)
    weight = None if weight is None else weight.to(device)
    _, exact = exact_gradients(x, W, target, weight)
    scale = 2.0 ** (13 - math.frexp(abs(exact).max())[1])
    _, ours = gradients(x, W, target, scale, weight=weight)
    error = np.linalg.norm(values_of(ours) - exact * scale, axis=1)
    kept = np.linalg.norm(exact, axis=1) * scale > 2.0**-8  # that float16 holds with eight bits and more
    assert kept.sum() > CLASSES // 8
    # p has the roundings of its logit and of the row's others; then dz, products and their sum have one each
    z = float((x.detach().double() @ W.detach().double().t()).abs().max())
    assert (error <= 2.0**-11 * (2 * z + 8) * np.linalg.norm(exact, axis=1) * scale)[kept].all()


@proves("3.22", "3.23")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["none", "1e-5", "1e-4 to 1e4"])
def test_what_is_rounded_stays_in_range_and_near_its_end(rng, weights, kind):
    """s is no larger than the bounds allow, and these are not far from what there is; probabilities may be negative."""
    x, w, target = (v.detach() for v in problem(rng, "cpu", kind))
    x, w, weight = x.float(), w.float()[:50], WEIGHTS[weights](rng)
    z, weight = x @ w.t(), None if weight is None else weight[:50]
    target = -target[:, :50].float() if target.is_floating_point() else target % 50 if kind != "certain" else z.argmax(1)
    asked = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, **KINDS[kind]}
    options = Options("none", -100, **asked, zero_if_ignored=False)
    loss, numbers, _, _ = run(z, target, Rest(weight, options))
    part = Problem(x, w, None, target[..., None], weight)
    shrink = float16_scale.of_chunk(part, loss[:, None], numbers, options, float16_scale.largest_element(w))
    assert shrink.frexp().mantissa == 0.5
    exact = reference.cross_entropy_with_options(
        z.numpy(), target.numpy(), weight if weight is None else weight.numpy(), reduction="none", **asked
    )
    g = torch.tensor(exact.dlogits.astype(np.float32)) / shrink
    largest = max(float(v.abs().max()) for v in (g, g @ w, g.t() @ x))
    assert 2.0**10 < largest <= 2.0**15


def test_products_of_many_rows_do_not_overflow(device):
    """The mean of what sums to 131,072, which float16 does not hold."""
    x = torch.full((128, 1), 2048.0, dtype=torch.float16, device=device, requires_grad=True)
    W = torch.zeros((2, 1), dtype=torch.float16, device=device, requires_grad=True)
    target = torch.zeros(128, dtype=torch.int64, device=device)
    (dW,) = torch.autograd.grad(HF.linear_cross_entropy(x, W, target), W)
    np.testing.assert_array_equal(values_of(dW), [[-1024.0], [1024.0]])


@pytest.mark.parametrize("weights", ["1e5", "of sum 1"])
def test_bfloat16_needs_no_scale(device, rng, weights):
    """It has the range of float32, in which its gradients meet the upstream gradient."""
    x, W, target = problem(rng, device, "classes")
    x, W = (v.detach().bfloat16().requires_grad_() for v in (x, W))
    weight = WEIGHTS[weights](rng).to(device)
    exact = exact_gradients(x, W, target, weight)
    ours, late = (gradients(x, W, target, 65536.0, weight=weight, gradient=when) for when in ("auto", "backward"))
    for name, a, b, e in zip(("input", "linear_weight"), ours, late, exact, strict=True):
        hold(name, a, e * 65536, "bfloat16", b, None)
