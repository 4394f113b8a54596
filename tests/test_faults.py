"""What is missing, too old, half installed or too small: one sentence that says so and, on auto, the CPU kernels.

The table of docs/reliability.md lists these, and what other files test; `test_the_table_names_tests_that_are_there` reads it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import hw3gpu
from hw3gpu._cli.arrays import cupy_refusal
from hw3gpu._core import dispatch
from hw3gpu._linalg import numerics

ROOT = Path(__file__).resolve().parent.parent
Z = np.linspace(-1.0, 1.0, 6).reshape(2, 3)


def child(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def on_auto_and_forced() -> str:
    """What the Triton kernels are refused with; on auto the CPU kernels run."""
    expected = np.exp(Z) / np.exp(Z).sum(1, keepdims=True)
    with hw3gpu.use_backend("auto"):
        for x in (Z, torch.from_numpy(Z)):
            np.testing.assert_allclose(np.asarray(hw3gpu.softmax(x)), expected, rtol=1e-15)
    with hw3gpu.use_backend("gpu"), pytest.raises(hw3gpu.BackendError) as caught:
        hw3gpu.softmax(Z)
    return str(caught.value)


def empty(name: str) -> types.ModuleType:
    """What a folder left behind imports as."""
    return types.ModuleType(name)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (None, r"Triton cannot be imported \(import of triton halted"),
        (empty("triton"), r"this Triton, without a version, is not the one .*, 3\.6 or later"),
        (types.SimpleNamespace(__version__="2.1.0", runtime=None), r"this Triton, 2\.1\.0, is not the one"),
    ],
    ids=["missing", "half installed", "too old"],
)
def test_triton(monkeypatch, module, sentence):
    monkeypatch.setitem(sys.modules, "triton", module)
    assert re.search(f"^backend 'gpu' was asked for, but {sentence}", on_auto_and_forced())


def test_a_triton_whose_library_cannot_be_loaded(monkeypatch):
    def broken(name):
        raise OSError("libtriton.so: undefined symbol")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    assert dispatch.gpu_refusal("cuda") == "Triton cannot be imported (libtriton.so: undefined symbol)"


@pytest.mark.parametrize("module", [None, empty("cupy")], ids=["missing", "half installed"])
def test_cupy(monkeypatch, module):
    """Nobody without CuPy arrays notices; an array on a GPU that needs it says what is missing."""
    monkeypatch.setitem(sys.modules, "cupy", module)
    for x in (Z, torch.from_numpy(Z)):
        assert tuple(hw3gpu.softmax(x).shape) == (2, 3)
        assert tuple(hw3gpu.minimize_trace(x.T @ x, 1).phi.shape) == (3, 1)
    with pytest.raises(TypeError, match=r"^z: expected a NumPy, CuPy or torch array, got builtins\.list"):
        hw3gpu.softmax([1.0])
    with pytest.raises(hw3gpu.BackendError, match=r"covariance: .*CuPy"):
        numerics._cupy("covariance")


def test_what_keeps_cupy_arrays_from_kernels(monkeypatch):
    def no_driver(n):
        raise RuntimeError("cudaErrorInsufficientDriver")

    for module, sentence in (
        (None, r"CuPy cannot be imported \(import of cupy halted"),
        (types.SimpleNamespace(zeros=no_driver), r"CuPy finds no usable device \(cudaErrorInsufficientDriver\)"),
    ):
        monkeypatch.setitem(sys.modules, "cupy", module)
        assert re.match(sentence, cupy_refusal())


def test_a_torch_that_is_half_loaded_is_no_matter_to_arrays_of_numpy():
    """Another thread may be importing it, or a folder of that name stand in the way."""
    code = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
import numpy as np, hw3gpu
print(hw3gpu.softmax(np.zeros((1, 4))).tolist(), hw3gpu.moments(np.eye(2)).mean.tolist())
print(hw3gpu.softmax(np.zeros((600, 600))).shape)
"""
    done = child(code)
    assert done.stdout == "[[0.25, 0.25, 0.25, 0.25]] [0.5, 0.5]\n(600, 600)\n", done.stderr


@pytest.mark.parametrize("hidden", ["numba", "torch"])
def test_what_the_library_cannot_do_without(hidden):
    """The import of the package is fine; what needs the other says so by name, and shapes need neither."""
    needs = "hw3gpu.softmax(np.zeros((1, 2)))" if hidden == "numba" else "hw3gpu.functional"
    code = f"""
import sys
sys.modules[{hidden!r}] = None
import numpy as np, hw3gpu
print(hw3gpu.conv2d_output_shape((1, 4, 4, 1), 1, 3))
{needs}
"""
    done = child(code)
    assert done.stdout == "(1, 2, 2, 1)\n"
    assert re.match(rf"ModuleNotFoundError: .*{hidden}", done.stderr.splitlines()[-1])


def test_no_device_is_visible():
    code = """
import numpy as np, torch, hw3gpu
print(hw3gpu.softmax(torch.zeros(1, 2)).tolist())
with hw3gpu.use_backend("gpu"):
    hw3gpu.softmax(np.zeros((1, 2)))
"""
    done = child(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert done.stdout == "[[0.5, 0.5]]\n"
    said = "hw3gpu._core.dispatch.BackendError: backend 'gpu' was asked for, but Triton finds no GPU driver"
    assert done.stderr.splitlines()[-1].startswith(said), done.stderr


MEMORY = """
import resource
import numpy as np, torch, hw3gpu, hw3gpu.functional as HF
from hw3gpu import nn
layer, small = nn.BatchNorm1d(8), torch.randn(64, 8)
layer(small)
HF.cross_entropy(small, torch.zeros(64, dtype=torch.int64))
x = torch.zeros(1 << 21, 8)
with open("/proc/self/statm") as f:
    used = int(f.read().split()[5]) * 4096
resource.setrlimit(resource.RLIMIT_DATA, (used + (32 << 20),) * 2)
mean, var = layer.running_mean.clone(), layer.running_var.clone()
for name, call in {"batch norm": lambda: layer(x), "softmax": lambda: hw3gpu.softmax(x.numpy()),
                   "loss": lambda: HF.cross_entropy(x.requires_grad_(), torch.zeros(1 << 21, dtype=torch.int64))}.items():
    try:
        call()
        print(name, "had memory")
    except (MemoryError, RuntimeError) as error:
        print(name, type(error).__name__, "allocate" in str(error))
print(torch.equal(layer.running_mean, mean) and torch.equal(layer.running_var, var), layer(small).isfinite().all().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts the memory of arrays on Linux alone")
def test_memory_that_runs_out_in_a_call():
    """An error by the allocator's own name; nothing has been written, and the next call runs."""
    done = child(MEMORY, HW3GPU_CPU_CACHE_MB="64")
    told = done.stdout.splitlines()
    assert len(told) == 4, done.stderr
    for line, name in zip(told, ("batch norm", "softmax", "loss"), strict=False):
        assert re.fullmatch(rf"{name} (\w*MemoryError|RuntimeError) True", line), line
    assert told[-1] == "True True"


def test_the_table_names_tests_that_are_there():
    text = (ROOT / "docs" / "reliability.md").read_text()
    table = text[text.index("## Faults") + 3 :].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 12
    for row in rows:
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), row
