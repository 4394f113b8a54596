"""Every numbered equation of docs/derivations.md, checked: exactly with SymPy where it can be, else in float64.

A test names the equations it checks by `proves`; an equation that no test names is a failure. The loss in the tests of
gradients is linear, Σ g_i y_i with symbols g_i: a chain rule sees of any other loss no more than these derivatives.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import sympy as sp
import torch

from hw3gpu import minimize_trace, reference

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8")
TAGS = re.findall(r"\\tag\{([\d.]+)\}", DOCUMENT)

PROVED: dict[str, Callable[..., None]] = {}


def proves(*tags: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(test: Callable[..., None]) -> Callable[..., None]:
        for tag in tags:
            assert tag not in PROVED, f"({tag}) has two tests"
            PROVED[tag] = test
        return test

    return register


# The document ------------------------------------------------------------------------------------------------------


def test_every_equation_has_a_test_and_every_test_an_equation() -> None:
    assert sorted(PROVED) == sorted(TAGS)
    for tag, test in PROVED.items():
        assert test.__name__.startswith("test_"), f"the test of ({tag}) is not collected"
        assert globals().get(test.__name__) is test, f"the test of ({tag}) is shadowed by another of its name"


def test_equations_are_numbered_in_order_within_their_sections() -> None:
    by_section: dict[int, list[int]] = {}
    for tag in TAGS:
        section, number = map(int, tag.split("."))
        by_section.setdefault(section, []).append(number)
    assert list(by_section) == [1, 2, 3, 4, 5]
    for section, numbers in by_section.items():
        assert numbers == list(range(1, len(numbers) + 1)), f"section {section}"
        heading = DOCUMENT.index(f'<a id="s{section}"></a>\n## {section} ')
        assert heading < DOCUMENT.index(rf"\tag{{{section}.1}}")


def test_every_displayed_formula_is_numbered_or_it_could_escape_its_test() -> None:
    displays = re.findall(r"```math\n(.*?)\n```", DOCUMENT, flags=re.S)
    assert len(displays) == len(TAGS)
    assert all(display.count(r"\tag{") == 1 for display in displays)


def test_contents_headings_and_anchors_agree() -> None:
    headings = re.findall(r'^<a id="s([\d.]+)"></a>\n##+ ([\d.]+) ', DOCUMENT, flags=re.M)
    assert [anchor for anchor, _ in headings] == [number for _, number in headings]
    assert len(headings) == len(re.findall(r"^##+ ", DOCUMENT, flags=re.M))
    assert re.findall(r"\(#s([\d.]+)\)", DOCUMENT) == [anchor for anchor, _ in headings]


def test_citations_in_the_code_name_sections_and_equations_that_exist() -> None:
    sections = set(re.findall(r'<a id="s([\d.]+)"', DOCUMENT))
    sources = [*ROOT.glob("hw3gpu/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("kernels/*.md"), ROOT / "README.md"]
    cited = 0
    for path in (path for path in sources if path.exists()):
        text = re.sub(r"\s+#?\s*", " ", path.read_text(encoding="utf-8"))
        for citation in re.findall(r"derivations\.md`*,? \(?sections? ((?:[\d.]*\d(?:, | and | to )?)+)", text):
            for section in re.findall(r"\d[\d.]*\d|\d", citation):
                assert section in sections, f"{path.name} cites section {section}"
                cited += 1
    equations = set(re.findall(r"\((\d\.\d+)\)", (ROOT / "hw3gpu" / "reference.py").read_text(encoding="utf-8")))
    assert equations <= set(TAGS), equations - set(TAGS)
    assert cited >= 5
    assert len(equations) > 15


def test_inline_formulas_survive_github() -> None:
    """Plain $…$ passes through Markdown first, which eats backslashes and reads _ and * as emphasis."""
    text = re.sub(r"```math\n.*?\n```", "", DOCUMENT, flags=re.S)
    assert "$$" not in text
    for left, guarded, plain, right in re.findall(r"(.?)\$(?:`([^`]*)`|([^$`]+))\$(.?)", text, flags=re.S):
        formula = guarded or plain
        assert "\n" not in formula, formula
        assert left in " \n(", f"{left!r} before {formula}"
        assert right in " \n.,;:)", f"{right!r} after {formula}"
        assert not re.search(r"\\[^a-zA-Z]|[*<>\[\]`]|[^a-zA-Z]_|_[^a-zA-Z0-9]", plain), f"needs $`…`$: {plain}"
    for macro in (r"\operatorname", r"\color", r"\mbox", r"\phantom", r"\newcommand", r"\def"):
        assert not re.search(re.escape(macro) + r"\b", DOCUMENT), f"GitHub refuses {macro}"


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


# 4 Points with given mean and covariance ---------------------------------------------------------------------------


def helmert(n: int, r: int) -> sp.Matrix:
    columns = [[1] * j + [-j] + [0] * (n - j - 1) for j in range(1, r + 1)]
    return sp.Matrix(n, r, lambda i, j: sp.Integer(columns[j][i]) / sp.sqrt((j + 1) * (j + 2)))


def exact_moments(points: sp.Matrix) -> tuple[sp.Matrix, sp.Matrix]:
    """(4.1) as it stands: sums of single points."""
    n, m = points.shape
    mean = sp.Matrix(m, 1, lambda j, _: sum(points[i, j] for i in range(n)) / sp.Integer(n))
    deviations = [points[i, :].T - mean for i in range(n)]
    return mean.expand(), sum((d * d.T for d in deviations), sp.zeros(m, m)).expand() / n


@proves("4.1", "4.2")
def test_4_1_and_4_2_say_the_same() -> None:
    points = sp.Matrix(3, 2, sp.symbols("p1:7", real=True))
    mean, covariance = exact_moments(points)
    ones = sp.ones(3, 1)
    centred = points - ones * mean.T
    assert (centred.T * ones).expand() == sp.zeros(2, 1)
    assert (centred.T * centred - 3 * covariance).expand() == sp.zeros(2, 2)


@proves("4.3")
def test_4_3_one_point_more_than_the_rank_is_needed_and_enough() -> None:
    for n in range(1, 6):
        centring = sp.eye(n) - sp.ones(n, n) / n
        assert centring.rank() == n - 1  # so rank Y <= n - 1 for every Y = centring · X
    for r in range(4):
        a = sp.Matrix(4, r, lambda i, j: sp.Integer((i + 1) ** (j + 1)))
        covariance = a * a.T
        assert covariance.rank() == r
        points = sp.sqrt(r + 1) * helmert(r + 1, r) * a.T
        assert exact_moments(points) == (sp.zeros(4, 1), covariance)
        with pytest.raises(ValueError, match=rf"= {r + 1}, got {r}"):
            reference.points_with_moments(np.zeros(4), np.array(covariance, dtype=float), n=r)


@proves("4.4")
@pytest.mark.parametrize(("n", "r"), [(1, 0), (2, 1), (4, 2), (4, 3), (7, 6)])
def test_4_4_helmerts_columns_are_orthonormal_and_orthogonal_to_ones(n: int, r: int) -> None:
    h = helmert(n, r)
    assert h.T * h == sp.eye(r)
    assert h.T * sp.ones(n, 1) == sp.zeros(r, 1)
    np.testing.assert_allclose(reference.helmert(n, r), np.array(h, dtype=float).reshape(n, r), rtol=1e-15, atol=0)


@proves("4.5")
@pytest.mark.parametrize(("n", "r"), [(3, 2), (5, 2), (4, 1)])
def test_4_5_has_the_moments_for_symbols_mu_and_a(n: int, r: int) -> None:
    a = sp.Matrix(3, r, sp.symbols(f"a1:{3 * r + 1}", real=True))
    mu = sp.Matrix(sp.symbols("mu1:4", real=True))
    points = sp.ones(n, 1) * mu.T + sp.sqrt(n) * helmert(n, r) * a.T
    mean, covariance = exact_moments(points)
    assert (mean - mu).expand() == sp.zeros(3, 1)
    assert (covariance - a * a.T).expand() == sp.zeros(3, 3)


@proves("4.6")
def test_4_6_pairs_along_the_columns_have_the_moments() -> None:
    a = sp.Matrix(3, 2, sp.symbols("a1:7", real=True))
    mu = sp.Matrix(sp.symbols("mu1:4", real=True))
    points = sp.Matrix.vstack(*[(mu + sign * sp.sqrt(2) * a[:, j]).T for j in range(2) for sign in (1, -1)])
    mean, covariance = exact_moments(points)
    assert (mean - mu).expand() == sp.zeros(3, 1)
    assert (covariance - a * a.T).expand() == sp.zeros(3, 3)


@proves("4.7")
def test_4_7_every_solution_has_the_form_and_every_rotation_of_h_is_one() -> None:
    rng = np.random.default_rng(5)
    n, m, r = 9, 5, 3
    points = rng.normal(size=(n, r)) @ rng.normal(size=(r, m)) + rng.normal(size=m)
    mean, covariance = reference.moments(points)
    eigenvalues, q = np.linalg.eigh(covariance)
    a = q[:, -r:] * np.sqrt(eigenvalues[-r:])
    h = (points - mean) @ a @ np.linalg.inv(a.T @ a) / np.sqrt(n)
    np.testing.assert_allclose(h.T @ h, np.eye(r), atol=1e-13)
    np.testing.assert_allclose(h.sum(axis=0), 0.0, atol=1e-13)
    np.testing.assert_allclose(mean + np.sqrt(n) * h @ a.T, points, atol=1e-13)
    rotation = np.linalg.qr(rng.normal(size=(r, r)))[0]
    others = mean + np.sqrt(n) * h @ rotation @ a.T
    assert np.abs(others - points).max() > 0.1
    np.testing.assert_allclose(reference.moments(others).covariance, covariance, atol=1e-13)


@proves("4.8", "4.9")
def test_4_8_and_4_9_merge_scatters_of_parts_about_any_rounded_mean() -> None:
    a, b, shift = 2, 3, sp.Matrix(sp.symbols("c1:3", real=True))
    points = sp.Matrix(a + b, 2, sp.symbols("p1:11", real=True))

    def mean_and_scatter(rows: sp.Matrix) -> tuple[sp.Matrix, sp.Matrix]:
        mean, covariance = exact_moments(rows)
        return mean, covariance * rows.shape[0]

    (mean_a, scatter_a), (mean_b, scatter_b) = mean_and_scatter(points[:a, :]), mean_and_scatter(points[a:, :])
    delta = mean_b - mean_a
    mean, scatter = mean_and_scatter(points)
    assert (mean_a + sp.Rational(b, a + b) * delta - mean).expand() == sp.zeros(2, 1)
    merged = scatter_a + scatter_b + sp.Rational(a * b, a + b) * delta * delta.T
    assert (merged - scatter).expand() == sp.zeros(2, 2)
    deviations = [points[i, :].T - shift for i in range(a + b)]
    rest = sum(deviations, sp.zeros(2, 1)) / (a + b)
    assert (shift + rest - mean).expand() == sp.zeros(2, 1)
    centred = sum(((d - rest) * (d - rest).T for d in deviations), sp.zeros(2, 2))
    assert (centred - scatter).expand() == sp.zeros(2, 2)


# 5 The trace problem -----------------------------------------------------------------------------------------------


def rational_orthogonal(m: int, rng: random.Random) -> sp.Matrix:
    """Cayley's transform of a rational skew matrix: orthogonal, with rational entries."""
    skew = sp.zeros(m, m)
    for i, j in product(range(m), repeat=2):
        if i < j:
            skew[i, j] = sp.Rational(rng.choice([-5, -3, -2, 1, 4]), rng.randint(1, 4))
            skew[j, i] = -skew[i, j]
    return (sp.eye(m) - skew) * (sp.eye(m) + skew).inv()


