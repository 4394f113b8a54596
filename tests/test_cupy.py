"""CuPy arrays, on the stand-in of tests/fake_cupy.py, and the stand-in beside the real CuPy."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
import torch
from array_functions import CALLS, leaves, operands
from fake_cupy import cupy

import hw3gpu
from hw3gpu._cli.arrays import to_numpy
from hw3gpu._core import dispatch

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


# ------------------------------------------------------------------------------------------ the stand-in is CuPy's
def parameters(f):
    """[(name, kind, default)]; CuPy's compiled functions and its ufuncs have theirs in the first line of their text."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):
        line = f.__doc__.strip().splitlines()[0].partition(" ->")[0].removeprefix("_ndarray_base.")
        for written, meant in (("\\*", "*"), ("Py_ssize_t ", ""), ("int ", ""), ("tuple ", "")):
            line = line.replace(written, meant)
        signature = fake_cupy.parse(line.replace("[, out1, out2], / [, out=(None, None)]", ", /, out=None"))[1]
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


SPECIAL = ("__array__", "__array_function__", "__array_ufunc__", "__dlpack__", "__dlpack_device__", "__cuda_array_interface__")


def compare(ours, theirs, path):
    """Each name of `ours` is one of `theirs`, and a function's parameters are the same."""
    for name in [name for name in vars(ours) if not name.startswith("_") or name in SPECIAL]:
        assert hasattr(theirs, name), f"CuPy has no {path}.{name}"
        value = vars(ours)[name]
        if callable(value) and name != "ndarray":
            assert parameters(value) == parameters(getattr(theirs, name)), f"{path}.{name}"


def test_the_stand_in_has_nothing_that_cupy_has_not():
    real = pytest.importorskip("cupy", reason="CuPy is not installed, and so the stand-in is not compared with it")
    import cupyx

    for path in ("", "linalg", "ndarray", "cuda", "cuda.runtime", "cuda.Device", "cuda.Stream"):
        ours, theirs = cupy, real
        for part in filter(None, path.split(".")):
            ours, theirs = getattr(ours, part), getattr(theirs, part)
        compare(ours, theirs, f"cupy.{path}")
    stream = real.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, 16)))
    assert (stream.ptr, stream.device_id, real.cuda.Device(1).id) == (16, -1, 1)
    assert parameters(fake_cupy.cupyx.errstate) == parameters(cupyx.errstate)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (TypeError, lambda x: np.asarray(x)),
        (TypeError, lambda x: x + np.ones(2)),
        (TypeError, lambda x: np.ones(2) + x),
        (TypeError, lambda x: np.sum(x)),
        (TypeError, lambda x: cupy.where(x > 0, x, np.zeros(2))),
        (TypeError, lambda x: x.__setitem__(0, np.ones(()))),
        (TypeError, lambda x: cupy.zeros(2, device=0)),
        (ValueError, lambda x: cupy.asarray(np.array([None]))),
        (BufferError, lambda x: np.from_dlpack(x[::-1])),
        (AttributeError, lambda x: cupy.nanmax),
    ],
)
def test_the_stand_in_refuses_what_cupy_refuses(stand_in, error, call):
    x = cupy.asarray(np.ones(2))
    with pytest.raises(error):
        call(x)
    assert not stand_in.copies


# ------------------------------------------------------------------------------------------------- array functions
def test_an_array_comes_to_the_host_as_float64(stand_in):
    x = to_numpy(cupy.asarray(np.arange(3, dtype=np.float32)))
    assert x.dtype == np.float64
    assert x.tolist() == [0.0, 1.0, 2.0]


def test_every_array_function_is_tried():
    others = {"BackendError", "BatchNorm", "BatchNormGradients", "Moments", "SoftmaxCrossEntropy", "TraceMinimum"}
    others |= {"distributed", "functional", "nn", "empty_cache", "use_backend", "Explanation", "explain", "patch_transformers"}
    others |= {name for name in hw3gpu.__all__ if name.startswith("conv")}
    assert set(hw3gpu.__all__) - others <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_the_results_are_numpys_on_the_device_and_stream_of_the_argument(stand_in, rng, name):
    """The arguments are on device 1, whose stream is the caller's, while device 0 is current."""
    arrays = operands(rng)
    expected = leaves(CALLS[name](hw3gpu, arrays))
    with cupy.cuda.Device(1):
        given = {key: cupy.asarray(x.copy()) for key, x in arrays.items()}
        stream = cupy.cuda.Stream()
    with cupy.cuda.Device(1), stream, cupy.cuda.Device(0):
        result = leaves(CALLS[name](hw3gpu, given))
        assert stand_in.runs
        assert {(run.device, run.stream) for run in stand_in.runs} == {(1, stream.ptr)}
    assert stand_in.current == 0
    assert any(isinstance(r, cupy.ndarray) for r in result)
    for ours, theirs in zip(result, expected, strict=True):
        if isinstance(ours, cupy.ndarray):
            assert ours.device.id == 1
            assert ours.dtype == theirs.dtype
            ours = ours.get()
        if not isinstance(ours, (str, type(None))):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    for key, x in arrays.items():
        np.testing.assert_array_equal(given[key].get(), x)


