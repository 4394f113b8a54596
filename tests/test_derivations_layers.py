"""Sections 1 to 3 of docs/derivations.md, proved: convolution, batch normalisation, softmax and cross entropy.

The loss in the tests of gradients is linear, Σ g_i y_i with symbols g_i: a chain rule sees of any other loss no more than
these derivatives.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
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


# 3 Softmax and cross entropy ---------------------------------------------------------------------------------------

N = 3
Z = sp.symbols("z1:4", real=True)
Y = sp.symbols("y1:4", real=True)
W = sp.symbols("w1:4", positive=True)
C, SMOOTHING = sp.symbols("c varepsilon", real=True)
DENOMINATOR = sum(sp.exp(z) for z in Z)
LSE = sp.log(DENOMINATOR)
S = [sp.exp(z) / DENOMINATOR for z in Z]


def delta(i: int, j: int) -> int:
    return int(i == j)


@proves("3.1")
def test_3_1_is_a_distribution_and_the_answer_sheet_evaluates_it() -> None:
    assert sp.simplify(sum(S) - 1) == 0
    values = {Z[0]: 2, Z[1]: sp.Rational(-7, 2), Z[2]: sp.Rational(1, 3)}
    exact = np.array([float(s.subs(values)) for s in S])
    np.testing.assert_allclose(reference.softmax([float(values[z]) for z in Z]), exact, rtol=1e-15)


@proves("3.2")
def test_3_2_a_common_shift_changes_nothing() -> None:
    for s in S:
        assert sp.simplify(s.subs({z: z - C for z in Z}, simultaneous=True) - s) == 0


@proves("3.3")
def test_3_3_the_shifted_logarithm_and_its_bounds() -> None:
    shifted = C + sp.log(sum(sp.exp(z - C) for z in Z))
    assert sp.simplify(sp.exp(shifted) - DENOMINATOR) == 0
    for z, s in zip(Z, S, strict=True):
        assert sp.simplify(sp.exp(z - LSE) - s) == 0
    rng = np.random.default_rng(2)
    z = np.concatenate([rng.normal(size=(200, 7)) * 10.0 ** rng.integers(-3, 3, (200, 1)), np.full((1, 7), 3.25)])
    lse, largest = reference.log_sum_exp(z)[:, 0], z.max(axis=1)
    assert np.all(largest <= lse)
    assert np.all(lse <= largest + np.log(7) + 1e-15 * np.abs(lse))


@proves("3.4")
def test_3_4_is_the_jacobian() -> None:
    for i, j in product(range(N), repeat=2):
        assert sp.simplify(sp.diff(S[i], Z[j]) - S[i] * (delta(i, j) - S[j])) == 0


@proves("3.5")
def test_3_5_is_the_jacobian_applied_to_a_gradient() -> None:
    composed = sum(g * s for g, s in zip(G, S, strict=True))
    for j in range(N):
        by_jacobian = sum(G[i] * S[i] * (delta(i, j) - S[j]) for i in range(N))
        assert sp.simplify(by_jacobian - S[j] * (G[j] - composed)) == 0
        assert sp.simplify(sp.diff(composed, Z[j]) - by_jacobian) == 0


@proves("3.6")
def test_3_6_with_its_convention_is_the_limit() -> None:
    p = sp.Symbol("p", positive=True)
    assert sp.limit(p * sp.log(p), p, 0, "+") == 0
    y, y_hat = [0.0, 0.25, 0.75], [0.0, 0.5, 0.5]
    assert reference.cross_entropy(y, y_hat) == pytest.approx(np.log(2.0), rel=1e-15)


CROSS_ENTROPY = -sum(y * (z - LSE) for y, z in zip(Y, Z, strict=True))


@proves("3.7")
def test_3_7_is_3_6_at_the_softmax() -> None:
    by_definition = -sum(y * sp.log(s) for y, s in zip(Y, S, strict=True))
    assert sp.simplify(sp.expand_log(by_definition, force=True) - CROSS_ENTROPY) == 0
    assert sp.simplify(CROSS_ENTROPY - (LSE * sum(Y) - sum(y * z for y, z in zip(Y, Z, strict=True)))) == 0


@proves("3.8", "3.9")
def test_3_8_and_3_9_are_the_gradient_for_any_sum_of_y_and_for_sum_one() -> None:
    for j in range(N):
        gradient = sp.diff(CROSS_ENTROPY, Z[j])
        assert sp.simplify(gradient - (S[j] * sum(Y) - Y[j])) == 0
        sum_one = {Y[2]: 1 - Y[0] - Y[1]}
        assert sp.simplify((gradient - (S[j] - Y[j])).subs(sum_one)) == 0


Q = [w * ((1 - SMOOTHING) * y + SMOOTHING / N) for w, y in zip(W, Y, strict=True)]
WEIGHTED_LOSS = sum(q * (LSE - z) for q, z in zip(Q, Z, strict=True))


@proves("3.10", "3.11")
def test_3_10_and_3_11_are_pytorchs_weighted_smoothed_loss() -> None:
    rng = np.random.default_rng(3)
    z, y, w = rng.normal(size=3), rng.uniform(size=3), rng.uniform(0.5, 2.0, 3)
    evaluate = sp.lambdify((Z, Y, W, SMOOTHING), WEIGHTED_LOSS)
    for target, smoothing in [(y, 0.0), (y, 0.3), (np.eye(3)[1], 0.3), (np.eye(3)[1], 1.0)]:
        in_torch = torch.nn.functional.cross_entropy(
            *map(torch.tensor, (z, target, w)), reduction="none", label_smoothing=smoothing
        )
        assert evaluate(z, target, w, smoothing) == pytest.approx(in_torch.item(), rel=1e-14)


@proves("3.12")
def test_3_12_is_the_gradient_of_3_11() -> None:
    for j in range(N):
        assert sp.simplify(sp.diff(WEIGHTED_LOSS, Z[j]) - (S[j] * sum(Q) - Q[j])) == 0


@proves("3.13")
@pytest.mark.parametrize("t", range(N))
def test_3_13_needs_no_q_for_a_class_target(t: int) -> None:
    unit = {y: delta(j, t) for j, y in enumerate(Y)}
    sum_q = (1 - SMOOTHING) * W[t] + SMOOTHING / N * sum(W)
    short = LSE * sum_q - (1 - SMOOTHING) * W[t] * Z[t] - SMOOTHING / N * sum(w * z for w, z in zip(W, Z, strict=True))
    assert sp.expand(sum(Q).subs(unit) - sum_q) == 0
    assert sp.expand(WEIGHTED_LOSS.subs(unit) - short) == 0


@proves("3.14")
@pytest.mark.parametrize("kind", ["classes", "distributions"])
def test_3_14_is_the_divisor_and_the_gradient_of_pytorchs_mean(kind: str) -> None:
    rng = np.random.default_rng(4)
    z, w, smoothing, upstream = rng.normal(size=(5, 3)), rng.uniform(0.5, 2.0, 3), 0.2, 65536.0
    if kind == "classes":
        target = np.array([0, -100, 2, 1, -100])
        kept = target >= 0
        y = np.eye(3)[np.where(kept, target, 0)]
        d = w[target[kept]].sum()
    else:
        target = y = rng.uniform(size=(5, 3))
        kept, d = np.ones(5, bool), 5
    q = kept[:, None] * w * ((1 - smoothing) * y + smoothing / 3)
    logits = torch.tensor(z, requires_grad=True)
    mean = torch.nn.functional.cross_entropy(logits, torch.tensor(target), torch.tensor(w), label_smoothing=smoothing)
    mean.backward(torch.tensor(upstream).double())
    by_formula = upstream / d * (reference.softmax(z) * q.sum(axis=1, keepdims=True) - q)
    np.testing.assert_allclose(logits.grad.numpy(), by_formula, rtol=1e-12, atol=1e-12)
    rows = np.sum(q * (reference.log_sum_exp(z) - z), axis=1)
    assert mean.item() == pytest.approx(rows.sum() / d, rel=1e-14)


@proves("3.15")
def test_3_15_merges_two_parts_of_a_row() -> None:
    c_a, c_b = sp.symbols("c_a c_b", real=True)
    parts = [Z[:1], Z[1:]]
    s_a, s_b = (sum(sp.exp(z - c) for z in part) for part, c in zip(parts, (c_a, c_b), strict=True))
    s = s_a * sp.exp(c_a - C) + s_b * sp.exp(c_b - C)
    assert sp.simplify(sp.exp(C) * s - DENOMINATOR) == 0
    assert sp.simplify(sp.exp(C + sp.log(s)) - DENOMINATOR) == 0


@proves("3.16")
def test_3_16_the_gradient_at_the_target_is_minus_the_other_probabilities() -> None:
    for t in range(N):
        assert sp.simplify(S[t] - 1 + sum(S[c] for c in range(N) if c != t)) == 0
    p = torch.tensor(1.0 - 2.0**-12, dtype=torch.float32)
    assert p.bfloat16() - 1 == 0
    assert (p - 1).bfloat16() == -(2.0**-12)


Z_LOSS = sp.Symbol("zeta", nonnegative=True)
CAP = sp.Symbol("tau", positive=True)


@proves("3.17")
def test_3_17_is_the_gradient_of_the_loss_with_its_z_loss() -> None:
    for j in range(N):
        gradient = sp.diff(WEIGHTED_LOSS + Z_LOSS * LSE**2, Z[j])
        assert sp.simplify(gradient - (S[j] * (sum(Q) + 2 * Z_LOSS * LSE) - Q[j])) == 0
    rng = np.random.default_rng(6)
    z, t, w = rng.normal(size=(4, 3)), np.array([0, -100, 2, 1]), rng.uniform(0.5, 2.0, 3)
    with_z_loss, without = (
        reference.cross_entropy_with_options(z, t, w, label_smoothing=0.2, reduction="none", z_loss=zeta) for zeta in (0.3, 0.0)
    )
    lse = reference.log_sum_exp(z)[:, 0]
    np.testing.assert_allclose(with_z_loss.loss - without.loss, np.where(t < 0, 0.0, 0.3 * lse**2), rtol=0, atol=1e-14)
    pull = np.where(t < 0, 0.0, 0.6 * lse)[:, None] * reference.softmax(z)
    np.testing.assert_allclose(with_z_loss.dlogits - without.dlogits, pull, rtol=0, atol=1e-14)


@proves("3.18")
def test_3_18_is_the_chain_rule_through_the_softcap() -> None:
    z, u = Z[0], CAP * sp.tanh(Z[0] / CAP)
    assert sp.simplify(sp.diff(u, z) - (1 - u**2 / CAP**2)) == 0
    assert sp.limit(u, z, -sp.oo) == -CAP
    rng = np.random.default_rng(7)
    logits, t = rng.normal(size=(4, 5)) * 3, np.array([0, 4, 2, 1])
    x = torch.tensor(logits, requires_grad=True)
    torch.nn.functional.cross_entropy(2.5 * torch.tanh(x / 2.5), torch.tensor(t)).backward()
    sheet = reference.cross_entropy_with_options(logits, t, softcap=2.5)
    np.testing.assert_allclose(sheet.dlogits, x.grad.numpy(), rtol=0, atol=1e-15)


@proves("3.19")
def test_3_19_are_the_log_probability_and_the_entropy() -> None:
    s = sum(sp.exp(z - C) for z in Z)
    r = sum(sp.exp(z - C) * (z - C) for z in Z)
    entropy = -sum(p * (z - LSE) for p, z in zip(S, Z, strict=True))
    log_s = LSE - C  # (3.3)
    assert sp.simplify(log_s - r / s - entropy) == 0
    for t in range(N):
        assert sp.simplify(sp.exp(Z[t] - C) / s - S[t]) == 0
    z = np.random.default_rng(8).normal(size=(6, 4))
    z[0, :2] = z[0].max() + 1  # two classes share the first place
    t = np.array([1, 2, 3, 0, -100, int(z[5].argmax())])
    found = reference.cross_entropy_statistics(z, t)
    p = torch.distributions.Categorical(logits=torch.tensor(z))
    kept = t >= 0
    np.testing.assert_allclose(found.entropy[kept], p.entropy().numpy()[kept], rtol=0, atol=1e-15)
    np.testing.assert_allclose(found.log_prob[kept], p.log_prob(torch.tensor(np.maximum(t, 0))).numpy()[kept], atol=1e-14)
    assert found.correct.tolist() == [True, *(z[i].argmax() == t[i] for i in range(1, 4)), False, True]


@proves("3.20")
def test_3_20_merges_the_sum_of_the_entropy() -> None:
    c_a, c_b = sp.symbols("c_a c_b", real=True)
    merged = 0
    for part, c in ((Z[:1], c_a), (Z[1:], c_b)):
        s, r = sum(sp.exp(z - c) for z in part), sum(sp.exp(z - c) * (z - c) for z in part)
        merged += sp.exp(c - C) * (r + s * (c - C))
    assert sp.simplify(merged - sum(sp.exp(z - C) * (z - C) for z in Z)) == 0


@proves("3.24", "3.25")
def test_3_24_and_3_25_are_the_three_numbers_of_a_row_and_their_gradients() -> None:
    """The gradients symbolically; the answer sheet beside PyTorch's distribution, at a temperature."""
    T, g_l, g_h, g_u = sp.symbols("T g_l g_h g_u", positive=True)
    d = [(z - C) / T for z in Z]
    s, r = sum(map(sp.exp, d)), sum(sp.exp(v) * v for v in d)
    p, t = [sp.exp(v) / s for v in d], 1
    log_prob, entropy, lse = d[t] - sp.log(s), sp.log(s) - r / s, C / T + sp.log(s)
    assert sp.simplify(entropy + sum(q * (v - sp.log(s)) for q, v in zip(p, d, strict=True))) == 0
    total = g_l * log_prob + g_h * entropy + g_u * lse  # none of the three depends on c
    assert sp.simplify(sp.diff(total, C)) == 0
    for j in range(N):
        gradient = (p[j] * (g_u - g_l - g_h * (d[j] - r / s)) + g_l * int(j == t)) / T
        assert sp.simplify(sp.diff(total, Z[j]) - gradient) == 0

    rng = np.random.default_rng(11)
    z, t, upstream = rng.normal(size=(6, 4)) * 3, np.array([1, 2, 3, 0, -100, 2]), tuple(rng.normal(size=(3, 6)))
    sheet = reference.token_log_probs(z, t, 0.7, upstream=upstream)
    x, kept = torch.tensor(z, requires_grad=True), torch.tensor(t >= 0)
    of = torch.distributions.Categorical(logits=x / 0.7)
    numbers = of.log_prob(torch.tensor(np.maximum(t, 0))), of.entropy(), torch.logsumexp(x / 0.7, -1)
    numbers = [torch.where(kept, v, 0.0) for v in numbers]
    sum((v * torch.tensor(g)).sum() for v, g in zip(numbers, upstream, strict=True)).backward()
    for ours, theirs in zip(sheet, (*(v.detach() for v in numbers), x.grad), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-14)


