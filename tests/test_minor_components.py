"""S9 of points: `minor_components`, by the singular values of the centred points."""

from __future__ import annotations

import numpy as np
import pytest
from matrices import EPS, sine

from hw3gpu import minimize_trace, minor_components, reference


def points_with_singular_values(sigma, n, offset=3.0):
    """Points (n, m) whose 1/n covariance has the eigenvalues sigma², and the directions, ascending."""
    m = len(sigma)
    rng = np.random.default_rng(0)
    u = np.linalg.qr(np.column_stack([np.ones(n), rng.standard_normal((n, m))]))[0][:, 1:]
    v = np.linalg.qr(rng.standard_normal((m, m)))[0]
    return (u * sigma) @ v.T * n**0.5 + offset, v


def test_minor_components_keep_what_squaring_loses():
    sigma = np.logspace(-8, 0, 20)
    x, v = points_with_singular_values(sigma, 200)
    result = minor_components(x, 3)
    np.testing.assert_allclose(result.eigenvalues, sigma[:3] ** 2, rtol=1e-7)
    assert sine(result.phi, v[:, :3]) < 1e-8
    assert result.certified
    assert result.subspace_error < 1e-7
    through_the_covariance = minimize_trace(reference.moments(x).covariance, 3)
    assert sine(through_the_covariance.phi, v[:, :3]) > 1e-5


@pytest.mark.parametrize("largest", [False, True], ids=["smallest", "largest"])
@pytest.mark.parametrize(("n", "m", "k"), [(50, 6, 2), (50, 6, 6), (4, 9, 3), (4, 9, 7), (1, 3, 1), (7, 1, 1)])
def test_minor_components_agree_with_the_covariance(kit, largest, n, m, k):
    x = np.random.default_rng(0).standard_normal((n, m)) + 5
    result = minor_components(kit.array(x, "float64"), k, largest=largest, ddof=min(1, n - 1))
    covariance = reference.moments(x).covariance * (n / (n - min(1, n - 1)))
    expected = minimize_trace(covariance, k, largest=largest)
    assert result.method == "gesdd"
    np.testing.assert_allclose(kit.numpy(result.eigenvalues), expected.eigenvalues, atol=1e-13)
    assert kit.numpy(result.value) == pytest.approx(expected.value, abs=1e-13)
    assert result.unique == expected.unique
    assert result.value_certified
    assert result.certified == expected.certified
    if result.unique:
        assert sine(kit.numpy(result.phi), expected.phi) < 1e-12
        assert result.gap == pytest.approx(expected.gap, rel=1e-9)
    bound = result.dual_value - expected.value
    assert bound >= -1e-12 if largest else bound <= 1e-12


def test_minor_components_of_batches_and_float32(kit):
    x = np.random.default_rng(0).standard_normal((3, 40, 5))
    result = minor_components(kit.array(x, "float32"), 2)
    assert tuple(result.phi.shape) == (3, 5, 2)
    assert str(result.phi.dtype).removeprefix("torch.") == "float32"
    assert result.certified.all()
    for i in range(3):
        single = minimize_trace(reference.moments(x[i].astype(np.float32)).covariance, 2)
        assert sine(kit.numpy(result.phi)[i], single.phi) < 10 * EPS["float32"]


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("scale", [1e140, 1e-140])
def test_minor_components_at_any_scale(scale, offset):
    x, v = points_with_singular_values(np.linspace(1, 2, 8), 30, offset)
    result = minor_components(x * scale, 2)
    assert sine(result.phi, v[:, :2]) < 1e-14 * (1 + offset) * 30
    assert result.value / scale**2 == pytest.approx(np.sum(np.linspace(1, 2, 8)[:2] ** 2), rel=1e-9)
    assert result.certified


@pytest.mark.parametrize(
    ("points", "k", "options", "error", "message"),
    [
        (np.ones(3), 1, {}, ValueError, r"points: expected at least 2 axes \(\.\.\., n, m\)"),
        (np.ones((4, 3), np.float16), 1, {}, TypeError, r"points: .*got float16, whose 11 bits"),
        (np.ones((4, 3)), 4, {}, ValueError, r"k: expected 1 <= k <= m = 3, got 4"),
        (np.ones((0, 3)), 1, {}, ValueError, r"points: expected n > ddof >= 0, got n = 0, ddof = 0"),
        (np.ones((1, 3)), 1, {"ddof": 1}, ValueError, r"points: expected n > ddof >= 0, got n = 1, ddof = 1"),
        (np.full((4, 3), np.nan), 1, {}, ValueError, r"points: expected finite values, got nan at \[0, 0\]"),
    ],
)
def test_errors_of_minor_components(points, k, options, error, message):
    with pytest.raises(error, match=message):
        minor_components(points, k, **options)
