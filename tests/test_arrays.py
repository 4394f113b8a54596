"""`hw3gpu._core.arrays`: which kernels run, how they see an array, and what comes back. No input is ever written."""

from __future__ import annotations

import sys
import threading
from functools import partial
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
import torch

import hw3gpu
from hw3gpu import BackendError, use_backend
from hw3gpu._core import dispatch, outputs
from layouts import LAYOUTS, in_layout

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def no_backend_asked_for(monkeypatch):
    monkeypatch.delenv("HW3GPU_BACKEND", raising=False)


@pytest.fixture
def launched(monkeypatch):
    """The operations whose launchers calls reach for, in their order; nothing is computed."""
    names = []

    class Recorder:
        def __getattr__(self, name):
            return lambda *_, **__: None

    def launchers(operation, which):
        names.append(f"{which}.{operation}")
        return Recorder()

    for operation in ("batch_norm", "softmax", "cross_entropy"):
        monkeypatch.setattr(dispatch, operation, partial(launchers, operation))
    return names


def has_gpu():
    return torch.cuda.is_available()


# ---------------------------------------------------------------------------------------------- which kernels run
@pytest.mark.usefixtures("no_backend_asked_for")
def test_arrays_on_the_host_run_the_numba_kernels(launched):
    for z in (np.ones((2, 3)), torch.ones(2, 3)):
        hw3gpu.softmax(z)
        hw3gpu.batch_norm(z)
        hw3gpu.softmax_cross_entropy(z, z)
    assert launched == ["cpu.softmax", "cpu.batch_norm", "cpu.cross_entropy"] * 2


@pytest.mark.usefixtures("no_backend_asked_for")
def test_the_environment_variable_is_read_at_each_call(launched, monkeypatch):
    monkeypatch.setattr(dispatch, "gpu_refusal", lambda device: None)
    for name, expected in (("gpu", "gpu"), ("cpu", "cpu"), ("auto", "cpu"), ("", "cpu")):
        monkeypatch.setenv("HW3GPU_BACKEND", name)
        hw3gpu.softmax(np.ones(3))
        assert launched[-1] == f"{expected}.softmax"


def test_use_backend_overrides_the_environment_and_nests(launched, monkeypatch):
    monkeypatch.setattr(dispatch, "gpu_refusal", lambda device: None)
    monkeypatch.setenv("HW3GPU_BACKEND", "gpu")
    z = np.ones(3)

    def now():
        hw3gpu.softmax(z)
        return launched[-1].partition(".")[0]

    assert now() == "gpu"
    with use_backend("cpu"):
        assert now() == "cpu"
        with use_backend("gpu"):
            assert now() == "gpu"
        with use_backend("auto"):
            assert now() == "cpu"
        assert now() == "cpu"
    with pytest.raises(KeyError), use_backend("cpu"):
        raise KeyError
    assert now() == "gpu"


@pytest.mark.usefixtures("no_backend_asked_for")
def test_use_backend_is_for_its_thread_alone(monkeypatch):
    monkeypatch.setattr(dispatch, "gpu_refusal", lambda device: None)
    seen = []
    with use_backend("gpu"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested_backend()))
        thread.start()
        thread.join()
        seen.append(dispatch.requested_backend())
    assert seen == ["auto", "gpu"]


def test_unknown_backends(monkeypatch):
    with pytest.raises(ValueError, match=r"use_backend: expected one of auto, gpu, cpu, got 'cuda'"), use_backend("cuda"):
        pytest.fail("the block was entered")
    monkeypatch.setenv("HW3GPU_BACKEND", "GPU")
    with pytest.raises(ValueError, match=r"HW3GPU_BACKEND: expected one of auto, gpu, cpu, got 'GPU'"):
        hw3gpu.softmax(np.ones(3))


@pytest.mark.skipif(has_gpu(), reason="about machines without a GPU")
def test_the_triton_kernels_are_refused_without_a_driver():
    """In this leg Triton's interpreter is off; nothing falls back in silence."""
    with (
        use_backend("gpu"),
        pytest.raises(BackendError, match=r"backend 'gpu' was asked for, but Triton finds no GPU driver .*TRITON_INTERPRET=1"),
    ):
        hw3gpu.softmax(np.ones(3))


def test_the_triton_kernels_are_refused_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with use_backend("gpu"), pytest.raises(BackendError, match=r"asked for, but Triton cannot be imported"):
        hw3gpu.softmax(np.ones(3))


