"""S8: points with given moments (`hw3gpu.points_with_moments`)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw3gpu import moments, points_with_moments, reference

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def covariance(m, rank, seed=0):
    a = np.random.default_rng(seed).standard_normal((m, rank))
    return a @ a.T / max(rank, 1)


SIGMAS = {
    "1x1": covariance(1, 1),
    "full rank": covariance(6, 6),
    "singular": covariance(7, 3),
    "rank 1": covariance(5, 1),
    "zero": np.zeros((4, 4)),
    "identity": np.eye(5),
    "diagonal with zeros": np.diag([3.0, 0.0, 1e-6, 0.0]),
    "m = 80": covariance(80, 80),
    "m = 80, rank 11": covariance(80, 11),
    "scaled by 1e150": covariance(6, 4) * 1e150,
    "scaled by 1e-150": covariance(6, 4) * 1e-150,
}


RANKS = dict(zip(SIGMAS, [1, 6, 3, 1, 0, 5, 2, 80, 11, 4, 4], strict=True))


@pytest.fixture(params=SIGMAS, ids=list(SIGMAS))
def sigma(request):
    """A covariance and its rank."""
    return SIGMAS[request.param], RANKS[request.param]


def relative_error(x, mean, sigma, ddof=0):
    """Errors of the mean and the covariance of points, relative to the points' own size, by the answer sheet."""
    got = reference.moments(x)
    got_covariance = got.covariance * (len(x) / (len(x) - ddof))
    size = np.abs(sigma).max()
    error = np.abs(got_covariance - sigma).max()
    return np.abs(got.mean - mean).max() / (np.abs(x).max() or 1.0), error / size if size else error


