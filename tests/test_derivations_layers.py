"""Sections 1 and 2 of docs/derivations.md, proved: convolution and batch normalisation.

The loss in the tests of gradients is linear, Σ g_i y_i with symbols g_i: a chain rule sees of any other loss no more than
these derivatives.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import sympy as sp
import torch
from proofs import proves

from hw3gpu import reference

# 1 Convolution -----------------------------------------------------------------------------------------------------


@proves("1.1")
def test_1_1_counts_the_kernel_positions_on_the_padded_axis() -> None:
    for size, p, k, d, s in product(range(1, 9), range(3), range(1, 5), range(1, 4), range(1, 5)):
        last_pixel = size + 2 * p - 1
        positions = sum(1 for j in range(last_pixel + 1) if j * s + d * (k - 1) <= last_pixel)
        formula = (size + 2 * p - d * (k - 1) - 1) // s + 1
        assert max(formula, 0) == positions


@proves("1.2")
def test_1_2_is_the_shape_a_direct_convolution_has() -> None:
    rng = np.random.default_rng(0)
    for (w, h), (k1, k2), (s1, s2), (p1, p2) in [
        ((7, 11), (3, 4), (2, 1), (5, 0)),
        ((13, 6), (5, 2), (1, 3), (0, 4)),
        ((4, 9), (6, 7), (5, 8), (1, 2)),
    ]:
        x, weight = rng.normal(size=(2, w, h, 3)), rng.normal(size=(5, 3, k1, k2))
        padded = np.pad(x, ((0, 0), (p1, p1), (p2, p2), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (k1, k2), axis=(1, 2))[:, ::s1, ::s2]
        y = np.einsum("bwhckl,ockl->bwho", windows, weight)
        assert y.shape == (2, (w + 2 * p1 - k1) // s1 + 1, (h + 2 * p2 - k2) // s2 + 1, 5)
        channels_first = torch.tensor(x).permute(0, 3, 2, 1)
        in_torch = torch.nn.functional.conv2d(
            channels_first, torch.tensor(weight).transpose(2, 3), stride=(s2, s1), padding=(p2, p1)
        )
        np.testing.assert_allclose(in_torch.permute(0, 3, 2, 1).numpy(), y, rtol=1e-12, atol=1e-12)


GEOMETRIES = list(product(range(1, 10), range(1, 5), range(1, 4), range(1, 5)))  # size, kernel, stride, dilation


def positions(size: int, padding: int, k: int, s: int, d: int) -> int:
    """Where a kernel may start on the padded axis, counted."""
    return sum(1 for j in range(0, size + 2 * padding, s) if j + d * (k - 1) <= size + 2 * padding - 1)


@proves("1.3")
def test_1_3_is_every_padding_that_gives_the_size() -> None:
    empty = 0
    for size, k, s, d in GEOMETRIES:
        a = d * (k - 1) + 1
        for wanted in range(1, 8):
            low, high = -(-((wanted - 1) * s + a - size) // 2), (wanted * s - 1 + a - size) // 2
            paddings = [p for p in range(40) if positions(size, p, k, s, d) == wanted]
            assert paddings == list(range(max(low, 0), high + 1))
            if not paddings:
                empty += 1
                assert wanted * s - 1 + a - size < 0 or (s == 1 and (wanted - 1 + a - size) % 2)
    assert empty > 100


@proves("1.4")
def test_1_4_is_the_least_padding_of_both_sides_that_gives_the_size_over_the_stride_rounded_up() -> None:
    for size, k, s, d in GEOMETRIES:
        wanted = -(-size // s)
        total = max((wanted - 1) * s + d * (k - 1) + 1 - size, 0)
        assert positions(size + total, 0, k, s, d) == wanted
        assert total == 0 or positions(size + total - 1, 0, k, s, d) == wanted - 1


@proves("1.5")
def test_1_5_is_every_size_that_a_convolution_takes_to_the_given_one() -> None:
    for size, k, s, d in GEOMETRIES:
        for p in range(3):
            found = [(size - 1) * s - 2 * p + d * (k - 1) + 1 + o for o in range(s)]
            counted = [n for n in range(1, 60) if n + 2 * p >= d * (k - 1) + 1 and positions(n, p, k, s, d) == size]
            assert [n for n in found if n >= 1] == counted


# 2 Batch normalisation ---------------------------------------------------------------------------------------------

M = 3
X = sp.symbols("x1:4", real=True)
G = sp.symbols("g1:4", real=True)
GAMMA, BETA, EPS, U, V = sp.symbols("gamma beta epsilon mu sigma2", real=True)
ROOT_S = sp.Symbol("s", positive=True)

MEAN = sum(X) / sp.Integer(M)
VAR = sum((x - MEAN) ** 2 for x in X) / M


def x_hats(mean: sp.Expr, var: sp.Expr) -> list[sp.Expr]:
    return [(x - mean) / sp.sqrt(var + EPS) for x in X]


def loss(mean: sp.Expr, var: sp.Expr) -> sp.Expr:
    return sum(g * (GAMMA * x_hat + BETA) for g, x_hat in zip(G, x_hats(mean, var), strict=True))


def vanishes(expression: sp.Expr) -> bool:
    """Whether an expression in x is 0 for all x: with eps = s² − σ² it becomes rational, and so decidable."""
    return sp.cancel(sp.together(expression.subs(EPS, ROOT_S**2 - VAR))) == 0


DX_HAT = [GAMMA * g for g in G]
RSTD = 1 / sp.sqrt(VAR + EPS)
X_HAT = x_hats(MEAN, VAR)
DVAR = -((VAR + EPS) ** sp.Rational(-3, 2)) / 2 * sum(d * (x - MEAN) for d, x in zip(DX_HAT, X, strict=True))
DMEAN = -RSTD * sum(DX_HAT)
DGAMMA = sum(g * x_hat for g, x_hat in zip(G, X_HAT, strict=True))
DBETA = sum(G)
DX = [
    GAMMA * RSTD / M * (M * g - sum(G) - x_hat * sum(h * other for h, other in zip(G, X_HAT, strict=True)))
    for g, x_hat in zip(G, X_HAT, strict=True)
]


@proves("2.1", "2.2", "2.3", "2.4")
def test_2_1_to_2_4_are_the_forward_pass_of_the_answer_sheet_and_of_pytorch() -> None:
    values = {x: value for x, value in zip(X, (sp.Rational(7, 3), -4, sp.Rational(1, 5)), strict=True)}
    values |= {GAMMA: sp.Rational(3, 2), BETA: -2, EPS: sp.Rational(1, 100)}
    by_formula = {
        "y": [(GAMMA * x_hat + BETA).subs(values) for x_hat in X_HAT],
        "mean": MEAN.subs(values),
        "var": VAR.subs(values),
        "rstd": RSTD.subs(values),
        "x_hat": [x_hat.subs(values) for x_hat in X_HAT],
    }
    x = np.array([float(values[symbol]) for symbol in X])
    answer = reference.batch_norm(x, 1.5, -2.0, eps=0.01, channel_axis=None)
    for field, exact in by_formula.items():
        np.testing.assert_allclose(getattr(answer, field), np.array(exact, dtype=float), rtol=1e-14, err_msg=field)
    y = torch.nn.functional.batch_norm(
        torch.tensor(x)[:, None],
        None,
        None,
        torch.tensor([1.5]).double(),
        torch.tensor([-2.0]).double(),
        True,
        eps=0.01,
    )
    np.testing.assert_allclose(answer.y, y[:, 0].numpy(), rtol=1e-14)


@proves("2.5", "2.9", "2.10")
def test_2_5_2_9_and_2_10_are_the_derivatives_along_y() -> None:
    free = sp.symbols("xhat1:4", real=True)
    free_loss = sum(g * (GAMMA * x_hat + BETA) for g, x_hat in zip(G, free, strict=True))
    assert [sp.diff(free_loss, x_hat) for x_hat in free] == DX_HAT
    assert vanishes(sp.diff(loss(MEAN, VAR), GAMMA) - DGAMMA)
    assert vanishes(sp.diff(loss(MEAN, VAR), BETA) - DBETA)


@proves("2.6")
def test_2_6_is_the_derivative_by_the_variance_at_fixed_x_and_mean() -> None:
    derivative = sp.diff(loss(MEAN, V), V).subs(V, VAR)
    assert vanishes(derivative - DVAR)


@proves("2.7")
def test_2_7_is_the_derivative_by_the_mean_with_the_variance_following_it() -> None:
    var_of_mean = sum((x - U) ** 2 for x in X) / M
    derivative = sp.diff(loss(U, var_of_mean), U).subs(U, MEAN)
    second_way = DVAR * sum(-2 * (x - MEAN) for x in X) / M
    assert vanishes(derivative - (DMEAN + second_way))
    assert vanishes(second_way)


@proves("2.8")
def test_2_8_is_the_derivative_by_x_of_the_whole() -> None:
    whole = loss(MEAN, VAR)
    for x, d in zip(X, DX_HAT, strict=True):
        assert vanishes(sp.diff(whole, x) - (d * RSTD + DVAR * 2 * (x - MEAN) / M + DMEAN / M))


@proves("2.11")
def test_2_11_gives_dvar_and_dmean_from_the_parameters_gradients() -> None:
    assert vanishes(DVAR + GAMMA * RSTD**2 / 2 * DGAMMA)
    assert vanishes(DMEAN + GAMMA * RSTD * DBETA)


@proves("2.12")
def test_2_12_is_the_derivative_by_x_of_the_whole() -> None:
    whole = loss(MEAN, VAR)
    for x, dx in zip(X, DX, strict=True):
        assert vanishes(sp.diff(whole, x) - dx)


@proves("2.13")
def test_2_13_the_gradient_is_blind_to_a_shift_and_but_for_eps_to_a_scale() -> None:
    assert vanishes(sum(DX))
    assert vanishes(sum(dx * h for dx, h in zip(DX, X_HAT, strict=True)) - GAMMA * RSTD * EPS / (VAR + EPS) * DGAMMA)


@proves("2.14", "2.15")
def test_2_14_and_2_15_hold_with_statistics_that_do_not_depend_on_x() -> None:
    fixed = loss(U, V)
    for x, g in zip(X, G, strict=True):
        assert sp.simplify(sp.diff(fixed, x) - GAMMA * g / sp.sqrt(V + EPS)) == 0
    rng = np.random.default_rng(1)
    x, (mean, gamma, beta), var = rng.normal(size=(4, 3, 5)), rng.normal(size=(3, 3)), rng.uniform(0.5, 2.0, 3)
    y = torch.nn.functional.batch_norm(*map(torch.tensor, (x, mean, var, gamma, beta)), training=False)
    np.testing.assert_allclose(reference.batch_norm_inference(x, mean, var, gamma, beta), y.numpy(), rtol=0, atol=1e-14)


@proves("2.16")
def test_2_16_merges_counts_means_and_squared_deviations() -> None:
    a, b = sp.symbols("a b", positive=True)
    mean_a, mean_b, m_a, m_b = sp.symbols("mu_a mu_b M_a M_b", real=True)
    total, total_of_squares = a * mean_a + b * mean_b, (m_a + a * mean_a**2) + (m_b + b * mean_b**2)
    delta = mean_b - mean_a
    mean = mean_a + b / (a + b) * delta
    assert sp.simplify(mean - total / (a + b)) == 0
    assert sp.simplify(m_a + m_b + a * b / (a + b) * delta**2 - (total_of_squares - (a + b) * mean**2)) == 0


@proves("2.17", "2.18", "2.19", "2.20")
def test_2_17_to_2_20_are_the_batch_of_the_values_that_count() -> None:
    """Of four values the third does not count: the gradients are derivatives of the formula as it stands, with w_3 = 0."""
    x, w = (*X[:2], sp.Symbol("x4", real=True), X[2]), (1, 1, 0, 1)
    g = (*G[:2], sp.Symbol("g4", real=True), G[2])
    n = sum(w)
    mean = sum(of * v for of, v in zip(w, x, strict=True)) / n
    var = sum(of * (v - mean) ** 2 for of, v in zip(w, x, strict=True)) / n
    rstd = 1 / sp.sqrt(var + EPS)
    x_hat = [(v - mean) * rstd for v in x]
    whole = sum(of * h * (GAMMA * hat + BETA) for of, h, hat in zip(w, g, x_hat, strict=True))
    counted = [of * h for of, h in zip(w, g, strict=True)]
    dgamma, dbeta = sum(h * hat for h, hat in zip(counted, x_hat, strict=True)), sum(counted)
    assert vanishes(sp.diff(whole, GAMMA) - dgamma)
    assert vanishes(sp.diff(whole, BETA) - dbeta)
    for of, v, h, hat in zip(w, x, counted, x_hat, strict=True):
        assert vanishes(sp.diff(whole, v) - of * GAMMA * rstd / n * (n * h - dbeta - hat * dgamma))
    values, upstream = np.array([7.0, -4.0, np.nan, 0.5]), np.array([1.0, 2.0, np.inf, -3.0])
    mask = np.array(w, dtype=bool)
    masked = reference.batch_norm(values, 1.5, -2.0, eps=0.01, channel_axis=None, mask=mask)
    alone = reference.batch_norm(values[mask], 1.5, -2.0, eps=0.01, channel_axis=None)
    np.testing.assert_array_equal(masked.y[mask], alone.y)
    assert masked.y[2] == 0
    assert (masked.mean, masked.var) == (alone.mean, alone.var)
    gradients = reference.batch_norm_backward(upstream, values, masked.mean, masked.var, 1.5, channel_axis=None, mask=mask)
    of_alone = reference.batch_norm_backward(upstream[mask], values[mask], alone.mean, alone.var, 1.5, channel_axis=None)
    np.testing.assert_allclose(gradients.dx[mask], of_alone.dx, rtol=1e-15)
    assert gradients.dx[2] == 0
    assert (gradients.dgamma, gradients.dbeta) == (of_alone.dgamma, of_alone.dbeta)


P = sp.Symbol("p", real=True)
SIGMA, DENSITY = 1 / (1 + sp.exp(-P)), sp.exp(-(P**2) / 2) / sp.sqrt(2 * sp.pi)
DISTRIBUTION = (1 + sp.erf(P / sp.sqrt(2))) / 2
FORMULAS = {
    "silu": (P * SIGMA, SIGMA * (1 + P * SIGMA.subs(P, -P))),
    "hardswish": (P * sp.Min(sp.Max(P + 3, 0), 6) / 6, P / 3 + sp.Rational(1, 2)),
    "gelu": (P * DISTRIBUTION, DISTRIBUTION + P * DENSITY),
}


@proves("2.21", "2.22", "2.23", "2.24")
def test_2_21_to_2_24_are_the_activations_of_the_answer_sheet_and_of_pytorch_and_their_derivatives() -> None:
    at = np.array([-7.5, -3.0, -2.5, -0.5, 0.0, 1.25, 3.0, 6.5])
    for kind, (value, derivative) in FORMULAS.items():
        inside = value.subs(sp.Min(sp.Max(P + 3, 0), 6), P + 3)
        assert sp.simplify(sp.diff(inside, P) - derivative) == 0
        p = torch.tensor(at, requires_grad=True)
        y = getattr(torch.nn.functional, kind)(p)
        y.backward(torch.full_like(y, 2.0))
        exact = [float(value.subs(P, sp.Rational(v)).evalf(30)) for v in at]
        np.testing.assert_allclose(reference.activation(at, kind), exact, rtol=1e-15, atol=2e-18)
        np.testing.assert_allclose(reference.activation(at, kind), y.detach().numpy(), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(reference.activation_backward(2.0, at, kind), p.grad, rtol=1e-12, atol=1e-15)


@proves("2.25")
def test_2_25_is_the_series_of_the_normal_distribution() -> None:
    terms = [P ** (2 * k + 1) / sp.factorial2(2 * k + 1) for k in range(6)]
    left = sp.series((DISTRIBUTION - sp.Rational(1, 2)) / DENSITY, P, 0, 13).removeO()
    assert sp.simplify(left - sum(terms)) == 0