@pytest.mark.parametrize("name", CALLS)
def test_negative_strides(stand_in, rng, name):
    """DLPack with a negative stride ends the process in torch; the kernels get a copy."""
    arrays = operands(rng)
    given = {key: cupy.asarray(np.flip(x).copy())[(slice(None, None, -1),) * x.ndim] for key, x in arrays.items()}
    assert given["x"].strides[0] < 0
    for ours, theirs in zip(leaves(CALLS[name](hw3gpu, given)), leaves(CALLS[name](hw3gpu, arrays)), strict=True):
        if isinstance(ours, cupy.ndarray):
            np.testing.assert_allclose(ours.get(), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("gamma", lambda here, there: hw3gpu.batch_norm(here, there[0])),
        ("mean", lambda here, there: hw3gpu.batch_norm_backward(here, here, there[0], here[0])),
        ("dy", lambda here, there: hw3gpu.softmax_backward(there, here)),
        ("y", lambda here, there: hw3gpu.cross_entropy(there, here)),
        ("y", lambda here, there: hw3gpu.softmax_cross_entropy(here, there)),
        ("mean", lambda here, there: hw3gpu.points_with_moments(there[0], here)),
        ("points", lambda here, there: hw3gpu.MomentAccumulator().update(here).update(there)),
    ],
)
def test_arrays_of_two_devices_are_refused(stand_in, name, call):
    here = cupy.asarray(np.eye(3))
    with cupy.cuda.Device(1):
        there = cupy.asarray(np.eye(3))
    with pytest.raises(ValueError, match=rf"{name}: expected the device of [\w ]+, <CUDA Device 0>, got <CUDA Device 1>"):
        call(here, there)


# --------------------------------------------------------------------------------------------- the eigensolvers on a GPU
def wishart(*shape):
    z = np.random.default_rng(0).standard_normal(shape)
    return z.swapaxes(-1, -2) @ z / shape[-2]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: hw3gpu.minimize_trace(x, 2),
        lambda x: hw3gpu.minimize_trace(x, 6),
        lambda x: hw3gpu.minimize_trace(x, 7, largest=True),
        lambda x: hw3gpu.minimize_trace(x, 2, certify=False),
        lambda x: hw3gpu.minor_components(x, 2),
        lambda x: hw3gpu.minor_components(x[..., :4, :], 5, largest=True),
    ],
    ids=["k < m / 2", "k > m / 2", "k = m", "no certificate", "components", "few points"],
)
@pytest.mark.parametrize("shape", [(9, 7), (5, 9, 7)], ids=["matrix", "stack"])
def test_all_that_a_call_reports_comes_to_the_host_in_one_copy(stand_in, shape, call):
    sigma = wishart(*shape)
    found, expected = call(cupy.asarray(sigma)), call(sigma)
    assert len(stand_in.copies) == 1
    for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
        if isinstance(ours, cupy.ndarray):
            np.testing.assert_allclose(ours.get(), theirs, rtol=1e-9, atol=1e-12)
        elif not isinstance(ours, str):
            assert type(ours) is type(theirs)
            assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)
    assert np.array_equal(found.certified, expected.certified)
    assert np.array_equal(found.reason, expected.reason)


def test_points_ask_once_for_the_rank(stand_in):
    sigma = cupy.asarray(np.diag([2.0, 1.0, 0.0]))
    assert hw3gpu.points_with_moments(cupy.asarray(np.zeros(3)), sigma).shape == (3, 3)
    assert len(stand_in.copies) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, bad: hw3gpu.minimize_trace(bad(x, np.nan), 2), r"covariance: expected finite values, got nan at \[1, 2\]"),
        (lambda x, bad: hw3gpu.minimize_trace(bad(x, np.inf), 2), r"covariance: expected finite values, got inf at \[1, 2\]"),
        (lambda x, bad: hw3gpu.minimize_trace(bad(x, 9.0), 2), r"covariance: expected a symmetric matrix, got max .* where"),
        (
            lambda x, bad: hw3gpu.minor_components(bad(x, np.nan), 2),
            r"points: expected finite values, got nan at \[1, 2\]",
        ),
        (lambda x, bad: hw3gpu.points_with_moments(x[0], bad(x, np.nan)), r"covariance: expected finite values, got nan"),
        (lambda x, bad: hw3gpu.points_with_moments(bad(x, np.inf)[1], x), r"mean: expected finite values, got inf at \[2\]"),
        (
            lambda x, bad: hw3gpu.points_with_moments(x[0], -x),
            r"covariance: expected a positive semidefinite matrix",
        ),
    ],
)
def test_what_is_wrong_is_said_by_name_though_it_is_looked_at_last(stand_in, monkeypatch, call, message):
    for name in ("eigh", "svd"):  # of which no solver hears
        honest = getattr(cupy.linalg, name)
        monkeypatch.setattr(
            cupy.linalg, name, lambda x, *a, _honest=honest, **b: _honest(x, *a, **b) if np.isfinite(x._memory).all() else 1 / 0
        )

    def bad(x, value):
        x = x.copy()
        x[1, 2] = value
        return x

    with pytest.raises(ValueError, match=message):
        call(cupy.asarray(wishart(9, 4)), bad)


