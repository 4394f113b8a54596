"""The CPU kernels under valgrind's memcheck: nothing outside an array is read or written, and no branch or address hangs on a
number that was never written.

`python tests/memcheck.py` makes the calls of `guarded_calls.py` on small shapes, with every array in a block of `malloc` of its
own size. The kernels are compiled first, without valgrind and for x86-64-v3, whose instructions valgrind knows; under it they
come from the cache. Of what memcheck reports only that of compiled kernels counts: code that is of no file. A kernel that is
wrong on purpose, in both ways, shows that this is seen. `valgrind` has to be installed. `--only TEXT` names some operations.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import guarded_calls
import numba
import numpy as np

from hw3gpu.kernels.cpu._numba import threads

ROOT = Path(__file__).resolve().parent.parent
ELEMENTS = 20_000  # of the largest operand
SHAPES = 16  # an operation
LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129, 513, 1001]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


class Heap(guarded_calls.Guard):
    """Each array in a block of its own, freed before the next call."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.blocks: list[int] = []

    def begin(self, at_end: bool) -> None:
        for block in self.blocks:
            libc.free(block)
        self.blocks.clear()

    def out(self, *shape: int, dtype: Any = None) -> np.ndarray:
        dtype = np.dtype(dtype or self.of)
        nbytes = math.prod(shape) * dtype.itemsize
        self.blocks.append(libc.malloc(max(nbytes, 1)))
        return np.ndarray(shape, dtype, (ctypes.c_char * nbytes).from_address(self.blocks[-1]))


@numba.njit(cache=True, error_model="numpy")
def _wrong(x: np.ndarray, y: np.ndarray) -> None:
    """Reads one number behind x, and branches on one of y that nobody has written."""
    y[0] = x[x.size]
    if y[1] > 0:
        y[0] = 0.0


def calls(dtype: str, only: list[str]) -> None:
    """Every operation, or those with one of these texts in their names."""
    threads.set_num_threads(1)
    np.seterr(all="ignore")
    guarded_calls.LENGTHS[:], guarded_calls.SHORT[:] = LENGTHS, [1, 3, 16, 17, 33]
    heap = Heap(dtype)
    heap.begin(True)
    _wrong(heap.numbers(5, dtype=np.float64), heap.out(2, dtype=np.float64))
    for name, (shapes, call) in guarded_calls.operations(dtype).items():
        if only and not any(text in name for text in only):
            continue
        found = [shape for shape in shapes(heap) if math.prod(shape) <= ELEMENTS]
        for shape in found[:: -(-len(found) // SHAPES)]:
            heap.begin(True)
            call(heap, *shape)
        print(f"{name}, {dtype}", flush=True)


def of_kernels(report: Path) -> Counter[str]:
    """What memcheck says of code that is of no file, by kind: the functions of libc that it calls are not its own."""
    found: Counter[str] = Counter()
    for error in ET.parse(report).iter("error"):
        frames = [Path(frame.findtext("obj", "")).name for frame in error.find("stack").iter("frame")]
        own = [name for name in frames if not name.startswith(("vgpreload", "libc.", "libm."))]
        if own[:1] == [""]:
            found[error.findtext("kind", "")] += 1
    return found


def checked(dtype: str, only: list[str]) -> Counter[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "NUMBA_CPU_NAME": "x86-64-v3",
        "NUMBA_CPU_FEATURES": "",
        "OMP_NUM_THREADS": "1",
    }
    # glibc's and OpenBLAS's own choices go by the processor, which valgrind plays; blocks of the size asked for
    environment |= {"OPENBLAS_CORETYPE": "Haswell", "PYTHONMALLOC": "malloc", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, __file__, "--calls", "--dtypes", dtype, *(["--only", *only] if only else [])]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)  # compiles
        options = [
            "--quiet",
            "--xml=yes",
            f"--xml-file={report}",
            "--error-limit=no",
            "--num-callers=4",
            "--child-silent-after-fork=yes",
        ]
        subprocess.run(["valgrind", *options, *command], env=environment, check=True)
        return of_kernels(report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=guarded_calls.IN_MEMORY, default=["float32", "float16"])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    wrong = 0
    for dtype in asked.dtypes:
        if asked.calls:
            calls(dtype, asked.only)
            continue
        found = checked(dtype, asked.only)
        expected = Counter({"InvalidRead": 1, "UninitCondition": 1})
        print(f"{dtype}: {dict(found)}, of which the kernel that is wrong on purpose has {dict(expected)}", flush=True)
        wrong += found != expected
    return wrong


if __name__ == "__main__":
    sys.exit(main())
