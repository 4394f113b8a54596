"""What is the CPU kernels' alone: the exponential, the bits of halves, the cache, strides, memory."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from cpu_operations import (
    HALVES,
    channels_last,
    random_array,
    run_batch_norm,
    same_bits,
)

import hw3gpu.functional as HF
from hw3gpu.kernels.cpu import batch_norm, cross_entropy, softmax
from hw3gpu.kernels.cpu._cross_entropy import kernels
from hw3gpu.kernels.cpu._numba import by_address, compile, elements, exp, log, openmp, simd
from hw3gpu.kernels.cpu._numba import half as _half

KERNELS = Path(batch_norm.__file__).parent


# ---------------------------------------------------------------------------------------------- elements
@numba.njit(error_model="numpy")
def exp_of(x, y):
    for i in range(x.size):
        elements.store(y, i, exp.exp(elements.load(x, i)))


def loaded(x, y):
    for i in range(x.size):
        y[i] = elements.load(x, i)


def stored(x, y):
    for i in range(x.size):
        elements.store(y, i, x[i])


@pytest.mark.parametrize(("dtype", "lowest"), [(np.float32, -103.9), (np.float64, -745.1)], ids=["float32", "float64"])
def test_exp_is_right_to_one_ulp_subnormal_results_included(rng, dtype, lowest):
    x = np.concatenate(
        [rng.uniform(lowest, 1, 400_000), rng.uniform(-2, 0, 400_000), -np.logspace(-40, np.log10(-lowest), 200_000)]
    ).astype(dtype)
    y = np.empty_like(x)
    exp_of(x, y)
    exact = np.exp(x.astype(np.longdouble))
    ulp = np.spacing(exact.astype(dtype)).astype(np.longdouble)
    assert np.max(np.abs(y - exact) / ulp) <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_exp_of_what_is_no_ordinary_number(dtype):
    x = np.array([np.nan, -np.nan, -np.inf, -1e30, 0.0, -0.0], dtype)
    y = np.empty_like(x)
    exp_of(x, y)
    np.testing.assert_array_equal(y, np.array([np.nan, np.nan, 0, 0, 1, 1], dtype))


@compile.inline
def _log1p_of(i, exist, args):
    x = simd.load_lanes(args[0], i, exist, 0.0)
    return log.log1p(x, 1.0 + x)


@numba.njit(error_model="numpy")
def log1p_of(x, y):
    simd.write(y, False, _log1p_of, (x,))


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_log1p_is_right_to_two_and_a_half_ulp(rng, dtype):
    """Near 0, down to where 1 + x is 1; near -0.4 and 0.4, where the rounding of 1 + x counts most; and far out."""
    size = np.exp(rng.uniform(-45, 45, 50_000))
    x = np.concatenate([size, -size[size < 0.9], rng.uniform(-0.6, 1.2, 100_000), [0.0]]).astype(dtype)
    y = np.empty_like(x)
    log1p_of(x, y)
    exact = np.log1p(x.astype(np.longdouble))
    ulp = np.spacing(np.abs(exact.astype(dtype))).astype(np.longdouble)
    assert np.max(np.abs(y - exact) / ulp) <= 2.5


@pytest.mark.parametrize("path", ["softmax", "cross entropy"])
def test_the_loop_over_a_row_is_packed(path):
    """The multiplications of the exponential work on whole vectors, in the kernel as it is compiled for this machine.

    And there is a fence: what is written past the caches is seen by whoever is told that it is there.
    """
    fused = numba.njit(fastmath={"contract"})(lambda a, b, c: a * b + c)
    fused(1.0, 1.0, 1.0)
    x86 = r"vfmadd\w+ps[^\n]*[yz]mm" if "vfmadd" in str(fused.inspect_asm()) else r"mulps[^\n]*[xy]mm"
    packed = {"x86_64": x86, "AMD64": x86, "aarch64": r"fml[as]\s+v\d+\.4s"}
    if platform.machine() not in packed:
        pytest.skip(f"no pattern for the instructions of {platform.machine()}")
    original = softmax._forward_rows if path == "softmax" else kernels._hard_forward_backward
    kernel = numba.njit(**compile._OPTIONS)(original.py_func)
    z, acc = np.zeros((2, 8, 1), np.float32), np.empty(0, np.float32)
    if path == "softmax":
        kernel(0, 2, z, np.empty_like(z), acc)
    else:
        target, invalid = np.zeros((2, 1), np.int64), np.full(1, 2)
        kernel(0, 2, z, target, acc, np.zeros((2, 1), np.float32), np.empty_like(z), invalid, 1.0, -100, 0.0, 0.0)
    (assembly,) = kernel.inspect_asm().values()
    assert len(re.findall(packed[platform.machine()], assembly)) >= 8
    assert re.search(r"dmb\s+ish" if platform.machine() == "aarch64" else r"mfence|lock\s+or", assembly)


@pytest.fixture(params=["as compiled here", "by arithmetic on bits"])
def conversions(request, monkeypatch):
    """`loaded` and `stored`, and once more as on a processor that has no instructions for float16."""
    if request.param != "as compiled here":
        monkeypatch.setattr(_half, "has_instruction", lambda *processor: False)
    return numba.njit(loaded), numba.njit(stored)


@pytest.mark.parametrize("half", HALVES)
def test_every_half_is_loaded_as_pytorch_reads_it(half, conversions):
    torch_dtype, bits_dtype = HALVES[half]
    bits = np.arange(1 << 16, dtype=np.uint16).view(bits_dtype)
    values = np.empty(bits.size, np.float32)
    conversions[0](bits, values)
    np.testing.assert_array_equal(values, torch.from_numpy(bits.view(np.int16)).view(torch_dtype).float().numpy())


@pytest.mark.parametrize("half", HALVES)
def test_halves_are_stored_as_pytorch_rounds(rng, half, conversions):
    """Random bits, and the midpoints between neighbours, where rounding to even decides."""
    torch_dtype, bits_dtype = HALVES[half]
    every = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch_dtype).double()
    midpoints = ((every[:-1] + every[1:]) / 2).float().numpy()
    random = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([random, midpoints, -midpoints, np.float32([np.inf, -np.inf, 0.0, -0.0])])
    bits = np.empty(x.size, bits_dtype)
    conversions[1](x, bits)
    expected = torch.from_numpy(x).to(torch_dtype).float().numpy()
    ours = torch.from_numpy(bits.view(np.int16)).view(torch_dtype).float().numpy()
    np.testing.assert_array_equal(ours, expected)
    same_sign = np.signbit(ours) == np.signbit(expected)
    assert same_sign[~np.isnan(expected)].all()


def test_halves_do_not_follow_the_processors_flush_to_zero(conversions):
    """Subnormal halves are ordinary float32: `torch.set_flush_denormal` is for those of float32."""
    bits = np.arange(1 << 10, dtype=np.int16)
    values, back = np.empty(bits.size, np.float32), np.empty_like(bits)
    for convert, arguments in zip(conversions, ((bits, values), (values, back)), strict=True):
        convert(*arguments)  # compiled before the mode is set
    values[:], back[:] = 0, 0
    torch.set_flush_denormal(True)
    try:
        conversions[0](bits, values)
        conversions[1](values, back)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(values, np.arange(1 << 10) * np.float32(2.0**-24))
    np.testing.assert_array_equal(back, bits)


# ---------------------------------------------------------------------------------------------- the cache
USE = """
import sys
import numpy as np
from copied.cpu import softmax
from copied.cpu._numba import compile
z, y = np.array([[0.0, 1.0]], np.float32)[:, :, None], np.empty((1, 2, 1), np.float32)
softmax.forward(z, y)
print(compile.cache_folder(), sum(softmax._forward_rows.stats.cache_hits.values()), y.sum())
"""


@pytest.fixture
def copied(tmp_path):
    """A copy of the kernels to change, and a way to use it in a process of its own."""
    shutil.copytree(KERNELS, tmp_path / "copied" / "cpu", ignore=shutil.ignore_patterns("__pycache__"))

    def use(cache, processes=1):
        """(folder, hits, total) of processes that begin together."""
        environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", USE]
        begun = [
            subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        found = [process.communicate()[0].split() for process in begun]
        assert not any(process.returncode for process in begun)
        (folder,), (total,) = {of[0] for of in found}, {float(of[2]) for of in found}
        return folder, sum(int(of[1]) for of in found), total

    return tmp_path / "copied" / "cpu", use


def test_the_cache_is_used_by_other_processes_and_notices_a_changed_helper(copied, tmp_path):
    sources, use = copied
    folder, hits, total = use(tmp_path / "cache", processes=3)
    assert hits == (2 if importlib.util.find_spec("fcntl") else 0), "one process compiles, and the others wait for it"
    assert total == pytest.approx(1)
    assert any(Path(folder).glob("*.nbc"))
    assert use(tmp_path / "cache") == (folder, 1, total)

    helper = sources / "_rows.py"
    changed = helper.read_text().replace("high = e.dtype.type(1.0 / total)", "high = e.dtype.type(3.0 / total)")
    helper.write_text(changed.replace("low = e.dtype.type(1.0 / total", "low = e.dtype.type(3.0 / total"))
    assert use(tmp_path / "cache") == (folder, 0, pytest.approx(3))


def test_another_package_of_the_same_sources_has_a_cache_of_its_own(copied, tmp_path):
    """What is in the cache names types by their modules, which only the package that compiled it has."""
    code = "from copied.cpu._numba import compile; print(compile.source_hash('softmax'))"
    theirs = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() != compile.source_hash("softmax")


def test_what_a_kernel_is_made_from_is_all_that_its_module_imports(monkeypatch, tmp_path):
    """A change of any file, of an inner folder too, changes the hash of each module that imports it at any depth, no other."""
    shutil.copytree(KERNELS, tmp_path / "cpu", ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    files = {
        ".".join(path.relative_to(tmp_path / "cpu").with_suffix("").parts): path for path in (tmp_path / "cpu").rglob("*.py")
    }
    direct = {name: _imports(name, path, files) for name, path in files.items()}
    monkeypatch.setattr(compile, "__file__", str(tmp_path / "cpu" / "_numba" / "compile.py"))
    hashes = {name: compile.source_hash.__wrapped__(name) for name in files}
    assert "_numba.exp" in direct["_rows"]
    assert "_batch_norm.planes" in direct["batch_norm"]
    for changed, source in files.items():
        text = source.read_text()
        source.write_text(text + "\n")
        importers, found = set(), {changed}
        while found - importers:
            importers |= found
            found = {name for name in files if direct[name] & importers}
        expected = {*files} if importers & {"_numba.openmp", "_numba.by_address"} else importers
        assert {name for name in files if compile.source_hash.__wrapped__(name) != hashes[name]} == expected, changed
        source.write_text(text)


def _imports(name, path, files):
    """The modules among `files` that one of them imports, as Python reads it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*name.split(".")[: -node.level], *(node.module.split(".") if node.module else [])]
            found |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
    return found & {*files}