SPECTRA = {
    "distinct": [-2, 0, sp.Rational(1, 2), 3],
    "cluster below the cut": [1, 1, 4, 5],
    "cluster across the cut": [0, 2, 2, 7],
    "multiple of the identity": [3, 3, 3, 3],
}
spectra = pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA.keys())


def symmetric(eigenvalues: list[sp.Expr], rng: random.Random) -> tuple[sp.Matrix, sp.Matrix]:
    q = rational_orthogonal(len(eigenvalues), rng)
    return q * sp.diag(*eigenvalues) * q.T, q


@proves("5.1")
def test_5_1_the_trace_is_the_mean_squared_projected_deviation() -> None:
    points = sp.Matrix(4, 3, sp.symbols("p1:13", real=True))
    phi = sp.Matrix(3, 2, sp.symbols("f1:7", real=True))
    mean, covariance = exact_moments(points)
    projected = [phi.T * (points[i, :].T - mean) for i in range(4)]
    mean_square = sum((v.T * v)[0] for v in projected) / 4
    assert sp.expand((phi.T * covariance * phi).trace() - mean_square) == 0


@proves("5.2", "5.3", "5.4", "5.5")
@spectra
@pytest.mark.parametrize("k", [1, 2, 4])
def test_5_2_to_5_5_hold_exactly_for_rational_matrices(eigenvalues: list[sp.Expr], k: int) -> None:
    rng = random.Random(6)
    sigma, q = symmetric(eigenvalues, rng)
    minimum = sum(eigenvalues[:k])
    assert sum((value * q[:, i] * q[:, i].T for i, value in enumerate(eigenvalues)), sp.zeros(4, 4)) == sigma
    best = q[:, :k]
    assert (best.T * best, (best.T * sigma * best).trace()) == (sp.eye(k), minimum)
    for _ in range(6):
        phi = rational_orthogonal(4, rng)[:, :k]
        value = (phi.T * sigma * phi).trace()
        p = [(q[:, i].T * phi * phi.T * q[:, i])[0] for i in range(4)]
        assert value == sum(v * w for v, w in zip(eigenvalues, p, strict=True))
        assert all(0 <= w <= 1 for w in p)
        assert sum(p) == k
        assert value >= minimum
        for t in (*eigenvalues, -5, sp.Rational(9, 4), 20):
            assert value >= k * t - sum(max(t - v, 0) for v in eigenvalues)
    answer = reference.minimize_trace(np.array(sigma, dtype=float), k)
    assert float(answer.value) == pytest.approx(float(minimum), abs=1e-13)


