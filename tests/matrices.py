"""Matrices that are hard for an eigensolver, and what the tests of the trace problem hold results to."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from hw3gpu import reference

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def spectrum(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues in random directions, and those directions."""
    eigenvalues = np.asarray(eigenvalues, dtype=np.float64)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    sigma = (q * eigenvalues) @ q.T
    return (sigma + sigma.T) / 2, q


def wishart(m, n=None, seed=0):
    x = np.random.default_rng(seed).standard_normal((n or 2 * m, m))
    return x.T @ x / len(x)


def wilkinson(m):
    """Wilkinson's W⁺: |i - (m - 1) / 2| on the diagonal, ones beside it; its largest eigenvalues come in pairs."""
    return np.diag(abs(np.arange(m) - (m - 1) / 2)) + np.eye(m, k=1) + np.eye(m, k=-1)


def sine(phi, other):
    """‖sin Θ‖ between two subspaces, from their projectors."""
    return np.linalg.norm(phi @ phi.conj().T - other @ other.conj().T) / 2**0.5


MATRICES = {
    "wishart": (wishart(60), 7),
    "wishart, k = m - 1": (wishart(30), 29),
    "kappa 1e4": (spectrum(np.logspace(-4, 0, 50))[0], 6),
    "kappa 1e8": (spectrum(np.logspace(-8, 0, 50))[0], 20),
    "kappa 1e12": (spectrum(np.logspace(-12, 0, 50))[0], 30),
    "cluster inside k": (spectrum([1.0] * 10 + [2.0] * 20 + [3.0] * 10)[0], 10),
    "cluster across k": (spectrum([1.0] * 10 + [2.0] * 20 + [3.0] * 10)[0], 15),
    "rank-deficient, k in the null space": (wishart(40, n=12), 9),
    "rank-deficient, k past the null space": (wishart(40, n=12), 31),
    "diagonal, indefinite": (np.diag(np.random.default_rng(1).permutation(np.arange(-20.0, 20.0))), 4),
    "Wilkinson W21+": (wilkinson(21), 3),
    "Wilkinson W21+, inside its closest pair": (wilkinson(21), 20),
    "Hilbert": (scipy.linalg.hilbert(12), 3),
    "identity": (np.eye(20), 6),
    "zero": (np.zeros((20, 20)), 6),
    "1x1": (np.array([[3.0]]), 1),
    "k = m": (wishart(25), 25),
    "m = 130, a range of eigenpairs": (wishart(130), 5),
}
DEGENERATE = {
    "cluster across k",
    "rank-deficient, k in the null space",
    "Wilkinson W21+, inside its closest pair",
    "identity",
    "zero",
}


def check_against_reference(result, sigma, k, tolerance):
    """Value, eigenvalues and, where it is determined, the subspace, within `tolerance` · ‖Σ‖."""
    expected = reference.minimize_trace(sigma, k)
    size = np.linalg.norm(sigma)
    phi = np.asarray(result.phi, dtype=np.float64)
    np.testing.assert_allclose(phi.T @ phi, np.eye(k), atol=tolerance)
    assert abs(float(result.value) - expected.value) <= tolerance * size
    assert np.abs(np.asarray(result.eigenvalues) - expected.eigenvalues[:k]).max() <= tolerance * size
    assert abs(np.trace(phi.T @ sigma @ phi) - expected.value) <= tolerance * size * k**0.5
    gap = expected.eigenvalues[k] - expected.eigenvalues[k - 1] if k < len(sigma) else np.inf
    if gap > 100 * tolerance * size:
        assert sine(phi, expected.phi) <= 2 * tolerance * size / gap + tolerance