@proves("3.26", "3.27", "3.28", "3.29")
def test_3_26_to_3_29_are_the_divergences_and_their_gradients() -> None:
    """Each equation symbolically, at a point with digits enough; the answer sheet beside PyTorch."""
    T, b = sp.Rational(7, 10), sp.Rational(3, 10)
    z, x = sp.symbols("z:3", real=True), sp.symbols("x:3", real=True)
    p, q = ([sp.exp(v / T) / sum(sp.exp(w / T) for w in of) for v in of] for of in (z, x))
    point = dict(zip((*z, *x), map(sp.Rational, ("1/3", "-2", "1", "-1", "1/7", "2")), strict=True))

    def holds(left, right) -> None:
        assert abs((left - right).subs(point).evalf(30, chop=True)) < 1e-25

    def phi(v):
        return sp.exp(v) - 1 - v

    def kl(p, q):
        return sum(a * (sp.log(a) - sp.log(c)) for a, c in zip(p, q, strict=True))

    u = [sp.log(c) - sp.log(a) for a, c in zip(p, q, strict=True)]
    holds(kl(p, q), sum(a * phi(v) for a, v in zip(p, u, strict=True)))
    M = [b * a + (1 - b) * c for a, c in zip(p, q, strict=True)]
    v, w = [sp.log(1 + (1 - b) * (sp.exp(r) - 1)) for r in u], [sp.log(1 + b * (sp.exp(-r) - 1)) for r in u]
    J = b * kl(p, M) + (1 - b) * kl(q, M)
    holds(J, sum(b * a * phi(r) + (1 - b) * c * phi(s) for a, c, r, s in zip(p, q, v, w, strict=True)))
    for j in range(3):
        holds(sp.diff(kl(p, q), x[j]), (q[j] - p[j]) / T)
        holds(sp.diff(kl(p, q), z[j]), -p[j] * (u[j] + kl(p, q)) / T)
        holds(sp.diff(J, x[j]), -(1 - b) * q[j] * (w[j] + kl(q, M)) / T)
        holds(sp.diff(J, z[j]), -b * p[j] * (v[j] + kl(p, M)) / T)

    rng = np.random.default_rng(12)
    student, teacher = (torch.tensor(rng.normal(size=(5, 4)), requires_grad=True) for _ in range(2))
    log_q, log_p = (torch.log_softmax(of / 0.7, -1) for of in (student, teacher))
    log_m = torch.logaddexp(log_p + np.log(0.3), log_q + np.log(0.7))
    losses = {
        "forward": torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
        "reverse": torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean"),
        "jensen_shannon": 0.3 * torch.nn.functional.kl_div(log_m, log_p, log_target=True, reduction="batchmean")
        + 0.7 * torch.nn.functional.kl_div(log_m, log_q, log_target=True, reduction="batchmean"),
    }
    for kind, loss in losses.items():
        sheet = reference.distillation_loss(student.detach(), teacher.detach(), 0.7, kind, 0.3)
        gradients = torch.autograd.grad(loss, (student, teacher), retain_graph=True)
        for ours, theirs in zip(sheet, (loss, *gradients), strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-14)