@proves("5.6")
@spectra
def test_5_6_the_bound_is_met_exactly_between_the_two_eigenvalues(eigenvalues: list[sp.Expr]) -> None:
    for k in (1, 2, 3, 4):
        low = eigenvalues[k - 1]
        high = eigenvalues[k] if k < 4 else low + 10
        for t in (low, (low + high) / sp.Integer(2), high):
            assert k * t - sum(max(t - v, 0) for v in eigenvalues) == sum(eigenvalues[:k])
        for t in (low - 1, *([high + 1] if k < 4 else [])):
            assert k * t - sum(max(t - v, 0) for v in eigenvalues) < sum(eigenvalues[:k])


@proves("5.7")
def test_5_7_a_rotation_of_the_columns_changes_nothing() -> None:
    rng = random.Random(7)
    sigma = sp.Matrix(4, 4, lambda i, j: sp.Symbol(f"s{min(i, j)}{max(i, j)}", real=True))
    phi, rotation = rational_orthogonal(4, rng)[:, :2], rational_orthogonal(2, rng)
    assert rotation != sp.eye(2)
    assert sp.expand(((phi * rotation).T * sigma * phi * rotation).trace() - (phi.T * sigma * phi).trace()) == 0


@proves("5.8")
@spectra
def test_5_8_the_excess_is_at_least_the_gap_times_the_squared_sines(eigenvalues: list[sp.Expr]) -> None:
    rng = random.Random(8)
    sigma, q = symmetric(eigenvalues, rng)
    for k in (1, 2, 3):
        phi = rational_orthogonal(4, rng)[:, :k]
        p = [(q[:, i].T * phi * phi.T * q[:, i])[0] for i in range(4)]
        cut = eigenvalues[k - 1]
        excess = (phi.T * sigma * phi).trace() - sum(eigenvalues[:k])
        inside = sum((cut - v) * (1 - w) for v, w in zip(eigenvalues[:k], p[:k], strict=True))
        outside = sum((v - cut) * w for v, w in zip(eigenvalues[k:], p[k:], strict=True))
        assert excess == inside + outside
        assert excess >= (eigenvalues[k] - cut) * sum(p[k:])
        angles = scipy.linalg.subspace_angles(np.array(phi, dtype=float), np.array(q[:, :k], dtype=float))
        assert float(sum(p[k:])) == pytest.approx(np.sum(np.sin(angles) ** 2), abs=1e-12)