@pytest.mark.parametrize(("active", "given"), [("cuda", "cpu"), ("hip", "cuda")])
def test_the_triton_kernels_are_refused_on_a_device_that_the_driver_does_not_drive(monkeypatch, active, given):
    class Driver:
        def get_active_torch_device(self):
            return torch.device(active)

    import triton

    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Driver()))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert dispatch.gpu_refusal(active) is None
    expected = f"the active Triton driver launches on '{active}' arrays and this array is on '{given}'"
    assert dispatch.gpu_refusal(given) == expected


def test_the_numba_kernels_are_refused_on_a_device(monkeypatch):
    fake_cupy.install(monkeypatch)
    with use_backend("cpu"), pytest.raises(BackendError, match=r"backend 'cpu' was asked for, but the array lives on a GPU"):
        hw3gpu.softmax(fake_cupy.cupy.asarray(np.ones(3)))


def test_backend_errors_are_runtime_errors():
    assert issubclass(BackendError, RuntimeError)
    assert hw3gpu.BackendError is BackendError


# ---------------------------------------------------------------------------------------------- kinds
@pytest.mark.parametrize("x", [None, 1.0, [1.0], (1.0,), "x", np.float32(1), memoryview(b"1")], ids=lambda x: type(x).__name__)
def test_other_kinds_are_named(x):
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    with pytest.raises(TypeError, match=rf"^z: expected a NumPy, CuPy or torch array, got {kind}$"):
        hw3gpu.softmax(x)


def test_kinds_are_not_mixed():
    a, t = np.ones((2, 3), np.float32), torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"y: expected a torch array, as z is, got a numpy array"):
        hw3gpu.softmax_cross_entropy(t, a)
    with pytest.raises(TypeError, match=r"dy: expected a numpy array, as y is, got a torch array"):
        hw3gpu.softmax_backward(t, a)
    with pytest.raises(TypeError, match=r"gamma: expected a numpy array, as x is, got a torch array"):
        hw3gpu.batch_norm(a, t[0])
    with pytest.raises(TypeError, match=r"mean: expected a torch array, as x is, got a numpy array"):
        hw3gpu.batch_norm_backward(t, t, a[0], a[0])


@pytest.mark.parametrize("dtype", [">f4", "longdouble", "complex64", "object", "bool", "uint32"])
def test_dtypes_that_have_no_kernel(dtype):
    with pytest.raises(TypeError, match=r"z: expected dtype float16, bfloat16, float32, float64, got"):
        hw3gpu.softmax(np.ones(3).astype(dtype))


def test_array_functions_leave_no_graph(device):
    """They are functions of arrays: the differentiable ones are in `hw3gpu.functional`."""
    x = torch.rand(4, 3, device=device, requires_grad=True)
    vector = torch.rand(3, device=device, requires_grad=True)
    norm = hw3gpu.batch_norm(x, vector, vector)
    back = hw3gpu.batch_norm_backward(x, x, norm.mean, norm.var, vector, return_dx_hat=True)
    fused = hw3gpu.softmax_cross_entropy(x, x)
    results = [*vars(norm).values(), *vars(back).values(), *vars(fused).values()]
    results += [hw3gpu.softmax(x), hw3gpu.softmax_backward(x, x), hw3gpu.softmax_jacobian(x), hw3gpu.cross_entropy(x, x)]
    assert not any(r.requires_grad for r in results)


# ---------------------------------------------------------------------------------------------- views
def address(x):
    return x.data_ptr() if hasattr(x, "data_ptr") else x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr


@pytest.mark.parametrize(
    ("shape", "axis", "folded"),
    [((2, 3, 4, 5), 1, (2, 3, 20)), ((2, 3, 4, 5), -1, (24, 5, 1)), ((2, 3, 4), 0, (1, 2, 12)), ((7,), 0, (1, 7, 1)),
     ((2, 3), None, (1, 1, 6)), ((), None, (1, 1, 1)), ((0, 3, 4), 1, (0, 3, 4)), ((2, 0, 4), -1, (0, 4, 1))],
)  # fmt: skip
def test_fold(kit, shape, axis, folded):
    x = kit.array(np.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape))
    view = outputs.fold(x, axis)
    assert tuple(view.shape) == folded
    np.testing.assert_array_equal(kit.numpy(view), kit.numpy(x).reshape(folded))
    assert address(view) == address(x)


@pytest.mark.parametrize(("layout", "axis"), [("channels-last", 1), ("contiguous", 2), ("shifted", 1), ("sliced", -1)])
def test_fold_is_a_view_where_strides_allow(kit, layout, axis):
    x = in_layout(kit, np.arange(60.0).reshape(3, 4, 5), "float32", layout)
    view = outputs.fold(x, axis)
    assert address(view) == address(x)
    np.testing.assert_array_equal(kit.numpy(view).reshape(-1), np.moveaxis(kit.numpy(x), axis, axis).reshape(-1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1, 2, -1, None])
