"""CuPy arrays, on the stand-in of tests/fake_cupy.py, and the stand-in beside the real CuPy."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from array_functions import CALLS, leaves, operands
from fake_cupy import cupy

import hw3gpu

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
def test_every_array_function_is_tried():
    others = {"BackendError", "BatchNorm", "BatchNormGradients", "Moments", "SoftmaxCrossEntropy", "TraceMinimum"}
    others |= {"distributed", "functional", "nn", "empty_cache", "use_backend"}
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
