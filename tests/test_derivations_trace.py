"""Section 5 of docs/derivations.md, proved: the trace problem."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import scipy.linalg
import sympy as sp
from proofs import exact_moments, proves

from hw3gpu import minimize_trace, reference


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
