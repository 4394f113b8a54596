"""No CPU kernel touches memory outside its arrays, on this processor or, as far as its code shows, on one with AVX-512."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect and fork")
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("float32", ()),
        ("float64", ("--once",)),
        ("float16", ("--once",)),
        # the rest of their options, and bfloat16, which moves its elements as float16 does
        *(pytest.param(dtype, (), marks=pytest.mark.slow) for dtype in ("float64", "float16", "bfloat16")),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(v) or "all options",
)
def test_no_launcher_touches_the_pages_before_and_behind_its_arrays(dtype, how, tmp_path):
    """Every launcher, input and output, lengths of 1 to 70 and some larger: `guarded_calls.py` says which.

    And none keeps a reference to its arrays or to memory of its own.
    """
    command = [sys.executable, HERE / "guarded_calls.py", dtype, tmp_path / "case", *how]
    child = subprocess.run(command, env=ENVIRONMENT | {"NUMBA_NRT_STATS": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert not child.stdout, f"these calls died:\n{child.stdout}{child.stderr}"
    assert "forbidden page in front" in (tmp_path / "case").read_text()  # the last case ran


COMPILED = """
import numba
from numba import types
from hw3gpu.kernels.cpu._numba import compile
from hw3gpu.kernels.cpu._cross_entropy import kernels
from hw3gpu.kernels.cpu import softmax

def array(ndim, dtype=types.float32):
    return types.Array(dtype, ndim, "C")

def code(kernel, *of):
    compiled = numba.njit(**compile._OPTIONS)(kernel.py_func)  # for a processor that need not be this one: nothing is run
    compiled.compile((types.intp, types.intp, *of))
    print(*compiled.inspect_llvm().values())

code(kernels._soft_forward_backward, array(3), array(3), array(1), array(2), array(3), types.float64, types.float64)
code(softmax._backward_rows, array(3), array(3), array(3), array(1))
"""
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize(
    "processor",
    ["", pytest.param("skylake-avx512", marks=pytest.mark.skipif(not X86, reason="another architecture"))],
    ids=["this processor", "AVX-512"],
)
def test_no_vector_is_loaded_or_stored_under_a_mask(processor):
    """LLVM's code for AVX-512 has read lanes that a mask left out; the IR is that of the whole kernel, optimised."""
    environment = ENVIRONMENT | ({"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""} if processor else {})
    ir = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"load <32 x float>", ir)) > 5  # the vectors that the kernels are made of
    calls = [line for line in ir.splitlines() if re.search(r"call .*@llvm\.(masked|vp)\.", line)]
    # LLVM gathers elements that lie apart, whole vectors of those that a loop reads: nothing is masked then
    assert [line for line in calls if "splat (i1 true)" not in line] == []
