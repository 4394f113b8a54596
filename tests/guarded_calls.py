"""Every launcher of the CPU kernels on arrays between two pages that may not be touched: what `test_guard_pages.py` runs.

`python guarded_calls.py DTYPE NOTE [--once]` runs the operations in a fork, and prints those that failed, one a line, with the
last case that began. A stray access kills the fork, and another one runs what was left. NOTE is a file in which each case is
named before it begins. `--once`: without `OPTIONS`, so that every launcher is called, but not with all options. With
NUMBA_NRT_STATS=1 the kernels have given back all memory and references at the end of each operation.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba.core.runtime import rtsys

from hw3gpu.kernels.cpu import (
    batch_norm,
    batch_norm_small,
    cross_entropy,
    cross_entropy_small,
    distillation,
    eigh,
    moments,
    softmax,
    token_log_probs,
)
from hw3gpu.kernels.cpu._numba import threads

# Every number of lanes of a partial vector, of one vector and of two; a chunk of 512 and a bit; a few long ones.
LENGTHS = [*range(1, 71), 127, 128, 129, 255, 256, 257, 511, 513, 1000, 1001, 1030, 4097]
SHORT = [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 37, 63, 64, 65, 129, 257]
LARGE = 4 << 20  # bytes of results that are written around the caches
AROUND = 8 << 20  # of batch normalisation's
# bfloat16 and float16 are bits to the kernels
IN_MEMORY = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "float16": np.int16}


# ---------------------------------------------------------------------------------------------- memory
class Pages:
    """Readable pages between two that are not; kept for the life of the process."""

    def __init__(self, nbytes: int) -> None:
        page = mmap.PAGESIZE
        self.size = -(-nbytes // page) * page
        self.memory = mmap.mmap(-1, self.size + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for forbidden in (start, start + page + self.size):
            if libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def array(self, shape: tuple[int, ...], dtype: Any, at_end: bool) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return np.ndarray(shape, dtype, self.memory, mmap.PAGESIZE + (self.size - nbytes if at_end else 0))


class Guard:
    """Arrays whose first or last element stands beside a forbidden page, in the operands' dtype or in that of their sums."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.of = dtype, np.dtype(IN_MEMORY[dtype])
        self.acc = np.dtype(np.float64 if dtype == "float64" else np.float32)
        self.rng = np.random.default_rng(0)
        self.normal = self.rng.standard_normal(1 << 13)
        self.pages: list[Pages] = []
        self.at_end, self.used = True, 0

    def begin(self, at_end: bool) -> None:
        """Gives the pages of the call before to the next one."""
        self.at_end, self.used = at_end, 0

    def out(self, *shape: int, dtype: Any = None) -> np.ndarray:
        dtype = np.dtype(dtype or self.of)
        nbytes = math.prod(shape) * dtype.itemsize
        if self.used == len(self.pages):
            self.pages.append(Pages(nbytes))
        elif self.pages[self.used].size < nbytes:
            self.pages[self.used] = Pages(nbytes)
        self.used += 1
        return self.pages[self.used - 1].array(shape, dtype, self.at_end)

    def copy(self, values: Any) -> np.ndarray:
        values = np.asarray(values)
        array = self.out(*values.shape, dtype=values.dtype)
        array[...] = values
        return array

    def numbers(self, *shape: int, positive: bool = False, dtype: Any = None) -> np.ndarray:
        """Ordinary numbers, halves as bits; above 0 if `positive`, and then as small as probabilities."""
        array = self.out(*shape, dtype=dtype)
        values = np.resize(self.normal, shape)
        if positive:
            values = np.abs(values) / max(shape[1] if len(shape) > 1 else 1, 1)
        if array.dtype == np.uint16:
            values = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        elif array.dtype == np.int16:
            values = values.astype(np.float16).view(np.int16)
        array[...] = values
        return array

    def vector(self, size: int) -> np.ndarray:
        return self.numbers(size, positive=True, dtype=self.acc)

    def sums(self, *shape: int) -> np.ndarray:
        return self.out(*shape, dtype=self.acc)

    def classes(self, N: int, V: int, S: int) -> np.ndarray:
        """A row of no class to ignore, where there are three."""
        target = self.copy(np.arange(N * S).reshape(N, S) * 7 % V)
        if N * S > 2:
            target.flat[1] = -100
        return target