@proves("5.9")
@spectra
def test_5_9_turning_the_last_column_costs_the_gap_times_the_squared_sine(eigenvalues: list[sp.Expr]) -> None:
    sigma, q = symmetric(eigenvalues, random.Random(9))
    cos, sin = sp.Rational(3, 5), sp.Rational(4, 5)
    for k in (1, 2, 3):
        turned = sp.Matrix.hstack(q[:, : k - 1], cos * q[:, k - 1] + sin * q[:, k])
        assert turned.T * turned == sp.eye(k)
        gap = eigenvalues[k] - eigenvalues[k - 1]
        assert (turned.T * sigma * turned).trace() == sum(eigenvalues[:k]) + gap * sin**2


@proves("5.10")
@spectra
def test_5_10_any_positive_semidefinite_matrix_that_lifts_sigma_to_t_gives_a_lower_bound(
    eigenvalues: list[sp.Expr],
) -> None:
    rng = random.Random(10)
    sigma, q = symmetric(eigenvalues, rng)
    for t in (sp.Rational(1, 3), sp.Integer(2), sp.Integer(6)):
        positive_part = q * sp.diag(*[max(t - v, 0) for v in eigenvalues]) * q.T
        b = sp.Matrix(4, 2, lambda i, j: sp.Rational(rng.randint(-3, 3), 2))
        for lift in (positive_part, positive_part + b * b.T):
            assert (sigma + lift - t * sp.eye(4)).is_positive_semidefinite
            for k in (1, 3, 4):
                psi = rational_orthogonal(4, rng)[:, :k]
                middle = k * t - (psi.T * lift * psi).trace()
                assert (psi.T * sigma * psi).trace() >= middle >= k * t - lift.trace()


