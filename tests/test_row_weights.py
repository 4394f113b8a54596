"""`token_weight`, `normalizer`, `loss_dtype` and hidden states (N, …, D) of the cross entropies, against the answer sheet."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from twins import ACC, SINGLE, gradcheck, gradgradcheck, hold, ones, same, tensor, values_of, zeros

import hw3gpu.functional as HF
import hw3gpu.nn as HN
from hw3gpu import _error_bounds, reference
from hw3gpu._core.dispatch import requested_backend
from hw3gpu._torch import cross_entropy, expected_upstream, linear_chunks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

N, C = 5, 17


def problem(rng, device, dtype, kind):
    """Logits (N, C, 3), targets and weights of rows; one row is ignored, one has the weight 0."""
    x = tensor(3 * rng.standard_normal((N, C, 3)), dtype, device, grad=True)
    if kind == "classes":
        target = torch.tensor(rng.integers(0, C, (N, 3)), device=device)
        target[1, 2] = -100
    else:
        y = rng.random((N, C, 3)) + 0.01
        target = tensor(y / y.sum(1, keepdims=True), dtype, device)
    v = tensor(rng.random((N, 3)) + 0.25, dtype, device)
    v[2, 0] = 0.0
    return x, target, v


def in_torch(x, target, acc, reduction="mean", normalizer=None, token_weight=None, weight=None, label_smoothing=0.0):
    """The loss in PyTorch's operations, in the precision of the sums, and its gradient."""
    x = x.detach().to(acc).requires_grad_()
    soft = target.is_floating_point()
    target = target.to(acc) if soft else target
    rows = F.cross_entropy(x, target, weight, reduction="none", label_smoothing=label_smoothing)
    v = torch.ones_like(rows) if token_weight is None else token_weight.to(acc)
    kept = torch.ones_like(rows) if soft else (target != -100).to(acc)
    if weight is not None and not soft:
        kept = kept * weight[target.clamp(min=0)]
    divisor = (v * kept).sum() if reduction == "mean" else 1.0
    divisor = divisor if normalizer is None else normalizer
    loss = (rows * v if reduction == "none" else (rows * v).sum()) / divisor
    return loss, *torch.autograd.grad(loss, x, torch.ones_like(loss))


CASES = {
    "normalizer": {"normalizer": 7.0},
    "normalizer of all rows": {"normalizer": 0.3, "reduction": "none"},
    "normalizer of a sum": {"normalizer": 1e4, "reduction": "sum"},
    "weights": {},
    "weights of all rows": {"reduction": "none"},
    "weights and normalizer": {"normalizer": 3e-3},
}