def test_a_kernel_is_compiled_once_whatever_the_strides_of_its_arrays(rng, monkeypatch):
    def double(x, y):
        for n, c, s in np.ndindex(x.shape):
            y[n, c, s] = 2 * x[n, c, s]

    kernel = compile.kernel(double)
    x = rng.standard_normal((4, 6, 10))
    read_only = x.copy()
    read_only.flags.writeable = False
    arrays = [x, x[::2, ::-1, ::3], x.transpose(2, 0, 1), read_only]
    for known in (False, True):
        for each in arrays:
            y = np.empty(each.shape)
            kernel(each, y)
            np.testing.assert_array_equal(y, 2 * each)
        assert len(kernel.signatures) == 1
        if not known:  # from now on each is found by its type
            monkeypatch.setattr(type(kernel), "_compile_for_args", None)


def test_no_two_kernels_share_a_cache_file():
    """Modules have kernels of the same name, and all that run on OpenMP's threads have `_numba/openmp.py` as their file."""
    apart = {"__init__", "threads", "openmp", "compile"}
    paths = [path.relative_to(KERNELS).with_suffix("") for path in KERNELS.rglob("*.py") if path.stem not in apart]
    modules = [importlib.import_module(".".join(["hw3gpu.kernels.cpu", *path.parts])) for path in paths]
    found = {v for m in modules for v in vars(m).values() if isinstance(getattr(v, "_cache", None), compile._KernelCache)}
    made = (lambda kernel: kernel, openmp.team_of, by_address.at_addresses)
    files = [make(kernel)._cache._impl.filename_base for kernel in found for make in made]
    assert len(found) > 30
    assert len(set(files)) == len(files)


