"""Section 3 of docs/derivations.md, proved: softmax, cross entropy and what follows from the sums of a row."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import sympy as sp
import torch
from proofs import proves

from hw3gpu import reference

N = 3
G = sp.symbols("g1:4", real=True)
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


@proves("3.37")
def test_3_37_is_the_row_of_which_each_part_knows_its_own_sums() -> None:
    """Symbolically, of parts of one and of two classes; none of it depends on what the parts subtract."""
    c_a, c_b = sp.symbols("c_a c_b", real=True)
    s = mu = sp.Integer(0)
    for part, c_r in ((Z[:1], c_a), (Z[1:], c_b)):
        s_r, r_r = sum(sp.exp(z - c_r) for z in part), sum(sp.exp(z - c_r) * (z - c_r) for z in part)
        s += s_r * sp.exp(c_r - C)
        mu += sp.exp(c_r - C) * (r_r + (c_r - C) * s_r)
    p = [sp.exp(z) / sum(map(sp.exp, Z)) for z in Z]
    entropy, lse = sp.log(s) - mu / s, C + sp.log(s)
    at = dict(zip((*Z, c_a, c_b, C), (sp.Rational(v, 7) for v in (3, -5, 9, 3, 9, 9)), strict=True))
    for found, expected in (
        (lse, sp.log(sum(map(sp.exp, Z)))), (entropy, -sum(v * sp.log(v) for v in p)), (Z[0] - C - sp.log(s), sp.log(p[0])),
    ):  # fmt: skip
        assert abs((found - expected).subs(at).evalf(60)) < 1e-55
        for of in (c_a, c_b, C):
            assert abs(found.diff(of).subs(at).evalf(60)) < 1e-55


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


@proves("3.35", "3.36")
def test_3_35_and_3_36_are_the_weighted_mean_and_its_derivatives() -> None:
    v, L, c = (sp.symbols(f"{name}1:4", positive=True) for name in "vLc")
    divisor = sp.Symbol("d", positive=True)
    total = sum(a * b for a, b in zip(v, L, strict=True))
    counted = sum(a * b for a, b in zip(v, c, strict=True))
    for n in range(3):
        mean = total / counted
        assert sp.simplify(sp.diff(mean, L[n]) - v[n] / counted) == 0
        assert sp.simplify(sp.diff(mean, v[n]) - (L[n] - mean * c[n]) / counted) == 0
        assert sp.simplify(sp.diff(total / divisor, v[n]) - L[n] / divisor) == 0
    assert sp.simplify(sp.diff(total / divisor, divisor) + total / divisor / divisor) == 0

    rng = np.random.default_rng(5)
    z, w, t, weights = rng.normal(size=(6, 4)), rng.uniform(0.5, 2.0, 4), np.array([0, 3, -100, 1, 2, 2]), rng.normal(size=6)
    leaf, kept = torch.tensor(z, requires_grad=True), np.asarray(t >= 0)
    rows = torch.nn.functional.cross_entropy(leaf, torch.tensor(t), torch.tensor(w), reduction="none")
    counted = weights * np.where(kept, w[np.where(kept, t, 0)], 0.0)
    for given, d in (({}, counted.sum()), ({"normalizer": 7.0}, 7.0), ({"reduction": "sum"}, 1.0)):
        loss = (rows * torch.tensor(weights)).sum() / d
        sheet = reference.cross_entropy_with_options(z, t, w, token_weight=weights, upstream=0.5, **given)
        (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(0.5, dtype=torch.float64), retain_graph=True)
        np.testing.assert_allclose(sheet.loss, loss.item(), rtol=1e-13)
        np.testing.assert_allclose(sheet.dlogits, gradient.numpy(), rtol=0, atol=1e-14)


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


@proves("3.32", "3.33", "3.34")
def test_3_32_to_3_34_of_classes_in_parts() -> None:
    """In 60 digits, of parts of 1, 2 and no classes; and the answer sheet against that of all classes in one."""
    x = sp.symbols("x1:3")
    W = [[sp.Rational(i + 3 * k, 7 - k) for i in range(2)] for k in range(3)]
    w, epsilon, zeta, t = [sp.Rational(1, 2), 3, 2], sp.Rational(1, 5), sp.Rational(1, 9), 2
    at = {x[0]: sp.Rational(-3, 4), x[1]: sp.Rational(5, 3)}
    z = [sum(a * b for a, b in zip(x, row, strict=True)) for row in W]
    lse = sp.log(sum(sp.exp(v) for v in z))
    q = [w_k * ((1 - epsilon) * delta(k, t) + epsilon / 3) for k, w_k in enumerate(w)]
    loss = sum(q_k * (lse - z_k) for q_k, z_k in zip(q, z, strict=True)) + zeta * lse**2

    parts, numbers = [(0,), (1, 2)], [v.subs(at) for v in z]
    c_r = [max(numbers[k] for k in part) for part in parts]
    c = max(c_r)
    s = sum(sum(sp.exp(numbers[k] - of) for k in part) * sp.exp(of - c) for part, of in zip(parts, c_r, strict=True))
    Q, found = sum(q), c + sp.log(s)
    assert abs((found - lse.subs(at)).evalf(60)) < 1e-55
    inner = sum(
        sum(w[k] * (numbers[k] - of) for k in part) + (of - c) * sum(w[k] for k in part)
        for part, of in zip(parts, c_r, strict=True)
    )
    merged = Q * sp.log(s) - (1 - epsilon) * w[t] * (numbers[t] - c) - epsilon / 3 * inner + zeta * found**2
    assert abs((merged - loss.subs(at)).evalf(60)) < 1e-55
    g = [(sp.exp(numbers[k] - found) * (Q + 2 * zeta * found) - q[k]) for k in range(3)]
    for i in range(2):
        of_parts = sum(sum(g[k] * W[k][i] for k in part) for part in parts)
        assert abs((of_parts - loss.diff(x[i]).subs(at)).evalf(60)) < 1e-55

    cuts, target, options = (0, 1, 1, 3), np.array([2, -100, 0]), {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0}
    rows, head, bias, class_weights = (np.random.default_rng(3).normal(size=n) for n in ((3, 2), (3, 2), 3, 3))
    divided = [np.split(v, cuts[1:-1]) for v in (head, bias, class_weights**2)]
    ours = reference.vocab_parallel_linear_cross_entropy(
        rows, divided[0], target, divided[1], class_weights=divided[2], **options
    )
    whole = reference.cross_entropy_with_options(rows @ head.T + bias, target, class_weights**2, reduction="none", **options)
    np.testing.assert_allclose(ours.loss, whole.loss, rtol=0, atol=1e-15)
    for found_, expected in ((ours.dx, whole.dlogits @ head), (np.concatenate(ours.dweights), whole.dlogits.T @ rows)):
        np.testing.assert_allclose(found_, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.concatenate(ours.dbiases), whole.dlogits.sum(0), rtol=0, atol=1e-15)