@proves("3.30", "3.31")
def test_3_30_and_3_31_hold_for_any_shift() -> None:
    """Exact logits 2^-30 apart: sums about a rounded K give the divergence of 60 digits, and so do parts about others."""
    mp = sp.Float
    rng = np.random.default_rng(13)
    t = [mp(float(v), 60) for v in rng.normal(size=6)]
    s = [v + mp(float(e), 60) * mp(2, 60) ** -30 for v, e in zip(t, rng.integers(-8, 8, 6), strict=True)]
    w, Zs = [sp.exp(v) for v in t], sum(map(sp.exp, s))
    Zt = sum(w)
    K = sp.log(Zs) - sp.log(Zt)
    kl = sum(a / Zt * (v - x + K) for a, v, x in zip(w, t, s, strict=True))

    def sums(part, c):
        y = [s[j] - t[j] - c for j in part]
        return (
            sum(w[j] for j in part),
            sum(w[j] * (sp.exp(v) - 1 - v) for j, v in zip(part, y, strict=True)),
            sum(w[j] * v for j, v in zip(part, y, strict=True)),
        )

    c = K + mp(1e-8, 60)
    Z, A, B = sums(range(6), c)
    kappa = sp.log(1 + (A + B) / Z)
    assert abs(kappa - (K - c)) < 1e-50
    assert abs(A / Z - (sp.exp(kappa) - 1 - kappa) - kl) < 1e-40
    merged = [mp(0, 60)] * 3
    for part, own in ((range(2), mp(0.25, 60)), (range(2, 6), mp(-1e-9, 60))):
        Z_, A_, B_ = sums(part, own)
        x = own - c
        more = Z_, sp.exp(x) * A_ + (sp.exp(x) - 1 - x) * Z_ + (sp.exp(x) - 1) * B_, B_ + x * Z_
        merged = [a + m for a, m in zip(merged, more, strict=True)]
    for ours, whole in zip(merged, (Z, A, B), strict=True):
        assert abs(ours - whole) < 1e-40


@proves("3.21")
def test_3_21_sums_the_gradients_of_chunks() -> None:
    rng = np.random.default_rng(9)
    x, w, b, t = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)), rng.normal(size=5), np.array([0, 4, -100, 2, 1, 1, 3])
    leaves = [torch.tensor(v, requires_grad=True) for v in (x, w, b)]
    torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves), torch.tensor(t)).backward()
    dx, dw, db = np.zeros_like(x), np.zeros_like(w), np.zeros_like(b)
    for chunk in (slice(0, 3), slice(3, 7)):
        z = x[chunk] @ w.T + b
        g = reference.cross_entropy_with_options(z, t[chunk], reduction="sum").dlogits / np.count_nonzero(t >= 0)
        dx[chunk] = g @ w
        dw += g.T @ x[chunk]
        db += g.sum(axis=0)
    for ours, leaf in zip((dx, dw, db), leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad.numpy(), rtol=0, atol=1e-15)