KINDS = list(itertools.product(("float64", "float32", "bfloat16", "float16"), ("classes", "probabilities")))


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_loss_and_gradient(device, rng, case, number):
    """Two dtypes and kinds of target a case; all of them, and each with several cases, in all."""
    dtype, kind = KINDS[(3 * list(CASES).index(case) + 5 * number) % 8]
    x, target, v = problem(rng, device, dtype, kind)
    acc = ACC[dtype]
    options = dict(CASES[case])
    if "weights" in case:
        options["token_weight"] = v
    if dtype != "bfloat16":
        options |= {"label_smoothing": 0.2, "weight": tensor(rng.random(C) + 0.25, SINGLE[acc], device)}
    given = {k: values_of(of) if isinstance(of, torch.Tensor) else of for k, of in options.items()}
    t = values_of(target) if kind == "probabilities" else target.cpu().numpy()
    sheet = reference.cross_entropy_with_options(values_of(x), t, **given)
    bound = _error_bounds.cross_entropy_with_options(values_of(x), t, **given, dtype=SINGLE[acc])
    by_torch = in_torch(x, target, acc, **options)
    loss = HF.cross_entropy(x, target, loss_dtype=acc, **options)
    assert loss.dtype == acc
    (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    hold("loss", loss, sheet.loss, SINGLE[acc], by_torch[0], bound.loss)
    hold("dx", dx, sheet.dlogits, dtype, by_torch[1].to(x.dtype), bound.dlogits)
    assert (dx[1, :, 2] == 0).all() or kind == "probabilities"
    if "weights" in case:
        assert (dx[2, :, 0] == 0).all()
    short = HF.cross_entropy(x, target, **options)
    assert short.dtype == x.dtype
    assert torch.equal(short, loss.to(x.dtype))


def test_every_derivative(device, rng):
    x, target, v = problem(rng, device, "float64", "classes")
    x, target, v = x.detach()[:2, :4].requires_grad_(), target[:2].clamp(max=3), v[:2].requires_grad_()
    divisor = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
    W = tensor(rng.standard_normal((4, 5)), "float64", device, grad=True)
    h = tensor(rng.standard_normal((2, 3, 5)), "float64", device, grad=True)

    def weighed(x, v, divisor):
        return HF.cross_entropy(x, target, token_weight=v, normalizer=divisor, z_loss=0.1)

    def linear(h, W, v, divisor):
        return HF.linear_cross_entropy(h, W, target, token_weight=v, normalizer=divisor, z_loss=0.1)

    gradcheck(weighed, (x, v, divisor))
    gradcheck(linear, (h, W, v, divisor))
    gradgradcheck(weighed, (x, v, divisor))
    if requested_backend() != "gpu":
        gradcheck(lambda x, divisor: HF.cross_entropy(x, target, normalizer=divisor), (x, divisor))
        gradcheck(lambda x, v: HF.cross_entropy(x, target, token_weight=v), (x, v))


def test_statistics_beside_them_have_gradients(device, rng):
    x, target, v = problem(rng, device, "float64", "classes")
    found = []
    for differentiable in (False, True):
        loss, stats = HF.cross_entropy(
            x, target, token_weight=v, normalizer=5, return_stats=True, differentiable=differentiable
        )
        found.append([loss, stats.entropy.detach(), *torch.autograd.grad(loss, x)])
    for ours, other in zip(*found, strict=True):
        same(ours, other)


# ---------------------------------------------------------------------------------------------- digits
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_float32_loss_keeps_the_digits_of_the_rows(device, rng, dtype):
    x, target = tensor(9 * rng.standard_normal((64, 32)), dtype, device), torch.arange(64, device=device) % 32
    kept, short = HF.cross_entropy(x, target, loss_dtype=torch.float32, reduction="sum"), HF.cross_entropy(x, target)
    exact = reference.cross_entropy_with_options(values_of(x), target.cpu().numpy(), reduction="sum").loss
    assert kept.dtype == torch.float32
    assert abs(float(kept) - exact) <= 1e-6 * exact
    assert short.dtype == x.dtype


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("v", "divisor"), [(3e4, 1e9), (1e-6, 1e-9), (1e6, 3e5)])
def test_float16_far_from_1(device, rng, v, divisor, linear):
    """Neither the weights nor the divisor, nor what they make of a row in between, need be numbers of float16."""
    rows, D = 32, 16
    x = tensor(rng.standard_normal((rows, D)), "float16", device, grad=True)
    W = tensor(rng.standard_normal((24, D)) / 4, "float16", device, grad=True)
    target = torch.arange(rows, device=device) % 24
    of_rows = tensor(v * (1 + rng.random(rows)), "float32", device)
    given = {"token_weight": of_rows, "normalizer": divisor, "loss_dtype": torch.float32}
    z = F.linear(x, W).detach().requires_grad_()
    if linear:
        loss = HF.linear_cross_entropy(x, W, target, chunk_rows=7, **given)
        found = torch.autograd.grad(loss, (x, W))
    else:
        loss = HF.cross_entropy(z, target, **given)
        found = torch.autograd.grad(loss, z)
    sheet = reference.cross_entropy_with_options(
        values_of(z), target.cpu().numpy(), token_weight=values_of(of_rows), normalizer=divisor
    )
    assert abs(float(loss.detach()) - sheet.loss) <= (2e-3 if linear else 1e-5) * sheet.loss
    dz = sheet.dlogits
    expected = [dz @ values_of(W), dz.T @ values_of(x)] if linear else [dz]
    for ours, exact in zip(found, expected, strict=True):
        least = 2.0**-25 * (1 if not linear else 24)  # of a subnormal number
        assert np.abs(values_of(ours) - exact).max() <= 4e-3 * np.abs(exact).max() + least


def test_a_row_of_weight_0_adds_nothing_where_its_loss_is_infinite(device):
    x = torch.tensor([[-math.inf, 0.0, 1.0], [0.5, 0.0, 1.0]], device=device, requires_grad=True)
    target, v = torch.tensor([0, 1], device=device), torch.tensor([0.0, 2.0], device=device)
    loss = HF.cross_entropy(x, target, token_weight=v)
    same(loss, F.cross_entropy(x[1:], target[1:]), 1e-6)
    (dx,) = torch.autograd.grad(loss, x)
    assert (dx[0] == 0).all()


@pytest.mark.parametrize("linear", [False, True], ids=["cross entropy", "linear cross entropy"])
@pytest.mark.parametrize("wrong", [3, 2**31 - 1, -1])
def test_a_class_out_of_range_beside_class_weights(device, wrong, linear):
    target, W = torch.tensor([0, wrong], device=device), torch.eye(3, device=device)
    given = {"weight": torch.ones(3, device=device), "token_weight": torch.ones(2, device=device)}
    with pytest.raises(IndexError, match=f"target: expected classes in 0…2 or ignore_index -100, got {wrong} in row 1"):
        HF.linear_cross_entropy(W[:2], W, target, **given) if linear else HF.cross_entropy(W[:2], target, **given)