@proves("5.11", "5.12")
@spectra
@pytest.mark.parametrize("k", [1, 2, 4])
def test_5_11_and_5_12_lift_the_smallest_and_prove_the_value(eigenvalues: list[sp.Expr], k: int) -> None:
    sigma, q = symmetric(eigenvalues, random.Random(11))
    phi, theta, minimum, tau = q[:, :k], eigenvalues[:k], sum(eigenvalues[:k]), sp.Rational(1, 10)
    high = eigenvalues[k] if k < 4 else theta[-1] + 10
    for t in (theta[-1], high):
        lift = phi * sp.diag(*[t - v for v in theta]) * phi.T
        rest = sum(((eigenvalues[i] - t) * q[:, i] * q[:, i].T for i in range(k, 4)), sp.zeros(4, 4))
        assert sigma + lift - t * sp.eye(4) == rest
        assert rest.is_positive_semidefinite
        assert k * t - lift.trace() == minimum
    for t in (theta[-1] - tau, (theta[-1] - tau + high) / 2):
        lift = phi * sp.diag(*[t - v + tau for v in theta]) * phi.T
        assert lift.is_positive_semidefinite
        assert (sigma + lift - t * sp.eye(4)).is_positive_definite
        assert k * t - lift.trace() == minimum - k * tau


@proves("5.13")
def test_5_13_a_definite_lift_by_k_columns_leaves_at_most_k_eigenvalues_below_t() -> None:
    rng = random.Random(12)
    proved = refused = 0
    for eigenvalues in SPECTRA.values():
        sigma, q = symmetric(eigenvalues, rng)
        noise = sp.Matrix(4, 2, lambda i, j: sp.Rational(rng.randint(-1, 1), 20))
        for phi in (q[:, :2] + noise, q[:, 1:3], rational_orthogonal(4, rng)[:, :2]):
            for t in (sp.Rational(-1), sp.Rational(1, 4), sp.Rational(3, 2), sp.Rational(5, 2)):
                if (sigma + phi * sp.diag(9, 9) * phi.T - t * sp.eye(4)).is_positive_definite:
                    assert eigenvalues[2] > t
                    proved += 1
                else:
                    refused += 1
    assert min(proved, refused) > 5