def test_a_cache_folder_that_cannot_be_written_is_no_error(copied, tmp_path):
    (tmp_path / "a file").write_text("")
    folder, hits, total = copied[1](tmp_path / "a file" / "cache")
    assert (folder, hits, total) == ("None", 0, pytest.approx(1))


def test_the_cache_folder_is_under_the_users_cache_by_default(monkeypatch, tmp_path):
    compile.cache_folder.cache_clear()
    monkeypatch.setattr(compile.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        assert Path(compile.cache_folder()).parent == tmp_path / "hw3gpu"
    finally:
        compile.cache_folder.cache_clear()


# ---------------------------------------------------------------------------------------------- the sum of the losses
def test_the_sum_of_the_losses_keeps_what_an_addition_rounds_away():
    loss = np.ones((1, 66))
    loss[0, 1], loss[0, 65] = 2.0**60, -(2.0**60)  # a 1 beside them is far less than an ulp
    total, denominator = np.empty(1), np.empty(1)
    cross_entropy.reduce(loss, np.zeros((1, 66), np.int64), None, total, denominator, ignore_index=-100)
    assert (total[0], denominator[0]) == (64.0, 66.0)


@pytest.mark.parametrize("weights", [(0.25, 2.0**60), (0.37, 0.37)], ids=["far apart", "alike"])
def test_the_sum_of_the_weights_keeps_what_an_addition_rounds_away(weights):
    """The denominator of a mean, of 2^16 rows of the first class and one of the second in front."""
    target, weight, denominator = np.zeros((1, 2**16 + 1), np.int64), np.array(weights), np.empty(1)
    target[0, 0] = 1
    cross_entropy.count(target, weight, denominator, ignore_index=-100)
    assert denominator[0] == math.fsum(weight[target[0]])


# ---------------------------------------------------------------------------------------------- strides and memory
def in_strides(x, layout):
    """`x` in other strides."""
    if layout == "transposed":
        return np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0)
    if layout == "classes adjacent":
        return channels_last(x)
    wide = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2]), x.dtype)
    if layout == "sliced":
        wide[:, ::2, 1::2] = x
        return wide[:, ::2, 1::2]
    wide[:, -1 : -2 * x.shape[1] : -2, : x.shape[2]] = x
    return wide[:, -1 : -2 * x.shape[1] : -2, : x.shape[2]]


