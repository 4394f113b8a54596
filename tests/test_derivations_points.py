"""Section 4 of docs/derivations.md, proved: points with given mean and covariance."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
from proofs import exact_moments, proves

from hw3gpu import reference


def helmert(n: int, r: int) -> sp.Matrix:
    columns = [[1] * j + [-j] + [0] * (n - j - 1) for j in range(1, r + 1)]
    return sp.Matrix(n, r, lambda i, j: sp.Integer(columns[j][i]) / sp.sqrt((j + 1) * (j + 2)))


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
