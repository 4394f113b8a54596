"""Arrays of a library that we do not know, through DLPack and the array API standard's namespace."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from array_functions import CALLS, leaves, operands

import hw3gpu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Foreign:
    """An array of some other library, on the host."""

    exported = 0

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        Foreign.exported += 1
        return self.x.__dlpack__(**options)

    def __getitem__(self, slices):
        return Foreign(self.x[slices])

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()

    def __array_namespace__(self, *, api_version=None):
        return SimpleNamespace(from_dlpack=lambda x: Foreign(x))


@pytest.fixture
def arrays(rng):
    return operands(rng)


@pytest.mark.parametrize("of", ["numpy", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_what_goes_in_comes_out(arrays, name, of):
    """The results are those for NumPy arrays, of the caller's kind, and the arguments are as they were."""
    wrap = (lambda x: Foreign(x.copy())) if of == "numpy" else (lambda x: Foreign(torch.from_numpy(x.copy())))
    foreign = {key: wrap(x) for key, x in arrays.items()}
    expected = leaves(CALLS[name](hw3gpu, arrays))
    result = CALLS[name](hw3gpu, foreign)
    assert type(result) is type(CALLS[name](hw3gpu, arrays)) or isinstance(result, Foreign)
    for ours, theirs in zip(leaves(result), expected, strict=True):
        assert isinstance(ours, Foreign) == isinstance(theirs, np.ndarray)
        if isinstance(ours, Foreign):
            np.testing.assert_allclose(np.from_dlpack(ours.x), theirs, rtol=1e-12, atol=1e-12)
    for key, x in arrays.items():
        np.testing.assert_array_equal(np.from_dlpack(foreign[key].x), x)


def test_memory_is_shared_and_not_copied(arrays, monkeypatch):
    seen = []
    kernels = SimpleNamespace(forward=lambda z, y: seen.append(z))
    monkeypatch.setattr(hw3gpu._core.dispatch, "softmax", lambda which: kernels)
    x = Foreign(arrays["x"])
    hw3gpu.softmax(x)
    assert np.shares_memory(seen[0], x.x)


def test_bfloat16_goes_through_torch(rng):
    x = torch.from_numpy(rng.standard_normal((4, 3))).bfloat16()
    y = hw3gpu.softmax(Foreign(x))
    assert torch.equal(y.x, hw3gpu.softmax(x))


def test_numpy_and_torch_behave_the_same(arrays):
    tensors = {key: torch.from_numpy(x) for key, x in arrays.items()}
    for name, call in CALLS.items():
        for a, b in zip(leaves(call(hw3gpu, arrays)), leaves(call(hw3gpu, tensors)), strict=True):
            if isinstance(a, np.ndarray):
                np.testing.assert_array_equal(a, b.numpy(), err_msg=name)


def test_kinds_do_not_mix(arrays):
    with pytest.raises(TypeError, match=r"gamma: expected a numpy array, as x is, got a torch array"):
        hw3gpu.batch_norm(Foreign(arrays["x"]), torch.ones(3, dtype=torch.float64))


def test_what_exports_nothing_is_refused():
    for x in ([1.0], 1.0, None):
        with pytest.raises(TypeError, match="expected a NumPy, CuPy or torch array"):
            hw3gpu.softmax(x)


class Elsewhere(Foreign):
    """An array that says that it lies on another device."""

    def __init__(self, x, device):
        super().__init__(x)
        self.device = device

    def __dlpack_device__(self):
        return self.device


def test_where_the_array_lies(arrays, monkeypatch):
    x, gamma = arrays["x"], arrays["gamma"]
    with pytest.raises(
        TypeError, match=r"z: expected an array on the CPU or a CUDA device, got one on DLPack's device \(8, 0\)"
    ):
        hw3gpu.softmax(Elsewhere(x, (8, 0)))
    with pytest.raises(ValueError, match=r"gamma: expected the device of x, DLPack's \(1, 0\), got \(2, 1\)"):
        hw3gpu.batch_norm(Foreign(x), gamma=Elsewhere(gamma, (2, 1)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(hw3gpu.BackendError, match=r"points: the array is on a GPU, and torch, .* finds none"):
        hw3gpu.MomentAccumulator().update(Elsewhere(x, (2, 0)))


def test_one_dtype_that_numpy_has_not_takes_all_arguments_to_torch(rng):
    """bfloat16 values beside float32 parameters."""
    x, gamma = torch.from_numpy(rng.standard_normal((4, 3))).bfloat16(), torch.rand(3)
    result = hw3gpu.batch_norm(Foreign(x), Foreign(gamma))
    assert torch.equal(result.y.x, hw3gpu.batch_norm(x, gamma).y)


def test_the_array_may_be_any_keyword(arrays):
    assert isinstance(hw3gpu.softmax(axis=0, z=Foreign(arrays["x"])), Foreign)
    with pytest.raises(TypeError, match="unexpected keyword argument 'banana'"):
        hw3gpu.softmax(Foreign(arrays["x"]), banana=1)