@pytest.mark.parametrize("layout", ["transposed", "classes adjacent", "sliced", "backwards"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strides_change_no_bit_of_softmax_and_cross_entropy(rng, layout, dtype):
    shape = (4, 37, 5)
    z, dy, target = random_array(rng, shape, dtype), random_array(rng, shape, dtype), rng.integers(0, 37, (4, 5))

    def results(arrange):
        out = [arrange(np.zeros(shape, z.dtype)) for _ in range(3)]
        softmax.forward(arrange(z), out[0])
        softmax.backward(arrange(dy), out[0], out[1])
        loss, invalid = np.empty((4, 5), np.float32), np.full(1, 20)
        options = {"ignore_index": 3, "label_smoothing": 0.0}
        cross_entropy.forward_backward(arrange(z), target, None, loss, out[2], invalid, **options)
        return [np.ascontiguousarray(v) for v in out] + [loss]

    assert same_bits(results(lambda x: in_strides(x, layout)), results(lambda x: x.copy()))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "backwards"])
def test_strides_of_batch_norm(rng, layout):
    """Another layout may add in another order: the results agree to float32's rounding."""
    contiguous = run_batch_norm(np.random.default_rng(3), (5, 6, 70))()
    arranged = run_batch_norm(np.random.default_rng(3), (5, 6, 70), layout=lambda x: in_strides(x, layout))()
    for ours, expected in zip(arranged, contiguous, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last], ids=["planes", "channels-last"])