def test_a_solver_that_gives_no_numbers_is_an_error(stand_in, monkeypatch):
    monkeypatch.setattr(cupy.linalg, "eigh", lambda s: (s[..., 0] * np.nan, s * np.nan))
    for call in (hw3gpu.minimize_trace, lambda s, k: hw3gpu.points_with_moments(s[..., 0], s)):
        with pytest.raises(np.linalg.LinAlgError, match="values that are not finite"):
            call(cupy.asarray(wishart(9, 4)), 2)


def test_stacks_go_to_jacobis_method_in_parts_whose_workspace_it_can_count(stand_in, monkeypatch):
    """Its workspace overflows 32 bits near 2.0 million matrices of any size, and at 2^31 numbers."""
    from hw3gpu._linalg import solvers

    assert solvers._GPU_BATCH < 1.9e6
    monkeypatch.setattr(solvers, "_GPU_BATCH", 3)
    sigma = wishart(7, 5, 4)
    hw3gpu.minimize_trace(cupy.asarray(sigma), 2)
    found = hw3gpu.minor_components(cupy.asarray(sigma), 2)
    for name in ("eigh", "svd"):
        assert [run.shape[0] for run in stand_in.runs if run.name == name] == [3, 3, 1]
    np.testing.assert_allclose(found.eigenvalues.get(), hw3gpu.minor_components(sigma, 2).eigenvalues, rtol=1e-9)


@pytest.mark.parametrize(
    ("shape", "method"), [((9, 4), "gesvd"), ((2, 32, 32), "gesvdj"), ((2, 33, 4), "gesvd"), ((2, 4, 33), "gesvd")]
)
def test_the_solver_of_singular_values_that_cupy_chooses_is_named(stand_in, shape, method):
    x = np.random.default_rng(0).standard_normal(shape)
    assert hw3gpu.minor_components(cupy.asarray(x), 2).method == method
    assert hw3gpu.minor_components(x, 2).method == "gesdd"


# ---------------------------------------------------------------------------------------------------------- failures
def test_only_a_missing_cupy_or_device_is_said_to_be_one(stand_in, monkeypatch):
    sigma = cupy.asarray(np.eye(3))

    def out_of_memory(*_):
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    with monkeypatch.context() as patch:
        patch.setattr(cupy.linalg, "eigh", out_of_memory)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="CUDA error 2"):
            hw3gpu.minimize_trace(sigma, 1)

    def no_library(*_):
        raise ImportError("libcusolver.so.12: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(cupy.linalg, "eigh", no_library)
        with pytest.raises(hw3gpu.BackendError, match=r"covariance: .*cannot be used here \(ImportError: libcusolver"):
            hw3gpu.minimize_trace(sigma, 1)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", out_of_memory)
    with pytest.raises(hw3gpu.BackendError, match=r"covariance: .*cannot be used here \(CUDARuntimeError: CUDA error 2\)"):
        hw3gpu.minimize_trace(sigma, 1)


# ------------------------------------------------------------------------------------------------------ CUDA tensors
@pytest.mark.parametrize(("device", "entered"), [("cuda:1", ["cuda:1"]), ("cuda:0", []), ("cpu", [])])
def test_triton_launches_on_the_device_of_the_tensors(monkeypatch, device, entered):
    """Triton itself takes the current device, whatever the tensors' is."""
    calls, on = [], []

    @contextlib.contextmanager
    def current(of):
        on.append(str(of))
        yield
        calls.append("left")

    def softmax(z, y, *, option):
        calls.append((z, y, option))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", current)
    z = SimpleNamespace(device=torch.device(device), is_cuda=device != "cpu")
    dispatch._on_its_device(softmax)(z, None, option=3)
    assert on == entered
    assert calls == [(z, None, 3), *(["left"] if entered else [])]


def test_every_triton_launcher_does():
    pytest.importorskip("triton")
    for of in (dispatch.softmax, dispatch.batch_norm, dispatch.cross_entropy, dispatch.token_log_probs, dispatch.moments):
        ours, theirs = of("gpu"), importlib.import_module(f"hw3gpu.kernels.gpu.{of.__name__}")
        public = [name for name, f in vars(theirs).items() if inspect.isfunction(f) and f.__module__ == theirs.__name__]
        wrapped = {name for name in public if getattr(ours, name) is not getattr(theirs, name)}
        assert wrapped == {name for name in public if not name.startswith("_")}
        assert all(inspect.signature(getattr(ours, name)) == inspect.signature(getattr(theirs, name)) for name in wrapped)
