"""No function lets a warning of NumPy escape: what is wrong is an error by name, what overflows is infinite in the result."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
from array_functions import CALLS, leaves, operands

import hw3gpu

SPECIAL = [np.nan, np.inf, -np.inf]
EXTREME = [1.7e308, -1.7e308, 1e155, 1e-155, 5e-324]
LINEAR_ALGEBRA = {"points_with_moments", "moments", "minimize_trace", "minor_components", "MomentAccumulator"}

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("everywhere", [False, True], ids=["one entry", "all entries"])
def test_special_and_extreme_numbers_raise_an_error_or_nothing(name, everywhere):
    for key, values in operands(np.random.default_rng(0)).items():
        for value in SPECIAL + EXTREME * (name in LINEAR_ALGEBRA):
            arrays = operands(np.random.default_rng(0))
            if values.dtype.kind == "f":
                arrays[key][... if everywhere else tuple([0] * (values.ndim - 1) + [1])] = value
                with contextlib.suppress(ValueError, np.linalg.LinAlgError):
                    CALLS[name](hw3gpu, arrays)


def test_infinities_that_cancel_are_an_error_by_name_alone():
    for sigma in (np.array([[1, np.inf], [np.inf, 1]]), np.array([[[1.0, np.inf], [-np.inf, 1]], np.eye(2)])):
        with pytest.raises(ValueError, match=r"covariance: expected finite values, got inf at \[.*0, 1\] \(2 not finite\)"):
            hw3gpu.minimize_trace(sigma, 1)
        with pytest.raises(ValueError, match="covariance: expected finite values, got inf"):
            hw3gpu.points_with_moments(np.ones(sigma.shape[:-1]), sigma)
    with pytest.raises(ValueError, match="expected a symmetric matrix"):
        hw3gpu.minimize_trace(np.array([[1, 1.7e308], [-1.7e308, 1]]), 1)


def test_points_whose_covariance_is_near_the_largest_number():
    """λ = 5.1e308 is no number of float64, and its root is."""
    sigma = np.full((3, 3), 1.7e308)
    x = hw3gpu.points_with_moments(np.zeros(3), sigma)
    np.testing.assert_allclose(x, [[1.7e308**0.5] * 3, [-(1.7e308**0.5)] * 3], rtol=1e-14)
    with pytest.raises(ValueError, match="indefinite one: its smallest eigenvalue is -inf"):
        hw3gpu.points_with_moments(np.zeros(3), -sigma)


@pytest.mark.parametrize("size", [1e155, 1e170, 1e-155, 1e-170])
def test_components_whose_variance_is_a_number_where_the_square_of_the_scale_is_none(size):
    x = np.array([[1.0, 1e-20], [-1.0, 1e-20], [1.0, -1e-20], [-1.0, -1e-20]]) * size
    found = hw3gpu.minor_components(x, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.array([1e-20 * size * (1e-20 * size), size * size])
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-3 if size < 1 else 1e-9, atol=5e-324)
    assert not any(np.isnan(a).any() for a in leaves(found) if isinstance(a, (float, np.ndarray)))
