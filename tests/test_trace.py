"""S9: the trace minimum, its diagnostics and its certificate (`hw3gpu.trace`)."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import scipy.linalg

from hw3gpu import _arrays, _certificate, _cusolver, _linalg, reference, trace
from hw3gpu.trace import minimize_trace, minor_components

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


@pytest.fixture(params=MATRICES, ids=list(MATRICES))
def case(request):
    return (*MATRICES[request.param], request.param in DEGENERATE)


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
    m, k = 1024, 8
    sigma = spectrum(np.logspace(-5, 0, m))[0].astype(np.float32)
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
    signed = _linalg.fix_signs(_linalg.Numerics(np, None), np.array([[-1.0, 1.0, 0.0], [1.0, -1.0, -2.0]]))
    np.testing.assert_array_equal(signed, [[1.0, 1.0, 0.0], [-1.0, -1.0, 2.0]])
    phi = minimize_trace(wishart(12), 12).phi
    assert np.all(phi[abs(phi).argmax(axis=0), range(12)] > 0)


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

    monkeypatch.setattr(_certificate, "deflated_is_definite", look)
    m, k = 60, 10
    result = minimize_trace(np.eye(m) / 2, k)  # scaled by one; every eigenvalue of Σ + S - tI is the margin
    u = EPS["float64"] / 2
    room = result.margin - np.linalg.eigvalsh(shown[0])
    assert np.all(room >= 0.9 * ((k + 8) * u * np.linalg.norm(np.eye(m) / 2) + (m + 2) * u * np.trace(shown[0])))
    assert np.all(room <= result.margin / 3)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("m", "k"), [(12, 3), (200, 20), (700, 2)], ids=str)
def test_the_margin_covers_what_a_factorisation_of_an_indefinite_matrix_hides(dtype, m, k):
    """The least eigenvalue lies below zero by less than the rounding: Cholesky may succeed, and the shift must exceed that."""
    ns, u = _linalg.Numerics(np, None), EPS[dtype] / 2
    gamma = (m + 2) * u
    sigma, q = spectrum(np.linspace(0.5, 1, m))
    phi, d = q[:, :k].astype(dtype), np.full(k, 0.25)
    shifts = 0.5 + np.array([1, 3, 10, 30, 100, 1000]) * u  # the deflated matrix is indefinite by so many u
    hidden = []
    for shift in shifts:
        deflated = (sigma.astype(dtype) + 0).copy()
        if _linalg.deflated_is_definite(ns, deflated, phi, d * 0, np.float64(shift)):
            hidden.append(shift - 0.5)
    trace = np.trace(sigma) - m * 0.5
    assert max(hidden, default=0.0) <= gamma / (1 - gamma) * trace + (k + 8) * u * (np.linalg.norm(sigma) + 0.5)


@pytest.mark.parametrize("swapped", [0, 2, 4], ids="eigenpair {} missed".format)
@pytest.mark.parametrize("m", [20, 9], ids=["k < m / 2", "k > m / 2"])
def test_a_missed_eigenvalue_is_found(monkeypatch, swapped, m):
    """A solver that leaves one of the k smallest out: exact eigenvectors, orthonormal, and not the minimum."""
    k = 5
    honest = _linalg.eigh

    def misses_one(ns, s, method):
        values, vectors = honest(ns, s)
        order = [i for i in range(m) if i != swapped] + [swapped]
        return values[order], vectors[:, order]

    monkeypatch.setattr(_linalg, "eigh", misses_one)
    result = minimize_trace(wishart(m), k, method="syevd")
    assert result.residual < 1e-14
    assert not result.certified
    assert not result.value_certified
    assert result.reason


def test_wrong_eigenvectors_are_found(monkeypatch):
    honest = _linalg.eigh

    def of_another_matrix(ns, s, method):
        values = honest(ns, s)[0]
        return values, honest(ns, s + 1e-6 * np.diag(np.arange(20.0)))[1]

    monkeypatch.setattr(_linalg, "eigh", of_another_matrix)
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


# --------------------------------------------------------------------------------------------------------- the solvers
def test_the_method_chosen():
    cases = [(30, 1), (128, 8), (128, 9), (256, 32), (256, 33)]
    chosen = [minimize_trace(np.diag(np.arange(float(m))), k, certify=False).method for m, k in cases]
    assert chosen == ["syevd", "syevr", "syevd", "syevr", "syevd"]
    stack = np.broadcast_to(np.diag(np.arange(64.0)), (40, 64, 64))
    assert minimize_trace(stack, 8, certify=False).method == "syevr"
    assert minimize_trace(stack, 9, certify=False).method == "syevd"
    assert minimize_trace(1j * np.zeros((80, 80)), 2, certify=False).method == "heevr"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", ["syevr", "syevd"])
def test_a_large_batch_in_threads_gives_what_one_matrix_gives(dtype, method):
    sigma = np.stack([wishart(64, seed=i) for i in range(40)])
    sigma[7], sigma[8] = np.eye(64), 0.0
    result = minimize_trace(sigma, 3, dtype=dtype, method=method)
    assert result.method == method
    assert result.value_certified.all()
    assert not result.certified[7:9].any()
    assert np.array_equal(result.certified, result.gap > 2 * result.margin)
    assert result.certified.sum() == 38 or dtype == "float32"
    for i in (0, 7, 8, 39):
        single = minimize_trace(sigma[i], 3, method=method, dtype=dtype)
        assert result.value[i] == pytest.approx(single.value, rel=40 * EPS[dtype], abs=1e-300)
        if single.unique:
            assert sine(result.phi[i], single.phi) < 1e4 * EPS[dtype]
    assert np.array_equal(minimize_trace(sigma, 3, dtype=dtype, method=method).phi, result.phi)


def test_a_large_batch_reports_matrices_without_a_factorisation():
    kernels = _arrays.kernels("eigh", "cpu")
    a = np.stack([np.eye(5), np.diag([1.0, 1, -1, 1, 1]), np.diag([1.0, 1, -1, 1, 1]), 2 * np.eye(5)])
    b = np.zeros((4, 2, 5))
    b[1, 1, 2] = 1.5  # lifts -1 to 1.25
    assert kernels.deflated_is_definite(a, b, np.array([0.5, 0.5, 0.5, 2.5])).tolist() == [True, True, False, False]
    for solve, all_values in ((kernels.smallest, [1, 2]), (kernels.smallest_of_all, [1, 2, 3])):
        values, vectors, info = solve(np.stack([np.diag([3.0, 1, 2]), np.full((3, 3), np.nan)]), 2)
        assert info[0] == 0
        np.testing.assert_allclose(values[0], all_values)
        np.testing.assert_allclose(abs(vectors[0]), [[0, 0], [1, 0], [0, 1]])
        assert info[1] != 0 or not np.isfinite(values[1]).all()


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "Hermitian"])
@pytest.mark.parametrize("k", [5, 30, 64])
def test_every_size_of_k_on_a_stack_in_threads(complex_, k):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((40, 80, 64)) + (1j * rng.standard_normal((40, 80, 64)) if complex_ else 0)
    sigma = z.conj().swapaxes(-1, -2) @ z / 80
    result = minimize_trace(sigma, k)
    assert result.method == ("he" if complex_ else "sy") + ("evr" if k == 5 else "evd")
    assert result.certified.all()
    assert result.residual.max() < 1e-13
    values, vectors = np.linalg.eigh(sigma)
    np.testing.assert_allclose(result.eigenvalues, values[:, :k], atol=1e-13)
    for i in (0, 39):
        assert sine(result.phi[i], vectors[i, :, :k]) < 1e-10


def test_divide_and_conquer_turns_back_no_more_vectors_than_are_asked_for():
    sigma = wishart(300)
    values, vectors, method = _linalg.smallest(_linalg.Numerics(np, None), sigma, 60, "auto")
    assert (values.shape, vectors.shape, method) == ((300,), (300, 61), "syevd")
    result = minimize_trace(sigma, 60)
    check_against_reference(result, sigma, 60, 10 * 300 * EPS["float64"])
    assert result.certified


def test_the_solver_s_failure_is_an_error(monkeypatch):
    def returns_nan(s):
        return np.full(s.shape[:-1], np.nan), np.full(s.shape, np.nan)

    monkeypatch.setattr(np.linalg, "eigh", returns_nan)
    with pytest.raises(np.linalg.LinAlgError, match="values that are not finite"):
        minimize_trace(wishart(5), 2)


def test_zero_matrices_and_large_batches_on_a_gpu(monkeypatch):
    """The path of CuPy arrays, with NumPy in its place and a solver that makes NaN of zero matrices."""
    honest, calls = np.linalg.eigh, []

    def cusolver(s):
        calls.append(len(s))
        values, vectors = honest(s)
        zero = ~s.any(axis=(-2, -1))
        return np.where(zero[:, None], np.nan, values), np.where(zero[:, None, None], np.nan, vectors)

    monkeypatch.setattr(np.linalg, "eigh", cusolver)
    monkeypatch.setattr(_linalg, "_GPU_BATCH_ELEMENTS", 3 * 4 * 4)
    s = np.stack([wishart(4, seed=i) for i in range(7)])
    s[5] = 0
    values, vectors = _linalg._eigh_on_gpu(np, s)
    assert calls == [3, 3, 1]
    np.testing.assert_allclose((vectors * values[:, None, :]) @ vectors.swapaxes(1, 2), s, atol=1e-14)
    np.testing.assert_array_equal(values[5], np.zeros(4))
    s[2] = np.nan
    monkeypatch.setattr(np.linalg, "eigh", lambda s: (np.zeros(s.shape[:-1]), np.full(s.shape, np.nan)))
    assert np.isnan(_linalg._eigh_on_gpu(np, s)[0]).all()


class StandInForCuPy:
    """NumPy in CuPy's place, with what `_cusolver` asks of the device."""

    cuda = SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0), get_current_stream=lambda: SimpleNamespace(ptr=1234))

    def __getattr__(self, name):
        return getattr(np, name)