def test_output_and_its_fold_are_one(kit, rng, layout, axis, dtype):
    """What a kernel writes into the fold is in the output, whatever the input's layout."""
    x = in_layout(kit, rng.standard_normal((3, 4, 5)), dtype, layout)
    out, folded = outputs.output_like(x, axis)
    assert type(out) is type(x)
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    assert address(out) != address(x)
    values = kit.array(np.arange(60.0), dtype)
    folded[:] = values.reshape(tuple(folded.shape))
    np.testing.assert_array_equal(kit.numpy(out).reshape(kit.numpy(folded).shape), kit.numpy(folded))


def test_output_keeps_the_layout(device):
    x = torch.zeros(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    assert outputs.output_like(x, 1)[0].is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- inputs are never written
def storage(x):
    """The bytes of the whole allocation that `x` is a view of."""
    if isinstance(x, torch.Tensor):
        return bytes(x.detach().cpu().untyped_storage())
    while getattr(x, "base", None) is not None:
        x = x.base
    return np.asarray(x.get() if hasattr(x, "get") else x).tobytes(order="A")


OPERATIONS = {
    "batch_norm": lambda x, dy, v, t: hw3gpu.batch_norm(x, v, v),
    "batch_norm, channels last": lambda x, dy, v, t: hw3gpu.batch_norm(x, channel_axis=-1),
    "batch_norm, one variable": lambda x, dy, v, t: hw3gpu.batch_norm(x, channel_axis=None),
    "batch_norm_backward": lambda x, dy, v, t: hw3gpu.batch_norm_backward(dy, x, v, v, v, return_dx_hat=True),
    "softmax": lambda x, dy, v, t: hw3gpu.softmax(x, 1),
    "softmax_backward": lambda x, dy, v, t: hw3gpu.softmax_backward(dy, x, 1),
    "softmax_jacobian": lambda x, dy, v, t: hw3gpu.softmax_jacobian(x),
    "cross_entropy": lambda x, dy, v, t: hw3gpu.cross_entropy(dy, x),
    "softmax_cross_entropy, classes": lambda x, dy, v, t: hw3gpu.softmax_cross_entropy(x, t),
    "softmax_cross_entropy, vectors": lambda x, dy, v, t: hw3gpu.softmax_cross_entropy(x, dy),
}


def results_of(result):
    return [v for v in vars(result).values() if v is not None] if hasattr(result, "__dataclass_fields__") else [result]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=list(OPERATIONS))
