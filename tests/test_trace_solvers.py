"""S9: the solvers of the trace problem, and which is chosen; cuSOLVER through a stand-in for nvmath-python."""

from __future__ import annotations

import ctypes
import re
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import fake_cupy
import numpy as np
import pytest
import scipy.linalg.lapack
from fake_cupy import cupy
from matrices import EPS, check_against_reference, sine, wishart

from hw3gpu import minimize_trace
from hw3gpu._array_functions import trace
from hw3gpu._core import dispatch
from hw3gpu._linalg import cusolver as _cusolver
from hw3gpu._linalg import numerics, solvers


def test_the_method_chosen():
    cases = [(30, 1), (128, 8), (128, 9), (256, 32), (256, 33)]
    chosen = [minimize_trace(np.diag(np.arange(float(m))), k, certify=False).method for m, k in cases]
    assert chosen == ["syevd", "syevr", "syevd", "syevr", "syevd"]
    stack = np.broadcast_to(np.diag(np.arange(64.0)), (40, 64, 64))
    assert minimize_trace(stack, 8, certify=False).method == "syevr"
    assert minimize_trace(stack, 9, certify=False).method == "syevd"
    stack = np.broadcast_to(np.diag(np.arange(32.0)), (256, 32, 32))
    assert [minimize_trace(stack, k, certify=False).method for k in (2, 3)] == ["syevr", "syevd"]
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


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_reports_matrices_without_a_factorisation(threads, monkeypatch):
    kernel_threads, batch = dispatch.threads, 40
    monkeypatch.setattr(kernel_threads, "_setting", threads)
    monkeypatch.setattr(kernel_threads, "BYTES_PER_THREAD", 1)
    monkeypatch.setattr(numerics, "_WORTH_THREADS", 1)
    a = np.stack([np.eye(5), np.diag([1.0, 1, -1, 1, 1]), np.diag([1.0, 1, -1, 1, 1]), 2 * np.eye(5)])
    phi, d = np.zeros((4, 5, 2)), np.ones((4, 2))
    phi[1, 2, 1] = 1.5  # lifts -1 to 1.25
    a, phi, d, shift = (np.concatenate([x] * (batch // 4)) for x in (a, phi, d, np.array([0.5, 0.5, 0.5, 2.5])))
    definite = solvers.deflated_is_definite(numerics.Numerics(np, None), a, phi, d, shift)
    assert definite.tolist() == [True, True, False, False] * (batch // 4)


def test_a_matrix_that_is_not_solved_is_reported():
    stack = np.stack([np.diag([3.0, 1, 2]), np.full((3, 3), np.nan)])
    values, vectors, info = dispatch.eigh.smallest(stack, 2)
    assert info[0] == 0
    np.testing.assert_allclose(values[0], [1, 2])
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
    values, vectors, method = solvers.smallest(numerics.Numerics(np, None), sigma, 60, "auto")
    count = 61 if hasattr(scipy.linalg.lapack, "dstevd") else 300  # an old SciPy has no stevd
    assert (values.shape, vectors.shape, method) == ((300,), (300, count), "syevd")
    result = minimize_trace(sigma, 60)
    check_against_reference(result, sigma, 60, 10 * 300 * EPS["float64"])
    assert result.certified


def test_the_solver_s_failure_is_an_error(monkeypatch):
    def returns_nan(s):
        return np.full(s.shape[:-1], np.nan), np.full(s.shape, np.nan)

    monkeypatch.setattr(np.linalg, "eigh", returns_nan)
    with pytest.raises(np.linalg.LinAlgError, match="values that are not finite"):
        minimize_trace(wishart(5), 2)


def test_zero_matrices_and_those_without_eigenvectors_on_a_gpu(monkeypatch):
    """The stand-in, as cuSOLVER, makes NaN of zero matrices."""
    fake_cupy.install(monkeypatch)
    s = np.stack([wishart(4, seed=i) for i in range(7)])
    s[5] = 0
    ns = numerics.Numerics(cupy, None)
    values, vectors = (a.get() for a in solvers._eigh_on_gpu(ns, cupy.asarray(s)))
    np.testing.assert_allclose((vectors * values[:, None, :]) @ vectors.swapaxes(1, 2), s, atol=1e-14)
    np.testing.assert_array_equal(values[5], np.zeros(4))
    monkeypatch.setattr(cupy.linalg, "eigh", lambda s: (cupy.zeros(s.shape[:-1]), cupy.full(s.shape, np.nan)))
    assert np.isnan(solvers._eigh_on_gpu(ns, cupy.asarray(s))[0].get()).all()


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
        assert (handle, stream) == (77, cupy.cuda.get_current_stream().ptr)
        assert stream

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
    fake_cupy.install(monkeypatch)
    stand_in, nvmath, bindings = StandInForCuSolver(), ModuleType("nvmath"), ModuleType("nvmath.bindings")
    nvmath.bindings, bindings.cusolverDn = bindings, stand_in
    for name, module in (("nvmath", nvmath), ("nvmath.bindings", bindings), ("nvmath.bindings.cusolverDn", stand_in)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_cusolver, "_handles", SimpleNamespace())
    _cusolver.refusal.cache_clear()
    with cupy.cuda.Stream():
        yield stand_in
    _cusolver.refusal.cache_clear()


def smallest(matrices, k, method):
    """What `_linalg.solvers.smallest` finds on a GPU, after the checks that wait for it."""
    ns = numerics.Numerics(cupy, None)
    values, vectors, ran = solvers.smallest(ns, cupy.asarray(matrices), k, method)
    ns.fetch()
    return values.get(), vectors.get(), ran


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
        values, vectors, method = smallest(given, k, "auto")
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
    values, vectors, _ = smallest(s, 2, "syevdx")  # forced: one after another
    np.testing.assert_allclose(values, expected[0][:, :3], atol=tolerance)
    assert np.array_equal(s, before)


def test_cusolvers_stacks_come_in_parts_that_it_can_count(cusolver, monkeypatch):
    monkeypatch.setattr(_cusolver, "_BATCH_ELEMENTS", 3 * 4 * 4)
    s = np.stack([wishart(4, seed=i) for i in range(7)])
    values, vectors, _ = smallest(s, 4, "syev_batched")
    assert cusolver.calls == [("xsyev_batched", 4, 3), ("xsyev_batched", 4, 3), ("xsyev_batched", 4, 1)]
    np.testing.assert_allclose((vectors * values[:, None, :]) @ vectors.swapaxes(1, 2), s, atol=1e-14)


def test_cusolvers_dev_info_is_looked_at(cusolver):
    cusolver.fails = True
    stack = np.stack([wishart(9)] * 4)
    for matrices, method, message in (
        (wishart(9), "syevdx", r"Xsyevdx did not converge for 1 of 1 matrices \(devInfo 3\)"),
        (stack, "syevdx", r"Xsyevdx did not converge for 4 of 4 matrices \(devInfo 3\)"),
        (stack, "syev_batched", r"XsyevBatched did not converge for 1 of 4 matrices \(devInfo 3\)"),
    ):
        with pytest.raises(np.linalg.LinAlgError, match=message):
            smallest(matrices, 1, method)


def test_a_gpu_solver_without_nvmath_is_refused_with_the_extra_s_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvmath", None)
    _cusolver.refusal.cache_clear()
    with pytest.raises(dispatch.BackendError, match=r"method: 'syevdx' needs nvmath-python .*hw3gpu\[nvmath\]"):
        solvers.check_method("syevdx", on_host=False)
    with pytest.raises(
        ValueError, match="'syevr' runs on the host alone, and covariance lives on a GPU; use one of auto, syevd"
    ):
        solvers.check_method("syevr", on_host=False)
    assert solvers._auto_on_gpu(np.zeros((3, 3)), 1) == "syevd"
    _cusolver.refusal.cache_clear()


@pytest.mark.parametrize(
    "module",
    [
        "_array_functions/points",
        "_array_functions/trace",
        "_linalg/solvers",
        "_linalg/numerics",
        "_linalg/certificate",
        "_linalg/cusolver",
    ],
)
def test_cupy_has_every_function_that_the_array_namespace_is_asked_for(module):
    real = pytest.importorskip("cupy", reason="CuPy is not installed")
    source = (Path(trace.__file__).parents[1] / f"{module}.py").read_text()
    asked = set(re.findall(r"\bxp\.((?:linalg\.)?\w+)", source))
    assert asked
    for name in asked:
        assert attrgetter(name)(real)