def memory(address, shape, dtype):
    """The array that lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class StandInForCuSolver(ModuleType):
    """nvmath.bindings.cusolverDn in NumPy: arguments as NVIDIA documents them, matrices by columns, lower triangles alone."""

    DTYPES: ClassVar = {0: np.float32, 1: np.float64, 4: np.complex64, 5: np.complex128}

    def __init__(self):
        super().__init__("cusolverDn")
        self.calls, self.fails = [], False

    def create(self):
        return 77

    def create_params(self):
        return 88

    def set_stream(self, handle, stream):
        assert (handle, stream) == (77, 1234)

    def _solved(self, a, n):
        lower = np.tril(a.T)  # what lies there, by columns
        full = lower + np.tril(lower, -1).conj().T
        return np.linalg.eigh(full)

    def xsyevdx_buffer_size(self, handle, params, jobz, range_, uplo, n, dta, a, lda, vl, vu, il, iu, meig, dtw, w, compute):
        assert (handle, params, jobz, range_, uplo, lda) == (77, 88, 1, 1002, 0, n)
        assert 0 not in (a, vl, vu, meig, w)
        return 40, 24

    def xsyevdx(
        self, handle, params, jobz, range_, uplo, n, dta, a, lda, vl, vu, il, iu, dtw, w, compute, dev, d, host, h, info
    ):
        assert (d, h, il, compute) == (40, 24, 1, dta)
        matrix = memory(a, (n, n), self.DTYPES[dta])
        values, vectors = self._solved(matrix, n)
        matrix[:] = np.nan
        matrix[:iu] = vectors[:, :iu].T
        memory(w, (n,), self.DTYPES[dtw])[:iu] = values[:iu]
        memory(info, (1,), np.int32)[:] = 3 if self.fails else 0
        self.calls.append(("xsyevdx", n, iu))
        return iu

    def xsyev_batched_buffer_size(self, handle, params, jobz, uplo, n, dta, a, lda, dtw, w, compute, batch):
        assert (handle, params, jobz, uplo, lda) == (77, 88, 1, 0, n)
        return 16 * batch, 0

    def xsyev_batched(self, handle, params, jobz, uplo, n, dta, a, lda, dtw, w, compute, dev, d, host, h, info, batch):
        assert (d, h) == (16 * batch, 0)
        assert not memory(dev, (d,), np.uint8).any()
        matrices, values = memory(a, (batch, n, n), self.DTYPES[dta]), memory(w, (batch, n), self.DTYPES[dtw])
        for matrix, value in zip(matrices, values, strict=True):
            if not matrix.any():
                matrix[:], value[:] = np.nan, np.nan
            else:
                value[:], vectors = self._solved(matrix, n)
                matrix[:] = vectors.T
        memory(info, (batch,), np.int32)[:] = [3 if self.fails and i == 1 else 0 for i in range(batch)]
        self.calls.append(("xsyev_batched", n, batch))


@pytest.fixture
def cusolver(monkeypatch):
    """nvmath-python, of which only the part used is there; its real one has never been called by these tests."""
    stand_in, nvmath, bindings = StandInForCuSolver(), ModuleType("nvmath"), ModuleType("nvmath.bindings")
    nvmath.bindings, bindings.cusolverDn = bindings, stand_in
    for name, module in (("nvmath", nvmath), ("nvmath.bindings", bindings), ("nvmath.bindings.cusolverDn", stand_in)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_cusolver, "_handles", SimpleNamespace())
    _cusolver.refusal.cache_clear()
    yield stand_in
    _cusolver.refusal.cache_clear()


def on_a_stand_in():
    return _linalg.Numerics(StandInForCuPy(), None)


@pytest.mark.parametrize("dtype", ["float64", "float32", "complex128"])
def test_cusolvers_range_and_batches_through_nvmath(cusolver, dtype):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((5, 30, 12)) + (1j * rng.standard_normal((5, 30, 12)) if dtype == "complex128" else 0)
    s = (z.conj().swapaxes(-1, -2) @ z / 30).astype(dtype)
    s[3] = 0
    before, prefix = s.copy(), "he" if dtype == "complex128" else "sy"
    expected = np.linalg.eigh(s.astype("complex128" if dtype == "complex128" else "float64"))
    tolerance = 1e3 * EPS["float32" if dtype == "float32" else "float64"]
    for given, k, ran, call in (
        (s[0], 2, "evdx", ("xsyevdx", 12, 3)),
        (s[0], 4, "evd", None),
        (s[3], 2, "evdx", ("xsyevdx", 12, 3)),
        (s, 2, "ev_batched", ("xsyev_batched", 12, 5)),
    ):
        cusolver.calls.clear()
        values, vectors, method = _linalg.smallest(on_a_stand_in(), given, k, "auto")
        assert method == prefix + ran
        assert cusolver.calls == ([call] if call else [])
        count = values.shape[-1]
        exact = expected[0][..., :count] if given is s else expected[0][3 if given is s[3] else 0, :count]
        exact = exact if given.any() else np.zeros(count)
        np.testing.assert_allclose(values, exact, atol=tolerance)
        product = given @ vectors
        np.testing.assert_allclose(product, vectors * values[..., None, : vectors.shape[-1]], atol=tolerance)
        gram = vectors.conj().swapaxes(-1, -2) @ vectors
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(vectors.shape[-1]), gram.shape), atol=tolerance)
    values, vectors, _ = _linalg.smallest(on_a_stand_in(), s, 2, "syevdx")  # forced: one after another
    np.testing.assert_allclose(values, expected[0][:, :3], atol=tolerance)
    assert np.array_equal(s, before)


def test_cusolvers_stacks_come_in_parts_that_it_can_count(cusolver, monkeypatch):
    monkeypatch.setattr(_cusolver, "_BATCH_ELEMENTS", 3 * 4 * 4)
    s = np.stack([wishart(4, seed=i) for i in range(7)])
    values, vectors = _linalg.eigh(on_a_stand_in(), s, "syev_batched")
    assert cusolver.calls == [("xsyev_batched", 4, 3), ("xsyev_batched", 4, 3), ("xsyev_batched", 4, 1)]
    np.testing.assert_allclose((vectors * values[:, None, :]) @ vectors.swapaxes(1, 2), s, atol=1e-14)


def test_cusolvers_dev_info_is_looked_at(cusolver):
    cusolver.fails = True
    with pytest.raises(np.linalg.LinAlgError, match=r"Xsyevdx did not converge for 1 of 1 matrices \(devInfo 3\)"):
        _linalg.smallest(on_a_stand_in(), wishart(9), 1, "syevdx")
    with pytest.raises(np.linalg.LinAlgError, match=r"XsyevBatched did not converge for 1 of 4 matrices \(devInfo 3\)"):
        _linalg.smallest(on_a_stand_in(), np.stack([wishart(9)] * 4), 1, "syev_batched")


def test_a_gpu_solver_without_nvmath_is_refused_with_the_extra_s_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvmath", None)
    _cusolver.refusal.cache_clear()
    with pytest.raises(_arrays.BackendError, match=r"method: 'syevdx' needs nvmath-python .*hw3gpu\[nvmath\]"):
        _linalg.check_method("syevdx", on_host=False)
    with pytest.raises(
        ValueError, match="'syevr' runs on the host alone, and covariance lives on a GPU; use one of auto, syevd"
    ):
        _linalg.check_method("syevr", on_host=False)
    assert _linalg._auto_on_gpu(np.zeros((3, 3)), 1) == "syevd"
    _cusolver.refusal.cache_clear()


@pytest.mark.parametrize("room", ["points", "trace", "_linalg", "_certificate", "_cusolver"])
def test_cupy_has_every_function_that_the_array_namespace_is_asked_for(room):
    cupy = pytest.importorskip("cupy")
    source = Path(trace.__file__).with_name(f"{room}.py").read_text()
    asked = set(re.findall(r"\bxp\.((?:linalg\.)?\w+)", source))
    assert len(asked) >= 4
    for name in asked:
        assert attrgetter(name)(cupy)


def test_the_benchmark_says_which_promise_was_not_kept():
    from benchmarks import linalg

    case = linalg.Case(30, 3, (*linalg.FEW, *linalg.MANY, linalg.CERTIFICATE))
    linalg.verify(case, case.matrices())
    with pytest.raises(AssertionError, match="not certified"):
        linalg.verify(case, np.eye(30))
    seconds = {"numpy": 10.0, "torch": 12.0, "scipy": 3.0, "uncertified": 3.5, "certified": 4.5}
    short = linalg.Measurement(case, seconds).shortfalls()
    assert short == [
        "uncertified: 0.86 times as fast as numpy and torch and scipy, promised 0.91",
        "certificate 29 % of the solve, promised 25 %",
    ]
    assert linalg.Measurement(case, seconds | {"scipy": 4.0, "certified": 4.3}).shortfalls() == []


# ------------------------------------------------------------------------------------------------- minor_components
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
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        sigma = torch.empty(3, 3, device="cuda")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(_arrays.BackendError, match=r"covariance: .*solved by CuPy.*pip install 'hw3gpu\[cuda12\]'"):
        minimize_trace(sigma, 1)
    with pytest.raises(TypeError, match="covariance: expected a tensor on a CPU or CUDA device, got meta"):
        minimize_trace(torch.empty(3, 3, device="meta"), 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("dtype", "unit"), [("float64", 1e308), ("float32", 2e38)])
def test_a_value_beyond_its_dtype_is_infinite_and_not_certified(dtype, unit):
    found = minimize_trace((np.diag([1.0, 1.1, 1.7]) * unit).astype(dtype), 2)
    assert found.value == np.inf
    assert not found.certified
    assert not found.value_certified
    assert "beyond the largest number" in found.reason
    assert minimize_trace((np.diag([1.0, 1.1, 1.7]) * unit / 3).astype(dtype), 2).certified