# ------------------------------------------------------------------------------------------------ points_with_moments
@pytest.mark.parametrize("extra", [0, 1, 40], ids="rank + 1 + {}".format)
@pytest.mark.parametrize("rng", [None, 5], ids=["Helmert", "random"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_the_moments_are_exact(sigma, extra, rng, ddof):
    sigma, rank = sigma
    m, n = len(sigma), rank + 1 + extra
    if n - ddof < 1:
        n += 1
    mean = np.random.default_rng(1).standard_normal(m) * np.abs(sigma).max() ** 0.5
    x = points_with_moments(mean, sigma, n, ddof=ddof, rng=rng)
    assert x.shape == (n, m)
    mean_error, covariance_error = relative_error(x, mean, sigma, ddof)
    assert mean_error <= 1e-15 * m + 1e-15
    assert covariance_error <= 1e-14 * m


def test_the_fewest_points(sigma):
    sigma, rank = sigma
    mean = np.ones(len(sigma))
    assert points_with_moments(mean, sigma).shape == (rank + 1, len(sigma))
    assert points_with_moments(mean, sigma, ddof=1).shape == (max(rank, 1) + 1, len(sigma))
    if rank:
        with pytest.raises(ValueError, match=rf"at least rank\(covariance\) \+ 1 = {rank + 1} points, got {rank}"):
            points_with_moments(mean, sigma, rank)


def test_every_kind_and_dtype(kit):
    for dtype in ("float64", "float32"):
        mean, sigma = kit.array([1.0, -2, 3, 0.5], dtype), kit.array(covariance(4, 2), dtype)
        before = kit.numpy(mean), kit.numpy(sigma)
        x = points_with_moments(mean, sigma)
        assert type(x) is type(mean)
        assert str(x.dtype).removeprefix("torch.") == dtype
        assert x.device == mean.device
        assert tuple(x.shape) == (3, 4)
        mean_error, covariance_error = relative_error(kit.numpy(x), *before)
        assert mean_error <= EPS[dtype]
        assert covariance_error <= 20 * EPS[dtype]
        got = moments(x)
        assert type(got.mean) is type(got.covariance) is type(mean)
        assert str(got.covariance.dtype).removeprefix("torch.") == dtype
        np.testing.assert_allclose(kit.numpy(got.mean), before[0], atol=8 * EPS[dtype])
        np.testing.assert_allclose(kit.numpy(got.covariance), before[1], atol=20 * EPS[dtype])
        assert np.array_equal(kit.numpy(mean), before[0])
        assert np.array_equal(kit.numpy(sigma), before[1])


def test_the_rank_of_a_float32_covariance_is_told_at_its_own_precision():
    sigma = covariance(30, 5).astype(np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < -1e-9  # rounding alone makes it indefinite
    x = points_with_moments(np.zeros(30, np.float32), sigma)
    assert x.shape == (6, 30)
    assert relative_error(x.astype(np.float64), 0.0, sigma.astype(np.float64))[1] <= 30 * EPS["float32"]


def test_helmert_is_the_default_and_agrees_with_the_answer_sheet():
    sigma, mean = covariance(5, 5), np.arange(5.0)
    x, expected = points_with_moments(mean, sigma, 9), reference.points_with_moments(mean, sigma, 9)
    # both are 1 μᵀ + sqrt(n) H Aᵀ, and only the order of A's columns is free: H has one span
    deviations, others = x - mean, expected - mean
    np.testing.assert_allclose(deviations @ np.linalg.pinv(deviations), others @ np.linalg.pinv(others), atol=1e-12)
    np.testing.assert_array_equal(x[6:], np.broadcast_to(mean, (3, 5)))
    np.testing.assert_array_equal(x, points_with_moments(mean, sigma, 9))


def test_random_members_of_the_solution_set():
    sigma, mean = covariance(3, 2), np.zeros(3)
    first, again = (points_with_moments(mean, sigma, 6, rng=np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(first, points_with_moments(mean, sigma, 6, rng=7))
    assert not np.allclose(first, points_with_moments(mean, sigma, 6, rng=8))
    # Haar: no point is set apart, so that over many draws each point's second moment is Σ (n points share n Σ)
    rng = np.random.default_rng(0)
    draws = np.stack([points_with_moments(mean, sigma, 4, rng=rng) for _ in range(500)])
    second = np.einsum("dni,dnj->nij", draws, draws) / len(draws)
    assert np.abs(second - sigma).max() < 0.2 * np.abs(sigma).max()
    assert np.abs(draws.mean(axis=0)).max() < 0.2


@pytest.mark.parametrize("rng", [None, 3], ids=["Helmert", "random"])
def test_batches(kit, rng):
    ranks = [[3, 1, 0], [2, 3, 3]]
    sigma = np.array([[covariance(3, r, seed=r + i) for r in row] for i, row in enumerate(ranks)])
    sigma[0, 0] *= 1e80
    mean = np.random.default_rng(0).standard_normal((2, 3, 3))
    x = points_with_moments(kit.array(mean, "float64"), kit.array(sigma, "float64"), 8, rng=rng)
    got = moments(x)
    x = kit.numpy(x)
    assert x.shape == (2, 3, 8, 3)
    for i in np.ndindex(2, 3):
        # the mean is known to the rounding of the points
        assert relative_error(x[i], mean[i], sigma[i])[0] <= 1e-14
        assert relative_error(x[i], mean[i], sigma[i])[1] <= 1e-13
        np.testing.assert_allclose(kit.numpy(got.covariance)[i], sigma[i], atol=1e-13 * (np.abs(sigma[i]).max() or 1))
    assert points_with_moments(mean[0], sigma[0]).shape == (3, 4, 3)
    assert points_with_moments(mean[:0], sigma[:0]).shape == (0, 3, 1, 3)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 12), rank=st.integers(0, 12), extra=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_any_size_and_rank(m, rank, extra, seed):
    rank = min(m, rank)
    sigma = covariance(m, rank, seed)
    x = points_with_moments(np.zeros(m), sigma, rank + 1 + extra)
    assert relative_error(x, 0.0, sigma)[1] <= 1e-14 * m


# ---------------------------------------------------------------------------------------------------------- bad input
def indefinite():
    return np.diag([4.0, 1.0, -0.5])


def asymmetric():
    a = np.eye(3)
    a[0, 2] = 0.25
    return a


def with_nan():
    a = np.eye(3)
    a[1, 1] = np.nan
    return a


ZERO3 = np.zeros(3)


@pytest.mark.parametrize(
    ("mean", "sigma", "options", "error", "message"),
    [
        ([0.0], np.eye(1), {}, TypeError, r"mean: expected a NumPy, CuPy or torch array"),
        (ZERO3, [[1.0]], {}, TypeError, r"covariance: expected a NumPy, CuPy or torch array"),
        (ZERO3, np.eye(3, dtype=np.float32), {}, TypeError, r"mean: .*the dtype of covariance, float32, got float64"),
        (ZERO3, np.eye(3, dtype=np.float16), {}, TypeError, r"covariance: .*got float16, whose 11 bits"),
        (ZERO3, np.eye(3, dtype=complex), {}, TypeError, r"covariance: expected dtype .*float64, got complex128"),
        (ZERO3, np.ones((3, 2)), {}, ValueError, r"covariance: expected square matrices .*got shape \(3, 2\)"),
        (ZERO3, np.ones(3), {}, ValueError, r"covariance: expected at least 2 axes"),
        (np.zeros(2), np.eye(3), {}, ValueError, r"mean: expected shape \(3,\) .*got \(2,\)"),
        (np.zeros((1, 3)), np.eye(3), {}, ValueError, r"mean: expected shape \(3,\) .*got \(1, 3\)"),
        (ZERO3, indefinite(), {}, ValueError, r"indefinite one: its smallest eigenvalue is -0\.5 \(largest 4, tol"),
        (ZERO3, asymmetric(), {}, ValueError, r"covariance: .*max \|A - A\^T\| = 0\.25 where max \|A\| = 1"),
        (ZERO3, with_nan(), {}, ValueError, r"covariance: expected finite values, got nan at \[1, 1\]"),
        (np.array([0, np.inf, 0]), np.eye(3), {}, ValueError, r"mean: expected finite values, got inf at \[1\]"),
        (ZERO3, np.eye(3), {"n": 3}, ValueError, r"n: .*rank\(covariance\) \+ 1 = 4 points, got 3"),
        (ZERO3, np.eye(3), {"n": 4.0}, TypeError, r"n: expected an integer, got 4\.0"),
        (ZERO3, np.zeros((3, 3)), {"n": 1, "ddof": 1}, ValueError, r"n: .*at least ddof \+ 1 = 2 points, got 1"),
        (ZERO3, np.zeros((3, 3)), {"n": 0}, ValueError, r"n: .*rank\(covariance\) \+ 1 = 1 points, got 0"),
        (ZERO3, np.eye(3), {"ddof": -1}, ValueError, r"ddof: expected 0 or more, got -1"),
    ],
)
def test_errors(mean, sigma, options, error, message):
    with pytest.raises(error, match=message):
        points_with_moments(mean, sigma, **options)


def test_kinds_cannot_be_mixed():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="mean: expected a torch array, as covariance is, got a numpy array"):
        points_with_moments(ZERO3, torch.eye(3, dtype=torch.float64))