def test_no_rows_and_all_ignored(device):
    W = torch.ones(3, 4, device=device, requires_grad=True)
    for rows in (0, 2):
        x, h = (torch.zeros(rows, n, device=device, requires_grad=True) for n in (3, 4))
        target, v = torch.full((rows,), -100, device=device), torch.ones(rows, device=device)
        for call in (lambda **k: HF.cross_entropy(x, target, **k), lambda **k: HF.linear_cross_entropy(h, W, target, **k)):  # noqa: B023
            assert call(token_weight=v).isnan()
            assert call(token_weight=v, all_ignored="zero") == 0
            assert call(token_weight=v, normalizer=4.0) == 0
            assert call(normalizer=torch.tensor(0, device=device)).isnan()
            zero = call(normalizer=torch.tensor(0, device=device), all_ignored="zero")
            assert zero == 0
            for of in torch.autograd.grad(zero, (x, h, W), allow_unused=True):
                assert of is None or (of == 0).all()


# ---------------------------------------------------------------------------------------------- when the gradient is computed
def test_a_divisor_that_changes_costs_no_pass_on_the_cpu(rng, monkeypatch):
    """The forward pass writes the gradient for the upstream gradient that the quotient will have."""
    calls = []
    run = cross_entropy._run_step
    monkeypatch.setattr(cross_entropy, "_run_step", lambda *args, **kwargs: calls.append(args[3]) or run(*args, **kwargs))
    x, target = tensor(rng.standard_normal((64, 2000)), "float32", "cpu", grad=True), torch.arange(64)
    for divisor in (3.0, 5.0, 7.0, 11.0):
        HF.cross_entropy(x, target, normalizer=torch.tensor(divisor)).backward()
    assert calls == [float(np.float32(1) / np.float32(d)) for d in (3.0, 5.0, 7.0, 11.0)]


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_weights_that_are_known_cost_no_product_and_no_pass(device, rng, monkeypatch, dtype):
    """The linear form makes its gradients in the forward pass, and the CPU those of logits; a second call makes them anew."""
    x = tensor(rng.standard_normal((6, 8)), dtype, device, grad=True)
    W = tensor(rng.standard_normal((11, 8)), dtype, device, grad=True)
    z = tensor(rng.standard_normal((6, 11)), dtype, device, grad=True)
    target = torch.tensor([3, 10, -100, 0, 1, 2], device=device)
    v = tensor(rng.random(6), dtype, device)
    calls = {
        "linear": (
            lambda v: HF.linear_cross_entropy(x, W, target, token_weight=v, chunk_rows=4, loss_dtype=torch.float32),
            (x, W),
        ),
        "logits": (lambda v: HF.cross_entropy(z, target, token_weight=v, loss_dtype=torch.float32), (z,)),
    }
    rows = {"linear": (linear_chunks, "logits_of", 2), "logits": (cross_entropy, "run_backward", 0)}
    for name, (call, of) in calls.items():
        learnt = call(v.detach().requires_grad_())
        expected = torch.autograd.grad(learnt, of, torch.tensor(0.5, device=device))
        module, function, expected_calls = rows[name]
        made, whole = [], getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, whole=whole, made=made: made.append(1) or whole(*args))
        loss = call(v)
        torch.testing.assert_close(loss, learnt)
        torch.autograd.grad(loss, of, torch.ones_like(loss), retain_graph=True)
        if name == "linear" or requested_backend() != "gpu":
            assert len(made) == expected_calls
        for _ in range(2):
            found = torch.autograd.grad(loss, of, torch.tensor(0.5, device=device), retain_graph=True)
            for ours, other in zip(found, expected, strict=True):
                tolerance = 2.0**-9 if dtype == "float16" else 1e-6
                torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
        (again,) = torch.autograd.grad(loss, of[0], create_graph=True)
        assert again.requires_grad


def test_a_remembered_upstream_gradient_is_that_of_the_quotient():
    of = expected_upstream.Expected()
    for divisor in (3.0, 7.0, 49.0):
        divided = expected_upstream.Divided(of, torch.tensor(divisor))
        divided.was(float(np.float32(0.1) / np.float32(divisor)) if divisor != 3.0 else divided.guess())
        assert of.last == pytest.approx(1.0 if divisor == 3.0 else 0.1, rel=1e-6)
    assert of.guess() is not None


