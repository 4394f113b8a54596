"""`python -m benchmarks processors`: every processor that this machine can play, and whether the CPU kernels are right on it.

A feature set is chosen by environment variables before anything is loaded: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES (this
library's kernels), ATEN_CPU_CAPABILITY (PyTorch's, which are part of the measure), OPENBLAS_CORETYPE (NumPy's and SciPy's BLAS
and LAPACK). For each set, in processes of its own: `bits`, the results of a few operations for 1 to 4 threads, which have to
be the same bytes; `hw3gpu verify`; the tests of the CPU kernels. What this machine cannot run is a row of the table too, with
what it lacks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
THREADS = (1, 2, 3, 4)
TESTS = (
    "tests/test_cpu_kernels.py",
    "tests/test_softmax.py",
    "tests/test_softmax_cross_entropy.py",
    "tests/test_batch_norm.py",
    "tests/test_batch_norm_fused.py",
    "tests/test_batch_norm_masked.py",
    "tests/test_token_log_probs.py",
    "tests/test_distillation.py",
    "tests/test_small.py",
    "tests/test_points.py",
    "tests/test_moments.py",
    "tests/test_trace_solvers.py",
    "tests/test_guard_pages.py",
)
VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE", "HW3GPU_NUM_THREADS")

# the levels of x86-64, each with what it has beyond the one before, by LLVM's names
V2 = ("cx16", "popcnt", "sahf", "sse3", "ssse3", "sse4.1", "sse4.2")
V3 = (*V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


@dataclass(frozen=True)
class FeatureSet:
    """A processor to play: the variables that choose it, and the features that the machine needs for it."""

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """What the processor lacks to play this one."""
        if self.needs and platform.machine().lower() not in ("x86_64", "amd64"):
            return ["x86-64"]
        return [feature for feature in self.needs if not host_features().get(feature)]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | self.variables
        if "ATEN_CPU_CAPABILITY" in self.variables:  # which the cache of torch.compile's code does not tell apart: it crashed
            capability = self.variables["ATEN_CPU_CAPABILITY"]
            found["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"torchinductor_{capability}")
        return found


def _level(level: str, aten: str, coretype: str, needs: tuple[str, ...]) -> FeatureSet:
    # no list of features: with one of the machine's own LLVM would add what the level has not
    numba = {"NUMBA_CPU_NAME": level, "NUMBA_CPU_FEATURES": ""}
    return FeatureSet(level, numba | {"ATEN_CPU_CAPABILITY": aten, "OPENBLAS_CORETYPE": coretype}, needs)


HOST = FeatureSet("the machine's own")
# Numba's, PyTorch's and OpenBLAS's kernels as one processor would choose them
LEVELS = (
    HOST,
    _level("x86-64-v2", "default", "Nehalem", V2),
    _level("x86-64-v3", "avx2", "Haswell", V3),
    _level("x86-64-v4", "avx512", "SkylakeX", V4),
)
# one of the three at a time, the others the machine's own: `verify` alone, since the kernels are those of the first row
APART = (
    *(
        FeatureSet(f"PyTorch's {value}", {"ATEN_CPU_CAPABILITY": value}, needs)
        for value, needs in (("default", V2), ("avx2", V3), ("avx512", V4))
    ),
    *(
        FeatureSet(f"OpenBLAS's {value}", {"OPENBLAS_CORETYPE": value}, needs)
        for value, needs in (("Nehalem", V2), ("Haswell", V3), ("Zen", V3), ("SkylakeX", V4))
    ),
    *(FeatureSet(f"{n} threads", {"HW3GPU_NUM_THREADS": str(n), "OMP_NUM_THREADS": str(n)}) for n in THREADS[1:]),
)


def host_features() -> dict[str, bool]:
    """Of this machine's processor, by LLVM's names."""
    import llvmlite.binding as llvm

    return dict(llvm.get_host_cpu_features())


# ---------------------------------------------------------------------------------------------- the same bytes
def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, images, classes), the same in every process; float64."""
    rng = np.random.default_rng(20240229)
    rows, images = rng.standard_normal((40, 300)), rng.standard_normal((6, 5, 70))
    return rows, images + np.arange(5)[:, None], np.arange(40) * 7 % 300


def operations() -> dict[str, Callable[[], Sequence[np.ndarray]]]:
    """Calls on NumPy arrays: no process has to load PyTorch."""
    import hw3gpu

    rows, images, classes = inputs()

    def softmax(dtype: str) -> Sequence[np.ndarray]:
        return [hw3gpu.softmax(rows.astype(dtype))]

    def cross_entropy() -> Sequence[np.ndarray]:
        step = hw3gpu.softmax_cross_entropy(rows.astype("float32"), classes)
        return step.loss, step.dz

    def batch_norm() -> Sequence[np.ndarray]:
        norm = hw3gpu.batch_norm(images.astype("float32"))
        return norm.y, norm.mean, norm.var

    def moments() -> Sequence[np.ndarray]:
        return hw3gpu.moments(rows)

    return {
        "softmax float32": lambda: softmax("float32"),
        "softmax float16": lambda: softmax("float16"),
        "cross entropy float32": cross_entropy,
        "batch norm float32": batch_norm,
        "moments float64": moments,
    }