@pytest.mark.parametrize("shape", [(60, 3, 900), (60, 40, 900), (900, 20, 64)], ids=str)
def test_first_values_unlike_the_rest(rng, shape, layout):
    """The shift comes from the first values: were the sums not taken again, the variance would lose 10 bits of float64."""
    x = rng.standard_normal(shape)
    x[0, :, :64] += 1e9
    x = layout(x)
    C = shape[1]
    mean, (var, rstd) = np.empty((2, C)), np.empty((2, C))
    batch_norm.forward(x, None, None, np.empty_like(x), mean, var, rstd, None, None, eps=1e-5, momentum=0.1)
    exact = x.astype(np.longdouble)
    np.testing.assert_allclose(mean[0], exact.mean((0, 2)), rtol=3e-16)
    np.testing.assert_allclose(var, exact.var((0, 2)), rtol=2e-15)


PEAK = """
import re, sys
import numpy as np
from hw3gpu.kernels.cpu._numba import threads
from hw3gpu.kernels.cpu import batch_norm, cross_entropy, softmax

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def run(x, y, dy, dx):
    softmax.forward(x, y); softmax.backward(dy, y, dx)
    N, V, S = x.shape
    loss, stats, invalid, one = np.zeros((N, S), "f4"), np.zeros((3, N, S), "f4"), np.full(1, N * S), np.ones(1, "f4")
    target, options = np.zeros((N, S), "i8"), dict(ignore_index=-100, label_smoothing=0.0)
    cross_entropy.forward(x, target, None, loss, stats, invalid, **options)
    cross_entropy.backward(x, target, None, stats, loss, one, dx, **options)
    cross_entropy.forward_backward(x, dy, None, loss, dx, invalid, **options)
    for last in (False, True):
        a, b, c, d = (v.reshape(v.shape[0], -1, V).transpose(0, 2, 1) if last else v for v in (x, y, dy, dx))
        mean, (var, rstd, dg, db) = np.zeros((2, V), "f4"), np.zeros((4, V), "f4")
        batch_norm.forward(a, None, None, b, mean, var, rstd, None, None, eps=1e-5, momentum=0.1)
        batch_norm.backward(c, a, mean, rstd, None, d, dg, db)

threads.set_num_threads(4)
threads.BYTES_PER_THREAD = 1  # the small call compiles what the large one uses
run(*(np.zeros((4, 64, 1024), "f4") for _ in range(4)))
big = [np.ones((64, 256, 1024), "f4") for _ in range(4)]
before = peak()
run(*big)
print(peak() - before, big[0].nbytes / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_peak_memory_above_inputs_and_outputs_is_small():
    """64 MiB tensors, 65,536 rows, 256 channels: what a call keeps for rows, channels and threads is some MiB."""
    output = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    above, tensor = map(float, output.stdout.split())
    assert tensor == 64
    assert above < 8


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


ROW_CALLS = {
    "softmax": lambda z, y, t: HF.softmax(z, 1) @ y[0],
    "classes, gradient later": lambda z, y, t: HF.cross_entropy(z, t, gradient="backward"),
    "classes, gradient at once": lambda z, y, t: HF.cross_entropy(z, t, gradient="forward"),
    "classes, z-loss": lambda z, y, t: HF.cross_entropy(z, t, z_loss=0.1),
    "probabilities, gradient later": lambda z, y, t: HF.cross_entropy(z, y, gradient="backward"),
    "probabilities, gradient at once": lambda z, y, t: HF.cross_entropy(z, y, gradient="forward"),
    "probabilities, z-loss": lambda z, y, t: HF.cross_entropy(z, y, z_loss=0.1),
    "log-probabilities of tokens": lambda z, y, t: HF.token_log_probs(z, t).log_prob,
    "distillation": lambda z, y, t: HF.distillation_loss(z, y),
    "Jensen-Shannon": lambda z, y, t: HF.distillation_loss(z, y, kind="jensen_shannon"),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux's /proc")
@pytest.mark.parametrize("call", ROW_CALLS.values(), ids=ROW_CALLS)
def test_memory_for_a_row_is_given_back(call):
    """Rows of 1 MiB, not adjacent in memory: a row kept by each of 48 calls would be 48 MiB, and malloc may keep some."""
    V = 1 << 18
    z, y = torch.zeros(1, V, 2).requires_grad_(), torch.full((1, V, 2), 1 / V)

    def step():
        call(z[:, :, 0], y[:, :, 0], torch.zeros(1, dtype=torch.int64)).sum().backward()

    for _ in range(3):
        step()
    before = resident()
    for _ in range(48):
        step()
    assert resident() - before < 24 << 20


# ---------------------------------------------------------------------------------------------- shapes
def wrong_calls():
    z, rows, C = np.zeros((2, 5, 3), np.float32), (2, 3), 5
    of_rows, of_channels, invalid = np.zeros(rows, np.float32), np.zeros(C, np.float32), np.zeros(1, np.int64)
    target, stats, mean = np.zeros(rows, np.int64), np.zeros((3, *rows), np.float32), np.zeros((2, C), np.float32)
    short, options = np.zeros(4, np.float32), {"ignore_index": -100, "label_smoothing": 0.0}
    moments = {"eps": 1e-5, "momentum": 0.1}
    one = np.ones(1, np.float32)
    return {
        "softmax": lambda: softmax.forward(z, z[:, :4]),
        "softmax backward": lambda: softmax.backward(z, z, z[:1]),
        "stats": lambda: cross_entropy.forward(z, target, None, of_rows, stats[:2], invalid, **options),
        "loss": lambda: cross_entropy.forward(z, target, None, of_rows[:1], stats, invalid, **options),
        "target": lambda: cross_entropy.forward(z, target[:1], None, of_rows, stats, invalid, **options),
        "class weights": lambda: cross_entropy.forward(z, target, short, of_rows, stats, invalid, **options),
        "dz": lambda: cross_entropy.forward_backward(z, target, None, of_rows, z[:, 1:], invalid, **options),
        "upstream": lambda: cross_entropy.backward(z, target, None, stats, of_rows[:1], None, z, **options),
        "reduce": lambda: cross_entropy.reduce(of_rows, target[:1], None, one, one, ignore_index=0),
        "mean": lambda: batch_norm.statistics(z, mean[:1], of_channels, of_channels, None, None, **moments),
        "rstd": lambda: batch_norm.statistics(z, mean, of_channels, short, None, None, **moments),
        "running": lambda: batch_norm.forward(z, None, None, z, mean, of_channels, of_channels, short, None, **moments),
        "gamma": lambda: batch_norm.normalize(z, mean, of_channels, short, None, z),
        "y": lambda: batch_norm.normalize(z, mean, of_channels, None, None, z[:1]),
        "dgamma": lambda: batch_norm.backward(z, z, mean, of_channels, None, z, short, of_channels),
        "dy": lambda: batch_norm.backward(z[:1], z, mean, of_channels, None, z, of_channels, of_channels),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_a_wrong_shape_stops_a_launcher_and_not_the_process(name):
    with pytest.raises(AssertionError):
        wrong_calls()[name]()
