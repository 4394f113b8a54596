"""S9: the trace minimum, its diagnostics and its certificate (`hw3gpu._array_functions.trace`)."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import scipy.linalg
from matrices import DEGENERATE, EPS, MATRICES, check_against_reference, sine, spectrum, wishart

from hw3gpu import minimize_trace, minor_components, reference
from hw3gpu._core import dispatch
from hw3gpu._linalg import certificate, numerics, solvers


@pytest.fixture(params=MATRICES, ids=list(MATRICES))
def case(request):
    return (*MATRICES[request.param], request.param in DEGENERATE)


@pytest.mark.parametrize(("method", "scale"), [("syevd", 1.0), ("syevr", 1.0), ("syevd", 1e150), ("syevr", 1e-150)])
def test_matches_the_answer_sheet(case, method, scale):
    sigma, k, degenerate = case
    result = minimize_trace(sigma * scale, k, method=method)
    assert result.method == method
    # the norms of the comparison would overflow at 1e150: in units of `scale`
    scaled = dataclasses.replace(result, value=result.value / scale, eigenvalues=result.eigenvalues / scale)
    check_against_reference(scaled, sigma, k, 10 * len(sigma) * EPS["float64"])
    assert result.residual <= len(sigma) * EPS["float64"]
    assert result.orthogonality <= 10 * len(sigma) * EPS["float64"]
    assert result.eigenvalue_sum == pytest.approx(result.value, rel=1e-12, abs=1e-13 * scale)
    assert result.unique == (not degenerate)
    assert result.value_certified
    assert result.certified == (not degenerate)
    assert (result.reason == "") == result.certified


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes"])
def test_covariances_of_real_data(name):
    datasets = pytest.importorskip("sklearn.datasets")
    x = getattr(datasets, f"load_{name}")().data
    sigma, k = reference.moments(x).covariance, 4
    result = minimize_trace(sigma, k)
    check_against_reference(result, sigma, k, 10 * len(sigma) * EPS["float64"])
    assert result.value_certified
    assert result.certified == (result.gap > 2 * result.margin)
    from_data = minor_components(x, k)
    assert abs(from_data.value - result.value) <= 10 * len(sigma) * EPS["float64"] * np.linalg.norm(sigma)
    assert from_data.certified
    # what is left of the small variances in the covariance is up to eps · λ_max; the data have them to more digits
    np.testing.assert_allclose(((x - x.mean(axis=0)) @ from_data.phi).var(axis=0), from_data.eigenvalues, atol=1e-20, rtol=1e-8)


def test_every_kind_and_dtype(kit):
    for dtype in ("float64", "float32"):
        sigma = kit.array(wishart(40), dtype)
        before = kit.numpy(sigma)
        result = minimize_trace(sigma, 5)
        for name in ("phi", "value", "eigenvalues"):
            got = getattr(result, name)
            assert str(got.dtype).removeprefix("torch.") == dtype, name
        assert type(result.phi) is type(sigma)
        assert result.phi.device == sigma.device
        assert [tuple(a.shape) for a in (result.phi, result.value, result.eigenvalues)] == [(40, 5), (), (5,)]
        assert result.certified is True
        assert isinstance(result.gap, float)
        expected = reference.minimize_trace(kit.numpy(sigma), 5)
        assert sine(kit.numpy(result.phi), expected.phi) <= 10 * EPS[dtype]
        assert kit.numpy(result.value) == pytest.approx(float(expected.value), rel=EPS[dtype] + 1e-13)
        assert np.array_equal(kit.numpy(sigma), before)


def test_float32_input_keeps_the_smallest_eigenspace_that_float32_arithmetic_loses():
    m, k = 512, 8
    sigma = spectrum(np.logspace(-6, 0, m))[0].astype(np.float32)
    sigma = np.tril(sigma) + np.tril(sigma, -1).T
    exact = np.linalg.eigh(sigma.astype(np.float64))[1][:, :k]
    assert sine(minimize_trace(sigma, k).phi.astype(np.float64), exact) <= 1e-6
    rough = minimize_trace(sigma, k, dtype="float32")
    for phi in (rough.phi, scipy.linalg.eigh(sigma)[1][:, :k]):  # ours on request, and LAPACK's
        assert sine(phi.astype(np.float64), exact) > 0.03
    assert rough.orthogonality < 1e-4
    # and the certificate says so: float32 cannot separate the k from the others
    assert not rough.certified
    assert "gap" in rough.reason


def test_largest_maximises():
    sigma = spectrum([-3.0, -1, 0, 2, 5, 5.5])[0]
    result = minimize_trace(sigma, 2, largest=True)
    np.testing.assert_allclose(result.eigenvalues, [5.5, 5.0])
    assert result.value == pytest.approx(10.5)
    assert result.gap == pytest.approx(3.0)
    assert result.certified
    assert result.dual_value >= 10.5 - 1e-14


def test_complex_hermitian(kit):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((80, 80)) + 1j * rng.standard_normal((80, 80))
    sigma = z @ z.conj().T / 80
    if kit.kind == "torch":
        import torch

        given = torch.from_numpy(sigma).to(kit.device)
    else:
        given = kit.array(sigma, "complex128")
    exact = np.linalg.eigh(sigma)
    for method in ("auto", "syevd"):
        result = minimize_trace(given, 3, method=method)
        phi = result.phi.cpu().numpy() if kit.kind == "torch" else result.phi
        phi = np.asarray(phi.get() if hasattr(phi, "get") else phi)
        assert sine(phi, exact[1][:, :3]) < 1e-12
        assert kit.numpy(result.eigenvalues) == pytest.approx(exact[0][:3])
        assert result.certified
        pivots = phi[abs(phi).argmax(axis=0), range(3)]
        assert np.all(pivots.real > 0)
        assert np.all(abs(pivots.imag) < 1e-15)


def test_batches_give_each_matrix_its_own_result(kit):
    sigma = np.stack([wishart(9, seed=i) for i in range(6)] + [np.eye(9), np.zeros((9, 9))]).reshape(2, 4, 9, 9)
    sigma[0, 1] *= 1e100
    result = minimize_trace(kit.array(sigma, "float64"), 3)
    phi, value = kit.numpy(result.phi), kit.numpy(result.value)
    assert phi.shape == (2, 4, 9, 3)
    assert result.certified.tolist() == [[True] * 4, [True, True, False, False]]
    assert result.unique.tolist() == result.certified.tolist()
    assert result.value_certified.all()
    assert result.reason[0, 0] == ""
    assert "only minimiser" in result.reason[1, 3]
    for i in np.ndindex(2, 4):
        single = minimize_trace(sigma[i], 3)
        assert value[i] == pytest.approx(single.value, rel=1e-13)
        np.testing.assert_allclose(np.trace(phi[i].T @ sigma[i] @ phi[i]), value[i], rtol=1e-12)
        assert result.gap[i] == pytest.approx(single.gap, rel=1e-9)


def test_an_empty_batch():
    result = minimize_trace(np.zeros((0, 5, 5)), 2)
    assert result.phi.shape == (0, 5, 2)
    assert result.value.shape == result.certified.shape == (0,)


@pytest.mark.parametrize("layout", ["Fortran", "transposed", "strided", "read-only"])
def test_any_layout(layout):
    sigma = wishart(70)
    given = {
        "Fortran": np.asfortranarray(sigma),
        "transposed": sigma.T,
        "strided": np.repeat(np.repeat(sigma, 2, axis=0), 2, axis=1)[::2, ::2],
        "read-only": sigma.copy(),
    }[layout]
    given.flags.writeable = False
    check_against_reference(minimize_trace(given, 4), sigma, 4, 4 * 70 * EPS["float64"])


def test_the_sign_rule():
    # an eigenvector whose entries sum to zero: a rule by the sum's sign would zero it
    result = minimize_trace(np.array([[0.0, 1.0], [1.0, 0.0]]), 2)
    np.testing.assert_allclose(abs(result.phi), 2**-0.5)
    columns = np.array([[-1.0, 1.0, 0.0], [1.0, -1.0, -2.0]])
    for signed in numerics.fix_signs(numerics.Numerics(np, None), columns, "float64"):
        np.testing.assert_array_equal(signed, [[1.0, 1.0, 0.0], [-1.0, -1.0, 2.0]])
    phi = minimize_trace(wishart(12), 12).phi
    assert np.all(phi[abs(phi).argmax(axis=0), range(12)] > 0)


def keeps_the_sign_rule(phi):
    """Whether in each column the first entry of largest modulus is positive."""
    pivot = np.take_along_axis(phi, abs(phi).argmax(axis=-2)[..., None, :], axis=-2)
    return np.all((pivot.real > 0) & (pivot.imag == 0))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_the_sign_rule_holds_of_what_is_given_back(dtype):
    """Matrices of few symmetries, whose eigenvectors have entries that are equal, or become so when they are rounded."""
    n, rng = 500, np.random.default_rng(0)
    a, b = rng.standard_normal((2, n, 2, 2))
    a, b = a + a.swapaxes(1, 2), b + b.swapaxes(1, 2)
    if dtype.startswith("complex"):
        phase = np.exp(1j * rng.uniform(0, 2 * np.pi, (n, 4)))
        sigma = np.block([[a, b], [b, a]]) * phase[:, :, None] * phase[:, None, :].conj()
    else:
        sigma = np.block([[a, b], [b, a]])  # eigenvectors (x, x) and (x, -x)
    sigma = ((sigma + sigma.conj().swapaxes(1, 2)) / 2).astype(dtype)
    phi = minimize_trace(sigma, 4).phi
    assert phi.dtype == dtype
    assert keeps_the_sign_rule(phi)
    gram = phi.conj().swapaxes(1, 2).astype("complex128") @ phi.astype("complex128")
    assert abs(gram - np.eye(4)).max() <= 16 * np.finfo(dtype).eps
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("hw3gpu.functional")
    differentiable = functional.minimize_trace(torch.from_numpy(sigma), 4).phi.numpy()
    assert keeps_the_sign_rule(differentiable)
    if dtype in ("float32", "float64"):
        assert keeps_the_sign_rule(minor_components(sigma, 4).phi)


def test_rounding_noise_is_symmetrised():
    sigma = wishart(30)
    noisy = sigma.copy()
    noisy[3, 4] *= 1 + 20 * EPS["float64"]
    assert minimize_trace(noisy, 4).value == pytest.approx(minimize_trace(sigma, 4).value, rel=1e-13)


# ---------------------------------------------------------------------------------------------------- the certificate
def test_the_dual_value_bounds_the_minimum(case):
    sigma, k, _ = case
    result = minimize_trace(sigma, k)
    minimum = np.linalg.eigvalsh(sigma)[:k].sum()
    assert result.dual_value <= minimum + 1e-14 * np.linalg.norm(sigma)
    assert result.value - result.dual_value <= 6 * k * result.margin + 1e-300
    # the margin is of the size of rounding, m² u ‖Σ‖ at the worst
    assert result.margin <= 8 * (len(sigma) + 4) ** 2 * EPS["float64"] * np.linalg.norm(sigma) + 1e-299


def test_the_factorised_matrix_leaves_room_for_rounding(monkeypatch):
    """What Cholesky is shown lies below Σ + S - tI by more than forming and factorising it can round."""
    shown = []

    def look(ns, a, phi, d, shift):
        shown.append(a + (phi * d) @ phi.T - shift * np.eye(len(a)))
        return np.array(True)

    monkeypatch.setattr(certificate, "deflated_is_definite", look)
    m, k = 60, 10
    result = minimize_trace(np.eye(m) / 2, k)  # scaled by one; every eigenvalue of Σ + S - tI is the margin
    u = EPS["float64"] / 2
    found = result.margin - np.linalg.eigvalsh(shown[0])
    assert np.all(found >= 0.9 * ((k + 8) * u * np.linalg.norm(np.eye(m) / 2) + (m + 2) * u * np.trace(shown[0])))
    assert np.all(found <= result.margin / 3)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("m", "k"), [(12, 3), (200, 20), (700, 2)], ids=str)
def test_the_margin_covers_what_a_factorisation_of_an_indefinite_matrix_hides(dtype, m, k):
    """The least eigenvalue lies below zero by less than the rounding: Cholesky may succeed, and the shift must exceed that."""
    ns, u = numerics.Numerics(np, None), EPS[dtype] / 2
    gamma = (m + 2) * u
    sigma, q = spectrum(np.linspace(0.5, 1, m))
    phi, d = q[:, :k].astype(dtype), np.full(k, 0.25)
    shifts = 0.5 + np.array([1, 3, 10, 30, 100, 1000]) * u  # the deflated matrix is indefinite by so many u
    hidden = []
    for shift in shifts:
        deflated = (sigma.astype(dtype) + 0).copy()
        if solvers.deflated_is_definite(ns, deflated, phi, d * 0, np.float64(shift)):
            hidden.append(shift - 0.5)
    trace = np.trace(sigma) - m * 0.5
    assert max(hidden, default=0.0) <= gamma / (1 - gamma) * trace + (k + 8) * u * (np.linalg.norm(sigma) + 0.5)


@pytest.mark.parametrize("swapped", [0, 2, 4], ids="eigenpair {} missed".format)
@pytest.mark.parametrize("m", [20, 9], ids=["k < m / 2", "k > m / 2"])
def test_a_missed_eigenvalue_is_found(monkeypatch, swapped, m):
    """A solver that leaves one of the k smallest out: exact eigenvectors, orthonormal, and not the minimum."""
    k = 5
    honest = solvers.eigh

    def misses_one(ns, s, method):
        values, vectors = honest(ns, s)
        order = [i for i in range(m) if i != swapped] + [swapped]
        return values[order], vectors[:, order]

    monkeypatch.setattr(solvers, "eigh", misses_one)
    result = minimize_trace(wishart(m), k, method="syevd")
    assert result.residual < 1e-14
    assert not result.certified
    assert not result.value_certified
    assert result.reason


def test_wrong_eigenvectors_are_found(monkeypatch):
    honest = solvers.eigh

    def of_another_matrix(ns, s, method):
        values = honest(ns, s)[0]
        return values, honest(ns, s + 1e-6 * np.diag(np.arange(20.0)))[1]

    monkeypatch.setattr(solvers, "eigh", of_another_matrix)
    result = minimize_trace(wishart(20), 3, method="syevd")
    assert result.orthogonality < 1e-14
    assert result.residual > 1e-9
    assert result.subspace_error > 1e-8
    # within the margin, which the residual widens, the value may still be right; it is not the claimed precision
    assert result.margin > 1e-7


def test_the_davis_kahan_bound_holds():
    lam = np.concatenate([np.linspace(0, 1, 5), np.linspace(1.01, 2, 45)])
    sigma, q = spectrum(lam)
    result = minimize_trace(sigma, 5)
    assert sine(result.phi, q[:, :5]) <= result.subspace_error + 50 * EPS["float64"] * np.linalg.norm(sigma) / 0.01
    assert result.subspace_error < 1e-11
    assert minimize_trace(np.eye(6), 2).subspace_error == 2**0.5
    assert minimize_trace(wishart(6), 6).subspace_error == 0


def test_without_a_certificate():
    result = minimize_trace(wishart(20), 3, certify=False)
    assert (result.certified, result.value_certified) == (False, False)
    assert result.reason == "not asked for (certify=False)"
    assert np.isnan([result.residual, result.orthogonality, result.dual_value, result.margin]).all()
    assert result.value == pytest.approx(np.linalg.eigvalsh(wishart(20))[:3].sum())
    assert result.unique


# ---------------------------------------------------------------------------------------------------------- bad input
def asymmetric():
    a = np.eye(3)
    a[0, 2] = 0.25
    return a


def with_entry(value):
    a = np.eye(3)
    a[1, 2] = a[2, 1] = value
    return a


@pytest.mark.parametrize(
    ("sigma", "k", "error", "message"),
    [
        ([[1.0]], 1, TypeError, r"covariance: expected a NumPy, CuPy or torch array, got builtins\.list"),
        (np.eye(3, dtype=np.float16), 1, TypeError, r"covariance: .*got float16, whose 11 bits lose every eigenvalue"),
        (np.eye(3, dtype=np.int64), 1, TypeError, r"covariance: expected dtype float32, .*got int64"),
        (np.ones(3), 1, ValueError, r"covariance: expected at least 2 axes .*got shape \(3,\)"),
        (np.ones((2, 3)), 1, ValueError, r"covariance: expected square matrices .*got shape \(2, 3\)"),
        (np.ones((0, 0)), 1, ValueError, r"m >= 1, got shape \(0, 0\)"),
        (np.eye(3), 0, ValueError, r"k: expected 1 <= k <= m = 3, got 0"),
        (np.eye(3), 4, ValueError, r"k: expected 1 <= k <= m = 3, got 4"),
        (np.eye(3), 1.0, TypeError, r"k: expected an integer, got 1\.0"),
        (np.eye(3), True, TypeError, r"k: expected an integer, got True"),
        (asymmetric(), 1, ValueError, r"covariance: .*symmetric matrix, got max \|A - A\^T\| = 0\.25 where max"),
        (asymmetric() * 1j, 1, ValueError, r"covariance: expected a Hermitian matrix"),
        (with_entry(np.nan), 1, ValueError, r"covariance: expected finite .* nan at \[1, 2\] \(2 not finite\)"),
        (with_entry(np.inf), 1, ValueError, r"covariance: expected finite values, got inf at \[1, 2\]"),
        (np.stack([np.eye(3), asymmetric()]), 1, ValueError, r"= 0\.25 where"),
    ],
)
def test_errors(sigma, k, error, message):
    with pytest.raises(error, match=message):
        minimize_trace(sigma, k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lobpcg"}, r"method: expected one of auto, syevr, syevd, syevdx, syev_batched, got 'lobpcg'"),
        (
            {"method": "syevdx"},
            r"method: 'syevdx' runs on a GPU alone, and covariance lives on the host; use one of auto, syevr, syevd",
        ),
        ({"dtype": "float16"}, r"dtype: expected None, 'float64' or 'float32', got 'float16'"),
    ],
)
def test_errors_in_options(options, message):
    with pytest.raises(ValueError, match=message):
        minimize_trace(np.eye(3), 1, **options)


def test_bfloat16_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"got bfloat16, whose 8 bits lose every eigenvalue below 2\^-8 of the largest"):
        minimize_trace(torch.eye(3, dtype=torch.bfloat16), 1)


@pytest.mark.parametrize("dtype", [np.float32, "float32"])
def test_the_dtype_computed_in_can_be_named_in_any_way(dtype):
    assert minimize_trace(wishart(30), 2, dtype=dtype).residual > 1e-9
    torch = pytest.importorskip("torch")
    assert minimize_trace(wishart(30), 2, dtype=torch.float32).residual > 1e-9
    assert minimize_trace(wishart(30), 2, dtype=torch.float64).residual < 1e-14


def test_arrays_on_a_gpu_without_cupy_say_what_is_missing(monkeypatch):
    torch = pytest.importorskip("torch")

    class OnCuda(torch.Tensor):
        is_cpu, is_cuda, device = False, True, torch.device("cuda", 0)

    monkeypatch.setitem(sys.modules, "cupy", None)
    with (
        pytest.raises(dispatch.BackendError, match=r"covariance: .*solved by CuPy.*pip install 'hw3gpu\[cuda12\]'"),
        numerics.numerics(torch.eye(3).as_subclass(OnCuda), "covariance"),
    ):
        pytest.fail("the block was entered")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("dtype", "unit"), [("float64", 1e308), ("float32", 2e38)])
def test_a_value_beyond_its_dtype_is_infinite_and_not_certified(dtype, unit):
    found = minimize_trace((np.diag([1.0, 1.1, 1.7]) * unit).astype(dtype), 2)
    assert found.value == np.inf
    assert not found.certified
    assert not found.value_certified
    assert "beyond the largest number" in found.reason
    assert minimize_trace((np.diag([1.0, 1.1, 1.7]) * unit / 3).astype(dtype), 2).certified