def bits(path: str) -> None:
    """Writes what each operation gives with one thread to `path` (.npz); prints a digest for each number of threads (JSON)."""
    from hw3gpu.kernels.cpu._numba import threads as _threads

    _threads.BYTES_PER_THREAD = 1  # small arrays too are shared
    digests: dict[int, str] = {}
    results: dict[str, np.ndarray] = {}
    for threads in THREADS:
        _threads.set_num_threads(threads)
        digest = hashlib.sha256()
        for name, call in operations().items():
            for k, array in enumerate(call()):
                digest.update(np.ascontiguousarray(array).tobytes())
                results.setdefault(f"{name} {k}", array)
        digests[threads] = digest.hexdigest()[:12]
    np.savez(path, **results)  # type: ignore[arg-type]
    print(json.dumps({"digests": digests, "instructions": instructions()}))


def instructions() -> str:
    """Of a loop over float32, compiled here: the widest registers, and whether it multiplies and adds at once."""
    import numba

    def axpy(a: Any, x: Any, y: Any) -> None:
        for i in range(x.size):
            y[i] += a * x[i]

    compiled = numba.njit(fastmath={"contract"})(axpy)
    one = np.ones(1, np.float32)
    compiled(one[0], one, one.copy())
    (assembly,) = compiled.inspect_asm().values()
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return platform.machine()
    widest = next(name for name in ("zmm", "ymm", "xmm") if name in assembly)
    return f"{widest}, {'fused' if 'vfmadd' in assembly else 'not fused'}"


# ---------------------------------------------------------------------------------------------- one feature set
@dataclass(frozen=True)
class Row:
    """What came of one feature set; a part that was not run is empty."""

    name: str
    variables: dict[str, str]
    instructions: str = ""
    bits: str = ""
    verify: str = ""
    tests: str = ""
    seconds: float = 0.0
    passed: bool = True


def _run(of: FeatureSet, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=of.environment(), capture_output=True, text=True)


def bits_of(of: FeatureSet, path: Path) -> tuple[str, dict[str, str]]:
    """(instructions, a digest for each number of threads) of a process that plays this processor."""
    done = _run(of, "-c", f"from benchmarks import processors; processors.bits({str(path)!r})")
    if done.returncode:
        raise RuntimeError(f"{of.name}: the process ended with status {done.returncode}\n{done.stderr}")
    found = json.loads(done.stdout)
    return found["instructions"], found["digests"]


def _bits(of: FeatureSet, folder: Path) -> tuple[str, str, bool]:
    instructions, digests = bits_of(of, folder / "bits.npz")
    one = len(set(digests.values())) == 1
    return instructions, f"{digests['1']}, 1 to 4 threads" if one else f"differ: {digests}", one


def _verify(of: FeatureSet) -> tuple[str, bool]:
    done = _run(of, "-m", "hw3gpu", "verify", "--kernels", "cpu", "--json")
    try:
        checks = json.loads(done.stdout)["checks"]
    except ValueError:
        return f"ended with status {done.returncode}", False
    failed = sum(not check["passed"] for check in checks)
    return f"{failed} of {len(checks)} failed" if failed else f"{len(checks)} pass", not failed


def _tests(of: FeatureSet, tests: Sequence[str]) -> tuple[str, bool]:
    done = _run(of, "-m", "pytest", "-q", "--kernels", "cpu", "-p", "no:cacheprovider", *tests)
    summary = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.strip().rpartition("\n")[2])
    for failure in done.stdout.splitlines():
        if failure.startswith(("FAILED", "ERROR")):
            print(failure, file=sys.stderr, flush=True)
    return ", ".join(summary) or f"ended with status {done.returncode}", done.returncode == 0


def measure(of: FeatureSet, tests: Sequence[str], folder: Path, whole: bool) -> Row:
    """Plays one processor. `whole`: bits and tests too, and not `verify` alone."""
    missing = of.missing()
    if missing:
        return Row(of.name, of.variables, verify=f"not run: this processor has no {', '.join(missing)}")
    start = time.perf_counter()
    instructions = same = tested = ""
    right = []
    if whole:
        instructions, same, ok = _bits(of, folder)
        right.append(ok)
    verified, ok = _verify(of)
    right.append(ok)
    if whole and tests:
        tested, ok = _tests(of, tests)
        right.append(ok)
    return Row(of.name, of.variables, instructions, same, verified, tested, time.perf_counter() - start, all(right))


# ---------------------------------------------------------------------------------------------- the table
HEADINGS = ("processor", "variables", "a loop's registers", "bytes of the results", "`verify`", "tests", "s")


def line(row: Row) -> str:
    """The row as Markdown."""
    variables = " ".join(f"{k}={v}" for k, v in row.variables.items())
    cells = (f"`{variables}`" if variables else "", row.instructions, row.bits, row.verify, row.tests)
    seconds = f"{row.seconds:.0f}" if row.seconds else ""
    return f"| {' | '.join(cell or '–' for cell in (row.name, *cells, seconds))} |"


def run(args: argparse.Namespace) -> int:
    """Prints the table, a row when it is done; status 1 where a result is wrong. Writes the rows to `args.json` if given."""
    from .harness import environment, processor

    print(", ".join(f"{k} {v}" for k, v in environment(processor(), seed=0).items()))
    print(f"\n| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    tests = [*args.tests, *(["--sample", str(args.sample)] if args.sample else [])] if args.tests else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for of in (*LEVELS, *APART):
            rows.append(measure(of, tests, Path(folder), of in LEVELS))
            print(line(rows[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if all(row.passed for row in rows) else 1
