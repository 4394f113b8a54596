"""What the array functions take for an array, and what they refuse because it is more than its elements in their order."""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
import threading
import types

import numpy as np
import pytest
import torch
from array_functions import CALLS, leaves, operands

import hw3gpu


class OwnArray(np.ndarray):
    """Someone's subclass, with a unit perhaps."""


class OwnTensor(torch.Tensor):
    """Someone's subclass that computes as torch does."""


def on_disk(x):
    copy = np.memmap(tempfile.TemporaryFile(), x.dtype, "w+", shape=x.shape)  # noqa: SIM115, it lives as long as the array
    copy[...] = x
    return copy


def unaligned(x):
    copy = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def field_of_a_record(x):
    records = np.zeros(x.shape, [("value", x.dtype), ("flag", "i1")])
    records["value"] = x
    return records["value"]


@pytest.fixture
def host(device):
    if device != "cpu":
        pytest.skip("about arrays on the host")


HARMLESS = {
    "memmap": on_disk,
    "recarray": lambda x: x.view(np.recarray),
    "unaligned": unaligned,
    "field of a record": field_of_a_record,
    "parameter": lambda x: torch.nn.Parameter(torch.from_numpy(x), requires_grad=x.dtype.kind == "f"),
    "tensor subclass": lambda x: torch.from_numpy(x).as_subclass(OwnTensor),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("make", HARMLESS)
def test_subclasses_that_add_nothing_are_arrays(host, rng, make, name):
    """What comes out is of NumPy's or torch's own class."""
    arrays = operands(rng)
    results = leaves(CALLS[name](hw3gpu, {key: HARMLESS[make](x) for key, x in arrays.items()}))
    for got, expected in zip(results, leaves(CALLS[name](hw3gpu, arrays)), strict=True):
        if isinstance(expected, np.ndarray):
            assert type(got) in (np.ndarray, torch.Tensor)
            np.testing.assert_allclose(np.asarray(got.detach() if hasattr(got, "detach") else got), expected, rtol=1e-13)


REFUSED = {
    "masked": (lambda x: np.ma.masked_array(x), r"a masked array, whose mask would be ignored: {0}\.filled\(value\) makes one"),
    "matrix": (np.matrix, r"numpy\.matrix, whose own meaning would be ignored: numpy\.asarray\({0}\) makes one"),
    "subclass": (lambda x: x.view(OwnArray), r"test_kinds\.OwnArray, whose own meaning"),
    "sparse": (lambda x: torch.from_numpy(x).to_sparse(), r"one of layout torch\.sparse_coo: {0}\.to_dense\(\) makes one"),
    "mkldnn": (lambda x: torch.from_numpy(x).float().to_mkldnn(), r"one of layout torch\._mkldnn"),
    "nested": (lambda x: torch.nested.nested_tensor([torch.from_numpy(x)]),
               r"a nested tensor: torch\.nested\.to_padded_tensor\({0}, value\) makes one"),
    "masked tensor": (lambda x: torch.masked.as_masked_tensor(torch.from_numpy(x), torch.ones(x.shape, dtype=torch.bool)),
                      r".*MaskedTensor, which has arithmetic"),
    "meta": (lambda x: torch.from_numpy(x).to("meta"), "one on meta: there are kernels for CPU and CUDA devices"),
}  # fmt: skip
FIRST = {
    "softmax": "z", "softmax_backward": "y", "softmax_jacobian": "z", "cross_entropy": "y_hat", "classes": "z",
    "softmax_cross_entropy": "z", "points_with_moments": "covariance", "moments": "points", "minimize_trace": "covariance",
    "minor_components": "points", "batch_norm": "x", "batch_norm_backward": "x",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("make", REFUSED)
def test_arrays_that_are_more_than_their_elements_are_refused(rng, make):
    convert, expected = REFUSED[make]
    arrays = {key: convert(x) for key, x in operands(rng).items()}
    plain = "NumPy array" if isinstance(arrays["x"], np.ndarray) else "tensor"
    for name, argument in FIRST.items():
        with pytest.raises(TypeError, match=rf"^{argument}: expected a plain {plain}, got {expected.format(argument)}"):
            CALLS[name](hw3gpu, arrays)


def test_a_mask_is_refused_wherever_it_stands(rng):
    """A hidden -1e9 would otherwise count."""
    a = operands(rng)
    hide = np.ma.masked_array
    calls = [
        ("gamma", lambda: hw3gpu.batch_norm(a["x"], hide(a["gamma"]))),
        ("beta", lambda: hw3gpu.batch_norm(a["x"], beta=hide(a["gamma"]))),
        ("var", lambda: hw3gpu.batch_norm_backward(a["dy"], a["x"], a["gamma"], hide(a["var"]))),
        ("dy", lambda: hw3gpu.softmax_backward(hide(a["dy"]), a["x"])),
        ("y", lambda: hw3gpu.cross_entropy(hide(a["p"]), a["p"])),
        ("y", lambda: hw3gpu.softmax_cross_entropy(a["x"], hide(a["classes"]))),
        ("mean", lambda: hw3gpu.points_with_moments(hide(a["gamma"]), a["sigma"])),
        ("points", lambda: hw3gpu.MomentAccumulator().update(hide(a["x"]))),
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=f"^{name}: expected a plain NumPy array, got a masked array"):
            call()


def test_tensors_inside_a_transform_are_refused():
    with pytest.raises(TypeError, match=r"z: expected a plain tensor, got one inside a torch\.func transform"):
        torch.vmap(hw3gpu.softmax)(torch.ones(2, 3))


def test_what_an_array_can_be_made_of_says_so():
    class Exporter:
        def __init__(self, name, value):
            setattr(self, name, value)

    host = Exporter("__array_interface__", np.ones(3).__array_interface__)
    with pytest.raises(TypeError, match=r"Exporter: numpy\.asarray\(z\) makes one of it$"):
        hw3gpu.softmax(host)
    with pytest.raises(TypeError, match=r"Exporter: cupy\.asarray\(z\) makes one of it$"):
        hw3gpu.softmax(Exporter("__cuda_array_interface__", {}))


@pytest.mark.parametrize(("dtype", "native"), [(">f4", "float32"), (">f8", "float64")])
def test_the_other_byte_order_says_how_to_convert(rng, dtype, native):
    z = rng.standard_normal((2, 3)).astype(dtype)
    with pytest.raises(TypeError, match=rf"z: .*got {dtype}, in the other byte order: z\.astype\('{native}'\) converts it$"):
        hw3gpu.softmax(z)
    with pytest.raises(TypeError, match=rf"points: .*points\.astype\('{native}'\) converts it$"):
        hw3gpu.moments(z)
    with pytest.raises(TypeError, match=r"y: expected integer classes .*y\.astype\('int64'\) converts it$"):
        hw3gpu.softmax_cross_entropy(z.astype(native), np.zeros(2, ">i8"))


@pytest.mark.parametrize("name", [name for name in CALLS if FIRST.get(name) in ("x", "y", "z", "y_hat")])
def test_bfloat16_of_numpy(host, rng, name):
    """NumPy has it from ml_dtypes; the results are those for torch's, to the bit."""
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes, which NumPy's bfloat16 is from, is not installed").bfloat16
    arrays = operands(rng)
    numpys = {key: x.astype(bfloat16) if x.dtype.kind == "f" else x for key, x in arrays.items()}
    torchs = {key: torch.from_numpy(x).to(torch.bfloat16 if x.dtype.kind == "f" else torch.int64) for key, x in arrays.items()}
    for ours, theirs in zip(leaves(CALLS[name](hw3gpu, numpys)), leaves(CALLS[name](hw3gpu, torchs)), strict=True):
        if theirs is not None:
            assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
            np.testing.assert_allclose(
                ours.astype("float64"), theirs.double().numpy(), rtol=1e-6 if name == "cross_entropy" else 0
            )


def test_compiled_code_leaves_its_graph_for_an_array_function():
    """PyTorch would trace into Numba."""
    z = torch.rand(4, 5)

    def twice(z):
        return hw3gpu.softmax(z + 1) * 2

    with pytest.raises(Exception, match=r"the array functions are not traced: hw3gpu\.functional has those that are"):
        torch.compile(twice, backend="eager", fullgraph=True)(z)
    torch.compiler.reset()
    with _imports_in_another_thread():
        compiled = torch.compile(twice, backend="eager")(z)
    assert torch.equal(compiled, twice(z))


@contextlib.contextmanager
def _imports_in_another_thread():
    """`sys.modules` changes all the time."""
    ended, interval = threading.Event(), sys.getswitchinterval()

    def imports():
        for k in itertools.count():
            sys.modules[f"_imported_{k % 50}"] = types.ModuleType("_imported")
            sys.modules.pop(f"_imported_{(k + 25) % 50}", None)
            if ended.is_set():
                break

    thread = threading.Thread(target=imports)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
        for k in range(50):
            sys.modules.pop(f"_imported_{k}", None)