# ---------------------------------------------------------------------------------------------- hidden states (N, …, D)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_hidden_states_of_sequences(device, rng, kind, reduction):
    x = tensor(rng.standard_normal((2, 3, 8)), "float64", device, grad=True)
    W = tensor(rng.standard_normal((C, 8)), "float64", device, grad=True)
    target = torch.tensor(rng.integers(0, C, (2, 3)), device=device)
    if kind == "probabilities":
        target = torch.softmax(tensor(rng.standard_normal((2, 3, C)), "float64", device), -1)
    v = tensor(rng.random((2, 3)), "float64", device)
    loss, stats = HF.linear_cross_entropy(x, W, target, token_weight=v, reduction=reduction, return_stats=True, chunk_rows=4)
    flat = HF.cross_entropy(F.linear(x, W).flatten(0, 1), target.flatten(0, 1), token_weight=v.flatten(), reduction=reduction)
    assert loss.shape == (target.shape[:2] if reduction == "none" else ())
    assert stats.lse.shape == (2, 3)
    same(loss.flatten(), flat.flatten())
    for ours, other in zip(*(torch.autograd.grad(of.sum(), (x, W)) for of in (loss, flat)), strict=True):
        same(ours, other, 1e-11)


def test_the_modules_take_them(device, rng):
    x, target, v = problem(rng, device, "float32", "classes")
    given = {"token_weight": v, "normalizer": 4}
    same(HN.CrossEntropyLoss(loss_dtype=torch.float64)(x, target, **given), HF.cross_entropy(x, target, **given).double())
    module = HN.LinearCrossEntropyLoss(8, C, loss_dtype=torch.float32).to(device)
    h, rows = torch.ones(2, 3, 8, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    loss = module(h, rows, token_weight=v[:2], normalizer=2)
    same(loss, HF.cross_entropy(module.linear(h).movedim(-1, 1), rows, token_weight=v[:2], normalizer=2), 1e-5)


# ---------------------------------------------------------------------------------------------- bad input
BAD = [
    (TypeError, r"loss_dtype: expected None or one of float16, .* got 'float32'", {"loss_dtype": "float32"}),
    (TypeError, r"loss_dtype: expected None or one of float16, .* got torch.int32", {"loss_dtype": torch.int32}),
    (ValueError, r"normalizer: expected a number from 1e-30 to 1e30, got 0", {"normalizer": 0}),
    (ValueError, r"normalizer: expected a number from 1e-30 to 1e30, got nan", {"normalizer": math.nan}),
    (ValueError, r"normalizer: expected a number from 1e-30 to 1e30, got 1e\+39", {"normalizer": 1e39}),
    (TypeError, r"normalizer: expected a number, got '8'", {"normalizer": "8"}),
    (ValueError, r"normalizer: expected shape \(\) \(one number\), got \(2,\)", {"normalizer": ones(2)}),
    (TypeError, r"normalizer: expected a tensor of real numbers, got bool", {"normalizer": torch.tensor(True)}),
    (TypeError, r"token_weight: expected a torch.Tensor, got builtins.float", {"token_weight": 0.5}),
    (TypeError, r"token_weight: expected dtype float16, .* got int64", {"token_weight": zeros(2)}),
    (ValueError, r"token_weight: expected shape \(2,\) \(one weight per row of input\), got \(3,\)", {"token_weight": ones(3)}),
    (ValueError, r"gradient: expected 'auto' or 'backward' with token_weight, got 'forward'",
     {"token_weight": ones(2), "gradient": "forward"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "options"), BAD)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        HF.cross_entropy(ones(2, 3), zeros(2), **options)
    if "gradient" in options:
        options, message = (
            options | {"token_weight": ones(2).requires_grad_()},
            r"gradient: expected 'auto' or 'backward' with a token_weight that asks",
        )
    with pytest.raises(error, match=message):
        HF.linear_cross_entropy(ones(2, 4), ones(3, 4), zeros(2), **options)


@pytest.mark.parametrize(
    ("message", "target", "W"),
    [
        (r"target: expected shape \(2, 3\) \(one class per row of input\), got \(6,\)", zeros(6), ones(5, 4)),
        (
            r"target: expected shape \(2, 3, 5\) \(the probabilities of each row of input\), got \(2, 5, 3\)",
            ones(2, 5, 3),
            ones(5, 4),
        ),
        (r"input: expected \(N, D\) with linear_weight \(C, d1, …, D\), got shape \(2, 3, 4\)", zeros(2), ones(5, 2, 4)),
    ],
)
def test_bad_hidden_states(message, target, W):
    with pytest.raises(ValueError, match=message):
        HF.linear_cross_entropy(ones(2, 3, 4), W, target)