def test_no_input_is_written_and_no_layout_changes_the_result(kit, rng, operation, layout):
    values, more = rng.random((2, 3, 4)) + 0.1, rng.random((2, 3, 4))
    vector = rng.random(3) + 0.5
    run = OPERATIONS[operation]
    x, dy = (in_layout(kit, v, "float32", layout) for v in (values, more))
    v = kit.array(np.repeat(vector, 2))[::2] if layout == "sliced" else kit.array(vector)
    t = kit.array(rng.integers(0, 4, (2, 3)), "int64")
    operands = (x, dy, v, t)
    before = [storage(a) for a in operands]
    results = results_of(run(*operands))
    assert [storage(a) for a in operands] == before
    assert not {address(r) for r in results} & {address(a) for a in operands}

    plain = [kit.array(values), kit.array(more), kit.array(vector), t]
    for got, expected in zip(results, results_of(run(*plain)), strict=True):
        np.testing.assert_allclose(kit.numpy(got), kit.numpy(expected), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("operation", OPERATIONS, ids=list(OPERATIONS))
def test_read_only_arrays(kit, rng, operation):
    if kit.kind != "numpy":
        x, dy, v = (kit.array(rng.random(s)) for s in ((1, 3, 4), (1, 3, 4), (1,)))
        x, dy, v = x.expand(2, 3, 4), dy.expand(2, 3, 4), v.expand(3)  # strides of 0 are the tensors' nearest kin
    else:
        x, dy, v = (kit.array(rng.random(s)) for s in ((1, 3, 4), (1, 3, 4), (1,)))
        x, dy, v = np.broadcast_to(x, (2, 3, 4)), np.broadcast_to(dy, (2, 3, 4)), np.broadcast_to(v, (3,))
    t = kit.array(rng.integers(0, 4, (2, 3)), "int64")
    results = results_of(OPERATIONS[operation](x, dy, v, t))
    plain = [kit.array(kit.numpy(a)) for a in (x, dy, v)]
    for got, expected in zip(results, results_of(OPERATIONS[operation](*plain, t)), strict=True):
        np.testing.assert_allclose(kit.numpy(got), kit.numpy(expected), rtol=2e-6, atol=1e-6)


def test_running_statistics_with_a_stride(device, rng):
    """Every second number of a vector is updated, and no other."""
    from hw3gpu import functional

    x = torch.tensor(rng.standard_normal((5, 3)), dtype=torch.float32, device=device)
    wide = [torch.full((6,), 7.0, device=device) for _ in range(2)]
    plain = [torch.full((3,), 7.0, device=device) for _ in range(2)]
    gamma = torch.tensor(rng.random(6), dtype=torch.float32, device=device)
    y = functional.batch_norm(x, wide[0][::2], wide[1][::2], gamma[::2], gamma[1::2], training=True)
    expected = functional.batch_norm(x, *plain, gamma[::2].contiguous(), gamma[1::2].contiguous(), training=True)
    torch.testing.assert_close(y, expected)
    for w, p in zip(wide, plain, strict=True):
        assert torch.equal(w[::2], p)
        assert (w[1::2] == 7.0).all()


def test_a_lazily_negated_tensor(device):
    """Torch may keep a minus sign as a flag beside the memory."""
    z = torch.tensor([[1 + 2j, 3 - 4j]], device=device).conj().imag
    assert z.is_neg()
    torch.testing.assert_close(hw3gpu.softmax(z), torch.softmax(z, -1))


# ---------------------------------------------------------------------------------------------- writes stay inside
SENTINEL = -77.0


def guarded(shape, dtype, device, layout):
    """A view of `shape`, and views of what lies beside it in the same allocation, all of it SENTINEL."""
    if layout == "sliced":
        whole = torch.full((*shape[:-1], 2 * shape[-1]), SENTINEL, dtype=dtype, device=device)
        return whole[..., ::2], whole[..., 1::2]
    pad = {"shifted": 1, "contiguous": 16}[layout]
    whole = torch.full((int(np.prod(shape)) + 2 * pad,), SENTINEL, dtype=dtype, device=device)
    return whole[pad:-pad].view(shape), whole[:pad], whole[-pad:]


@pytest.mark.parametrize("layout", ["contiguous", "shifted", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 37, 1), (2, 3, 49), (2, 64, 1)], ids=str)
def test_kernels_write_their_output_and_nothing_beside_it(device, rng, shape, dtype, layout):
    N, C, S = shape
    acc = torch.float32
    x, dy = (torch.tensor(rng.random(shape), dtype=dtype, device=device) for _ in range(2))
    target = torch.tensor(rng.integers(0, C, (N, S)), device=device)
    vector = torch.ones(C, dtype=acc, device=device)
    pair = torch.zeros(2, C, dtype=acc, device=device)
    rows, invalid = torch.empty(N, S, dtype=acc, device=device), torch.full((1,), N * S, device=device)
    stats = torch.zeros(3, N, S, dtype=acc, device=device)
    vectors = [torch.empty(C, dtype=acc, device=device) for _ in range(2)]
    ce = {"ignore_index": -100, "label_smoothing": 0.0}
    launches = [
        (dispatch.softmax, "forward", lambda out: (x, out), {}),
        (dispatch.softmax, "backward", lambda out: (dy, x, out), {}),
        (dispatch.cross_entropy, "forward_backward", lambda out: (x, target, None, rows, out, invalid), ce),
        (dispatch.cross_entropy, "backward", lambda out: (x, target, None, stats, rows, None, out), ce),
        (dispatch.batch_norm, "normalize", lambda out: (x, pair, vector, None, None, out), {}),
        (dispatch.batch_norm, "forward", lambda out: (x, None, None, out, pair.clone(), *vectors, None, None),
         {"eps": 1e-5, "momentum": 0.0}),
        (dispatch.batch_norm, "backward", lambda out: (dy, x, pair, vector, None, out, *vectors), {}),
        (dispatch.batch_norm, "inference_backward", lambda out: (dy, x, pair, vector, None, out, *vectors), {}),
    ]  # fmt: skip
    which = dispatch.backend(x)
    for operation, name, operands, options in launches:
        out, *around = guarded(shape, dtype, device, layout)
        getattr(operation(which), name)(*map(dispatch.kernel_view(which), operands(out)), **options)
        where = f"{operation.__name__}.{name}"
        assert all((a == SENTINEL).all() for a in around), f"{where} wrote beside its output"
        assert not (out == SENTINEL).any(), f"{where} left a part of its output unwritten"