# ---------------------------------------------------------------------------------------------- rows
def turned(x: np.ndarray) -> np.ndarray:
    """(N, S, V) as (N, V, S): classes adjacent, which is what channels-last is."""
    return x.transpose(0, 2, 1)


def row_shapes(g: Guard) -> Iterator[tuple[int, int, int]]:
    """Rows end to end; classes in the middle; results that go around the caches."""
    yield from ((2, V, 1) for V in LENGTHS)
    yield from ((2, V, 3) for V in SHORT)
    yield from ((LARGE // (V * g.of.itemsize) + 1, V, 1) for V in (7, 1001, 4097))


def softmaxes(g: Guard, N: int, V: int, S: int) -> None:
    z, y, dy, dz = g.numbers(N, V, S), g.out(N, V, S), g.numbers(N, V, S), g.out(N, V, S)
    softmax.forward(z, y)
    softmax.backward(dy, y, dz)


def turned_shapes(g: Guard) -> Iterator[tuple[int, int, int]]:
    yield from ((2, V, 3) for V in LENGTHS if V > 1)


def softmaxes_turned(g: Guard, N: int, V: int, S: int) -> None:
    z, y, dy, dz = (turned(a) for a in (g.numbers(N, S, V), g.out(N, S, V), g.numbers(N, S, V), g.out(N, S, V)))
    softmax.forward(z, y)
    softmax.backward(dy, y, dz)


def cross_entropies(weighted: bool, soft: bool, *, stats_of_row: int = 3, **options: Any) -> Callable[..., None]:
    """All launchers of `cross_entropy`, of classes or of probabilities, with or without class weights, with these options."""

    def call(g: Guard, N: int, V: int, S: int) -> None:
        settings = {"ignore_index": -100, "label_smoothing": 0.0, **options}
        z, dz = g.numbers(N, V, S), g.out(N, V, S)
        target = g.numbers(N, V, S, positive=True) if soft else g.classes(N, V, S)
        weight = g.vector(V) if weighted else None
        loss, stats, invalid = g.sums(N, S), g.sums(stats_of_row, N, S), g.copy(np.full(1, N * S))
        total, denominator = g.sums(1), g.sums(1)
        cross_entropy.forward(z, target, weight, loss, stats, invalid, **settings)
        cross_entropy.reduce(loss, target, weight, total, denominator, ignore_index=-100)
        cross_entropy.count(target, weight, denominator, ignore_index=-100)
        upstream = g.copy(np.full((N, S), 0.5, g.acc))
        cross_entropy.backward(z, target, weight, stats, upstream, denominator, dz, **settings)
        upstream[0] = 1.0
        cross_entropy.backward(z, target, weight, stats, upstream, None, dz, unless_one=True, **settings)
        cross_entropy.forward_backward(z, target, weight, loss, dz, invalid, **settings)
        if stats_of_row > 3:
            cross_entropy.forward_backward(z, target, weight, loss, dz, invalid, stats=stats, **settings)

    return call


def tokens(g: Guard, N: int, V: int, S: int) -> None:
    z, dz, target, invalid = g.numbers(N, V, S), g.out(N, V, S), g.classes(N, V, S), g.copy(np.full(1, N * S))
    log_prob, entropy, lse, stats = g.sums(N, S), g.sums(N, S), g.sums(N, S), g.sums(4, N, S)
    settings = {"ignore_index": -100, "temperature": 0.7}
    token_log_probs.forward(z, target, log_prob, entropy, lse, stats, invalid, **settings)
    token_log_probs.backward(z, target, stats, log_prob, entropy, lse, dz, **settings)


def divergences(kind: str) -> Callable[..., None]:
    def call(g: Guard, N: int, V: int, S: int) -> None:
        student, teacher, dstudent, dteacher = g.numbers(N, V, S), g.numbers(N, V, S), g.out(N, V, S), g.out(N, V, S)
        loss, stats, upstream = g.sums(N, S), g.sums(8, N, S), g.copy(np.full((N, S), 0.5, g.acc))
        settings = {"kind": kind, "beta": 0.3, "temperature": 0.7}
        distillation.forward(student, teacher, None, loss, stats, **settings)
        distillation.backward(student, teacher, None, stats, upstream, dstudent, dteacher, **settings)

    return call


def steps(soft: bool) -> Callable[..., None]:
    def call(g: Guard, N: int, V: int, S: int) -> None:
        z, dz, result, invalid = g.numbers(N, V, S), g.out(N, V, S), g.sums(1), g.copy(np.full(1, N * S))
        target = g.numbers(N, V, S, positive=True) if soft else g.classes(N, V, S)
        weight, settings = g.vector(V), {"upstream": 1.0, "mean": True, "ignore_index": -100}
        cross_entropy.forward_backward_reduced(z, target, weight, result, dz, invalid, label_smoothing=0.1, **settings)

    return call


def steps_at_addresses(g: Guard, N: int, V: int, S: int) -> None:
    z, dz, result, target = g.numbers(N, V, S), g.out(N, V, S), g.sums(1), g.classes(N, V, S)
    given, results, weight = z.ctypes.data, (dz.ctypes.data, result.ctypes.data), g.vector(V).ctypes.data
    for smoothing, of_classes in ((0.0, 0), (0.1, 0), (0.0, weight)):
        settings = {"mean": True, "zero_if_ignored": True, "ignore_index": -100, "label_smoothing": smoothing}
        cross_entropy_small.forward_backward(given, target.ctypes.data, of_classes, *results, N, V, S, upstream=0.5, **settings)


# ---------------------------------------------------------------------------------------------- batch normalisation
def plane_shapes(g: Guard) -> Iterator[tuple[int, int, int]]:
    """Planes of every length, channels whole and split; vectors of every number of channels (S = 1)."""
    yield from ((2, 3, S) for S in LENGTHS)
    yield from ((5, C, 1) for C in LENGTHS)
    yield from ((3, C, 9) for C in SHORT)
    yield from ((2, 2, -(-AROUND // (4 * g.of.itemsize)) + k) for k in (1, 5))


def line_shapes(g: Guard) -> Iterator[tuple[int, int, int]]:
    """Channels-last, lines of one row and of several."""
    yield from ((2, C, 5) for C in LENGTHS if C > 1)
    yield from ((3, C, S) for C in (2, 3, 5, 70, 600) for S in (2, 31, 33))
    yield from ((2, C, AROUND // (2 * C * g.of.itemsize) + 1) for C in (3, 70))


def batch_norms(last: bool, fused: bool, masked: bool = False) -> Callable[..., None]:
    """All launchers of `batch_norm`, channels-last or not, plain or with a residual and an activation, and with a mask."""

    def call(g: Guard, N: int, C: int, S: int) -> None:
        def values(make: Callable[..., np.ndarray]) -> np.ndarray:
            return turned(make(N, S, C)) if last else make(N, C, S)

        x, dy, y, dx = values(g.numbers), values(g.numbers), values(g.out), values(g.out)
        gamma, beta, mean, var, rstd = g.vector(C), g.vector(C), g.sums(2, C), g.sums(C), g.sums(C)
        running, dgamma, dbeta = (g.vector(C), g.vector(C)), g.sums(C), g.sums(C)
        forward, backward = {}, {}
        if masked:  # half of the positions count, or the first half of them
            counts = np.arange(N * S) % 2 == 0 if S % 2 else np.arange(N * S) < N * S // 2
            forward = backward = {"valid": g.copy(np.packbits(counts, bitorder="little"))}
        if fused:
            beside = values(g.numbers)
            forward |= {"residual": beside, "activation": "silu"}
            backward = {**forward, "beta": beta, "dresidual": values(g.out)}
        # the bytes that the kernels read for the bits, beside a forbidden page too
        batch_norm._unpacked = lambda bits, size: g.copy(np.unpackbits(bits, count=size, bitorder="little"))
        batch_norm.forward(x, gamma, beta, y, mean, var, rstd, *running, eps=1e-5, momentum=0.1, **forward)
        batch_norm.backward(dy, x, mean, rstd, gamma, dx, dgamma, dbeta, **backward)
        batch_norm.statistics(x, mean, var, rstd, *running, eps=1e-5, momentum=0.1, valid=forward.get("valid"))
        batch_norm.normalize(x, mean, rstd, gamma, beta, y, **forward)
        batch_norm.backward_reduce(
            dy, x, mean, rstd, dgamma, dbeta, **({**forward, "gamma": gamma, "beta": beta} if forward else {})
        )
        batch_norm.backward_apply(dy, x, mean, rstd, gamma, dgamma, dbeta, N * S, dx, **backward)
        batch_norm.inference_backward(dy, x, mean, rstd, gamma, dx, dgamma, dbeta, **backward)
        if fused and not last and not masked:  # each operand without the others
            batch_norm.normalize(x, mean, rstd, gamma, beta, y, residual=forward["residual"])
            batch_norm.normalize(x, mean, rstd, gamma, beta, y, activation="relu")
            relu = {"activation": "relu", "residual": values(g.numbers)}
            batch_norm.backward(dy, x, mean, rstd, gamma, dx, dgamma, dbeta, **relu)
            batch_norm.inference_backward(dy, x, mean, rstd, gamma, dx, dgamma, dbeta, **relu, dresidual=values(g.out))

    return call


def trained_at_addresses(g: Guard) -> Iterator[tuple[int, int, int]]:
    yield from ((N, C, 1) for N in (2, 35) for C in (1, 3, 31, 33, 127, 129, 515))
    yield from ((2, 2, S) for S in (257, 289, 512, 515, 1030))
    yield from ((N, 3, S) for N in (1, 5) for S in range(2, batch_norm_small.SMALL_PLANE + 1, 5))
    yield from ((2, C, 49) for C in range(1, 30))


def known_statistics(g: Guard) -> Iterator[tuple[int, int, int]]:
    yield from ((5, C, 1) for C in (*range(1, 103), 1023, 1025, 2050))
    yield from ((N, 3, S) for N in (1, 5) for S in (2, 15, 16, 17, 33, 255, 257, 300))


def known_statistics_at_addresses(g: Guard, N: int, C: int, S: int) -> None:
    x, y, stats, vectors = g.numbers(N, C, S), g.out(N, C, S), g.sums(3, C), [g.vector(C) for _ in range(4)]
    gamma, beta, mean, var = (v.ctypes.data for v in vectors)
    batch_norm_small.normalize(x.ctypes.data, gamma, beta, y.ctypes.data, stats.ctypes.data, mean, var, N, C, S, eps=1e-5)
    batch_norm_small.normalize(x.ctypes.data, 0, 0, y.ctypes.data, 0, mean, var, N, C, S, eps=1e-5)
    dy, dx, dgamma, dbeta = g.numbers(N, C, S), g.out(N, C, S), g.sums(C), g.sums(C)
    for given in (gamma, 0):
        operands = (a if isinstance(a, int) else a.ctypes.data for a in (dy, x, stats, given, dx, dgamma, dbeta))
        batch_norm_small.inference_backward(*operands, N, C, S)


def batch_norms_at_addresses(g: Guard, N: int, C: int, S: int) -> None:
    x, dy, y, dx, stats = g.numbers(N, C, S), g.numbers(N, C, S), g.out(N, C, S), g.out(N, C, S), g.sums(4, C)
    gamma, beta, mean, var, dgamma, dbeta = g.vector(C), g.vector(C), g.vector(C), g.vector(C), g.sums(C), g.sums(C)
    at = {name: a.ctypes.data for name, a in locals().items() if isinstance(a, np.ndarray)}
    for given in (1, 0):
        vectors = [given * at[name] for name in ("mean", "var")]
        operands = at["x"], given * at["gamma"], given * at["beta"], at["y"], at["stats"], *vectors
        batch_norm_small.forward(*operands, N, C, S, eps=1e-5, momentum=0.1)
        operands = at["dy"], at["x"], at["stats"], given * at["gamma"], at["dx"], at["dgamma"], at["dbeta"]
        batch_norm_small.backward(*operands, N, C, S)


def fused_at_addresses(g: Guard, N: int, C: int, S: int) -> None:
    """ReLU's loops take the result; the others' compute it again, with a residual."""
    x, dy, beside, y, dx, dresidual = (make(N, C, S) for make in (*[g.numbers] * 3, *[g.out] * 3))
    stats, gamma, beta, mean, var, dgamma, dbeta = g.sums(4, C), *(g.vector(C) for _ in range(4)), g.sums(C), g.sums(C)
    at = {name: a.ctypes.data for name, a in locals().items() if isinstance(a, np.ndarray)}
    forward = [at[name] for name in ("x", "gamma", "beta", "y", "stats", "mean", "var")]
    backward = [at[name] for name in ("dy", "x", "stats", "gamma", "dx", "dgamma", "dbeta")]
    for activation in ("relu", "silu"):
        added = {"activation": activation, "residual": at["beside"]}
        batch_norm_small.forward(*forward, N, C, S, eps=1e-5, momentum=0.1, **added)
        batch_norm_small.normalize(*forward, N, C, S, eps=1e-5, **added)
        of = {"activation": activation, "beta": at["beta"], "beside": at["beside"], "dresidual": at["dresidual"]}
        batch_norm_small.backward(*backward, N, C, S, **of)


# ---------------------------------------------------------------------------------------------- points and matrices
def point_shapes(g: Guard) -> Iterator[tuple[int, int, int]]:
    yield from ((2, n, m) for m in (1, 2, 3, 4, 5, 17, 70) for n in (1, 2, 127, 129, 1100))
    yield from ((1, n, m) for m in range(1, 71) for n in (3,))
    yield (1, 40, 600)


def points(g: Guard, B: int, n: int, m: int) -> None:
    x, mean, covariance = g.numbers(B, n, m), g.out(B, m), g.out(B, m, m)
    first, second = ([g.out(*s, dtype=np.float64) for s in ((B, m), (2, B, m), (2, B, m, m), (B, m))] for _ in range(2))
    moments.update(x, *first, count=0)
    moments.update(x, *first, count=n)
    moments.update(x, *second, count=0)
    moments.merge(*second, *first, more=n, count=2 * n)
    moments.finish(*first, mean, covariance, count=3 * n, divisor=3 * n)


def matrix_shapes(g: Guard) -> Iterator[tuple[int, int]]:
    yield from ((2, m) for m in (*range(1, 18), 31, 32, 33, 63, 64, 65))
    yield from ((1, m) for m in (96, 97, 129))


def matrices(g: Guard, B: int, m: int) -> None:
    """`smallest` makes its outputs: those are guarded too."""

    def outputs(a: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
        return g.sums(B, k), g.out(B, k, m, dtype=a.dtype), g.out(B, dtype=np.int32)

    a, k = g.numbers(B, m, m), max(1, m // 3)
    eigh._outputs = outputs
    eigh.smallest(g.copy(a + a.swapaxes(-1, -2)), k)
    complex_dtype = np.complex128 if g.dtype == "float64" else np.complex64
    eigh.smallest(g.copy(a.astype(complex_dtype)), k)


# ---------------------------------------------------------------------------------------------- all of them
# name: (shapes, call)
OF_EVERY_DTYPE = {
    "softmax": (row_shapes, softmaxes),
    "softmax, classes adjacent": (turned_shapes, softmaxes_turned),
    "log-probabilities": (row_shapes, tokens),
    "divergence": (row_shapes, divergences("forward")),
    "divergence from a mixture": (row_shapes, divergences("jensen_shannon")),
    "classes": (row_shapes, cross_entropies(False, False)),
    "classes, weights": (row_shapes, cross_entropies(True, False)),
    "classes, smoothing": (row_shapes, cross_entropies(True, False, label_smoothing=0.1)),
    "classes, all options": (
        row_shapes,
        cross_entropies(True, False, stats_of_row=6, label_smoothing=0.1, z_loss=1e-3, softcap=20.0, logit_scale=0.7),
    ),
    "probabilities": (row_shapes, cross_entropies(False, True)),
    "probabilities, weights": (row_shapes, cross_entropies(True, True, label_smoothing=0.1)),
    "probabilities, all options": (
        row_shapes,
        cross_entropies(True, True, stats_of_row=6, label_smoothing=0.1, z_loss=1e-3, softcap=20.0, logit_scale=0.7),
    ),
    "a step, classes": (row_shapes, steps(False)),
    "a step, probabilities": (row_shapes, steps(True)),
    "batch norm": (plane_shapes, batch_norms(False, False)),
    "batch norm, fused": (plane_shapes, batch_norms(False, True)),
    "batch norm, channels-last": (line_shapes, batch_norms(True, False)),
    "batch norm, channels-last, fused": (line_shapes, batch_norms(True, True)),
    "batch norm, mask": (plane_shapes, batch_norms(False, False, True)),
    "batch norm, channels-last, mask": (line_shapes, batch_norms(True, False, True)),
}
OF_FLOAT32 = {
    "a step at addresses": (row_shapes, steps_at_addresses),
    "batch norm at addresses": (trained_at_addresses, batch_norms_at_addresses),
    "fused batch norm at addresses": (trained_at_addresses, fused_at_addresses),
    "evaluation at addresses": (known_statistics, known_statistics_at_addresses),
}
# Of these, which differ from others in options and weights alone, float32 has all: a dtype changes how elements are loaded.
OPTIONS = {
    "divergence", "classes, weights", "classes, smoothing", "probabilities, weights", "a step, probabilities",
    "batch norm, mask", "batch norm, channels-last, fused",
}  # fmt: skip
OF_SINGLE_AND_DOUBLE = {"points": (point_shapes, points), "matrices": (matrix_shapes, matrices)}


def operations(dtype: str) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    return (
        OF_EVERY_DTYPE
        | (OF_FLOAT32 if dtype == "float32" else {})
        | (OF_SINGLE_AND_DOUBLE if dtype in ("float32", "float64") else {})
    )


def run(name: str, dtype: str, note: int) -> None:
    """Every shape of an operation, arrays flush with the end of their pages, then with the start."""
    shapes, call = operations(dtype)[name]
    guard = Guard(dtype)
    for at_end in (True, False):
        for shape in shapes(guard):
            case = f"{name}, {dtype}, shape {shape}, forbidden page {'behind' if at_end else 'in front'}"
            os.pwrite(note, case.ljust(200).encode(), 0)
            guard.begin(at_end)
            call(guard, *shape)
    held = rtsys.get_allocation_stats()
    if held.mi_alloc != held.mi_free or held.alloc != held.free:
        raise AssertionError(f"{name}, {dtype}: references that were counted and not given back: {held}")


def main(dtype: str, note_path: str, once: bool) -> None:
    threads.set_num_threads(1)
    np.seterr(all="ignore")
    note = os.open(note_path, os.O_RDWR | os.O_CREAT)
    remaining = [name for name in operations(dtype) if not (once and name in OPTIONS)]
    while remaining:  # a fork runs them all: it has helpers compiled for one that others use
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for name in remaining:
                    os.write(writer, b".")
                    run(name, dtype, note)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        begun = max(len(os.read(reader, len(remaining))), 1)  # it may have died before it began
        os.close(reader)
        if code:
            print(f"{os.pread(note, 200, 0).decode().strip()}: status {code}", flush=True)
        remaining = remaining[begun:]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:] == ["--once"])