@proves("5.14")
def test_5_14_a_congruence_keeps_the_count_of_negative_eigenvalues() -> None:
    rng = np.random.default_rng(13)
    q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    eigenvalues = np.array([-3.0, -1.0, 0.5, 0.5, 2.0, 9.0])
    sigma = (q * eigenvalues) @ q.T
    for k in (1, 2, 4, 5):
        t = (eigenvalues[k - 1] + eigenvalues[k]) / 2
        shifted = sigma - t * np.eye(6)
        blocks = scipy.linalg.ldl(shifted)[1]
        m = rng.normal(size=(6, 6))
        for congruent in (shifted, blocks, m.T @ shifted @ m):
            assert np.sum(np.linalg.eigvalsh(congruent) < 0) == k


@pytest.fixture(scope="module")
def perturbed() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Σ with clusters on both sides of the cut at k = 2, its eigenvalues and vectors, and a symmetric direction."""
    rng = np.random.default_rng(14)
    q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    eigenvalues = np.array([1.0, 1.0, 3.0, 3.0, 6.0])
    direction = rng.normal(size=(5, 5))
    return (q * eigenvalues) @ q.T, eigenvalues, q, direction + direction.T


def central_difference(f: Callable[[np.ndarray], np.ndarray], sigma: np.ndarray, direction: np.ndarray) -> np.ndarray:
    h = 1e-5
    return (f(sigma + h * direction) - f(sigma - h * direction)) / (2 * h)


@proves("5.15")
def test_5_15_is_the_gradient_of_the_value(perturbed: tuple[np.ndarray, ...]) -> None:
    sigma, _, q, direction = perturbed
    projector = q[:, :2] @ q[:, :2].T
    numeric = central_difference(lambda s: reference.minimize_trace(s, 2).value, sigma, direction)
    assert np.trace(projector @ direction) == pytest.approx(float(numeric), abs=1e-8)


@proves("5.16")
def test_5_16_is_the_derivative_of_the_projector(perturbed: tuple[np.ndarray, ...]) -> None:
    sigma, eigenvalues, q, direction = perturbed

    def projector(s: np.ndarray) -> np.ndarray:
        phi = reference.minimize_trace(s, 2).phi
        return phi @ phi.T

    by_formula = np.zeros((5, 5))
    for i, j in product(range(2), range(2, 5)):
        weight = q[:, i] @ direction @ q[:, j] / (eigenvalues[i] - eigenvalues[j])
        by_formula += weight * (np.outer(q[:, i], q[:, j]) + np.outer(q[:, j], q[:, i]))
    assert np.abs(by_formula).max() > 0.1
    np.testing.assert_allclose(by_formula, central_difference(projector, sigma, direction), rtol=0, atol=1e-8)


@proves("5.17", "5.18")
def test_5_17_and_5_18_are_the_gradient_of_a_function_of_the_projector(perturbed: tuple[np.ndarray, ...]) -> None:
    sigma, eigenvalues, q, direction = perturbed
    weight = np.random.default_rng(15).normal(size=(5, 5))
    weight += weight.T

    def loss(s: np.ndarray) -> np.ndarray:
        phi = reference.minimize_trace(s, 2).phi
        projector = phi @ phi.T
        return np.sum(weight * projector) + np.trace(projector @ weight @ projector @ weight)

    phi, others = q[:, :2], q[:, 2:]
    gradient = weight + 2 * weight @ phi @ phi.T @ weight  # of the loss, at P
    differences = eigenvalues[None, :2] - eigenvalues[2:, None]
    z = (others.T @ gradient @ phi) / differences
    by_formula = others @ z @ phi.T + phi @ z.T @ others.T
    numeric = central_difference(loss, sigma, direction)
    assert abs(float(numeric)) > 0.1
    assert np.sum(by_formula * direction) == pytest.approx(float(numeric), abs=1e-7)
    assert np.linalg.norm(by_formula) <= 2**0.5 * np.linalg.norm(gradient) / (eigenvalues[2] - eigenvalues[1])

    columns = 2 * gradient @ phi + phi @ np.array([[3.0, -1], [2, 5]])  # what turns the basis does not matter
    v = (others.T @ columns) / differences
    through_columns = others @ v @ phi.T
    np.testing.assert_allclose((through_columns + through_columns.T) / 2, by_formula, atol=1e-12)


def exactly(a: np.ndarray) -> sp.Matrix:
    return sp.Matrix(a.shape[0], a.shape[1], lambda i, j: sp.Rational(float(a[i, j])))


def deflated_case(seed: int, m: int = 6, k: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix of condition 1e8, k of its computed eigenvectors with an error of 1e-9, and lifts of very different size."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(m, m)))[0]
    sigma = (q * np.logspace(-8, 0, m)) @ q.T
    return (sigma + sigma.T) / 2, q[:, :k] + 1e-9 * rng.normal(size=(m, k)), rng.uniform(0, 1, k) * np.array([1.0, 1e-6])


def gamma(n: int) -> float:
    return n * 2.0**-53 / (1 - n * 2.0**-53)


@proves("5.20")
def test_5_20_bounds_what_forming_the_deflated_matrix_rounds() -> None:
    for seed in range(6):
        sigma, phi, d = deflated_case(seed)
        b = phi * np.sqrt(d)
        shift = 0.1234567
        formed = sigma + b @ b.T
        formed[np.diag_indices(6)] -= shift
        exact = exactly(sigma) + exactly(phi) * sp.diag(*map(sp.Rational, map(float, d))) * exactly(phi).T
        exact -= sp.Rational(shift) * sp.eye(6)
        error = np.array((exactly(formed) - exact).evalf(40), dtype=float)
        trace_s = float(np.sum(d * (phi**2).sum(axis=0)))
        bound = gamma(2 + 7) * (np.linalg.norm(sigma) + trace_s + shift)
        assert 0 < np.linalg.norm(error, 2) <= bound
        magnitudes = sum(di * np.linalg.norm(np.outer(abs(f), abs(f))) for di, f in zip(d, phi.T, strict=True))
        assert magnitudes == pytest.approx(trace_s, rel=1e-14)


@proves("5.21")
def test_5_21_bounds_the_backward_error_of_a_factorisation() -> None:
    for seed in range(6):
        sigma, _, _ = deflated_case(seed)
        lower = np.linalg.cholesky(sigma)
        backward = np.array((exactly(lower) * exactly(lower).T - exactly(sigma)).evalf(40), dtype=float)
        bound = gamma(8) / (1 - gamma(8)) * np.trace(sigma)
        assert np.linalg.norm(backward, 2) <= bound
        assert gamma(8) * np.sum(lower**2) <= bound * (1 + 1e-14)
        assert np.all(abs(backward) <= gamma(8) * abs(lower) @ abs(lower).T)


@proves("5.19", "5.22")
def test_5_19_and_5_22_what_is_factorised_in_floating_point_is_positive_semidefinite_exactly() -> None:
    proved = refused = 0
    for seed in range(4):
        sigma, phi, d = deflated_case(seed)
        exact = exactly(sigma) + exactly(phi) * sp.diag(*map(sp.Rational, map(float, d))) * exactly(phi).T
        least = float(np.linalg.eigvalsh(np.array(exact.evalf(30), dtype=float))[0])
        for away in (-1e-3, -1e-12, -1e-15, 0.0, 1e-16, 1e-15, 1e-12):  # t up to a little above what can be true
            t = least + away
            f = gamma(2 + 8) * (np.linalg.norm(sigma) + float(np.sum(d * (phi**2).sum(axis=0))) + abs(t))
            trace = np.trace(sigma) + float(np.sum(d * (phi**2).sum(axis=0))) - 6 * t
            c = gamma(8) / (1 - gamma(8)) * (trace + 6 * f) + f
            b = phi * np.sqrt(d)
            try:
                np.linalg.cholesky(sigma + b @ b.T - (t + c) * np.eye(6))
            except np.linalg.LinAlgError:
                refused += 1
                continue
            proved += 1
            assert away < 0
            pivots = (exact - sp.Rational(float(t)) * sp.eye(6)).LDLdecomposition()[1]
            assert all(pivots[i, i] > 0 for i in range(6))
    assert proved >= 4
    assert refused >= 12
    # (5.22): with this much room a good Φ is certified, and the value to within k τ
    sigma = np.diag([1.0, 1.0, 2.0, 3.0])
    result = minimize_trace(sigma, 2)
    assert result.certified
    assert 0 <= result.value - result.dual_value <= 2 * result.margin + gamma(4 + 2 + 4) * 8
